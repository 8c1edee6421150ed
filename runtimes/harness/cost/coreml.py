"""Lists the operations of a Core ML package from its MIL program; weights stay in their file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runtimes.coreml.compressed import CONSTANT_EXPRESSIONS
from runtimes.coreml.constants import Constant, constants_of
from runtimes.coreml.datatypes import data_type_named
from runtimes.coreml.operations import OPERATIONS
from runtimes.coreml.package import open_package
from runtimes.coreml.program import UNKNOWN, Literal, Operation, Source, ValueType, read_program
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
    abs acos add argsort asin atan atanh avg_pool band_part batch_norm batch_to_space cast ceil clamped_relu clip
    concat cos cosh crop cumsum depth_to_space dequantize elu equal erf exp exp2 expand_dims fill fill_like flatten2d
    floor floor_div gather gather_along_axis gather_nd gelu greater greater_equal identity instance_norm inverse
    l2_norm l2_pool layer_norm leaky_relu less less_equal linear_activation local_response_norm log logical_and
    logical_not logical_or logical_xor max_pool maximum minimum mod mul non_zero not_equal one_hot pad pixel_shuffle
    pixel_unshuffle pow prelu quantize range_1d real_div reduce_argmax reduce_argmin reduce_l1_norm reduce_l2_norm
    reduce_log_sum reduce_log_sum_exp reduce_max reduce_mean reduce_min reduce_prod reduce_sum reduce_sum_square relu
    relu6 reshape reshape_like resize resize_bilinear resize_nearest_neighbor reverse reverse_sequence round rsqrt
    scaled_tanh scatter scatter_along_axis scatter_nd select shape sigmoid sigmoid_hard sign silu sin sinh
    slice_by_index slice_by_size slice_update sliding_windows softmax softplus softplus_parametric softsign
    space_to_batch space_to_depth split sqrt square squeeze stack sub tan tanh threshold thresholded_relu tile topk
    transpose upsample_bilinear upsample_nearest_neighbor
"""

NO_MACS = frozenset(_WITHOUT_MACS.split())
"""Element-wise operations, norms, reductions, pooling, interpolation and data movement."""

_LOOK_UPS = frozenset({"gather", "gather_along_axis", "gather_nd"})
_PARAMETERS = frozenset({"shape", "axis", "vector_axis", "output_dtype"})  # of constexpr operations


def read(path: Path) -> Listing:
    """The package's program. Raises `GraphError` for what cannot be read, or counted."""
    try:
        return _Reader(path).listing
    except GraphError as error:
        raise error if str(path) in str(error) else GraphError(f"{path}: {error}") from error


class _Reader:
    """Goes through the program once, in its order."""

    def __init__(self, path: Path) -> None:
        program = read_program(open_package(path))
        self.listing = Listing()
        self._constants: dict[str, Constant] = {}
        for spec in program.input_specs:
            self.listing.values[spec.name] = Value(spec.shape, data_type_named(spec.dtype).bits)
        for operation in program.block.operations:
            self._add(operation)
        self.listing.inputs = tuple(spec.name for spec in program.input_specs)
        self.listing.outputs = tuple(spec.name for spec in program.output_specs)

    def _add(self, operation: Operation) -> None:
        for output in operation.outputs:
            if output.type is None or UNKNOWN in output.type.shape:
                raise GraphError(f"operation {operation} gives {output.name!r} of no fixed shape, which cannot be counted")
            self.listing.values[output.name] = _value(output.type)
        if operation.type == "const":
            (output,) = operation.outputs
            self._constants |= constants_of(operation, self._constants)
            self.listing.stored[output.name] = {output.name: self.listing.values[output.name].bytes}
            return
        if operation.type in CONSTANT_EXPRESSIONS:
            self._constants |= constants_of(operation, self._constants)
            names = [name for name in operation.inputs if name not in _PARAMETERS]
            macs = 0
        else:
            macs = self._macs(operation)
            parameters = OPERATIONS[operation.type].parameters
            tensors = [name for name, parameter in parameters.items() if parameter.kind in ("tensor", "tensors")]
            names = [name for name in tensors if name in operation.inputs]
        results = tuple(output.name for output in operation.outputs)
        operands = tuple(
            self._operand(operation, f"{results[0]}.{name}.{place}", source)
            for name in names
            for place, source in enumerate(operation.inputs[name])
        )
        self.listing.steps.append(Step(results[0], operation.type, macs, operands, results, operation.type in _LOOK_UPS))

    def _operand(self, operation: Operation, label: str, source: Source) -> str:
        """The name of a value; a constant that is written into the operation itself gets `label` for a name."""
        if isinstance(source, Literal):
            value = self.listing.values[label] = _value(source.type)
            self.listing.stored[label] = {label: value.bytes}
            return label
        if source not in self.listing.values:
            raise GraphError(f"operation {operation} takes {source!r}, which nothing before it gives")
        return source

    def _macs(self, operation: Operation) -> int:
        match operation.type:
            case kind if kind in NO_MACS:
                return 0
            case "linear":
                return product_macs(self._result(operation), self._shape(operation, "x")[-1])
            case "matmul":
                shape = self._shape(operation, "x")
                depth = shape[-2] if len(shape) > 1 and self._flag(operation, "transpose_x") else shape[-1]
                return product_macs(self._result(operation), depth)
            case "conv":
                return convolution_macs(self._result(operation), self._shape(operation, "weight"))
            case "conv_transpose":
                return transposed_convolution_macs(self._shape(operation, "x"), self._shape(operation, "weight"))
            case "scaled_dot_product_attention":
                return attention_macs(*(self._shape(operation, name) for name in ("query", "key", "value")))
            case "einsum":
                shapes = [self._type_of(source).shape for source in operation.inputs["values"]]
                try:
                    return einsum_macs(str(self._constant(operation, "equation")), shapes)
                except ValueError as error:
                    raise GraphError(f"operation {operation} cannot be counted: {error}") from error
            case _:
                raise GraphError(f"operation {operation} is none that the cost model can count")

    def _type_of(self, source: Source) -> Value:
        return _value(source.type) if isinstance(source, Literal) else self.listing.values[source]

    def _shape(self, operation: Operation, name: str) -> tuple[int, ...]:
        if name not in operation.inputs:
            raise GraphError(f"operation {operation} lacks its input {name!r}")
        return self._type_of(operation.inputs[name][0]).shape

    def _result(self, operation: Operation) -> tuple[int, ...]:
        return self.listing.values[operation.outputs[0].name].shape

    def _flag(self, operation: Operation, name: str) -> bool:
        return name in operation.inputs and bool(self._constant(operation, name))

    def _constant(self, operation: Operation, name: str) -> object:
        (source,) = operation.inputs[name]
        known: Mapping[str, Constant] = self._constants
        if isinstance(source, str) and source not in known:
            raise GraphError(f"operation {operation} takes {name} from {source!r}, which is no constant")
        return (known[source] if isinstance(source, str) else source).array().item()


def _value(kind: ValueType) -> Value:
    return Value(kind.shape, kind.dtype.bits)
