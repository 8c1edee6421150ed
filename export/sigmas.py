"""The noise levels of the few steps: explicit, checked, and where they come from said.

In order: those given; those that the checkpoint carries in its `flash.json`, `{"sigmas": {"4": [five values, the last 0]}}`;
those of the checkpoint's own scheduler at evenly spaced times, which is a guess for a distilled model and is noted as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.checkpoint import Checkpoint
from export.errors import UserError
from runtimes.bundle import check_sigmas


@dataclass(frozen=True)
class Sigmas:
    """steps + 1 falling values from at most 1 to 0, and a note for the user where they were not given by anyone."""

    values: tuple[float, ...]
    note: str | None = None

    @property
    def steps(self) -> int:
        return len(self.values) - 1


def choose_sigmas(checkpoint: Checkpoint, steps: int | None = None, given: Sequence[float] | None = None) -> Sigmas:
    """The sigmas of an export. `steps` defaults to those given, then to 4. Raises `UserError`."""
    if given is not None:
        values = _checked(given, "--sigmas")
        if steps is not None and steps != len(values) - 1:
            raise UserError(f"--steps {steps} takes {steps + 1} sigmas, the last of them 0; --sigmas has {len(values)}")
        return Sigmas(values)
    steps = 4 if steps is None else steps
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1 step is needed")
    carried = _carried(checkpoint)
    if carried:
        if str(steps) not in carried:
            known = ", ".join(sorted(carried, key=int))
            raise UserError(
                f"--steps {steps}: {checkpoint.name} carries sigmas for {known}; choose one of those or give --sigmas"
            )
        values = _checked(carried[str(steps)], f"{checkpoint.name}/flash.json")
        if len(values) != steps + 1:
            raise UserError(f"{checkpoint.name}/flash.json: {steps} steps take {steps + 1} sigmas; it has {len(values)}")
        return Sigmas(values)
    return _evenly_spaced(checkpoint.config("scheduler"), steps, checkpoint.name)


def _carried(checkpoint: Checkpoint) -> Mapping[str, Sequence[float]]:
    """The lists of flash.json by number of steps."""
    found = checkpoint.flash.get("sigmas", {})
    lists = isinstance(found, dict) and all(key.isdecimal() and isinstance(value, list) for key, value in found.items())
    if not lists or not all(isinstance(value, int | float) for values in found.values() for value in values):
        raise UserError(
            f'{checkpoint.name}/flash.json: sigmas must be lists of numbers by steps, such as {{"2": [1, 0.75, 0]}}'
        )
    return found


def _checked(values: Sequence[float], where: str) -> tuple[float, ...]:
    """The values as floats; `UserError` where they are no sigmas."""
    try:
        check_sigmas(values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return tuple(float(value) for value in values)


def _evenly_spaced(scheduler: Mapping[str, Any], steps: int, name: str) -> Sigmas:
    """linspace(1, 1/N, N), shifted: s' = shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23)."""
    if scheduler.get("use_dynamic_shifting"):
        raise UserError(f"{name} shifts its schedule by resolution and carries no flash.json: give --sigmas")
    shift = float(scheduler.get("shift", 1.0))
    even = [1 - i / steps for i in range(steps)]
    values = (*(shift * s / (1 + (shift - 1) * s) for s in even), 0.0)
    listed = " ".join(f"{value:.4g}" for value in values)
    return Sigmas(values, f"{name} carries no sigmas; {listed} are {steps} even steps at its scheduler's shift {shift:g}")
