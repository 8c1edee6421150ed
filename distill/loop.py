"""The training loop that every stage shares: seeded by step, resumable at any moment, with a progress bar.

A stage hands over its modules, optimizers and a function of one step. The state on disk is one safetensors file (weights
and AdamW moments; no pickle) written beside its place and renamed, so that a killed run loses at most `save_seconds`.
Every step seeds its own generator from (seed, stage, step): a resumed run takes the same steps as an undisturbed one.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class RunError(Exception):
    """A run that cannot go on; the message is the one line the user sees."""


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


def refusal(error: BaseException) -> str | None:
    """The system's words where it refused to write a file, however a library wrapped them."""
    number = error.errno if isinstance(error, OSError) else None
    words = [os.strerror(n) for n in _UNWRITABLE if n == number or os.strerror(n) in str(error)]
    return words[0] if words else None


@dataclass(frozen=True)
class Run:
    """Where a run keeps its files, and what all its stages share."""

    folder: Path
    seed: int
    accelerator: Accelerator
    save_seconds: float = 120.0
    # An earlier checkpoint: its autoencoder and text encoders stay, its transformer is where the teacher begins.
    start: Path | None = None

    def check_start(self) -> None:
        """Keeps in RUN/start.json where a run begins; raises `RunError` where it began elsewhere."""
        path, begins = self.folder / "start.json", None if self.start is None else str(self.start.resolve())
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(begins) + "\n")
        elif (began := json.loads(path.read_text())) != begins:
            way = "without --from" if began is None else f"with --from {began}"
            raise RunError(f"{self.folder} was begun {way}; go on in the same way, or choose another --run")

    def generator(self, stage: str, step: int) -> torch.Generator:
        """The random numbers of one step of one stage, on the CPU, different in each process."""
        name = f"{self.seed}/{stage}/{step}/{self.accelerator.process_index}"
        return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def train(
    run: Run,
    stage: str,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step_fn: Callable[[int, torch.Generator], dict[str, float]],
    steps: int,
) -> None:
    """Calls `step_fn(step, generator)` up to `steps` times, from where the stage's file left off; returns at once when done.

    `step_fn` does its own backward and optimizer steps and returns figures for the progress bar. Raises `RunError` when the
    file on disk is of another shape, or cannot be written.
    """
    path = run.folder / f"{stage}.safetensors"
    first = _resume(path, modules, optimizers)
    if first >= steps:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / f"{stage}.log.jsonl"
    smooth: dict[str, float] = {}
    saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), disable=not run.accelerator.is_main_process) as progress:
        task = progress.add_task(stage, total=steps, completed=first, figures="")
        for step in range(first, steps):
            figures = step_fn(step, run.generator(stage, step))
            for name, value in figures.items():
                if not math.isfinite(value):
                    raise RunError(f"{stage}: {name} is {value} at step {step}; the last good state is {path}")
                smooth[name] = value if name not in smooth else 0.98 * smooth[name] + 0.02 * value
            progress.update(task, advance=1, figures="  ".join(f"{k} {v:.4f}" for k, v in smooth.items()))
            last = step + 1 == steps
            if run.accelerator.is_main_process and (last or step % 50 == 0):
                _note(log, {"step": step, "time": round(time.time(), 1), **smooth})
            if run.accelerator.is_main_process and (last or time.monotonic() - saved > run.save_seconds):
                save_state(path, modules, optimizers, step + 1)
                saved = time.monotonic()


def cosine(step: int, steps: int, peak: float, warmup: int = 200, floor: float = 0.05) -> float:
    """Learning rate at a step: linear warm-up, then half a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def linear(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate at a step: linear warm-up, flat to 40 % of the run, then linear to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(0.01, min(1.0, (steps - step) / (0.6 * steps)))


def set_rate(optimizers: Mapping[str, torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate


def step_all(optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """One step of each, and gradients cleared."""
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


class HalfCopy:
    """A bfloat16 working copy of a float32 module: forward and backward run on the copy, gradients land on the original.

    On CPUs this is about twice as fast as autocast, which keeps norms and sums in float32.
    """

    def __init__(self, module: nn.Module, accelerator: Accelerator) -> None:
        self.module = module
        self.copy = accelerator.prepare(copy.deepcopy(module).to(torch.bfloat16))

    @contextmanager
    def fresh(self) -> Iterator[nn.Module]:
        """The copy with the module's present weights; on leaving, its gradients are the module's."""
        with torch.no_grad():
            for master, half in zip(self.module.parameters(), self.copy.parameters(), strict=True):
                half.copy_(master)
                half.grad = None
        yield self.copy
        for master, half in zip(self.module.parameters(), self.copy.parameters(), strict=True):
            master.grad = None if half.grad is None else half.grad.float()

    @staticmethod
    def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(torch.bfloat16) for t in tensors)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Exponential moving average of weights: average <- decay * average + (1 - decay) * module."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for kept, now in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(now)


def save_state(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], step: int
) -> None:
    """Writes weights and optimizer moments beside `path`, then renames; raises `RunError` where that cannot be written."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{name}//{index}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    beside = path.with_suffix(".part")
    try:
        save_file(tensors, beside, metadata={"step": str(step)})
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        size = sum(t.nbytes for t in tensors.values())
        raise RunError(cannot_write(path, f"{refusal(error) or error} ({size / 1e6:.0f} MB needed)")) from error


def cannot_write(path: Path, reason: str) -> str:
    return f"cannot write {path}: {reason}; the last saved state is kept, free some room and run again"


def _note(log: Path, figures: Mapping[str, float]) -> None:
    try:
        with log.open("a") as file:
            file.write(json.dumps(figures) + "\n")
    except OSError as error:
        raise RunError(cannot_write(log, error.strerror or str(error))) from error


def _resume(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> int:
    """Loads the state at `path` into modules and optimizers; the step to go on from (0 with no file)."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise RunError(f"{path} is no state of this run ({error}); move it away to start anew") from error
    for name, module in modules.items():
        own = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/") and "//" not in k}
        wanted = module.state_dict()
        for key in sorted(wanted.keys() | own.keys()):
            here, there = wanted.get(key), own.get(key)
            if here is None or there is None or here.shape != there.shape:
                found, wants = (tuple(t.shape) if t is not None else "none" for t in (there, here))
                fault = f"{name}.{key} is {found} there, {wants} here"
                raise RunError(f"{path} is of another shape: {fault}; move it away to start anew")
        module.load_state_dict(own)
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{name}//"):
                index, field = key.removeprefix(f"{name}//").split("/")
                state.setdefault(int(index), {})[field] = value
        if state:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step
