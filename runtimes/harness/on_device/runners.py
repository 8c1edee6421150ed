"""The programs that run an artifact on a phone: how each is called, and what it says. The user builds one and gives it.

executor_runner         ExecuTorch's examples/portable/executor_runner. It logs "Iteration 1 of 30: 12.34 ms" for each run, on
                        Android to logcat. Built with -DEXECUTORCH_ENABLE_LOGGING=ON and the backends that the bundle needs.
onnxruntime_perf_test   ONNX Runtime's onnxruntime/test/perftest. It writes a line a run: model,seconds,peak,cpu,number.
Both are given the inputs of a golden case: raw tensors in the order of the method's inputs, or test_data_set_0/input_0.pb.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from runtimes.harness.on_device.device import DeviceError
from runtimes.harness.results import LoadMode


@dataclass(frozen=True)
class Run:
    """What one process of a runner did. `load` and `samples` in seconds, the samples in the order they ran; `before`: seconds
    of the runs that it made first and does not count; `peak`: most resident bytes, None where it does not tell."""

    load: float
    samples: tuple[float, ...]
    before: tuple[float, ...] = ()
    peak: int | None = None


class Runner(Protocol):
    """How one program is called. Paths of the phone are relative to the folder that everything is pushed to."""

    @property
    def name(self) -> str: ...

    @property
    def runtime(self) -> str: ...

    @property
    def load_mode(self) -> LoadMode | None: ...

    @property
    def output(self) -> str | None:
        """The file that it writes."""
        ...

    @property
    def log_tag(self) -> str | None:
        """What its lines in the phone's log are called, where it logs."""
        ...

    def write_inputs(self, inputs: Mapping[str, np.ndarray], folder: Path, artifact: str) -> tuple[str, ...]:
        """Writes what the artifact takes into files below `folder`. Returns their paths."""
        ...

    def arguments(self, artifact: str, inputs: Sequence[str], threads: int | None, runs: int) -> tuple[str, ...]:
        """What it is called with for a number of runs."""
        ...

    def lasting(
        self, artifact: str, inputs: Sequence[str], threads: int | None, each: float, seconds: float
    ) -> tuple[str, ...]:
        """What it is called with to run for so many seconds, a run taking `each`."""
        ...

    def parse(self, said: str, written: str) -> Run:
        """What it did, from what it printed or logged and what is in its file. Raises `DeviceError`."""
        ...


@dataclass(frozen=True)
class ExecutorRunner:
    """ExecuTorch's."""

    name: str = "executor_runner"
    runtime: str = "executorch"
    load_mode: LoadMode | None = "read"  # it loads through FileDataLoader
    output: str | None = None
    log_tag: str | None = "ExecuTorch"

    def write_inputs(self, inputs: Mapping[str, np.ndarray], folder: Path, artifact: str) -> tuple[str, ...]:
        names = []
        for number, array in enumerate(inputs.values()):
            name = f"inputs/{PurePosixPath(artifact).name}.{number}.bin"
            (folder / "inputs").mkdir(exist_ok=True)
            (folder / name).write_bytes(array.tobytes())
            names.append(name)
        return tuple(names)

    def arguments(self, artifact: str, inputs: Sequence[str], threads: int | None, runs: int) -> tuple[str, ...]:
        chosen = () if threads is None else (f"--cpu_threads={threads}",)
        method = ("--method_name=forward", f"--num_executions={runs}")
        return (f"--model_path={artifact}", f"--inputs={','.join(inputs)}", *method, *chosen)

    def lasting(
        self, artifact: str, inputs: Sequence[str], threads: int | None, each: float, seconds: float
    ) -> tuple[str, ...]:
        return self.arguments(artifact, inputs, threads, max(1, math.ceil(seconds / each)))

    def parse(self, said: str, written: str) -> Run:
        found = re.findall(r"Iteration (\d+) of (\d+): ([\d.]+) ms", said)
        if not found:
            raise DeviceError(
                "executor_runner told no time of a run: build a newer one with -DEXECUTORCH_ENABLE_LOGGING=ON, which logs "
                f'"Iteration 1 of N: ... ms"{_hint(said)}'
            )
        count = int(found[0][1])
        if [int(number) for number, _, _ in found] != [*range(1, count + 1)]:
            raise DeviceError(f"executor_runner's log has {len(found)} of {count} runs, the phone dropped some: ask for fewer")
        load = re.search(r"Model loaded in ([\d.]+) ms", said)
        if load is None:
            raise DeviceError("executor_runner told no time of loading: build a newer one")
        return Run(float(load[1]) / 1e3, tuple(float(milliseconds) / 1e3 for _, _, milliseconds in found))


@dataclass(frozen=True)
class PerfTest:
    """ONNX Runtime's, on the CPU, with no memory arena, as `runtimes.onnx` has it."""

    name: str = "onnxruntime_perf_test"
    runtime: str = "onnxruntime"
    load_mode: LoadMode | None = None
    output: str | None = "result.csv"
    log_tag: str | None = None

    def write_inputs(self, inputs: Mapping[str, np.ndarray], folder: Path, artifact: str) -> tuple[str, ...]:
        from onnx import numpy_helper

        data = PurePosixPath(artifact).parent / "test_data_set_0"
        (folder / data).mkdir(parents=True)
        names = []
        for number, (name, array) in enumerate(inputs.items()):
            names.append(str(data / f"input_{number}.pb"))
            (folder / names[-1]).write_bytes(numpy_helper.from_array(array, name).SerializeToString())
        return tuple(names)

    def arguments(self, artifact: str, inputs: Sequence[str], threads: int | None, runs: int) -> tuple[str, ...]:
        return self._arguments(artifact, threads, "-m", "times", "-r", str(runs))

    def lasting(
        self, artifact: str, inputs: Sequence[str], threads: int | None, each: float, seconds: float
    ) -> tuple[str, ...]:
        return self._arguments(artifact, threads, "-m", "duration", "-t", str(math.ceil(seconds)))

    def parse(self, said: str, written: str) -> Run:
        load = re.search(r"Session creation time cost: ([\d.e+-]+) s", said)
        first = re.search(r"First inference time cost: (\d+) ms", said)
        lines = [line.rsplit(",", 4) for line in written.splitlines() if line.strip()]
        if load is None or not lines or any(len(line) != 5 for line in lines):
            raise DeviceError(f"onnxruntime_perf_test told no times{_hint(said)}")
        before = (float(first[1]) / 1e3,) if first else ()
        return Run(float(load[1]), tuple(float(line[1]) for line in lines), before, int(lines[0][2]) or None)

    def _arguments(self, artifact: str, threads: int | None, *mode: str) -> tuple[str, ...]:
        chosen = () if threads is None else ("-x", str(threads), "-y", "1")
        return ("-e", "cpu", "-o", "99", "-A", *mode, *chosen, artifact, str(self.output))


RUNNERS: tuple[Runner, ...] = (ExecutorRunner(), PerfTest())


def choose_runner(program: Path, runtime: str | None) -> Runner:
    """How to call a program: by the runtime where that is named, or else by the program's name. Raises `DeviceError`."""
    if runtime is not None:
        found = [runner for runner in RUNNERS if runner.runtime == runtime]
        if not found:
            known = ", ".join(runner.runtime for runner in RUNNERS)
            raise DeviceError(f"--runtime {runtime} has no program for Android; choose from {known}")
        return found[0]
    found = [runner for runner in RUNNERS if program.name.startswith(runner.name)]
    if not found:
        names = " or ".join(runner.name for runner in RUNNERS)
        raise DeviceError(f"--runner {program} is not called {names}: say what it is with --runtime executorch or onnxruntime")
    return found[0]


def _hint(said: str) -> str:
    """The last line of what a program said, to be put behind a complaint."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"; its last words: {lines[-1]}" if lines else ""
