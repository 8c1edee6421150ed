"""This Mac: Core ML itself, through coremltools. Timings as of any computer, and where Core ML means to run each operation."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runtimes.harness.latency import WARM_UP, Listener, OpenBundle, measure, start_worker
from runtimes.harness.on_device.apple import refuse_other_than_coreml, refuse_threads
from runtimes.harness.on_device.device import Asked, DeviceError, sustained_entry
from runtimes.harness.on_device.placement import read_placements
from runtimes.harness.results import EnvironmentInfo, Placement, Result, Sustained
from runtimes.harness.worker import Request


@dataclass(frozen=True)
class Mac:
    """See `runtimes.harness.on_device.device.OnDevice`."""

    host: bool = True
    runtime: str = "coreml"

    def check(self, opened: OpenBundle, asked: Asked) -> None:
        refuse_threads(asked)

    def measure(self, opened: OpenBundle, asked: Asked, listener: Listener) -> Result:
        result = measure(opened, iterations=asked.iterations, listener=listener)
        placements: list[Placement] = []
        listener.stage("compute plans", len(opened.components))
        for entry in opened.components:
            listener.step(entry.name)
            placements += read_placements(opened.folder, entry)
        sustained = None
        if asked.sustained is not None:
            sustained = _sustained(opened, sustained_entry(opened).name, asked.sustained, listener)
        facts = {"device": sysctl("hw.model"), "chip": sysctl("machdep.cpu.brand_string")}
        environment = EnvironmentInfo.model_validate(result.environment_info.model_dump() | facts)
        found = {"environment_info": environment, "placements": tuple(placements), "sustained": sustained}
        return result.model_copy(update=found)


def connect(which: str | None, runner: Path | None, runtime: str | None) -> Mac:
    """This computer, if it is a Mac. Raises `DeviceError`."""
    if which is not None:
        raise DeviceError(f"--device mac:{which} names a Mac, but only this one can be measured: give --device mac")
    if sys.platform != "darwin":
        raise DeviceError(
            f"--device mac measures with Core ML itself, which only macOS has, and this is {sys.platform}: run it on a Mac, or "
            "leave --device out for host timings"
        )
    refuse_other_than_coreml("mac", runner, runtime)
    return Mac()


def sysctl(name: str) -> str:
    """A value of the system's, such as "Apple M2" for machdep.cpu.brand_string. Raises `DeviceError`."""
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise DeviceError(f"sysctl does not tell {name}: {error}") from error


def _sustained(opened: OpenBundle, name: str, seconds: float, listener: Listener) -> Sustained:
    listener.stage("sustained", 2)
    request = Request(bundle=opened.folder, component=name, runtime=opened.runtime.name, threads=None)
    with start_worker(request) as worker:
        listener.step(f"load {name}")
        worker.load()
        for _ in range(WARM_UP):
            worker.run()
        listener.step(f"{name} for {seconds:g} s")
        samples: list[float] = []
        end = time.monotonic() + seconds
        while not samples or time.monotonic() < end:
            samples.append(worker.run())
    return Sustained.of(name, seconds, samples)
