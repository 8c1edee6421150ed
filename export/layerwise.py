"""The reference of `verify --per-layer`: a component's module, traced and run eagerly, node by node.

Each format is compared with the traced graph that its exporter starts from, because artifacts keep that graph's names: for
Core ML the decomposed ATen graph, for ONNX the one that torch.onnx translates, for ExecuTorch the edge graph before anything
of it is given to XNNPACK. From there on the reference is torch's own kernels and the module's own weights, and knows nothing
of how the artifact was lowered, compressed or written.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node

from export.components.component import Component
from export.compression.compress import with_stored
from export.compression.stored import StoredWeight
from export.errors import UserError
from export.formats.format import example_inputs, export_graph
from runtimes.graph import check_inputs
from runtimes.harness.layers import ReferenceValue, Visit
from runtimes.harness.probes import handle_key, kernel_key
from runtimes.quiet import quiet

Stored = Mapping[str, StoredWeight]


@dataclass(frozen=True, eq=False)
class TorchReference:
    """A traced component. `names` of its nodes: their own, the component's output names, and a format's own keys."""

    component: Component
    program: ExportedProgram
    keys: Mapping[str, tuple[str, ...]]  # node -> further names

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for node in self.program.graph.nodes for name in self._names(node))

    def follow(self, inputs: Mapping[str, np.ndarray], visit: Visit) -> None:
        """Runs the graph on the component's inputs; see `runtimes.harness.layers.Reference`."""
        arrays = check_inputs(self.component.inputs, inputs)
        given = iter(torch.from_numpy(array) for array in arrays.values())
        constants = {**self.program.state_dict, **self.program.constants}
        signature = self.program.graph_signature.input_specs
        values = [next(given) if spec.kind is InputKind.USER_INPUT else constants[str(spec.target)] for spec in signature]
        with torch.no_grad():
            _Follower(self.program.graph_module, self._names, visit).run(*values)

    def _names(self, node: Node) -> tuple[str, ...]:
        return (node.name, *self.keys.get(node.name, ()))


class _Follower(Interpreter):
    """Shows every computed node to `visit`, and goes on with what it gives in the node's place."""

    def __init__(self, module: nn.Module, names: Callable[[Node], tuple[str, ...]], visit: Visit) -> None:
        super().__init__(module)
        self._names, self._visit = names, visit

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        array = result.numpy() if isinstance(result, Tensor) and result.dtype is torch.float32 else None
        sources = tuple(source.name for source in n.all_input_nodes)
        instead = self._visit(ReferenceValue(self._names(n), _module_path(n), sources, array))
        if instead is None:
            return result
        return torch.from_numpy(np.array(instead, np.float32))


def reference_of(format: str, component: Component, module: nn.Module, stored: Stored) -> TorchReference:
    """The reference of one artifact. `stored` are the weights as the format stores them. Raises `UserError` for a format whose
    artifacts cannot be walked."""
    if format not in _TRACES:
        raise UserError(f"--per-layer cannot walk {format} artifacts; choose from {', '.join(_TRACES)}")
    program, keys = _TRACES[format](component, module, stored)
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    found = dict(keys)
    for node, spec in zip(outputs, component.outputs, strict=True):
        found[node.name] = (*found.get(node.name, ()), spec.name)
    return TorchReference(component, program, found)


def _coreml(component: Component, module: nn.Module, stored: Stored) -> tuple[ExportedProgram, dict[str, tuple[str, ...]]]:
    """coremltools numbers some names from 0 where the traced graph has none: `linear_0` for `linear`."""
    program = export_graph(component, with_stored(module, stored)).run_decompositions({})
    return program, {node.name: (f"{node.name}_0",) for node in program.graph.nodes if node.op == "call_function"}


def _onnx(component: Component, module: nn.Module, stored: Stored) -> tuple[ExportedProgram, dict[str, tuple[str, ...]]]:
    from export.formats.onnx import OPSET, traceable
    from export.formats.onnx_kernels import TRANSLATIONS

    with quiet(), torch.no_grad():
        made = torch.onnx.export(
            traceable(module, stored),
            example_inputs(component.inputs),
            dynamo=True,
            custom_translation_table=TRANSLATIONS,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert made is not None and made.exported_program is not None
    return made.exported_program, {}


def _executorch(component: Component, module: nn.Module, stored: Stored) -> tuple[ExportedProgram, dict[str, tuple[str, ...]]]:
    """The edge graph with its debug handles; of several nodes with one handle the last is meant."""
    from export.formats.executorch import lowerable

    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.exir.backend.partitioner import PartitionResult

        class KeepAll(XnnpackPartitioner):
            """Decomposes as XNNPACK asks for, and gives it nothing."""

            kept = False

            def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[Any, Any]:
                operations, supported = super().ops_to_not_decompose(ep)
                return operations, (lambda node: False) if self.kept else supported  # asked again, whether any is left

            def partition(self, exported_program: ExportedProgram) -> PartitionResult:
                self.kept = True
                return PartitionResult(tagged_exported_program=exported_program, partition_tags={})

        edge = to_edge_transform_and_lower(export_graph(component, lowerable(module, stored)), partitioner=[KeepAll()])
    program = edge.exported_program()
    calls = [node for node in program.graph.nodes if node.op == "call_function" and hasattr(node.target, "_schema")]
    counts = Counter(node.target._schema.name for node in calls)
    seen = Counter[str]()
    keys: dict[str, tuple[str, ...]] = {}
    handles: dict[int, str] = {}
    for node in calls:
        kernel = node.target._schema.name
        keys[_result(node)] = (kernel_key(kernel, seen[kernel], counts[kernel]),)
        seen[kernel] += 1
        handles[node.meta["debug_handle"]] = _result(node)
    for handle, name in handles.items():
        keys[name] = (*keys.get(name, ()), handle_key(handle))
    return program, keys


def _result(node: Node) -> str:
    """The node that holds the first of several results, or the node itself."""
    first = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    return first.name if first is not None else node.name


def _module_path(node: Node) -> str:
    """Of the innermost module of the checkpoint that the node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    path: str = list(stack.values())[-1][0] if stack else ""
    return path


_TRACES: dict[str, Callable[[Component, nn.Module, Stored], tuple[ExportedProgram, dict[str, tuple[str, ...]]]]] = {
    "coreml": _coreml,
    "onnx": _onnx,
    "executorch": _executorch,
}
