"""safetensors files as one mapping from name to tensor: memory-mapped, so that a tensor is read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types that a checkpoint's weights may have, in safetensors' names."""


class TensorReader(Protocol):
    """Named tensors of one checkpoint folder."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def kind(self, name: str) -> str:
        """Element type in safetensors' names."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored: its pages are read from the file as they are used."""
        ...


class SafetensorsReader:
    """One or several safetensors files; opening reads their headers only."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._slices: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        for path in paths:
            file = open_safetensors(path)
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                if name in self._files:
                    raise UserError(f"{path}: tensor {name} stands in two files of this checkpoint; keep one")
                self._files[name] = file
                self._slices[name] = file.get_slice(name)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(s.get_shape()) for name, s in self._slices.items()}

    def kind(self, name: str) -> str:
        return str(self._slices[name].get_dtype())

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1 of a tensor, without the others."""
        return self._slices[name][start:stop]


def open_safetensors(path: Path) -> Any:
    """safetensors' own handle; a file that is missing, cut short or of another kind is one `UserError`."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the checkpoint is incomplete; download it again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from error
