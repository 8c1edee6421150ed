"""Lists the operations of an ExecuTorch program: the portable ones of its plan, and those inside its XNNPACK delegates.

A .pte is a flatbuffer, then segments: constants and delegates' graphs. Only the flatbuffers are read; weights stay in the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.graph import GraphError
from runtimes.harness.cost import xnnpack
from runtimes.harness.cost.flatbuffers import PROGRAM, XNNPACK_GRAPH, decode
from runtimes.harness.cost.operations import (
    Listing,
    Step,
    Value,
    convolution_macs,
    product_macs,
    transposed_convolution_macs,
)

METHOD = "forward"
XNNPACK = "XnnpackBackend"

# After root offset and identifier: magic, length of this header, then bytes of the program, where segments start, their bytes.
_HEADER = struct.Struct("<4sIQQQ")
_HEADER_AT, _MAGIC = 8, b"eh00"

NO_MACS = frozenset(
    f"{library}::{name}"
    for library, names in {
        "aten": """
            _native_batch_norm_legit_no_training _softmax _log_softmax abs acos acosh add alias_copy amax amin any arange argmax
            argmin as_strided_copy asin asinh atan atan2 atanh avg_pool2d bitwise_and bitwise_not bitwise_or bitwise_xor cat
            ceil clamp clone constant_pad_nd copy cos cosh cumsum detach_copy diagonal_copy div elu embedding empty eq erf exp
            expand_copy expm1 fill flip floor floor_divide fmod full full_like gather ge gelu glu gt hardtanh index index_put
            index_select isinf isnan le leaky_relu lift_fresh_copy log log10 log1p log2 logical_and logical_not logical_or
            logical_xor logit lt masked_fill masked_scatter max max_pool2d_with_indices maximum mean min minimum mul narrow_copy
            native_dropout native_group_norm native_layer_norm ne neg nonzero ones permute_copy pixel_shuffle pixel_unshuffle
            pow prod reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu remainder repeat repeat_interleave
            replication_pad1d replication_pad2d replication_pad3d roll round rsqrt rsub scalar_tensor scatter scatter_add
            select_copy select_scatter sigmoid sign sin sinh slice_copy slice_scatter split_copy split_with_sizes_copy sqrt
            squeeze_copy stack sub sum t_copy tan tanh to_copy topk transpose_copy tril triu trunc unbind_copy unfold_copy
            unsqueeze_copy upsample_bilinear2d upsample_nearest2d var view_as_real_copy view_copy where zeros
        """,
        "dim_order_ops": "_clone_dim_order _empty_dim_order _to_dim_order_copy",
        "executorch_prim": "et_view",
        "quantized_decomposed": """
            choose_qparams choose_qparams_per_token_asymmetric dequantize_per_channel dequantize_per_channel_group
            dequantize_per_tensor dequantize_per_token embedding_4bit embedding_byte quantize_per_channel
            quantize_per_channel_group quantize_per_tensor quantize_per_token
        """,
        "torchao": "choose_qparams_affine dequantize_affine quantize_affine",
    }.items()
    for name in names.split()
)
"""Element-wise operations, norms, reductions, pooling, interpolation and data movement, whatever their overload."""

_LOOK_UPS = frozenset({"aten::embedding", "aten::gather", "aten::index_select"})
_BITS = {
    "BYTE": 8,
    "CHAR": 8,
    "SHORT": 16,
    "INT": 32,
    "LONG": 64,
    "HALF": 16,
    "FLOAT": 32,
    "DOUBLE": 64,
    "BOOL": 8,
    "BFLOAT16": 16,
}


def read(path: Path) -> Listing:
    """The program's method `forward`. Raises `GraphError` for what cannot be read, or counted."""
    if not path.is_file():
        raise GraphError(f"{path} does not exist")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).listing
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    except (ValueError, LookupError, struct.error) as error:
        raise GraphError(f"{path} is no whole ExecuTorch program: {error}") from error


class _Reader:
    """Goes through the execution plan once, in its order."""

    def __init__(self, data: mmap.mmap) -> None:
        self.listing = Listing()
        if data[4:6] != b"ET":
            raise GraphError("this is no ExecuTorch program")
        magic, _, size, self._segments_at, _ = _HEADER.unpack_from(data, _HEADER_AT)
        if magic != _MAGIC:
            raise GraphError("the program has no header that says where its segments are; export it with export-flash")
        (program,) = decode(PROGRAM, [data[:size]])
        self._data, self._segments = data, program["segments"]
        if any(self._segments_at + segment["offset"] + segment["size"] > len(data) for segment in self._segments):
            raise GraphError("a segment ends beyond the end of the file: truncated?")
        plans = {plan["name"]: plan for plan in program["execution_plan"]}
        if METHOD not in plans:
            raise GraphError(f"the program has no method {METHOD!r}; it has {', '.join(plans)}")
        self._plan = plans[METHOD]
        self._values: list[dict[str, Any]] = self._plan["values"]
        self._declare()
        self._delegates = self._decode_delegates()
        for chain in self._plan["chains"]:
            for instruction in chain["instructions"]:
                self._add(instruction["instr_args_type"], instruction["instr_args"])

    def _declare(self) -> None:
        """Every tensor of the plan; those without memory of their own in the plan are constants."""
        for index, value in enumerate(self._values):
            if value["val_type"] != "Tensor":
                continue
            tensor = value["val"]
            if tensor["scalar_type"] not in _BITS:
                raise GraphError(f"the tensor {index} has the type {tensor['scalar_type']}, whose size is not known")
            name = str(index)
            declared = self.listing.values[name] = Value(tuple(tensor["sizes"]), _BITS[tensor["scalar_type"]])
            if tensor.get("extra_tensor_info", {}).get("location") == "EXTERNAL":
                raise GraphError("the program keeps its constants in another file (.ptd); export it as one .pte")
            if tensor["data_buffer_idx"] and "allocation_info" not in tensor:
                self.listing.stored[name] = {f"buffer {tensor['data_buffer_idx']}": declared.bytes}
        self.listing.inputs = tuple(str(index) for index in self._plan["inputs"] if str(index) in self.listing.values)
        self.listing.outputs = tuple(str(index) for index in self._plan["outputs"] if str(index) in self.listing.values)
        self._known = {*self.listing.stored, *self.listing.inputs}

    def _decode_delegates(self) -> list[dict[str, Any]]:
        payloads = []
        for delegate in self._plan["delegates"]:
            if delegate["id"] != XNNPACK:
                raise GraphError(f"a graph lowered for {delegate['id']} cannot be counted; only {XNNPACK} can")
            if delegate["processed"]["location"] != "SEGMENT":
                raise GraphError("a delegate inside the program's own flatbuffer cannot be counted; export with export-flash")
            segment = self._segments[delegate["processed"]["index"]]
            start = self._segments_at + segment["offset"]
            payloads.append(xnnpack.graph_bytes(self._data, start, segment["size"]))
        return decode(XNNPACK_GRAPH, payloads)

    def _add(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "FreeCall":
            return
        if kind not in ("KernelCall", "DelegateCall"):
            raise GraphError(f"the instruction {kind} is none that the cost model can count")
        # Arguments are inputs, then outputs, which kernels name twice: what nothing before has given is an output.
        tensors = list(dict.fromkeys(self._tensors(fields["args"])))
        operands = tuple(name for name in tensors if name in self._known)
        results = tuple(name for name in tensors if name not in self._known)
        if not results:
            raise GraphError(f"the {kind} on values {', '.join(tensors)} gives nothing new and cannot be counted")
        if kind == "DelegateCall":
            number = fields["delegate_index"]
            xnnpack.add_graph(self.listing, self._delegates[number], f"delegate {number}", operands, results)
        else:
            operator = self._plan["operators"][fields["op_index"]]
            name = f"{operator['name']}.{operator['overload']}" if operator["overload"] else operator["name"]
            macs = self._macs(operator["name"], name, fields["args"], operands, results)
            self.listing.steps.append(Step(results[0], name, macs, operands, results, operator["name"] in _LOOK_UPS))
        self._known |= set(results)

    def _tensors(self, indices: Sequence[int]) -> Iterator[str]:
        """The names of the tensors among arguments; a list of tensors gives each of its own, an absent one none."""
        for index in indices:
            value = self._values[index]
            if value["val_type"] == "Tensor":
                yield str(index)
            elif value["val_type"] in ("TensorList", "OptionalTensorList"):
                yield from self._tensors([item for item in value["val"]["items"] if item >= 0])

    def _macs(self, kernel: str, name: str, arguments: Sequence[int], operands: Sequence[str], results: Sequence[str]) -> int:
        if kernel in NO_MACS:
            return 0
        shapes = [self.listing.values[operand].shape for operand in operands]
        result = self.listing.values[results[0]].shape
        match kernel:
            case "aten::mm" | "aten::bmm" | "aten::linear":
                return product_macs(result, shapes[0][-1])
            case "aten::addmm":  # bias, states, weight
                return product_macs(result, shapes[1][-1])
            case "aten::convolution" if self._values[arguments[6]]["val"].get("bool_val"):
                return transposed_convolution_macs(shapes[0], shapes[1])
            case "aten::convolution":
                return convolution_macs(result, shapes[1])
            case _:
                raise GraphError(f"operation {name} (value {results[0]}) is none that the cost model can count")
