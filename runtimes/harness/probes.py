"""What an artifact computes on the way, value by value, for each format.

A probe opens one artifact. `keys` are the names by which a reference may know its values, without running anything;
`run` yields its operations in the artifact's order, with the values of the wanted keys. Nothing of the artifact's arithmetic
changes: Core ML programs run in the executor, ONNX models and ExecuTorch programs in their own runtime, on a copy in memory
that gives intermediate values as outputs too (ONNX Runtime's graph optimisations are off, since they fuse values away).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtimes.graph import GraphError, check_inputs

FETCHED = 256  # values that one run of an ONNX model gives at most: they are in memory together


@dataclass(frozen=True, eq=False)
class Probed:
    """One result: the operation's type, the value's name in the artifact, what a reference calls it, and, where that is
    wanted, the value."""

    operation: str
    name: str
    key: str
    value: np.ndarray | None


class Probe(Protocol):
    """An artifact whose intermediate values can be read."""

    @property
    def keys(self) -> frozenset[str]: ...

    def run(self, inputs: Mapping[str, np.ndarray], wanted: Set[str]) -> Iterator[Probed]:
        """Raises `GraphError` where the artifact cannot run."""
        ...


class CoreMLProbe:
    """Values of an ML program. coremltools names them after the nodes of the traced graph and adds how it cast them."""

    def __init__(self, path: Path) -> None:
        from runtimes.coreml import load_executor
        from runtimes.coreml.package import open_package
        from runtimes.coreml.program import all_operations, read_program

        self._executor = load_executor(path)
        operations = all_operations(read_program(open_package(path)).block)
        self.keys = frozenset(self._key(output.name) for operation in operations for output in operation.outputs)

    def run(self, inputs: Mapping[str, np.ndarray], wanted: Set[str]) -> Iterator[Probed]:
        for each in self._executor.intermediates(inputs):
            key = self._key(each.name)
            yield Probed(each.operation, each.name, key, each.value if key in wanted else None)

    @staticmethod
    def _key(name: str) -> str:
        return name.removesuffix("_cast_fp16")


class OnnxProbe:
    """Values of an ONNX model, whose names are those of the traced graph's nodes."""

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        from runtimes import onnx as runtime

        self._path = path
        self._inputs = runtime.load(path).inputs
        model = onnx.load(str(path), load_external_data=False)
        self._operations = [(node.op_type, name) for node in model.graph.node for name in node.output if name]
        self.keys = frozenset(name for _, name in self._operations)
        given = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for _, name in self._operations if name not in given)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
        self._session: Any = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Mapping[str, np.ndarray], wanted: Set[str]) -> Iterator[Probed]:
        given = check_inputs(self._inputs, inputs)
        for start in range(0, len(self._operations), FETCHED):
            some = self._operations[start : start + FETCHED]
            names = [name for _, name in some if name in wanted]
            try:
                values = dict(zip(names, self._session.run(names, given), strict=True)) if names else {}
            except Exception as error:  # ONNX Runtime raises a dozen types that share no base of their own
                raise GraphError(f"{self._path} failed to run: {str(error).splitlines()[0]}") from error
            for operation, name in some:
                yield Probed(operation, name, name, values.pop(name, None))


def kernel_key(operator: str, number: int, count: int) -> str:
    """By what a reference knows the result of one call of a portable kernel in a .pte, which has no names."""
    return f"{operator} {number}/{count}"


def handle_key(handle: int) -> str:
    """By what a reference knows the result of an XNNPACK node in a .pte: its debug handle."""
    return f"#{handle}"


def _executorch(path: Path) -> Probe:
    from runtimes.harness.pte import ExecuTorchProbe

    return ExecuTorchProbe(path)


PROBES: dict[str, Callable[[Path], Probe]] = {"coreml": CoreMLProbe, "onnx": OnnxProbe, "executorch": _executorch}
