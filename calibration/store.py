"""What lies on disk between two units of work: tensors of all prompts in numpy's format, written prompt by prompt."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError

from calibration.errors import CalibrationError

CACHE = "EXPORT_FLASH_CACHE"
"""Environment variable with the folder that holds what can be computed again."""


def default_cache() -> Path:
    """$EXPORT_FLASH_CACHE/calibration, or ~/.cache/export-flash/calibration."""
    return Path(os.environ.get(CACHE) or "~/.cache/export-flash").expanduser() / "calibration"


class Writer:
    """One tensor in the making."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._file = file

    def append(self, array: np.ndarray) -> None:
        """The next prompt's part, float32 of the tensor's shape."""
        assert array.shape == self.shape, f"{array.shape} is not {self.shape}"
        self._file.write(array.astype(np.float32).tobytes())  # not through a map: a full disk would kill the process


class Store:
    """A folder of named float32 tensors [prompts, *shape]. A tensor is there whole or not at all."""

    def __init__(self, folder: Path, prompts: int) -> None:
        self.folder = folder
        self.prompts = prompts

    def read(self, name: str) -> np.ndarray:
        """As a memory map."""
        return np.load(self.path(name), mmap_mode="r")

    @contextmanager
    def writing(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[list[Writer]]:
        """Writers of new tensors, by name and shape of one prompt; they take their places at the end of the block."""
        beside = [self.path(f"{name}.part") for name, _ in shapes]
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in beside]
            for file, (_, shape) in zip(files, shapes, strict=True):
                header = {"descr": "<f4", "fortran_order": False, "shape": (self.prompts, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            yield [Writer(file, shape) for file, (_, shape) in zip(files, shapes, strict=True)]
        for path, (name, _) in zip(beside, shapes, strict=True):
            path.rename(self.path(name))

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; the lock dies with the process.

    Inside the block a disk that is full or refuses to be written is a `CalibrationError`.
    """
    advice = f"free some room or choose another folder with {CACHE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CalibrationError(f"{folder}: another process calibrates the same now; wait for it") from None
            yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(f"calibration cannot write {folder}: {reason}; {advice}") from error
