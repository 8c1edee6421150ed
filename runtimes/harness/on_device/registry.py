"""Which kinds of device there are. A new one is one file and one entry in `KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtimes.harness.on_device import android, iphone, mac
from runtimes.harness.on_device.device import DeviceError, OnDevice

Connect = Callable[[str | None, Path | None, str | None], OnDevice]
"""Finds a device: (which one of its kind, the program that runs artifacts there, the runtime asked for); `DeviceError`."""

KINDS: dict[str, Connect] = {"mac": mac.connect, "iphone": iphone.connect, "android": android.connect}


def connect(device: str, runner: Path | None = None, runtime: str | None = None) -> OnDevice:
    """The device that `--device mac|iphone[:NAME]|android[:SERIAL]` means. Raises `DeviceError` where there is none."""
    kind, _, which = device.partition(":")
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise DeviceError(f"--device {device} does not exist; choose from {known}, or iphone:NAME, android:SERIAL")
    return KINDS[kind](which or None, runner, runtime)
