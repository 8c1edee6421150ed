"""An iPhone on a Mac's cable, through coremltools 9.0's own benchmarker (`coremltools.models.ml_program.experimental`).

coremltools builds its model runner with Xcode, signs it, installs it on the phone, and loads and runs each package there; both
are timed on the phone. The runner needs a signature: the team of $DEVELOPMENT_TEAM, or $PROVISIONING_PROFILE with its
$PRODUCT_BUNDLE_IDENTIFIER. It stays installed. It draws no picture and tells neither memory nor heat; the demo app's result,
filed with `export-flash bench BUNDLE --import FILE`, is the other way.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from runtimes.bundle import ComponentEntry
from runtimes.harness.latency import WARM_UP, Listener, OpenBundle
from runtimes.harness.on_device.apple import refuse_other_than_coreml, refuse_threads
from runtimes.harness.on_device.device import Asked, DeviceError, artifact_inputs, sustained_entry
from runtimes.harness.on_device.placement import place
from runtimes.harness.results import (
    BackendSettings,
    EnvironmentInfo,
    Latency,
    LoadTime,
    Placement,
    Result,
    Row,
    Sustained,
    describe_model,
    now,
)
from runtimes.quiet import quiet

OTHERWISE = "or let the demo app measure, and file what it hands back with --import FILE"
_TOOLS = ("xcodebuild", "xcrun", "devicectl")  # coremltools calls each by this name
_MILLISECONDS = 1e3


@dataclass(frozen=True)
class Hardware:
    """What `devicectl` says of a phone."""

    device: str
    arch: str


@dataclass(frozen=True)
class IPhone:
    """See `runtimes.harness.on_device.device.OnDevice`. `device` and `credentials` are coremltools' own objects."""

    device: Any
    hardware: Hardware
    credentials: Any
    host: bool = False
    runtime: str = "coreml"

    def check(self, opened: OpenBundle, asked: Asked) -> None:
        refuse_threads(asked)
        if asked.sustained is not None and (count := len(sustained_entry(opened).artifacts)) > 1:
            name = sustained_entry(opened).name
            raise DeviceError(f"--sustained: {name} is in {count} pieces, of which the phone holds one: leave it out")

    def measure(self, opened: OpenBundle, asked: Asked, listener: Listener) -> Result:
        try:
            return asyncio.run(self._measure(opened, asked, listener))
        except (DeviceError, asyncio.CancelledError):
            raise
        except Exception as error:  # coremltools raises its own errors, which share no base, and ValueError or TypeError
            raise DeviceError(f"{self.device.name}: {_line(error)}") from error

    async def _measure(self, opened: OpenBundle, asked: Asked, listener: Listener) -> Result:
        start = now()
        rows: list[Row] = []
        placements: list[Placement] = []
        sustained = None
        with TemporaryDirectory() as scratch:
            listener.stage("model runner", 1)
            listener.step("build, sign and install")
            device = await self.device.prepare_for_model_debugging(self.credentials, working_directory=Path(scratch))
            try:
                for entry in opened.components:
                    listener.stage(entry.name, 3 * len(entry.artifacts))
                    row, placed = await _component(device, opened, entry, asked.iterations, listener)
                    rows.append(row)
                    placements += placed
                if asked.sustained is not None:
                    sustained = await _sustained(device, opened, asked.sustained, listener)
            finally:
                device.session.stop()
        return Result(
            host=False,
            start_datetime=start,
            benchmark_model=describe_model(opened.manifest),
            backend_settings=BackendSettings(
                framework="coreml", framework_version=self.device.os_version, format="coreml", threads=None
            ),
            environment_info=EnvironmentInfo(
                platform="ios",
                device=self.hardware.device,
                arch=self.hardware.arch,
                os=f"iOS {self.device.os_version} ({self.device.os_build_number})",
                cores=None,
                total_mem=None,
            ),
            rows=tuple(rows),
            placements=tuple(placements),
            sustained=sustained,
        )


def connect(which: str | None, runner: Path | None, runtime: str | None) -> IPhone:
    """The connected iPhone of that name or identifier, or the only one. Raises `DeviceError`, saying what else can be done."""
    if sys.platform != "darwin":
        raise DeviceError(
            f"--device iphone needs macOS with Xcode, to build and sign what runs on the phone, and this is {sys.platform}: "
            f"run it on a Mac, {OTHERWISE}"
        )
    refuse_other_than_coreml("iphone", runner, runtime)
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise DeviceError(f"--device iphone needs Xcode's {missing[0]}, which is not on PATH: install Xcode, {OTHERWISE}")
    with quiet():
        from coremltools.models.ml_program.experimental import remote_device
    credentials = remote_device.AppSigningCredentials(**signature(os.environ))
    try:
        connected = remote_device.Device.get_connected_devices(remote_device.DeviceType.IPHONE)
    except Exception as error:  # see above
        raise DeviceError(f"--device iphone: {_line(error)}") from error
    device = choose(connected, which)
    return IPhone(device, parse_hardware(_list_devices(), device.udid), credentials)


def choose(connected: Sequence[Any], which: str | None) -> Any:
    """The phone (coremltools' `Device`) of that name, identifier or udid, or the only one. Raises `DeviceError`."""
    listed = ", ".join(device.name for device in connected)
    found = [device for device in connected if which in (None, device.name, device.identifier, device.udid)]
    if not found and which is not None:
        raise DeviceError(f"--device iphone:{which} is not connected; there is {listed or 'none at all'}")
    if not found:
        raise DeviceError(f"--device iphone: no iPhone is connected; plug one in, trust this Mac, unlock it, {OTHERWISE}")
    if len(found) > 1:
        raise DeviceError(f"--device iphone: {len(found)} are connected; choose one with iphone:NAME: {listed}")
    if found[0].developer_mode_state != "enabled":
        raise DeviceError(f"--device iphone: {found[0].name} is not in developer mode: turn it on in Privacy & Security")
    return found[0]


def signature(environ: Mapping[str, str]) -> dict[str, str | None]:
    """The fields of coremltools' `AppSigningCredentials`. Raises `DeviceError` where the environment has none."""
    team, profile = environ.get("DEVELOPMENT_TEAM") or None, environ.get("PROVISIONING_PROFILE") or None
    identifier = environ.get("PRODUCT_BUNDLE_IDENTIFIER") or None
    if team is None and profile is None:
        raise DeviceError(
            "--device iphone signs what runs on the phone: set DEVELOPMENT_TEAM to your team's identifier, or "
            f"PROVISIONING_PROFILE with PRODUCT_BUNDLE_IDENTIFIER, {OTHERWISE}"
        )
    if profile is not None and identifier is None:
        raise DeviceError("--device iphone: PROVISIONING_PROFILE needs the PRODUCT_BUNDLE_IDENTIFIER that it was made for")
    return {"development_team": team, "provisioning_profile_uuid": profile, "bundle_identifier": identifier}


def parse_hardware(text: str, udid: str) -> Hardware:
    """The phone of that udid in the JSON of `devicectl list devices`. Raises `DeviceError` where it is not there."""
    for device in json.loads(text).get("result", {}).get("devices", []):
        properties = device.get("hardwareProperties", {})
        if properties.get("udid") == udid:
            names = [properties.get(key) for key in ("marketingName", "productType")]
            arch = properties.get("cpuType", {}).get("name", "arm64")
            return Hardware(" ".join(f"({n})" if k else n for k, n in enumerate(filter(None, names))) or "iPhone", arch)
    raise DeviceError(f"--device iphone: devicectl does not list {udid}")


async def _component(
    device: Any, opened: OpenBundle, entry: ComponentEntry, iterations: int, listener: Listener
) -> tuple[Row, list[Placement]]:
    """Loads and runs of a component; of one in chunks, the sums over the chunks."""
    loads: list[list[float]] = []
    runs: list[list[float]] = []
    placements = []
    for artifact, inputs in zip(entry.artifacts, artifact_inputs(opened, entry), strict=True):
        listener.step("loads")
        benchmarker = _benchmarker(device, opened.folder / artifact.path, entry)
        loads.append(_seconds(await benchmarker.benchmark_load(iterations=2)))
        listener.step("runs")
        runs.append(_seconds(await benchmarker.benchmark_predict(inputs=inputs, iterations=WARM_UP + iterations)))
        listener.step("compute plan")
        placements.append(await _placement(device, opened.folder, entry, artifact.path))
    samples = [sum(values) for values in zip(*runs, strict=True)]
    row = Row(
        name=entry.name,
        delegate=entry.compute_units,
        bytes=entry.bytes,
        load_mode=None,
        model_load_time=LoadTime(first=sum(load[0] for load in loads), warm=sum(load[1] for load in loads)),
        warm_up=tuple(samples[:WARM_UP]),
        latency=Latency.of(samples[WARM_UP:]),
        memory=None,
    )
    return row, placements


async def _sustained(device: Any, opened: OpenBundle, seconds: float, listener: Listener) -> Sustained:
    """One component without a pause but what asking for the next run takes; `check` has made sure that it is one artifact."""
    entry = sustained_entry(opened)
    listener.stage("sustained", 1)
    listener.step(f"{entry.name} for {seconds:g} s")
    inputs: dict[str, np.ndarray] = next(artifact_inputs(opened, entry))
    benchmarker = _benchmarker(device, opened.folder / entry.artifacts[0].path, entry)
    await benchmarker.benchmark_predict(inputs=inputs, iterations=WARM_UP)
    samples: list[float] = []
    end = time.monotonic() + seconds
    while not samples or time.monotonic() < end:
        samples += _seconds(await benchmarker.benchmark_predict(inputs=inputs, iterations=1))
    return Sustained.of(entry.name, seconds, samples)


def _benchmarker(device: Any, package: Path, entry: ComponentEntry) -> Any:
    with quiet():
        import coremltools as ct
        from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    units = ct.ComputeUnit[entry.compute_units or "ALL"]
    return MLModelBenchmarker(ct.models.MLModel(str(package), compute_units=units, skip_model_load=True), device)


async def _placement(device: Any, folder: Path, entry: ComponentEntry, artifact: str) -> Placement:
    with quiet():
        import coremltools as ct
        from coremltools.models.ml_program.experimental.compute_plan_utils import load_compute_plan_from_path_on_device
        from coremltools.models.utils import compile_model
    requested = entry.compute_units or "ALL"
    with TemporaryDirectory() as scratch:
        compiled = compile_model(str(folder / artifact), str(Path(scratch) / "model.mlmodelc"))
        units = ct.ComputeUnit[requested]
        plan = await load_compute_plan_from_path_on_device(path=compiled, compute_units=units, device=device)
        return place(plan, entry.name, artifact, requested)


def _seconds(measurement: Any) -> list[float]:
    """The samples of coremltools' `Measurement`, which are milliseconds."""
    return [sample / _MILLISECONDS for sample in measurement.samples]


def _list_devices() -> str:
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "devices.json"
        try:
            subprocess.run(["xcrun", "devicectl", "list", "devices", "-j", str(file)], capture_output=True, check=True)
            return file.read_text(encoding="utf-8")
        except (OSError, subprocess.CalledProcessError) as error:
            raise DeviceError(f"--device iphone: devicectl does not list the devices: {error}") from error


def _line(error: Exception) -> str:
    """The last line of an error, which may hold what a tool printed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
