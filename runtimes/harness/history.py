"""Every benchmark result in one append-only file of the user's, and the comparison of two results.

The verdict about a row: with s the larger of both results' spreads, (q75 - q25) / median of the samples, the two differ when
their medians differ by more than s times the larger median. Medians and quartiles do not mind a few interrupted runs, and the
spread of the runs, other than the error of their median, does not shrink with their number: samples of one process share its
luck with memory and clock, so many of them are no reason to believe a small difference.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.bundle import BundleError
from runtimes.harness.results import BenchmarkModel, Latency, Result, parse_result

FEWEST = 5  # samples, below which quartiles say nothing


@dataclass(frozen=True)
class Verdict:
    """One row of two results. Medians in seconds; `spread` is relative, None where there are too few samples."""

    name: str
    before: float
    after: float
    spread: float | None

    @property
    def differs(self) -> bool:
        """Whether the medians differ beyond the spread."""
        if self.spread is None:
            return False
        return abs(self.after - self.before) > self.spread * max(self.before, self.after)

    @property
    def words(self) -> str:
        """Such as "faster by 12 % (beyond the spread of 3 %)"; the percentage is of the time before."""
        if self.spread is None:
            return f"too few runs to tell: {FEWEST} are needed"
        if not self.differs:
            return "no difference beyond noise"
        change = 100 * (self.after / self.before - 1)
        beyond = f"(beyond the spread of {_percent(100 * self.spread)} %)"
        return f"{'faster' if change < 0 else 'slower'} by {_percent(abs(change))} % {beyond}"


def history_file() -> Path:
    """Where results are kept: below $XDG_CACHE_HOME, ~/Library/Caches on macOS, or ~/.cache."""
    ours = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else ours) / "export-flash" / "bundles" / "history.jsonl"


def append(result: Result, path: Path) -> None:
    """Adds a line to the history. Raises `BundleError`; a line that a full disk cut short is taken back."""
    line = (result.model_dump_json() + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if file.write(line) != len(line):
                file.truncate(end)
                raise BundleError(f"the history {path} cannot be written: the disk is full")
    except OSError as error:
        raise BundleError(f"the history {path} cannot be written: {error.strerror}") from None


def read_history(path: Path) -> tuple[Result, ...]:
    """The results in the order they were added; none where there is no file. Raises `BundleError` naming the line."""
    if not path.exists():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"the history {path} cannot be read: {error}") from None
    return tuple(parse_result(line, f"line {number} of {path}") for number, line in enumerate(lines, 1))


def latest_like(result: Result, history: Sequence[Result]) -> Result | None:
    """The last result in the history of the same model, target, quantization, runtime, threads and machine."""
    return next((old for old in reversed(history) if _kind(old) == _kind(result)), None)


def check_comparable(old: Result, model: BenchmarkModel, host: bool) -> None:
    """Raises `BundleError` unless an old result is of the same checkpoint, size and steps, and of the same sort of machine."""
    was = old.benchmark_model
    if was.fingerprint != model.fingerprint:
        raise BundleError(f"results of {was.name} and {model.name} cannot be compared: they are different checkpoints")
    if (was.image_size, was.steps) != (model.image_size, model.steps):
        raise BundleError(f"results of {_drawing(was)} and of {_drawing(model)} cannot be compared")
    if old.host != host:
        raise BundleError("a result of a computer and one of a phone cannot be compared")


def compare(old: Result, new: Result) -> tuple[Verdict, ...]:
    """A verdict on every row that both have, in the new one's order. Raises `BundleError` where they cannot be compared."""
    check_comparable(old, new.benchmark_model, new.host)
    both = [(old.row(row.name), row) for row in new.rows]
    verdicts = tuple(judge(row.name, before.latency, row.latency) for before, row in both if before is not None)
    if not verdicts:
        raise BundleError("the results have no component in common")
    return verdicts


def differences(old: Result, new: Result) -> tuple[str, ...]:
    """What else differs between two results than their times, one line each."""
    settings, was = new.backend_settings, old.backend_settings
    pairs = {
        "machine": (old.environment_info.device, new.environment_info.device),
        "runtime": (f"{was.framework} {was.framework_version}", f"{settings.framework} {settings.framework_version}"),
        "threads": (was.threads or "the runtime's choice", settings.threads or "the runtime's choice"),
        "quantization": (old.benchmark_model.quantization, new.benchmark_model.quantization),
        "target": (old.benchmark_model.target, new.benchmark_model.target),
    }
    return tuple(f"{what}: {before} before, {after} now" for what, (before, after) in pairs.items() if before != after)


def judge(name: str, before: Latency, after: Latency) -> Verdict:
    """The verdict on two sets of samples."""
    if min(before.measured_samples, after.measured_samples) < FEWEST:
        return Verdict(name, before.p50, after.p50, None)
    return Verdict(name, before.p50, after.p50, max(spread(before), spread(after)))


def spread(latency: Latency) -> float:
    """Interquartile range over the median."""
    low, high = latency.quartiles
    return (high - low) / latency.p50


def _kind(result: Result) -> tuple[object, ...]:
    model, settings = result.benchmark_model, result.backend_settings
    what = (model.fingerprint, model.target, model.quantization, model.image_size, model.steps)
    return (*what, settings.framework, settings.threads, result.host, result.environment_info.device)


def _drawing(model: BenchmarkModel) -> str:
    return f"{model.image_size.width} x {model.image_size.height} px in {model.steps} steps"


def _percent(value: float) -> str:
    """Two figures at least: 12, 3.4, 0.25."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
