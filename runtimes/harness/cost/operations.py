"""What one artifact costs, operation by operation, whatever its format.

A reader (coreml.py, onnx.py, executorch.py) lists an artifact's steps, values and stored constants as a `Listing`; `tally`
turns that into costs by the same rules for every format, so that the same model has the same count in each:

- Multiply-accumulates are those of matrix products, convolutions and attention, as torch.utils.flop_counter counts them
  (two of its operations are one of ours). Element-wise arithmetic, norms, softmax, pooling, interpolation and data movement
  are no multiply-accumulates.
- A step whose operands are all constants depends on no input: runtimes and converters compute it once, at load. It is no
  operation of a run, and its result counts as a constant that is stored as its operands are. So are decompressed weights.
- The bytes of a weight are those of its stored form: indices and palettes, integers and scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """Shape and bits an element of a tensor as it lies in memory while the graph runs."""

    shape: tuple[int, ...]
    bits: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return packed_bytes(self.elements, self.bits)


@dataclass(frozen=True)
class Step:
    """One operation of a graph: `macs` multiply-accumulates over named tensors. Parameters such as an axis or a shape are no
    operands. `looks_up`: of its first operand it reads only as many elements as it gives."""

    name: str
    type: str
    macs: int
    operands: tuple[str, ...]
    results: tuple[str, ...]
    looks_up: bool = False


@dataclass
class Listing:
    """An artifact as its reader finds it; `steps` are in the order they run.

    `stored` names, for every constant tensor, the parts that it is kept in and the bytes of each; tensors may share parts.
    """

    steps: list[Step] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    stored: dict[str, dict[str, int]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class OperationCost:
    """One run of one operation. Bytes: of weights read as they are stored, of activations read, of activations written."""

    name: str
    type: str
    macs: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def activation_bytes(self) -> int:
        return self.input_bytes + self.output_bytes


@dataclass(frozen=True)
class ArtifactCost:
    """One run of one artifact.

    `stored_bytes`: of all constants that its operations use, each once. `boundary_bytes`: of the graph's inputs and outputs.
    """

    path: str
    operations: tuple[OperationCost, ...]
    stored_bytes: int
    boundary_bytes: int

    @property
    def macs(self) -> int:
        return sum(operation.macs for operation in self.operations)

    @property
    def weight_bytes(self) -> int:
        return sum(operation.weight_bytes for operation in self.operations)

    @property
    def activation_bytes(self) -> int:
        return sum(operation.activation_bytes for operation in self.operations)


def tally(path: str, listing: Listing) -> ArtifactCost:
    """The costs of the listed artifact by the rules above."""
    parts: dict[str, Mapping[str, int]] = dict(listing.stored)
    values, used, operations = listing.values, dict[str, int](), list[OperationCost]()
    for step in listing.steps:
        constants = [name for name in step.operands if name in parts]
        used |= _joined(parts[name] for name in constants)
        if len(constants) == len(step.operands):
            for name in step.results:
                parts[name] = _joined(parts[operand] for operand in constants)
            continue
        read = _looked_up(step, parts, values) if step.looks_up else sum(_joined(parts[name] for name in constants).values())
        operations.append(
            OperationCost(
                step.name,
                step.type,
                step.macs,
                read,
                sum(values[name].bytes for name in step.operands if name not in parts),
                sum(values[name].bytes for name in step.results),
            )
        )
    boundary = sum(values[name].bytes for name in (*listing.inputs, *listing.outputs))
    return ArtifactCost(path, tuple(operations), sum(used.values()), boundary)


def _joined(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    joined: dict[str, int] = {}
    for each in parts:
        joined |= each
    return joined


def _looked_up(step: Step, parts: Mapping[str, Mapping[str, int]], values: Mapping[str, Value]) -> int:
    """Bytes of constants that a look-up reads: of a table the share of its elements that is asked for, all of the others."""
    table, *others = step.operands
    read = sum(_joined(parts[name] for name in others if name in parts).values())
    if table not in parts:
        return read
    stored, elements = sum(parts[table].values()), values[table].elements
    wanted = min(elements, sum(values[name].elements for name in step.results))
    return read + -(-stored * wanted // elements)


def packed_bytes(elements: int, bits: int) -> int:
    """Bytes of elements that lie end to end, of 8 bits or less each or of whole bytes."""
    return -(-elements * bits // 8)


def product_macs(result: Sequence[int], depth: int) -> int:
    """A matrix product or a linear: every element of the result is a sum of `depth` products."""
    return math.prod(result) * depth


def convolution_macs(result: Sequence[int], kernel: Sequence[int]) -> int:
    """Every element of the result [batch, out, *size] is a sum over the kernel [out, in / groups, *window] of its channel."""
    return math.prod(result) * math.prod(kernel[1:])


def transposed_convolution_macs(source: Sequence[int], kernel: Sequence[int]) -> int:
    """Every element of the source [batch, in, *size] is multiplied by the kernel [in, out / groups, *window] of its channel;
    cropping the result saves nothing."""
    return math.prod(source) * math.prod(kernel[1:])


def attention_macs(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """q k^T and its product with v, over query [..., tokens, width], key and value [..., other tokens, width]."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def einsum_macs(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """One product for every combination of indices of two tensors; a single tensor is only moved or summed.

    Raises `ValueError` for more than two tensors, whose cost depends on their order, and for what it cannot read.
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    if len(shapes) > 2 or len(labels) != len(shapes) or not arrow or "." in equation:
        raise ValueError(f"the einsum {equation!r} over {len(shapes)} tensors is not one or two terms with an explicit result")
    sizes = {label: size for term, shape in zip(labels, shapes, strict=True) for label, size in zip(term, shape, strict=True)}
    if unknown := set(result) - sizes.keys():
        raise ValueError(f"the einsum {equation!r} gives {sorted(unknown)}, which no term has")
    return math.prod(sizes.values()) if len(shapes) == 2 else 0
