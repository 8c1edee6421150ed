"""Constants of a program, and the decompressed weights that are kept in memory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtimes.coreml.blob import Blob, Packed
from runtimes.coreml.compressed import CONSTANT_EXPRESSIONS, TAKES_PACKED
from runtimes.coreml.program import Literal, Operation, ValueType
from runtimes.graph import GraphError


@dataclass(frozen=True)
class Stored:
    """A constant as it lies in the program or in the weight file."""

    literal: Literal

    @property
    def type(self) -> ValueType:
        return self.literal.type

    @property
    def in_file(self) -> bool:
        return isinstance(self.literal.content, Blob)

    def array(self) -> np.ndarray:
        return self.literal.array()

    def content(self) -> np.ndarray | Packed:
        """The value as it is stored."""
        content = self.literal.content
        return content.content() if isinstance(content, Blob) else content


@dataclass(frozen=True)
class Decompressed:
    """The result number `place` of a constexpr operation over other constants."""

    operation: Operation
    type: ValueType
    inputs: Mapping[str, Constant]
    place: int

    @property
    def in_file(self) -> bool:
        return True

    def array(self) -> np.ndarray:
        try:
            arguments = {name: self._argument(name, constant) for name, constant in self.inputs.items()}
            result = CONSTANT_EXPRESSIONS[self.operation.type](**arguments)
        except (ValueError, IndexError, TypeError) as error:
            raise GraphError(f"operation {self.operation} cannot be decompressed: {error}") from error
        array = result[self.place] if isinstance(result, tuple) else result
        if array.shape != self.type.shape:
            raise GraphError(f"operation {self.operation} gave shape {array.shape}; the program declares {self.type.shape}")
        return array

    def _argument(self, name: str, constant: Constant) -> np.ndarray | Packed:
        if isinstance(constant, Stored) and (self.operation.type, name) in TAKES_PACKED:
            return constant.content()
        return constant.array()


Constant = Stored | Decompressed


def constants_of(operation: Operation, known: Mapping[str, Constant]) -> dict[str, Constant]:
    """The values that a `const` or constexpr operation defines. Raises `GraphError` if an input is no constant."""
    if operation.type == "const":
        (source,) = operation.inputs["val"]
        assert isinstance(source, Literal)
        return {operation.outputs[0].name: Stored(source)}
    function = CONSTANT_EXPRESSIONS[operation.type]
    inputs: dict[str, Constant] = {}
    accepted = inspect.signature(function).parameters
    for name, sources in operation.inputs.items():
        if name not in accepted:
            raise GraphError(f"operation {operation} has an input {name!r} that this executor does not know")
        (source,) = sources
        if isinstance(source, str) and source not in known:
            raise GraphError(f"operation {operation} takes {source!r}, which is no constant")
        inputs[name] = known[source] if isinstance(source, str) else Stored(source)
    for name, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and name not in inputs:
            raise GraphError(f"operation {operation} lacks its input {name!r}")
    values: dict[str, Constant] = {}
    for place, output in enumerate(operation.outputs):
        assert output.type is not None
        values[output.name] = Decompressed(operation, output.type, inputs, place)
    return values


def to_tensor(constant: Constant, widen: bool) -> Tensor:
    """The constant in its storage type; float16 as float32 if `widen`. Shares the file's pages where nothing changes."""
    array = constant.array()
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy()).to(constant.type.dtype.storage)
    return tensor.float() if widen and tensor.dtype is torch.float16 else tensor


class WeightCache:
    """Weights ready for use, at most `limit_bytes` of them.

    What fits is kept for good, and the rest is made anew for every use. A graph uses its weights in the same order in every
    run, so dropping the least recently used one would drop exactly what is needed next and never find anything.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._kept: dict[tuple[int, bool], Tensor] = {}

    def get(self, constant: Constant, widen: bool) -> Tensor:
        if isinstance(constant, Stored) and not self._changes(constant, widen):
            return to_tensor(constant, widen)  # the file's own pages: nothing of ours to keep
        key = (id(constant), widen)
        kept = self._kept.get(key)
        if kept is None:
            kept = to_tensor(constant, widen)
            nbytes = math.prod(kept.shape) * kept.element_size()
            if self.held_bytes + nbytes <= self.limit_bytes:
                self._kept[key] = kept
                self.held_bytes += nbytes
        return kept

    @staticmethod
    def _changes(constant: Stored, widen: bool) -> bool:
        """Whether the tensor differs from the bytes in the file."""
        dtype = constant.type.dtype
        return dtype.bits < 8 or (widen and dtype.storage is torch.float16) or dtype.bits != 8 * dtype.storage.itemsize
