"""The measuring process: holds one subject, loads and runs it when told to, and says how long that took.

    python -m runtimes.harness.worker '{"bundle": ..., "component": ..., "runtime": ..., "threads": ...}'

It reads one command a line ("load", "run" or "memory") and answers each with one line of JSON. `runtimes/harness/latency.py` is
the other end. Having a process for itself, a component's memory is nobody else's, and its threads disturb nobody.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Protocol, TextIO

from pydantic import BaseModel

from runtimes.bundle import BundleError, ComponentEntry, Manifest, load_manifest
from runtimes.golden import Arrays, read_cases
from runtimes.graph import Graph, GraphError
from runtimes.harness.results import IMAGE, Against, LoadMode
from runtimes.pipeline import Pipeline
from runtimes.registry import RUNTIMES, Runtime, load_component
from runtimes.tokenizer import TokenizerError

SELF = Path("/proc/self")  # Linux


class Request(BaseModel):
    """What a worker measures: a component, or the whole picture ("image")."""

    bundle: Path
    component: str
    runtime: str
    threads: int | None


class OriginalRequest(Request):
    """The same of the checkpoint that the bundle was made of; `runtime` is still the artifacts' own."""

    model: str
    loras: tuple[tuple[str, float], ...] = ()  # merged into it: file or hub id, and scale
    against: Against


class Answer(BaseModel):
    """Seconds of a load or run, or bytes and load mode, or what went wrong as one line."""

    seconds: float = 0.0
    baseline: int = 0
    peak: int = 0
    load_mode: LoadMode | None = None
    error: str | None = None


class Subject(Protocol):
    """Something whose loading and running is timed. Its libraries and inputs are in memory once it is made."""

    paths: tuple[Path, ...]
    """Files that it loads, for its load mode."""

    def load(self) -> float:
        """Loads anew, after releasing what was loaded before. Seconds of the loading alone."""
        ...

    def run(self) -> float:
        """Seconds of one run on the next of its inputs, which come round again."""
        ...


class ComponentSubject:
    """One component through one runtime, on the golden inputs."""

    def __init__(self, bundle: Path, manifest: Manifest, entry: ComponentEntry, runtime: Runtime, threads: int | None) -> None:
        self.paths = _files(bundle, [entry])
        self._bundle, self._entry, self._runtime, self._threads = bundle, entry, runtime, threads
        self._cases: Iterator[Arrays] = cycle([case.inputs for case in read_cases(bundle, manifest.golden, entry.name)])
        self._graph: Graph | None = None
        _import(runtime)

    def load(self) -> float:
        self._graph = None
        gc.collect()  # a graph may hold itself in a cycle
        start = time.perf_counter()
        self._graph = load_component(self._bundle, self._entry, self._runtime, self._threads)
        return time.perf_counter() - start

    def run(self) -> float:
        assert self._graph is not None
        inputs = next(self._cases)
        start = time.perf_counter()
        self._graph(inputs)
        return time.perf_counter() - start


class ImageSubject:
    """Prompt to picture through one runtime, on the golden prompts and seeds."""

    def __init__(self, bundle: Path, manifest: Manifest, runtime: Runtime, threads: int | None) -> None:
        self.paths = _files(bundle, [entry for entry in manifest.components if entry.format == runtime.format])
        self._bundle, self._manifest, self._runtime, self._threads = bundle, manifest, runtime, threads
        self._prompts = cycle([(golden.prompt, golden.seed) for golden in manifest.golden.prompts])
        self._pipeline: Pipeline | None = None
        _import(runtime)

    def load(self) -> float:
        """Seconds of making the pipeline and loading its components, which the picture drawn here makes it do."""
        self._pipeline = None
        gc.collect()
        start = time.perf_counter()
        self._pipeline = Pipeline(self._bundle, self._manifest, self._runtime, low_memory=False, threads=self._threads)
        made = time.perf_counter() - start
        drawn = self._pipeline.generate(*next(self._prompts))
        return made + sum(timing.load for timing in drawn.timings.values())

    def run(self) -> float:
        assert self._pipeline is not None
        prompt, seed = next(self._prompts)
        start = time.perf_counter()
        self._pipeline.generate(prompt, seed)
        return time.perf_counter() - start


def make_subject(request: Request, manifest: Manifest, runtime: Runtime) -> Subject:
    """The subject of a request, through a runtime of its format."""
    if request.component == IMAGE:
        return ImageSubject(request.bundle, manifest, runtime, request.threads)
    entry = manifest.component(request.component, runtime.format)
    if entry is None:
        raise BundleError(f"{request.bundle} has no {request.component} in format {runtime.format}")
    return ComponentSubject(request.bundle, manifest, entry, runtime, request.threads)


def serve(subject: Subject, commands: TextIO, answers: TextIO) -> None:
    """Answers commands until there are no more."""
    baseline = begin_peak()
    for command in commands:
        if command.strip() == "memory":
            answer = Answer(baseline=baseline, peak=peak_resident(), load_mode=load_mode(subject.paths))
        else:
            answer = Answer(seconds=subject.load() if command.strip() == "load" else subject.run())
        say(answers, answer)


def say(answers: TextIO, answer: Answer) -> None:
    answers.write(answer.model_dump_json() + "\n")
    answers.flush()


def begin_peak() -> int:
    """Resident bytes now, from which `peak_resident` starts anew where the system can (Linux; elsewhere the peak so far)."""
    clear = SELF / "clear_refs"
    if clear.exists():
        clear.write_text("5")  # proc(5): resets the peak resident set size to the current value
    return peak_resident()


def peak_resident() -> int:
    """Most resident bytes of this process.

    Linux: VmHWM, for getrusage's ru_maxrss there begins with what the parent had (getrusage(2): it survives execve).
    """
    status = SELF / "status"
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def load_mode(paths: tuple[Path, ...]) -> LoadMode | None:
    """Whether one of the files is mapped into this process now; None where the system does not tell (not Linux)."""
    maps = SELF / "maps"
    if not maps.exists():
        return None
    mapped = {line.split(maxsplit=5)[-1].rstrip("\n") for line in maps.read_text().splitlines()}
    return "mmap" if any(str(path.resolve()) in mapped for path in paths) else "read"


def private_stdout() -> TextIO:
    """The process's stdout for answers alone: whatever else is printed goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _files(bundle: Path, entries: list[ComponentEntry]) -> tuple[Path, ...]:
    return tuple(bundle / file.path for entry in entries for artifact in entry.artifacts for file in artifact.files)


def _import(runtime: Runtime) -> None:
    for module in runtime.imports:
        importlib.import_module(module)


def main() -> None:
    answers = private_stdout()
    try:
        request = Request.model_validate(json.loads(sys.argv[1]))
        serve(make_subject(request, load_manifest(request.bundle), RUNTIMES[request.runtime]), sys.stdin, answers)
    except (BundleError, GraphError, TokenizerError) as error:
        say(answers, Answer(error=str(error)))


if __name__ == "__main__":
    main()
