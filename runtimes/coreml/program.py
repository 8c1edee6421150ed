"""An ML program as plain data: blocks of operations whose inputs are names of values or constants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from runtimes.coreml.blob import Blob, BlobFile, unpack_bits
from runtimes.coreml.datatypes import DATA_TYPES, STRING, DataType
from runtimes.coreml.package import Package
from runtimes.coreml.schema import Model
from runtimes.graph import GraphError, TensorSpec

UNKNOWN = -1
"""A dimension that is only known when the program runs."""


@dataclass(frozen=True)
class ValueType:
    """Data type and shape of a value; a dimension may be `UNKNOWN`."""

    dtype: DataType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Named:
    """A value's name and type; `type` is None for lists, dictionaries and states, which are no tensors."""

    name: str
    type: ValueType | None


@dataclass(frozen=True)
class Literal:
    """A value written in the program, or a reference into the weight file. Strings are arrays of objects."""

    type: ValueType
    content: np.ndarray | Blob

    def array(self) -> np.ndarray:
        return self.content.read() if isinstance(self.content, Blob) else self.content


Source = str | Literal


@dataclass(frozen=True)
class Operation:
    """`inputs` maps a parameter to its arguments: one, or several for a parameter that takes a tuple."""

    type: str
    inputs: dict[str, tuple[Source, ...]]
    outputs: tuple[Named, ...]
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{self.type} (output {self.outputs[0].name!r})" if self.outputs else f"{self.type} (no output)"


@dataclass(frozen=True)
class Block:
    inputs: tuple[Named, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The function of a package that runs by default."""

    path: Path
    block: Block
    input_specs: tuple[TensorSpec, ...]
    output_specs: tuple[TensorSpec, ...]


def read_program(package: Package) -> Program:
    """Reads the program; of the weights only the headers. Raises `GraphError` for anything else than an ML program."""
    try:
        model = Model.FromString(package.model.read_bytes())
    except DecodeError as error:
        raise GraphError(f"{package.path}: the model file is damaged or truncated") from error
    functions = {entry.key: entry.value for entry in model.mlProgram.functions}
    if not functions:
        raise GraphError(f"{package.path}: the model is no ML program (convert with convert_to='mlprogram')")
    name = model.description.defaultFunctionName or "main"
    if name not in functions:
        raise GraphError(f"{package.path}: the function {name!r} is missing; the program has {sorted(functions)}")
    reader = _Reader(package)
    function = functions[name]
    specializations = {entry.key: entry.value for entry in function.block_specializations}
    if function.opset not in specializations:
        raise GraphError(f"{package.path}: the program has no block for its own opset {function.opset!r}")
    block = reader.block(specializations[function.opset])
    inputs = reader.named_values(function.inputs)
    return Program(package.path, block, _input_specs(package.path, inputs), _output_specs(package.path, block, inputs))


def all_operations(block: Block) -> Iterable[Operation]:
    """Every operation of the block and of the blocks inside it."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from all_operations(inner)


class _Reader:
    """Turns protocol buffer messages into the dataclasses above, opening each weight file once."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._files: dict[str, BlobFile] = {}

    def block(self, message: Any) -> Block:
        operations = tuple(self._operation(each) for each in message.operations)
        return Block(self.named_values(message.inputs), operations, tuple(message.outputs))

    def named_values(self, messages: Iterable[Any]) -> tuple[Named, ...]:
        return tuple(Named(each.name, self._type(each.type)) for each in messages)

    def _operation(self, message: Any) -> Operation:
        inputs: dict[str, tuple[Source, ...]] = {}
        # iOS 16 constexpr operations carry their parameters as attributes, all others as inputs.
        for entry in message.attributes:
            if entry.key != "name":
                inputs[entry.key] = (self._literal(entry.value, message),)
        for entry in message.inputs:
            inputs[entry.key] = tuple(
                binding.name if binding.name else self._literal(binding.value, message) for binding in entry.value.arguments
            )
        blocks = tuple(self.block(each) for each in message.blocks)
        return Operation(message.type, inputs, self.named_values(message.outputs), blocks)

    def _type(self, message: Any) -> ValueType | None:
        if not message.HasField("tensorType"):
            return None
        tensor = message.tensorType
        if tensor.dataType not in DATA_TYPES:
            raise GraphError(f"{self._package.path}: the program has values of an unknown data type {tensor.dataType}")
        shape = tuple(each.constant.size if each.HasField("constant") else UNKNOWN for each in tensor.dimensions)
        return ValueType(DATA_TYPES[tensor.dataType], shape)

    def _literal(self, message: Any, operation: Any) -> Literal:
        kind = self._type(message.type)
        if kind is None:
            raise GraphError(f"{self._package.path}: operation {_label(operation)} has a constant that is no tensor")
        if message.HasField("blobFileValue"):
            name = message.blobFileValue.fileName
            if name not in self._files:
                self._files[name] = BlobFile(self._package.blob_path(name))
            return Literal(kind, self._files[name].blob(message.blobFileValue.offset, kind.dtype, kind.shape))
        try:
            return Literal(kind, _immediate(message.immediateValue.tensor, kind))
        except ValueError as error:
            where = f"{self._package.path}: a constant of operation {_label(operation)}"
            raise GraphError(f"{where} is damaged: {error}") from error


def _label(message: Any) -> str:
    return f"{message.type} (output {message.outputs[0].name!r})" if message.outputs else message.type


def _immediate(tensor: Any, kind: ValueType) -> np.ndarray:
    """A value written in the program itself. Types without a field of their own are stored as bytes."""
    dtype = kind.dtype
    if tensor.HasField("bytes"):
        raw = np.frombuffer(tensor.bytes.values, dtype=np.uint8)
        if dtype.bits < 8:
            return unpack_bits(raw, dtype.bits, int(np.prod(kind.shape)), dtype.signed).reshape(kind.shape)
        return raw.view(dtype.array).reshape(kind.shape)
    for field in ("floats", "ints", "bools", "strings", "longInts", "doubles"):
        if tensor.HasField(field):
            values = np.array(getattr(tensor, field).values, dtype=object if dtype is STRING else dtype.array)
            return values.reshape(kind.shape)
    return np.zeros(kind.shape, dtype=dtype.array)  # proto3 leaves out a tensor without elements


def _input_specs(path: Path, inputs: tuple[Named, ...]) -> tuple[TensorSpec, ...]:
    specs = []
    for each in inputs:
        if each.type is None:
            raise GraphError(f"{path}: input {each.name!r} is no tensor; models with state cannot be run here")
        if UNKNOWN in each.type.shape:
            raise GraphError(f"{path}: input {each.name!r} has a flexible shape {each.type.shape}; export with fixed shapes")
        specs.append(TensorSpec(each.name, each.type.dtype.name, each.type.shape))
    return tuple(specs)


def _output_specs(path: Path, block: Block, inputs: tuple[Named, ...]) -> tuple[TensorSpec, ...]:
    """Dimensions that depend on the values, as after `non_zero`, are given as -1."""
    types = {each.name: each.type for operation in block.operations for each in operation.outputs}
    types |= {each.name: each.type for each in inputs}
    specs = []
    for name in block.outputs:
        kind = types[name]
        if kind is None:
            raise GraphError(f"{path}: output {name!r} is no tensor; only tensors can be returned here")
        specs.append(TensorSpec(name, kind.dtype.name, kind.shape))
    return tuple(specs)
