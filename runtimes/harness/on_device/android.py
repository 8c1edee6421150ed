"""An Android phone over adb: pushes each artifact with the inputs of a golden case, runs the user's program, collects times.

    export-flash bench bundles/flash-mini/android --device android --runner build/executor_runner

Everything lies in one folder of the phone, which is removed at the end, after a failure and after a Ctrl-C alike. One artifact
is there at a time. These programs draw no picture, so there is no row for one.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np

from runtimes.bundle import ArtifactEntry, ComponentEntry, sha256
from runtimes.harness.latency import WARM_UP, Listener, OpenBundle
from runtimes.harness.on_device import adb
from runtimes.harness.on_device.device import Asked, DeviceError, artifact_inputs, sustained_entry
from runtimes.harness.on_device.runners import Run, Runner, choose_runner
from runtimes.harness.results import (
    BackendSettings,
    Condition,
    Conditions,
    EnvironmentInfo,
    Latency,
    LoadTime,
    Memory,
    Result,
    Row,
    Sustained,
    describe_model,
    now,
)

HOME = "/data/local/tmp/export-flash"
_ELF = b"\x7fELF"
# e_machine of an ELF file, by the name that Android gives the processor's interface (ro.product.cpu.abi).
_MACHINES = {"arm64-v8a": 183, "armeabi-v7a": 40, "x86_64": 62, "x86": 3}


@dataclass(frozen=True)
class Android:
    """See `runtimes.harness.on_device.device.OnDevice`. `program` is the user's, called as `runner` says."""

    adb: adb.Adb
    program: Path
    runner: Runner
    host: bool = False

    @property
    def runtime(self) -> str:
        return self.runner.runtime

    def check(self, opened: OpenBundle, asked: Asked) -> None:
        abi = adb.parse_properties(self.adb.shell("getprop")).get("ro.product.cpu.abi", "")
        check_program(self.program, abi)
        if asked.sustained is not None and (count := len(sustained_entry(opened).artifacts)) > 1:
            name = sustained_entry(opened).name
            raise DeviceError(f"--sustained: {name} is in {count} pieces, and {self.runner.name} runs one alone: leave it out")

    def measure(self, opened: OpenBundle, asked: Asked, listener: Listener) -> Result:
        start = now()
        with _folder(self.adb, f"{HOME}/{opened.manifest.digest}") as folder:
            phone = _Phone(self.adb, self.runner, self.program, folder, opened, asked, listener)
            phone.push_program()
            before = phone.condition()
            rows = tuple(phone.row(entry) for entry in opened.components)
            sustained = None if asked.sustained is None else phone.sustained(rows, asked.sustained)
            conditions = Conditions(before=before, after=phone.condition())
            environment = phone.environment()
        return Result(
            host=False,
            start_datetime=start,
            benchmark_model=describe_model(opened.manifest),
            backend_settings=BackendSettings(
                framework=opened.runtime.name,
                framework_version=f"of {self.program.name} {sha256(self.program)[:12]}",
                format=opened.runtime.format,
                threads=asked.threads,
            ),
            environment_info=environment,
            rows=rows,
            conditions=conditions,
            sustained=sustained,
        )


def connect(which: str | None, program: Path | None, runtime: str | None) -> Android:
    """The phone of that serial, or the only one. Raises `DeviceError`: no adb, no such phone or several, no program."""
    command = adb.find_adb()
    phone = adb.choose(adb.attached(command), which)
    if program is None:
        raise DeviceError(
            f"--device android: {phone} needs a program that runs artifacts: give --runner with an executor_runner or "
            "onnxruntime_perf_test built for it"
        )
    if not program.is_file():
        raise DeviceError(f"--runner {program} is no file")
    return Android(adb.Adb(command, phone.serial), program, choose_runner(program, runtime))


def check_program(program: Path, abi: str) -> None:
    """Raises `DeviceError` for a program that was built for another processor than the phone's `abi` ("arm64-v8a")."""
    with program.open("rb") as file:
        head = file.read(20)
    if head.startswith(b"#!"):
        return  # a script of the phone's shell
    if not head.startswith(_ELF):
        raise DeviceError(f"--runner {program} is no program for Android: it is no ELF file")
    machine = int.from_bytes(head[18:20], "little")
    built = next((name for name, number in _MACHINES.items() if number == machine), f"processor {machine}")
    if built != abi:
        raise DeviceError(f"--runner {program} was built for {built}, and the phone is {abi}: build it for that")


@dataclass(frozen=True)
class _Phone:
    """A phone with its folder while a bundle is measured."""

    adb: adb.Adb
    runner: Runner
    program: Path
    folder: str
    opened: OpenBundle
    asked: Asked
    listener: Listener

    def push_program(self) -> None:
        """The program, and the libraries that lie beside it."""
        self._push([self.program, *sorted(self.program.parent.glob("*.so"))], "bin")
        self.adb.shell(f"chmod 755 {shlex.quote(f'{self.folder}/bin/{self.program.name}')}")

    def row(self, entry: ComponentEntry) -> Row:
        """Loads and runs of a component; of one in pieces, the sums over the pieces."""
        self.listener.stage(entry.name, 3 * len(entry.artifacts))
        first, again = [], []
        for artifact, inputs in zip(entry.artifacts, artifact_inputs(self.opened, entry), strict=True):
            self.listener.step(f"push {artifact.path}")
            with self._pushed(artifact, inputs) as names:
                self.listener.step("runs")
                runs = WARM_UP + self.asked.iterations
                first.append(self._run(self.runner.arguments(artifact.path, names, self.asked.threads, runs)))
                self.listener.step("warm load")
                again.append(self._run(self.runner.arguments(artifact.path, names, self.asked.threads, 1)))
        samples = _sums([run.samples for run in first])
        peaks = [run.peak for run in first if run.peak is not None]
        return Row(
            name=entry.name,
            delegate=entry.backend,
            bytes=entry.bytes,
            load_mode=self.runner.load_mode,
            model_load_time=LoadTime(first=sum(run.load for run in first), warm=sum(run.load for run in again)),
            warm_up=(*_sums([run.before for run in first]), *samples[:WARM_UP]),
            latency=Latency.of(samples[WARM_UP:]),
            memory=Memory(baseline_resident=None, peak_resident=max(peaks)) if peaks else None,
        )

    def sustained(self, rows: Sequence[Row], seconds: float) -> Sustained:
        """One component without a pause; `check` has made sure that it is one artifact."""
        entry = sustained_entry(self.opened)
        each = next(row.latency.p50 for row in rows if row.name == entry.name)
        self.listener.stage("sustained", 2)
        self.listener.step(f"push {entry.name}")
        inputs = next(artifact_inputs(self.opened, entry))
        with self._pushed(entry.artifacts[0], inputs) as names:
            self.listener.step(f"{entry.name} for {seconds:g} s")
            path = entry.artifacts[0].path
            run = self._run(self.runner.lasting(path, names, self.asked.threads, each, seconds))
        return Sustained.of(entry.name, seconds, run.samples)

    def condition(self) -> Condition:
        """How warm and charged the phone is now."""
        return adb.parse_condition(self.adb.shell("dumpsys thermalservice; true"), self.adb.shell("dumpsys battery; true"))

    def environment(self) -> EnvironmentInfo:
        """What the phone says of itself."""
        properties = adb.parse_properties(self.adb.shell("getprop"))
        device, chip, system = adb.name_device(properties)
        return EnvironmentInfo(
            platform="android",
            device=device,
            chip=chip,
            arch=properties.get("ro.product.cpu.abi", "unknown"),
            os=system,
            cores=adb.parse_cores(self.adb.shell("cat /sys/devices/system/cpu/possible")),
            total_mem=adb.parse_memory(self.adb.shell("cat /proc/meminfo")),
        )

    @contextmanager
    def _pushed(self, artifact: ArtifactEntry, inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, ...]]:
        """The artifact and its inputs on the phone, inside the block. Gives the paths of the inputs."""
        with TemporaryDirectory() as scratch:
            names = self.runner.write_inputs(inputs, Path(scratch), artifact.path)
            paths = {file.path: self.opened.folder / file.path for file in artifact.files}
            paths |= {name: Path(scratch) / name for name in names}
            parents = sorted({str(PurePosixPath(name).parent) for name in paths})
            for parent in parents:
                self._push([file for name, file in paths.items() if str(PurePosixPath(name).parent) == parent], parent)
        yield names
        self.adb.shell(f"cd {shlex.quote(self.folder)} && rm -f {' '.join(map(shlex.quote, paths))}")

    def _push(self, files: Sequence[Path], parent: str) -> None:
        folder = f"{self.folder}/{parent}"
        self.adb.shell(f"mkdir -p {shlex.quote(folder)}")
        self.adb.push(files, folder)

    def _run(self, arguments: Sequence[str]) -> Run:
        """One process of the program. Its number lies beside it, so that it can be ended whatever becomes of adb."""
        folder, name = shlex.quote(self.folder), shlex.quote(self.program.name)
        call = " ".join(map(shlex.quote, arguments))
        said, failure = "", None
        try:
            said = self.adb.shell(f"cd {folder} && echo $$ > pid && exec env LD_LIBRARY_PATH={folder}/bin ./bin/{name} {call}")
        except DeviceError as error:
            failure = error
        number = self.adb.shell(f"cd {folder} && cat pid && rm pid").strip()
        if self.runner.log_tag is not None:
            said += self.adb.shell(f"logcat -d -v raw --pid={number} {self.runner.log_tag}:I '*:S'")
        if failure is not None:
            words = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("---------")]
            raise DeviceError(f"{self.program.name} failed on {failure}{f'; its last words: {words[-1]}' if words else ''}")
        written = self.runner.output and self.adb.shell(f"cd {folder} && cat {self.runner.output} && rm {self.runner.output}")
        return self.runner.parse(said, written or "")


@contextmanager
def _folder(phone: adb.Adb, folder: str) -> Iterator[str]:
    """An empty folder of the phone. Leaving the block ends what runs in it and removes it."""
    place = shlex.quote(folder)
    tidy = f'[ -f {place}/pid ] && kill -9 "$(cat {place}/pid)" 2> /dev/null; rm -rf {place} && rmdir {HOME} 2> /dev/null; true'
    phone.clean(tidy)  # what a run that lost its phone left there
    try:
        phone.shell(f"mkdir -p {place}")
        yield folder
    except BaseException as error:
        try:
            phone.clean(tidy)
        except DeviceError as left:
            raise DeviceError(f"{str(error) or 'stopped'}; {folder} may be left on {left}") from error
        raise
    phone.clean(tidy)


def _sums(runs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The sums of the first values, of the second, and so on."""
    return tuple(sum(values) for values in zip(*runs, strict=True))
