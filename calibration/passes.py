"""Runs a trajectory forward, and back from random probes at its ends, one piece of the model in memory at a time.

What passes between the units of work (units.py) lies on disk until no later unit asks for it: in memory are one piece, what it
gathers, and one prompt's activations. A killed run goes on with the unit that it was in.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from calibration.errors import CalibrationError
from calibration.layers import Observer, Sums, signs
from calibration.statistics import INDEX, Statistics, Subject, load_statistics, save_index, save_piece
from calibration.store import CACHE, Store, locked
from calibration.trajectory import Piece, Read, Trajectory
from calibration.units import Unit, file_bytes, schedule

VERSION = 4
"""Of what is computed here: raise it with every change that gives other statistics, or does the work in another order."""

WORK, DONE = "work", "done"


class Progress(Protocol):
    """Hears how far the work is: a stage of `total` steps begins; a step of it begins."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, detail: str) -> None: ...


def gather(trajectory: Trajectory, subject: Subject, cache: Path, device: torch.device, progress: Progress) -> Statistics:
    """The statistics of every piece of a trajectory, from the cache or computed, going on where an earlier run was stopped.

    Raises `CalibrationError` where the disk cannot take them, and where a tensor becomes NaN or infinite.
    """
    folder = cache / _key(trajectory, subject)
    with locked(folder):
        if (folder / INDEX).is_file():
            return load_statistics(folder)
        _Run(trajectory, folder, device).go(progress)
        pieces = {call.piece.name: call.piece for call in trajectory.calls}
        files = {_file(piece): piece.component for piece in pieces.values() if piece.component is not None}
        statistics = save_index(folder, subject, files)
        shutil.rmtree(folder / WORK)
    return statistics


def _key(trajectory: Trajectory, subject: Subject) -> str:
    """The folder's name: a hash of all that the statistics depend on."""
    whole = hashlib.sha256(json.dumps([VERSION, asdict(subject)]).encode())
    for call in trajectory.calls:
        whole.update(repr((call.piece.name, call.piece.inputs, call.piece.outputs, call.reads, call.writes)).encode())
    for name, array in trajectory.given.items():
        whole.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:32]


def _file(piece: Piece) -> str:
    return f"{piece.name}.safetensors"


class _Run:
    """The units of a trajectory, done in order inside a folder."""

    def __init__(self, trajectory: Trajectory, folder: Path, device: torch.device) -> None:
        self.trajectory = trajectory
        self.folder = folder
        self.device = device
        self.store = Store(folder / WORK, trajectory.prompts)
        self.schedule = schedule(trajectory)
        self._loaded: tuple[str, nn.Module] | None = None
        self._variances: dict[str, float] = {}

    def go(self, progress: Progress) -> None:
        """Whatever units are left."""
        self.store.folder.mkdir(exist_ok=True)
        path = self.store.path(DONE)
        done = int(path.read_text()) if path.is_file() else 0
        self._check_space(done)
        units = self.schedule.units
        progress.stage("calibration", len(units) - done)
        for number in range(done, len(units)):
            unit = units[number]
            progress.step(f"{unit.call.stage}: {unit.call.piece.name}{' back' if unit.backward else ''}")
            if unit.backward:
                self._backward(unit)
            else:
                self._forward(unit)
            beside = self.store.path(f"{DONE}.part")
            beside.write_text(str(number + 1))
            beside.rename(path)
            self.store.remove(self.schedule.needless_after(number))

    def _check_space(self, done: int) -> None:
        needed = self.schedule.growth(done, file_bytes(self.trajectory, self.schedule))
        free = shutil.disk_usage(self.store.folder).free
        if needed > free:
            raise CalibrationError(
                f"calibration keeps {needed / 1e9:.1f} GB of activations in {self.folder}, where {free / 1e9:.1f} GB are free; "
                f"free some room, give fewer prompts or choose another folder with {CACHE}"
            )

    def _forward(self, unit: Unit) -> None:
        call = unit.call
        module, arrays = self._module(call.piece), [self._array(read) for read in call.reads]
        shapes = [(name, self.trajectory.specs[name].shape) for name in call.writes]
        with self.store.writing(shapes) as writers, torch.no_grad():
            for prompt in range(self.trajectory.prompts):
                outputs = module(*(self._tensor(array[prompt]) for array in arrays))
                for writer, output, name in zip(writers, outputs, call.writes, strict=True):
                    self._check_finite(output, name, prompt)
                    writer.append(output.cpu().numpy())

    def _backward(self, unit: Unit) -> None:
        call = unit.call
        module, arrays = self._module(call.piece), [self._array(read) for read in call.reads]
        sums = Sums.load(self.store.path(unit.sums_before), self.device) if unit.sums_before else Sums()
        observer = Observer(module, sums, self.trajectory.prompts)
        shapes = [(gradient.file, gradient.shape) for gradient in unit.gradients if gradient is not None]
        with self.store.writing(shapes) as writers:
            for prompt in range(self.trajectory.prompts):
                inputs = [self._tensor(array[prompt]) for array in arrays]
                learning = [x for x, gradient in zip(inputs, unit.gradients, strict=True) if gradient is not None]
                for tensor in learning:
                    tensor.requires_grad_()
                with observer.watching(prompt), torch.enable_grad():
                    outputs = module(*inputs)
                    self._run_back(outputs, [self._returned(name, prompt) for name in call.writes])
                for writer, tensor in zip(writers, learning, strict=True):
                    gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                    writer.append(gradient.cpu().numpy())
        if unit.sums_after is not None:
            sums.save(self.store.path(unit.sums_after))
        elif call.piece.component is not None:
            save_piece(self.folder / _file(call.piece), sums)

    @staticmethod
    def _run_back(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if output.requires_grad]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    def _returned(self, name: str, prompt: int) -> Tensor:
        """The gradient of a tensor: its probe, or the sum of what came back from its readers."""
        shape = self.trajectory.specs[name].shape
        if name in self.trajectory.objectives:
            return self._probe(name, shape, prompt)
        whole = np.zeros(shape, np.float32)
        for gradient in self.schedule.returned[name]:
            whole[gradient.part] += self.store.read(gradient.file)[prompt]
        return self._tensor(whole)

    def _probe(self, name: str, shape: tuple[int, ...], prompt: int) -> Tensor:
        """Random signs over sqrt(values * their variance), so that squares come out relative to the variance, a value."""
        if name not in self._variances:
            self._variances[name] = self._variance(name)
        size = math.prod(shape)
        return signs(name, prompt, size, 1).reshape(shape).to(self.device) / (size * self._variances[name]) ** 0.5

    def _variance(self, name: str) -> float:
        values = self.store.read(name)
        mean = np.mean([value.mean(dtype=np.float64) for value in values])
        variance = float(np.mean([np.square(value - mean).mean(dtype=np.float64) for value in values]))
        if variance == 0:
            raise CalibrationError(f"{name} has the same value everywhere, for every prompt: the checkpoint draws nothing")
        return variance

    def _array(self, read: Read) -> np.ndarray:
        """[prompts, *shape] of what a call reads."""
        array = self.store.read(read.tensor) if read.tensor in self.trajectory.specs else self.trajectory.given[read.tensor]
        return array[(slice(None), *read.part)]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def _check_finite(self, output: Tensor, name: str, prompt: int) -> None:
        if not torch.isfinite(output).all():
            raise CalibrationError(f"{name} becomes NaN or infinite in float32 for prompt {prompt}: the checkpoint is damaged")

    def _module(self, piece: Piece) -> nn.Module:
        if self._loaded is None or self._loaded[0] != piece.name:
            self._loaded = None  # released before the next one is loaded
            self._loaded = piece.name, piece.load().to(self.device)
        return self._loaded[1]
