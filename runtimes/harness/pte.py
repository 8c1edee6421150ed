"""Intermediate values of an ExecuTorch program, without ETDump, which the executorch package on PyPI is built without.

A .pte is taken apart, every result on the way becomes an output with memory of its own, and the copy is run in memory by the
same runtime with the same kernels and constants:
- a portable kernel's results are values of the program already; they only have to outlive the others;
- XNNPACK's graph is a flatbuffer inside the program: its internal float32 values are declared external outputs.

A .pte holds no names. A reference knows an XNNPACK node by the debug handle that the exporter wrote beside it ("#12"), and a
portable kernel by its operator, its number among the calls of that operator, and their count ("aten::embedding 1/2").
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtimes.executorch import load
from runtimes.graph import GraphError, check_inputs
from runtimes.harness.probes import Probed, handle_key, kernel_key
from runtimes.quiet import quiet

with quiet():
    from executorch.exir._serialize._flatbuffer import _flatc_compile, _flatc_decompile
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.schema import AllocationDetails, DelegateCall, EValue, KernelCall, TensorList, TensorShapeDynamism
    from executorch.exir.schema import Tensor as TensorValue
    from executorch.runtime import Runtime

_XNNPACK = "XnnpackBackend"
# An XNNPACK delegate: this header, padded to 16 bytes; the flatbuffer, padded to 16; the constants. Fields: zeros, magic, the
# header's own length, offset and length of the flatbuffer, offset and length of the constants.
_HEADER = struct.Struct("<4s4sHIIIQ")
_MAGIC, _ALIGNMENT = b"XH00", 16
_EXTERNAL_OUTPUT = 2  # XNN_VALUE_FLAG_EXTERNAL_OUTPUT
_FLOAT32 = "xnn_datatype_fp32"
_NO_HANDLE = 65535  # of transposes that a pass for XNNPACK has put in


@dataclass(frozen=True)
class _Value:
    """A result and where the program keeps it: the index of its EValue."""

    operation: str
    name: str
    key: str
    index: int


class ExecuTorchProbe:
    """A .pte that export-flash wrote, every float32 result among its outputs. Raises `GraphError` where it is none."""

    def __init__(self, path: Path) -> None:
        graph = load(path)
        self._path, self._inputs = path, graph.inputs
        file = deserialize_pte_binary(path.read_bytes())
        plan = next(plan for plan in file.program.execution_plan if plan.name == "forward")
        self._given = len(plan.outputs)
        self._operations = [*_expose(plan, file.program.backend_delegate_data)]
        _give_memory(plan)
        plan.outputs += [value.index for value in self._operations]
        self._content = bytes(serialize_pte_binary(file, extract_delegate_segments=True))
        self.keys = frozenset(value.key for value in self._operations)

    def run(self, inputs: Mapping[str, np.ndarray], wanted: Set[str]) -> Iterator[Probed]:
        arrays = check_inputs(self._inputs, inputs)
        program = Runtime.get().load_program(self._content)
        try:
            results = program.load_method("forward").execute([torch.from_numpy(array) for array in arrays.values()])
        except RuntimeError as error:
            raise GraphError(f"{self._path} failed to run: {str(error).splitlines()[0]}") from error
        for value, result in zip(self._operations, results[self._given :], strict=True):
            array = result.numpy().copy() if value.key in wanted else None
            yield Probed(value.operation, value.name, value.key, array)


def _expose(plan: Any, blobs: list[Any]) -> Iterator[_Value]:
    """Every float32 result in the order of the program, the delegates' graphs and calls changed so that they give theirs.

    Of several results with one key the last is meant.
    """
    instructions = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    kernels = [_operator(plan, call) for call in instructions if isinstance(call, KernelCall)]
    counts, seen = Counter(kernels), Counter[str]()
    values: list[_Value] = []
    for call in instructions:
        if isinstance(call, KernelCall):
            operator = _operator(plan, call)
            index = _result(plan, call)
            if _is_float32(plan.values[index].val):
                key = kernel_key(operator, seen[operator], counts[operator])
                values.append(_Value(operator, f"kernel {len(values)}", key, index))
            seen[operator] += 1
        elif isinstance(call, DelegateCall) and plan.delegates[call.delegate_index].id == _XNNPACK:
            blob = blobs[plan.delegates[call.delegate_index].processed.index]
            blob.data, found = _expose_delegate(plan, call, blob.data)
            values += found
    last = {value.key: value for value in values}
    return (value for value in values if last[value.key] is value)


def _operator(plan: Any, call: Any) -> str:
    name: str = plan.operators[call.op_index].name
    return name


def _result(plan: Any, call: Any) -> int:
    """The first of what a kernel writes; its last argument is its output, or the list of them."""
    last: int = call.args[-1]
    value = plan.values[last].val
    return value.items[0] if isinstance(value, TensorList) else last


def _is_float32(value: Any) -> bool:
    return isinstance(value, TensorValue) and value.scalar_type == ScalarType.FLOAT


def _expose_delegate(plan: Any, call: Any, data: bytes) -> tuple[bytes, list[_Value]]:
    """XNNPACK's graph with its internal values as further outputs; the call takes as many more arguments."""
    graph, constants = _read_delegate(data)
    values = {}
    for each in graph["xvalues"]:
        tensor = each["xvalue_union"]
        if each["xvalue_union_type"] == "XNNTensorValue" and tensor["datatype"] == _FLOAT32:
            values[tensor["id_out"]] = tensor
    outputs = sorted(tensor["external_id"] for tensor in values.values() if tensor["flags"] & _EXTERNAL_OUTPUT)
    arguments = dict(zip(outputs, call.args[len(call.args) - len(outputs) :], strict=True))
    found = []
    for number, node in enumerate(graph["xnodes"]):
        tensor = values.get(node["xnode_union"].get("output_id"))
        if tensor is None or node["debug_handle"] == _NO_HANDLE:
            continue
        if not tensor["flags"] & _EXTERNAL_OUTPUT:
            tensor["flags"] |= _EXTERNAL_OUTPUT
            tensor["external_id"] = graph["num_externs"]
            graph["num_externs"] += 1
            graph["output_ids"].append(tensor["id_out"])
            plan.values.append(EValue(_tensor(tensor["dims"])))
            call.args.append(len(plan.values) - 1)
            arguments[tensor["external_id"]] = len(plan.values) - 1
        operation = node["xnode_union_type"].removeprefix("XNN").removeprefix("_")
        name = f"delegate {call.delegate_index} node {number}"
        found.append(_Value(operation, name, handle_key(node["debug_handle"]), arguments[tensor["external_id"]]))
    return _write_delegate(graph, constants), found


def _tensor(sizes: list[int]) -> Any:
    return TensorValue(
        scalar_type=ScalarType.FLOAT,
        storage_offset=0,
        sizes=list(sizes),
        dim_order=list(range(len(sizes))),
        requires_grad=False,
        layout=0,
        data_buffer_idx=0,
        allocation_info=AllocationDetails(memory_id=1, memory_offset_low=0, memory_offset_high=0),
        shape_dynamism=TensorShapeDynamism.STATIC,
    )


def _give_memory(plan: Any) -> None:
    """A place of its own for every value that is computed, where the plan lets one use another's after its last use."""
    sizes = {ScalarType.DOUBLE: 8, ScalarType.LONG: 8, ScalarType.HALF: 2, ScalarType.CHAR: 1, ScalarType.BYTE: 1,
             ScalarType.BOOL: 1}
    end = 0
    for each in plan.values:
        tensor = each.val
        if not isinstance(tensor, TensorValue) or tensor.allocation_info is None:
            continue
        tensor.allocation_info = AllocationDetails(1, end & 0xFFFFFFFF, end >> 32)
        end = _padded(end + math.prod(tensor.sizes) * sizes.get(tensor.scalar_type, 4))
    plan.non_const_buffer_sizes = [0, end]


def _read_delegate(data: bytes) -> tuple[dict[str, Any], bytes]:
    """XNNPACK's graph as its schema's JSON, and the constants after it."""
    _, magic, _, offset, size, start, length = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise GraphError("an XNNPACK delegate without its header; export the program with export-flash")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "graph.bin").write_bytes(data[offset : offset + size])
        _flatc_decompile(folder, _schema(folder), str(Path(folder) / "graph.bin"), ["--raw-binary"])
        # flatc writes infinities bare, which JSON does not know, and reads them quoted.
        text = re.sub(r": (-?inf)\b", r': "\1"', (Path(folder) / "graph.json").read_text())
        graph: dict[str, Any] = json.loads(text)
    return graph, data[start : start + length]


def _write_delegate(graph: dict[str, Any], constants: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "graph.json").write_text(json.dumps(graph))
        _flatc_compile(folder, _schema(folder), str(Path(folder) / "graph.json"))
        content = (Path(folder) / "graph.bin").read_bytes()
    start = _padded(_HEADER.size)
    behind = start + _padded(len(content))
    header = _HEADER.pack(bytes(4), _MAGIC, _HEADER.size, start, len(content), behind, len(constants))
    return header.ljust(start, b"\0") + content.ljust(behind - start, b"\0") + constants


def _schema(folder: str) -> str:
    schema = Path(folder) / "schema.fbs"
    schema.write_bytes(resources.files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs").read_bytes())
    return str(schema)


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
