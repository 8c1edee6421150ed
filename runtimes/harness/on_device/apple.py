"""What Apple's devices cannot be asked: they run Core ML, which takes no program of the user's and chooses its own threads."""

from __future__ import annotations

from pathlib import Path

from runtimes.harness.on_device.device import Asked, DeviceError


def refuse_other_than_coreml(kind: str, runner: Path | None, runtime: str | None) -> None:
    """Raises `DeviceError` for a program of the user's, or for any runtime but Core ML."""
    if runner is not None:
        raise DeviceError(f"--runner {runner} is for --device android; on {kind} Core ML itself runs: leave it out")
    if runtime not in (None, "coreml"):
        raise DeviceError(f"--runtime {runtime} does not run on --device {kind}, which is measured with coreml: leave it out")


def refuse_threads(asked: Asked) -> None:
    """Raises `DeviceError` for a number of threads."""
    if asked.threads is not None:
        raise DeviceError(f"--threads {asked.threads} cannot be given to Core ML, which makes its own choice: leave it out")
