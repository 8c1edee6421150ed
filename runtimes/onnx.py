"""Runs an ONNX artifact with ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from runtimes.graph import GraphError, TensorSpec, check_inputs

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int32)": "int32", "tensor(int64)": "int64"}
_ERRORS_ONLY = 3


@dataclass(frozen=True)
class OnnxGraph:
    """A loaded session with its declared inputs and outputs."""

    path: Path
    session: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feed = check_inputs(self.inputs, inputs)
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self.session.run(names, feed), strict=True))
        except Exception as error:  # ONNX Runtime raises a dozen types that share no base of their own
            raise GraphError(f"{self.path} failed to run: {_line(error)}") from error


def load(path: Path | str, threads: int | None = None) -> OnnxGraph:
    """Loads a model.onnx with the external data beside it; `threads` of one operation, all cores by default."""
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} does not exist")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Without an arena, memory goes back after a run, and the largest component alone decides the peak.
    options.enable_cpu_mem_arena = False
    # Threads that wait by spinning take the cores from whatever else runs, and from each other where cores are few: on two busy
    # cores a step of four layers of SD3.5-Medium's width took 1.36 s without and 1.60 s with it (runs in turns).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see above
        raise GraphError(f"{path} is no ONNX model that ONNX Runtime can load: {_line(error)}") from error
    return OnnxGraph(path, session, _specs(path, session.get_inputs()), _specs(path, session.get_outputs()))


def _specs(path: Path, values: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        if value.type not in _DTYPES or not all(isinstance(size, int) for size in value.shape):
            raise GraphError(f"{path}: {value.name} is {value.type} {value.shape}; only fixed shapes of "
                             f"{', '.join(_DTYPES.values())} are supported")
        specs.append(TensorSpec(value.name, _DTYPES[value.type], tuple(value.shape)))
    return tuple(specs)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
