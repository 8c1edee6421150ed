"""Lists the operations of an ONNX model from its graph; weights in external data stay in their file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from runtimes.graph import GraphError
from runtimes.harness.cost.operations import (
    Listing,
    Step,
    Value,
    attention_macs,
    convolution_macs,
    einsum_macs,
    product_macs,
    transposed_convolution_macs,
)

_WITHOUT_MACS = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift Cast CastLike
    Ceil Celu Clip Compress Concat Constant ConstantOfShape Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
    DynamicQuantizeLinear Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu
    GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization
    Max MaxPool Mean Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose
    Trilu Unsqueeze Upsample Where Xor
"""

NO_MACS = frozenset(_WITHOUT_MACS.split())
"""Element-wise operations, norms, reductions, pooling, interpolation and data movement."""

_LOOK_UPS = frozenset({"Gather", "GatherElements", "GatherND"})
_MICROSOFT = "com.microsoft"

# The places of inputs that are parameters (a shape, axes, bounds), which are no operands. ONNX passes them as tensors.
_PARAMETERS: dict[str, frozenset[int]] = {
    "Clip": frozenset({1, 2}),
    "ConstantOfShape": frozenset({0}),
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Reshape": frozenset({1}),
    "Resize": frozenset({1, 2, 3}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Trilu": frozenset({1}),
    "Unsqueeze": frozenset({1}),
} | {name: frozenset({1}) for name in NO_MACS if name.startswith("Reduce")}

_BITS = {
    TensorProto.BOOL: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT: 32,
    TensorProto.INT32: 32,
    TensorProto.UINT32: 32,
    TensorProto.DOUBLE: 64,
    TensorProto.INT64: 64,
    TensorProto.UINT64: 64,
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
}


def read(path: Path) -> Listing:
    """The model's graph. Raises `GraphError` for what cannot be read, or counted."""
    if not path.is_file():
        raise GraphError(f"{path} does not exist")
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    except (DecodeError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"{path} is no ONNX model that can be read: {str(error).strip().splitlines()[0]}") from error
    try:
        return _Reader(model).listing
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error


class _Reader:
    """Goes through the graph once, in its order."""

    def __init__(self, model: Any) -> None:
        self.listing = Listing()
        graph = model.graph
        if model.functions:
            raise GraphError(f"the function {model.functions[0].name!r} is none that the cost model can count; inline it")
        for tensor in graph.initializer:
            self._store(tensor.name, tensor)
        stored = self.listing.stored.keys()
        inputs = [value for value in graph.input if value.name not in stored]  # old models list their weights as inputs too
        for value in (*inputs, *graph.value_info, *graph.output):
            if value.name not in self.listing.values:
                self._declare(value)
        for node in graph.node:
            self._add(node)
        self.listing.inputs = tuple(value.name for value in inputs)
        self.listing.outputs = tuple(value.name for value in graph.output)

    def _declare(self, value: Any) -> None:
        """A value whose shape is not fixed stays unknown, and is an error where it is used."""
        tensor = value.type.tensor_type
        sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
        if tensor.HasField("shape") and tensor.elem_type in _BITS and None not in sizes:
            self.listing.values[value.name] = Value(tuple(size for size in sizes if size is not None), _BITS[tensor.elem_type])

    def _store(self, name: str, tensor: Any) -> None:
        if tensor.data_type not in _BITS:
            raise GraphError(f"the constant {name!r} has data type {tensor.data_type}, whose size is not known")
        value = self.listing.values[name] = Value(tuple(tensor.dims), _BITS[tensor.data_type])
        self.listing.stored[name] = {name: value.bytes}

    def _add(self, node: Any) -> None:
        if node.op_type == "Constant" and not node.domain:
            tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if tensor is None:
                raise GraphError(f"{_label(node)} holds no tensor")
            self._store(node.output[0], tensor)
            return
        parameters = _PARAMETERS.get(node.op_type, frozenset())
        operands = tuple(name for place, name in enumerate(node.input) if name and place not in parameters)
        results = tuple(name for name in node.output if name)
        if (node.domain, node.op_type) == (_MICROSOFT, "MatMulNBits"):  # onnx infers no shapes outside its own operations
            self._shape(node, operands[0])
            states = self.listing.values[operands[0]]
            self.listing.values[results[0]] = Value((*states.shape[:-1], _attribute(node, "N", 0)), states.bits)
        if (node.domain, node.op_type) == (_MICROSOFT, "MultiHeadAttention"):  # likewise
            query, value = (self._shape(node, name) for name in (operands[0], operands[-1]))
            self.listing.values[results[0]] = Value((*query[:-1], value[-1]), self.listing.values[operands[0]].bits)
        for name in (*operands, *results):
            self._shape(node, name)
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        self.listing.steps.append(Step(results[0], kind, self._macs(node), operands, results, node.op_type in _LOOK_UPS))

    def _macs(self, node: Any) -> int:
        shapes = [self._shape(node, name) if name in self.listing.values else () for name in node.input]
        result = self._shape(node, node.output[0])
        match (node.domain, node.op_type):
            case ("", kind) if kind in NO_MACS:
                return 0
            case ("", "MatMul" | "MatMulInteger"):
                return product_macs(result, shapes[0][-1])
            case ("", "Gemm"):
                return product_macs(result, shapes[0][0 if _attribute(node, "transA", 0) else 1])
            case ("", "Conv" | "ConvInteger"):
                return convolution_macs(result, shapes[1])
            case ("", "ConvTranspose"):
                return transposed_convolution_macs(shapes[0], shapes[1])
            case ("", "Einsum"):
                try:
                    return einsum_macs(_attribute(node, "equation", b"").decode(), shapes)
                except ValueError as error:
                    raise GraphError(f"{_label(node)} cannot be counted: {error}") from error
            case ("", "Attention") if len(shapes[0]) == 4:
                return attention_macs(*shapes[:3])
            case (domain, "MultiHeadAttention") if domain == _MICROSOFT and [len(shape) for shape in shapes] == [3, 3, 3]:
                return attention_macs(*(_by_head(shape, _attribute(node, "num_heads", 1)) for shape in shapes))
            case (domain, "MatMulNBits") if domain == _MICROSOFT:
                return product_macs(result, _attribute(node, "K", 0))
            case _:
                raise GraphError(f"{_label(node)} is none that the cost model can count")

    def _shape(self, node: Any, name: str) -> tuple[int, ...]:
        if name not in self.listing.values:
            raise GraphError(f"{_label(node)} has a tensor {name!r} of no fixed shape, which cannot be counted")
        return self.listing.values[name].shape


def _by_head(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """[1, tokens, heads * d] -> [1, heads, tokens, d]."""
    batch, tokens, width = shape
    return batch, heads, tokens, width // heads


def _attribute(node: Any, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _label(node: Any) -> str:
    outputs: Iterable[str] = node.output
    return f"operation {node.op_type} (output {next(iter(outputs), '')!r})"
