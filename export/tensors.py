"""safetensors files as one mapping from name to tensor, each read when it is asked for.

A tensor is read into memory of its own: the pages of a mapped file would stay with the process, and a large checkpoint with
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types that a checkpoint's weights may have, in safetensors' names."""
_NAMED = 5  # tensors that an error lists before it counts the rest
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorReader(Protocol):
    """Named tensors of one checkpoint folder."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def kind(self, name: str) -> str:
        """Element type in safetensors' names."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored."""
        ...


class SafetensorsReader:
    """One or several safetensors files; opening reads their headers only."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._slices: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        for path in paths:
            file = open_safetensors(path)
            offsets = _offsets(path)
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                if name in self._files:
                    raise UserError(f"{path}: tensor {name} stands in two files of this checkpoint; keep one")
                self._files[name], self._offsets[name] = path, offsets[name]
                self._slices[name] = file.get_slice(name)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(s.get_shape()) for name, s in self._slices.items()}

    def kind(self, name: str) -> str:
        return str(self._slices[name].get_dtype())

    def tensor(self, name: str) -> Tensor:
        return self._read(name, 0, self.shapes[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1 of a tensor, without the others."""
        row = self.shapes[name][1:]
        return self._read(name, start * prod(row), (stop - start, *row))

    def _read(self, name: str, first: int, shape: tuple[int, ...]) -> Tensor:
        """The values of a tensor from the one numbered `first` on."""
        dtype = TORCH[self.kind(name)]
        content = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with self._files[name].open("rb") as file:
            file.seek(self._offsets[name] + first * dtype.itemsize)
            if file.readinto(content.numpy().data) != content.numel():
                raise UserError(f"{self._files[name]} ends within tensor {name}; download it again")
        return content.view(dtype).reshape(shape)


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor begins in a file that safetensors has opened: 8 bytes of length, a JSON header, then the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def listed(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def open_safetensors(path: Path) -> Any:
    """safetensors' own handle; a file that is missing, cut short or of another kind is one `UserError`."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the checkpoint is incomplete; download it again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from error
