"""The `adb` command of the Android SDK: which devices are attached, and what one of them is told.

Every parser is a function of the text that adb or a tool of the phone prints, as documented by Android:
https://developer.android.com/tools/adb and https://source.android.com/docs/core/power/thermal-mitigation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from runtimes.harness.on_device.device import DeviceError
from runtimes.harness.results import Condition, ThermalStatus

SERIAL = "ANDROID_SERIAL"
_ATTACHED = re.compile(r"(?P<serial>\S+)\s+(?P<state>no permissions|\S+)(?P<rest>.*)")
_PROPERTY = re.compile(r"^\[(?P<key>[^\]]+)\]: \[(?P<value>[^\]]*)\]\r?$", re.MULTILINE)
_TEMPERATURE = re.compile(r"Temperature\{mValue=(?P<value>-?[\d.]+), mType=(?P<type>-?\d+), mName=(?P<name>[^,}]+)")
# android.os.Temperature.TYPE_*: 6, 7 and 8 are the battery's voltage, current and charge, and -1 has no unit.
_NO_TEMPERATURES = {-1, 6, 7, 8}
_STATUSES: tuple[ThermalStatus, ...] = get_args(ThermalStatus)
_TO_DO = {
    "unauthorized": "allow this computer in the dialog on its screen",
    "offline": "unplug it and plug it in again",
    "authorizing": "wait until it is ready",
    "no permissions": "let your user open it (a udev rule; see developer.android.com/tools/device)",
}


@dataclass(frozen=True)
class Attached:
    """A line of `adb devices -l`. `state` is "device" for one that can be used; `model` is None where adb does not know it."""

    serial: str
    state: str
    model: str | None

    def __str__(self) -> str:
        return f"{self.serial} ({self.model})" if self.model else self.serial


@dataclass(frozen=True)
class Adb:
    """The command, for one device. Every call raises `DeviceError`, one line, where it fails."""

    program: str
    serial: str

    def shell(self, script: str) -> str:
        """What a script for the phone's shell prints, its errors after that."""
        done = self._run("shell", script)
        if done.returncode != 0:
            raise DeviceError(f"{self.serial}: {_last(done.stderr, done.stdout, f'exit code {done.returncode}')}")
        return done.stdout + done.stderr

    def push(self, files: Sequence[Path], folder: str) -> None:
        """Copies files into a folder of the phone that is there."""
        done = self._run("push", *map(str, files), f"{folder}/")
        if done.returncode != 0:
            raise DeviceError(f"{self.serial}: {_last(done.stderr, done.stdout, 'adb push failed')}")

    def clean(self, script: str) -> None:
        """Runs a script that tidies up; a Ctrl-C at the terminal does not reach it."""
        done = self._run("shell", script, own_session=True)
        if done.returncode != 0:
            raise DeviceError(f"{self.serial} could not be tidied: {_last(done.stderr, done.stdout, 'adb failed')}")

    def _run(self, *arguments: str, own_session: bool = False) -> subprocess.CompletedProcess[str]:
        return _call([self.program, "-s", self.serial, *arguments], own_session)


def find_adb() -> str:
    """The path of adb. Raises `DeviceError` where PATH has none."""
    found = shutil.which("adb")
    if found is None:
        raise DeviceError("--device android needs adb, which is not on PATH: install Android's platform-tools (Debian: adb)")
    return found


def attached(program: str) -> tuple[Attached, ...]:
    """The devices that adb sees; its server is started where it does not run. Raises `DeviceError`."""
    done = _call([program, "devices", "-l"], own_session=True)
    if done.returncode != 0:
        raise DeviceError(f"adb does not list its devices: {_last(done.stderr, done.stdout, f'exit code {done.returncode}')}")
    return parse_devices(done.stdout)


def choose(devices: Sequence[Attached], wanted: str | None) -> Attached:
    """The device to measure: the one of that serial, $ANDROID_SERIAL's, or the only one. Raises `DeviceError`."""
    by, named = ("--device android:", wanted) if wanted else (f"{SERIAL}=", os.environ.get(SERIAL) or None)
    if named is not None:
        found = [device for device in devices if device.serial == named]
        if not found:
            listed = ", ".join(map(str, devices)) or "none at all"
            raise DeviceError(f"{by}{named} is not attached; adb sees {listed}")
    else:
        found = [*devices]
    if not found:
        raise DeviceError("--device android: no device is attached; plug one in and allow USB debugging, so that adb sees it")
    usable = [device for device in found if device.state == "device"]
    if len(usable) > 1:
        listed = ", ".join(map(str, usable))
        raise DeviceError(f"--device android: {len(usable)} devices are attached; choose one with android:SERIAL: {listed}")
    if not usable:
        first = found[0]
        raise DeviceError(f"--device android: {first}: {first.state}; {_TO_DO.get(first.state, 'it cannot be used')}")
    return usable[0]


def parse_devices(text: str) -> tuple[Attached, ...]:
    """What `adb devices -l` lists, below its heading."""
    found = []
    for line in text.splitlines():
        match = _ATTACHED.fullmatch(line.strip())
        if match is None or line.startswith(("List of devices", "*")):
            continue
        model = re.search(r"\bmodel:(\S+)", match["rest"])
        found.append(Attached(match["serial"], match["state"], model[1] if model else None))
    return tuple(found)


def parse_properties(text: str) -> dict[str, str]:
    """What `getprop` prints, by name."""
    return {match["key"]: match["value"] for match in _PROPERTY.finditer(text)}


def parse_memory(text: str) -> int | None:
    """Bytes of memory, from /proc/meminfo; None where it does not say."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def parse_cores(text: str) -> int | None:
    """Number of processors, from /sys/devices/system/cpu/possible ("0-7" or "0-3,6"); None where that is no list of them."""
    ranges = re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text.strip())
    if ranges is None:
        return None
    ends = [part.split("-") for part in text.strip().split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def parse_condition(thermal: str, battery: str) -> Condition:
    """How warm and charged the phone is, from `dumpsys thermalservice` (Android 10 and later) and `dumpsys battery`.

    The temperatures are those that the hardware gives now, not the cached ones; a sensor that gives 0 is not there.
    """
    status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    _, _, current = thermal.partition("Current temperatures from HAL:")
    current = current.partition("Current cooling devices")[0]
    temperatures = {
        match["name"]: float(match["value"])
        for match in _TEMPERATURE.finditer(current)
        if int(match["type"]) not in _NO_TEMPERATURES and float(match["value"]) != 0
    }
    fields = dict(re.findall(r"^\s*([A-Za-z ]+): (.*?)\s*$", battery, re.MULTILINE))
    level, scale, tenths = (_number(fields.get(name)) for name in ("level", "scale", "temperature"))
    powered = [value for name, value in fields.items() if name.endswith(" powered")]
    return Condition(
        thermal_status=_STATUSES[int(status[1])] if status and int(status[1]) < len(_STATUSES) else None,
        temperatures=dict(sorted(temperatures.items())),
        battery_level=None if level is None or not scale else level / scale,
        battery_temperature=None if tenths is None else tenths / 10,
        powered="true" in powered if powered else None,
    )


def name_device(properties: Mapping[str, str]) -> tuple[str, str | None, str]:
    """Model, chip and system of a phone from its properties; the chip is None where it does not tell."""
    maker, model = (properties.get(f"ro.product.{key}", "") for key in ("manufacturer", "model"))
    chip = " ".join(filter(None, (properties.get(f"ro.soc.{key}", "") for key in ("manufacturer", "model"))))
    system = f"Android {properties.get('ro.build.version.release', '?')} ({properties.get('ro.build.id', '?')})"
    name = model if model.lower().startswith(maker.lower()) else f"{maker} {model}"
    return name.strip() or "unknown", chip or properties.get("ro.board.platform") or None, system


def _call(command: Sequence[str], own_session: bool) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, start_new_session=own_session
        )
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be run: {error.strerror}") from error


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def _last(*texts: str) -> str:
    """The last line that says something, of the first text that does."""
    return next(line for text in texts for line in reversed(text.splitlines()) if line.strip()).strip()
