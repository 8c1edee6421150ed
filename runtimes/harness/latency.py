"""Latency and memory of a bundle through one runtime: each component, then the whole picture, each in a process of its own.

    measure(open_bundle(Path("bundles/flash-mini/android"), "onnxruntime"), threads=2)

Of each: the first load, warm-up runs, the measured runs on the bundle's golden inputs, the peak of resident memory, and
another load, now warm. The first load is the first of its process, but of files that the check has just read: it comes from the
system's file cache. On a computer all of this is host timing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from runtimes.bundle import BundleError, ComponentEntry, Manifest, check_files, load_manifest
from runtimes.graph import GraphError
from runtimes.harness.results import (
    IMAGE,
    BackendSettings,
    EnvironmentInfo,
    Latency,
    LoadTime,
    Memory,
    Result,
    Row,
    describe_model,
    now,
)
from runtimes.harness.worker import Answer, Request
from runtimes.pipeline import REQUIRED
from runtimes.registry import Runtime, choose_runtime

WORKER = "runtimes.harness.worker"
ITERATIONS = 30
WARM_UP = 3  # runs of a subject before those that count
# Threads of ONNX Runtime and OpenMP spin for some milliseconds after a run; the other side must not run beside them.
PAUSE = 0.02  # seconds


class Listener(Protocol):
    """Hears of the measurements in order; `export.progress.Progress` is one."""

    def stage(self, name: str, total: int) -> None:
        """A row of `total` loads and runs begins."""
        ...

    def step(self, detail: str) -> None:
        """One of them begins."""
        ...


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that may be measured: its files are those that were published, and for the runtime that is installed."""

    folder: Path
    manifest: Manifest
    runtime: Runtime

    @property
    def components(self) -> tuple[ComponentEntry, ...]:
        """Those that the runtime runs, in the manifest's order."""
        return tuple(entry for entry in self.manifest.components if entry.format == self.runtime.format)

    @property
    def draws(self) -> bool:
        """Whether it has all that a picture takes."""
        return {entry.name for entry in self.components}.issuperset(REQUIRED)


def open_bundle(folder: Path, runtime: str = "auto") -> OpenBundle:
    """Checks the manifest, every file's bytes and the runtime's version.

    Raises `BundleError`, one line: no bundle, a file missing or altered, a runtime that it has no artifacts for, or artifacts
    made for another version (major.minor) of the runtime than is installed.
    """
    manifest = load_manifest(folder)
    chosen = choose_runtime(manifest, runtime)
    check_version(folder, manifest, chosen)
    check_files(folder, manifest)
    return OpenBundle(folder, manifest, chosen)


def check_version(folder: Path, manifest: Manifest, runtime: Runtime) -> None:
    """Raises `BundleError` unless the bundle was made with the installed major.minor of the runtime's package."""
    made, installed = manifest.tools.get(runtime.package), importlib.metadata.version(runtime.package)
    if made is None:
        raise BundleError(f"{folder} does not say which version of {runtime.package} it was made for: export it again")
    if _minor(made) != _minor(installed):
        raise BundleError(
            f"{folder} was made for {runtime.package} {made}, but {installed} is installed: export it again, or install {made}"
        )


@dataclass(frozen=True)
class Worker:
    """A measuring process, from `start_worker`.

    Every call raises `GraphError`, one line, where the process could not do it or has died.
    """

    name: str
    process: subprocess.Popen[str]
    noise: IO[bytes]  # its stderr

    def load(self) -> float:
        """Loads, after releasing what was loaded. Seconds."""
        return self._ask("load").seconds

    def run(self) -> float:
        """One run. Seconds."""
        return self._ask("run").seconds

    def memory(self) -> Answer:
        """Resident bytes and load mode."""
        return self._ask("memory")

    def _ask(self, command: str) -> Answer:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended; what it said before that is still there to read
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise GraphError(f"{self.name}: the measuring process {self._end()}")
        answer = Answer.model_validate_json(line)
        if answer.error is not None:
            raise GraphError(answer.error)
        return answer

    def _end(self) -> str:
        """How the process came to its end, with the last line that it wrote."""
        code = self.process.wait()
        if code < 0:
            return f"was ended by signal {-code}" + (": is there memory enough?" if code == -9 else "")
        self.noise.seek(0)
        lines = self.noise.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"ended with exit code {code}: {last}"


@contextmanager
def start_worker(request: Request, module: str = WORKER) -> Iterator[Worker]:
    """Runs `module`, which speaks as runtimes/harness/worker.py says, with the request as its argument.

    Leaving the block ends the process, whatever it is doing.
    """
    # -P and the path as it is here: whatever lies in the user's present folder is not imported by mistake.
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    command = [sys.executable, "-P", "-m", module, request.model_dump_json()]
    pipe, environ = subprocess.PIPE, os.environ | {"PYTHONPATH": path}
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=noise, text=True, encoding="utf-8", env=environ)
        try:
            yield Worker(request.component, process, noise)
        finally:
            process.kill()
            process.communicate()


def measure(opened: OpenBundle, *, threads: int | None = None, iterations: int = ITERATIONS, listener: Listener) -> Result:
    """Every component and, where the bundle draws, the whole picture.

    `threads` of the runtime, its own choice by default; `iterations` are the measured runs of each. Raises `GraphError` where
    something cannot be loaded or run, `BundleError` for counts below 1.
    """
    check_counts(threads, iterations)
    start = now()
    rows = [_component(opened, entry, threads, iterations, listener) for entry in opened.components]
    if opened.draws:
        size = sum(entry.bytes for entry in opened.components)
        rows.append(_row(opened, IMAGE, None, size, threads, iterations, listener))
    return Result(
        host=True,
        start_datetime=start,
        benchmark_model=describe_model(opened.manifest),
        backend_settings=_settings(opened.runtime, threads),
        environment_info=environment(),
        rows=tuple(rows),
    )


def check_counts(threads: int | None, iterations: int) -> None:
    """Raises `BundleError` unless both are at least 1."""
    if threads is not None and threads < 1:
        raise BundleError(f"{threads} threads cannot run anything; expected 1 or more")
    if iterations < 1:
        raise BundleError(f"{iterations} iterations measure nothing; expected 1 or more")


def interleave(artifact: Worker, other: Worker, iterations: int, listener: Listener) -> tuple[list[float], list[float]]:
    """Seconds of `iterations` runs of each, in turns, after the warm-up of both: A B A B."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(-WARM_UP, iterations):
        listener.step("warm-up" if number < 0 else "pair of runs")
        for worker, runs in zip((artifact, other), samples, strict=True):
            time.sleep(PAUSE)
            seconds = worker.run()
            if number >= 0:
                runs.append(seconds)
    return samples


def environment() -> EnvironmentInfo:
    """This computer."""
    system = "macos" if sys.platform == "darwin" else "linux"
    return EnvironmentInfo(
        platform=system,  # type: ignore[arg-type]
        device=_processor(),
        arch=platform.machine(),
        os=platform.platform(terse=True),
        cores=os.cpu_count() or 1,
        total_mem=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def _settings(runtime: Runtime, threads: int | None) -> BackendSettings:
    """What runs the artifacts here: off macOS "coreml on torch", which is no Core ML."""
    return BackendSettings(
        framework=runtime.name if runtime.stand_in is None else f"{runtime.name} on {runtime.stand_in}",
        framework_version=importlib.metadata.version(runtime.stand_in or runtime.package),
        format=runtime.format,
        threads=threads,
    )


def _component(opened: OpenBundle, entry: ComponentEntry, threads: int | None, iterations: int, listener: Listener) -> Row:
    delegate = entry.compute_units or entry.backend if opened.runtime.stand_in is None else None
    return _row(opened, entry.name, delegate, entry.bytes, threads, iterations, listener)


def _row(
    opened: OpenBundle,
    name: str,
    delegate: str | None,
    size: int,
    threads: int | None,
    iterations: int,
    listener: Listener,
) -> Row:
    request = Request(bundle=opened.folder, component=name, runtime=opened.runtime.name, threads=threads)
    listener.stage(name, 2 + WARM_UP + iterations)
    with start_worker(request) as worker:
        listener.step("first load")
        first = worker.load()
        warm_up = _runs(worker, WARM_UP, "warm-up", listener)
        samples = _runs(worker, iterations, "run", listener)
        memory = worker.memory()  # before the warm load, of which the released graph may leave something behind
        listener.step("warm load")
        warm = worker.load()
    return Row(
        name=name,
        delegate=delegate,
        bytes=size,
        load_mode=memory.load_mode,
        model_load_time=LoadTime(first=first, warm=warm),
        warm_up=tuple(warm_up),
        latency=Latency.of(samples),
        memory=Memory(baseline_resident=memory.baseline, peak_resident=memory.peak),
    )


def _runs(worker: Worker, count: int, what: str, listener: Listener) -> Sequence[float]:
    samples = []
    for _ in range(count):
        listener.step(what)
        samples.append(worker.run())
    return samples


def _minor(version: str) -> tuple[str, ...]:
    """ "1.31.1" and "1.31.0+cpu" -> ("1", "31")."""
    return tuple(re.split(r"[.+]", version)[:2])


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()
