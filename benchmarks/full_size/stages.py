"""Time and peak memory by stage, measured from inside the process that does the work.

Linux keeps the peak of a process's resident memory (VmHWM in /proc/self/status) and resets it on request (`5` into
/proc/self/clear_refs), so that every stage has a peak of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Stage:
    """One stage: seconds, and the peak of resident memory in bytes while it ran."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass
class Stages:
    """A `Progress` that keeps what each stage, or each step of the stages named in `by_step`, took."""

    by_step: tuple[str, ...] = ()
    tell: Callable[[str], None] = lambda line: None
    done: list[Stage] = field(default_factory=list)
    _stage: str = ""
    _name: str | None = None
    _start: float = 0.0

    def stage(self, name: str, total: int) -> None:
        self._stage = name
        self._begin(name)

    def step(self, detail: str) -> None:
        if self._stage in self.by_step:
            self._begin(f"{self._stage}: {detail}")

    def finish(self) -> list[Stage]:
        self._end()
        return self.done

    def _begin(self, name: str) -> None:
        self._end()
        reset_peak()
        self._name, self._start = name, time.perf_counter()

    def _end(self) -> None:
        if self._name is not None:
            stage = Stage(self._name, time.perf_counter() - self._start, peak())
            if stage.seconds > 0.05:
                self.done.append(stage)
                self.tell(f"{stage.name}: {stage.seconds:.0f} s, {stage.peak_bytes / 1e9:.2f} GB")
        self._name = None


def peak() -> int:
    """The most bytes of resident memory since the last `reset_peak`."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    CLEAR.write_text("5")
