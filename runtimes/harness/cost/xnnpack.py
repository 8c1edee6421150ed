"""Lists the operations of a graph that was lowered for XNNPACK, as the delegate's part of a .pte holds it.

The part is a header, a flatbuffer with nodes and values, and constants; most constants are segments of the .pte, by name.
Images are [batch, height, width, channels] and kernels [out, height, width, in / groups] here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtimes.graph import GraphError
from runtimes.harness.cost.operations import Listing, Step, Value, attention_macs, product_macs

# Four zero bytes, magic, length of the header, then offset and bytes of the flatbuffer, offset and bytes of the constants.
_HEADER = struct.Struct("<4x4sHIIIQ")
_MAGIC = b"XH00"
_NONE = 0xFFFFFFFF  # an absent value

Fields = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

_WITHOUT_MACS = """
    Abs Add AvgPooling2d Ceiling Clamp Concatenate2 Concatenate3 Concatenate4 Concatenate5 Convert Copy Cos Div ELU
    Exp Floor Gelu GlobalAvgPooling2d Hardswish LeakyReLU Log MaxPooling2d Maximum Minimum Multiply Negate PReLU
    ReciprocalSquareRoot Sigmoid Sin Softmax Square SquareRoot StaticConstantPad StaticReshape StaticResizeBilinear2D
    StaticSlice StaticTranspose Subtract Tanh
"""

NO_MACS = frozenset(f"XNN{name}" for name in _WITHOUT_MACS.split())
"""Element-wise operations, pooling, interpolation and data movement."""

_OPERANDS = (
    *(f"input{number}_id" for number in ("", 1, 2)),
    *(f"{name}_id" for name in ("filter", "bias", "query", "key", "value", "scale", "mask")),
)
_BITS = {
    f"xnn_datatype_{name}": bits
    for bits, names in {
        4: ("qcint4", "qbint4"),
        8: ("qint8", "quint8", "qcint8", "qdint8", "qpint8"),
        16: ("fp16", "bf16"),
        32: ("fp32", "pfp32", "int32", "qint32", "qcint32"),
    }.items()
    for name in names
}


def graph_bytes(data: mmap.mmap, start: int, size: int) -> bytes:
    """The flatbuffer inside a delegate's part of the file."""
    if size < _HEADER.size or start + size > len(data):
        raise GraphError("a delegate ends beyond the end of the file: truncated?")
    magic, _, offset, length, _, _ = _HEADER.unpack_from(data, start)
    if magic != _MAGIC or offset + length > size:
        raise GraphError("a delegate has no valid header: the file is damaged")
    return data[start + offset : start + offset + length]


def add_graph(
    listing: Listing, graph: Mapping[str, Any], label: str, operands: Sequence[str], results: Sequence[str]
) -> None:
    """Adds the graph's steps to the listing of the program, whose values `operands` and `results` it takes and gives."""
    names = _Names(listing, graph, label, (*operands, *results))
    for node in graph["xnodes"]:
        kind, fields = node["xnode_union_type"], node["xnode_union"]
        if kind not in NO_MACS and kind not in _MACS:
            raise GraphError(f"operation {kind} of {label} is none that the cost model can count")
        inputs = {key: names[fields[key]] for key in _operand_keys(kind) if fields.get(key, _NONE) != _NONE}
        output = names[fields["output_id"]]
        shapes = {key: listing.values[name].shape for key, name in (*inputs.items(), ("output_id", output))}
        macs = 0 if kind in NO_MACS else _MACS[kind](fields, shapes)
        listing.steps.append(Step(output, kind, macs, tuple(inputs.values()), (output,)))


def _operand_keys(kind: str) -> tuple[str, ...]:
    """XNNConcatenate2 has all of five fields for inputs, and uses two."""
    if kind.startswith("XNNConcatenate"):
        return tuple(f"input{number}_id" for number in range(1, int(kind.removeprefix("XNNConcatenate")) + 1))
    return _OPERANDS


class _Names(dict[int, str]):
    """The names in the listing of a graph's values by their number; makes its constants and intermediate values known there.

    External values are numbered in the order of the delegate's arguments, inputs first.
    """

    def __init__(self, listing: Listing, graph: Mapping[str, Any], label: str, arguments: Sequence[str]) -> None:
        values = [(each["xvalue_union"].get("tensor_value", each["xvalue_union"]), each["xvalue_union"].get("quant_params", {}))
                  for each in graph["xvalues"]]
        external = {tensor["id_out"]: tensor["external_id"] for tensor, _ in values if tensor["external_id"] != _NONE}
        order = [*sorted(graph["input_ids"], key=external.__getitem__), *sorted(graph["output_ids"], key=external.__getitem__)]
        if len(order) != len(arguments):
            raise GraphError(f"{label} takes and gives {len(order)} tensors, but is called with {len(arguments)}")
        super().__init__(zip(order, arguments, strict=True))
        for tensor, quantization in values:
            value = Value(tuple(tensor["dims"]), _bits(tensor["datatype"]))
            number = tensor["id_out"]
            if number in self:
                if listing.values[self[number]].elements != value.elements:
                    raise GraphError(f"{label} declares {value.shape} for the value {self[number]} of another size")
                continue
            name = self[number] = f"{label}, value {number}"
            listing.values[name] = value
            if tensor["constant_buffer_idx"]:
                listing.stored[name] = _stored(graph["constant_data"], tensor, quantization, label)


def _bits(datatype: str) -> int:
    if datatype not in _BITS:
        raise GraphError(f"a delegate has values of the type {datatype}, whose size is not known")
    return _BITS[datatype]


def _stored(
    constants: Sequence[Mapping[str, Any]], tensor: Mapping[str, Any], quantization: Mapping[str, Any], label: str
) -> dict[str, int]:
    """The bytes of a constant and of its scales, each by what names them in the file."""
    stored = {}
    for index in (tensor["constant_buffer_idx"], quantization.get("scale_buffer_idx", 0)):
        if index not in (0, _NONE):
            constant = constants[index]
            stored[constant["named_key"] or f"{label}, constant {index}"] = constant["size"]
    scales = quantization.get("scale")
    if isinstance(scales, list) and scales:  # inside the graph; a single number is the scale of a whole tensor
        stored[f"{label}, scales of value {tensor['id_out']}"] = 4 * len(scales)
    return stored


def _fully_connected(fields: Fields, shapes: Shapes) -> int:
    depth = shapes["input1_id"][-1]
    if math.prod(shapes["filter_id"]) != depth * shapes["output_id"][-1]:
        raise GraphError(f"XNNFullyConnected of {shapes['input1_id']} has a weight of {shapes['filter_id']}: it does not fit")
    return product_macs(shapes["output_id"], depth)


def _batch_matrix_multiply(fields: Fields, shapes: Shapes) -> int:
    return product_macs(shapes["output_id"], shapes["input1_id"][-1])


def _convolution(fields: Fields, shapes: Shapes) -> int:
    window = fields["kernel_height"] * fields["kernel_width"]
    return product_macs(shapes["output_id"], window * fields["group_input_channels"])


def _transposed_convolution(fields: Fields, shapes: Shapes) -> int:
    window = fields["kernel_height"] * fields["kernel_width"]
    return product_macs(shapes["input1_id"], window * fields["group_output_channels"])


def _attention(fields: Fields, shapes: Shapes) -> int:
    return attention_macs(shapes["query_id"], shapes["key_id"], shapes["value_id"])


_MACS: dict[str, Callable[[Fields, Shapes], int]] = {
    "XNNFullyConnected": _fully_connected,
    "XNNBatchMatrixMultiply": _batch_matrix_multiply,
    "XNNConv2d": _convolution,
    "XNNDepthwiseConv2d": _convolution,
    "XNNConvTranspose2d": _transposed_convolution,
    "XNNScaledDotProductAttention": _attention,
}
