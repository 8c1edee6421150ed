"""The order of work on a trajectory: units that can each be lost and done again, and which files each reads and writes.

First every call forward; what passes between stages is kept. Then the stages from the last to the first: a stage's calls
forward again for what passes inside it (Chen et al. 2016), and each of them backward, in reverse. Where few prompts make all
that passes small enough, everything is kept, and nothing is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from calibration.trajectory import Call, Read, Trajectory

KEPT = 4 << 30
"""Bytes on disk up to which everything that a trajectory computes is kept for the way back."""


@dataclass(frozen=True)
class Gradient:
    """A file: the gradient of a tensor, or of a part of it, that comes back from one call."""

    file: str
    part: tuple[slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """One call for all prompts. Tensors' files are named after them.

    Backward, `gradients` has for each of the call's reads the gradient to write, or None. The piece's sums are read from
    `sums_before` (None: nothing is gathered yet) and written to `sums_after` (None: they are complete).
    """

    call: Call
    reads: frozenset[str]
    writes: frozenset[str]
    backward: bool = False
    gradients: tuple[Gradient | None, ...] = ()
    sums_before: str | None = None
    sums_after: str | None = None

    @property
    def files(self) -> frozenset[str]:
        return self.reads | self.writes


@dataclass(frozen=True)
class Schedule:
    """The units in order. `returned` has for each tensor the gradients that come back from its readers."""

    units: tuple[Unit, ...]
    returned: Mapping[str, Sequence[Gradient]]

    def needless_after(self, number: int) -> list[str]:
        """Files of a unit that no later one reads before it is written anew."""

        def is_needed(file: str) -> bool:
            following = next((unit for unit in self.units[number + 1 :] if file in unit.files), None)
            return following is not None and file in following.reads

        return sorted(file for file in self.units[number].files if not is_needed(file))

    def growth(self, start: int, sizes: Mapping[str, int]) -> int:
        """The most bytes that the files of known size take from unit `start` on, beyond those that lie there before it."""
        present: set[str] = set()
        most = at_start = 0
        for number, unit in enumerate(self.units):
            if number == start:
                at_start = most = sum(sizes.get(file, 0) for file in present)
            present |= unit.writes
            most = max(most, sum(sizes.get(file, 0) for file in present))
            present -= set(self.needless_after(number))
        return most - at_start


def schedule(trajectory: Trajectory) -> Schedule:
    """The units of a trajectory."""
    calls = [(call, _gradients(trajectory, number, call)) for number, call in enumerate(trajectory.calls)]
    returned: dict[str, list[Gradient]] = {name: [] for name in trajectory.specs}
    for call, gradients in calls:
        for read, gradient in zip(call.reads, gradients, strict=True):
            if gradient is not None:
                returned[read.tensor].append(gradient)
    units = [_forward(trajectory, call) for call in trajectory.calls]
    keeps = sum(_bytes(trajectory, spec.shape) for spec in trajectory.specs.values()) <= KEPT
    sums: dict[str, str] = {}
    turns = [call.piece.name for call in trajectory.calls]
    for _, group in reversed([(stage, list(group)) for stage, group in groupby(calls, lambda item: item[0].stage)]):
        units += [] if keeps else [_forward(trajectory, call) for call, _ in group[:-1]]
        for call, gradients in reversed(group):
            piece = call.piece.name
            turns.remove(piece)
            after = f"{piece}.sums{turns.count(piece)}" if piece in turns else None
            units.append(_backward(trajectory, call, gradients, returned, sums.get(piece), after))
            if after is not None:
                sums[piece] = after
    return Schedule(tuple(units), returned)


def file_bytes(trajectory: Trajectory, plan: Schedule) -> dict[str, int]:
    """What each tensor and gradient takes; what a piece gathers is not known before it is loaded."""
    tensors = {name: spec.shape for name, spec in trajectory.specs.items()}
    gradients = {gradient.file: gradient.shape for found in plan.returned.values() for gradient in found}
    return {name: _bytes(trajectory, shape) for name, shape in (tensors | gradients).items()}


def _bytes(trajectory: Trajectory, shape: tuple[int, ...]) -> int:
    """Of a float32 tensor of every prompt."""
    return 4 * trajectory.prompts * math.prod(shape)


def _gradients(trajectory: Trajectory, number: int, call: Call) -> tuple[Gradient | None, ...]:
    return tuple(_gradient(trajectory, number, read) for read in call.reads)


def _gradient(trajectory: Trajectory, number: int, read: Read) -> Gradient | None:
    """None for what is given, and for an objective, which has a probe of its own."""
    if read.tensor not in trajectory.specs or read.tensor in trajectory.objectives:
        return None
    shape = np.broadcast_to(np.empty(()), trajectory.specs[read.tensor].shape)[read.part].shape
    return Gradient(f"{read.tensor}.gradient{number}", read.part, shape)


def _forward(trajectory: Trajectory, call: Call) -> Unit:
    return Unit(call, _computed(trajectory, call), frozenset(call.writes))


def _backward(
    trajectory: Trajectory,
    call: Call,
    gradients: tuple[Gradient | None, ...],
    returned: Mapping[str, Sequence[Gradient]],
    before: str | None,
    after: str | None,
) -> Unit:
    ends = set(call.writes) & set(trajectory.objectives)
    back = {gradient.file for name in call.writes for gradient in returned[name]}
    reads = _computed(trajectory, call) | back | ends | ({before} if before else set())
    writes = {gradient.file for gradient in gradients if gradient is not None} | ({after} if after else set())
    return Unit(call, frozenset(reads), frozenset(writes), True, gradients, before, after)


def _computed(trajectory: Trajectory, call: Call) -> frozenset[str]:
    """The tensors that a call reads and another wrote."""
    return frozenset(read.tensor for read in call.reads) & trajectory.specs.keys()
