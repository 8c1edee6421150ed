"""Where torch computes."""

from __future__ import annotations

import torch

from calibration.errors import CalibrationError


def available_devices() -> tuple[str, ...]:
    """The names of what this computer can calibrate on, the fastest first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return tuple(name for name, is_there in there.items() if is_there)


def choose_device(name: str | None) -> torch.device:
    """The device of that name (cpu, cuda or mps), or the fastest there is. Raises `CalibrationError` for one that is not."""
    there = available_devices()
    if name is not None and name not in there:
        raise CalibrationError(f"--calibration-device {name} is not available on this computer; choose from {', '.join(there)}")
    return torch.device(name or there[0])
