"""Core ML itself, through coremltools. macOS only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from runtimes.coreml.package import open_package
from runtimes.coreml.program import Program, read_program
from runtimes.graph import GraphError, TensorSpec, check_inputs
from runtimes.quiet import quiet

ComputeUnits = Literal["ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"]


class DeviceGraph:
    """A package compiled and loaded by Core ML."""

    def __init__(self, program: Program, model: Any) -> None:
        self._model = model
        self.inputs: tuple[TensorSpec, ...] = program.input_specs
        self.outputs: tuple[TensorSpec, ...] = program.output_specs

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph; see `runtimes.graph.Graph`."""
        arrays = check_inputs(self.inputs, inputs)
        try:
            results = self._model.predict(arrays)
        except (RuntimeError, ValueError) as error:
            raise GraphError(f"Core ML could not run the graph: {error}") from error
        return {spec.name: np.asarray(results[spec.name]).astype(spec.dtype) for spec in self.outputs}


def load(path: str | Path, compute_units: ComputeUnits = "ALL") -> DeviceGraph:
    """Compiles and loads the package. Raises `GraphError` if it is no ML program or Core ML refuses it."""
    if compute_units not in get_args(ComputeUnits):
        raise GraphError(f"compute units {compute_units!r} do not exist; choose from {', '.join(get_args(ComputeUnits))}")
    program = read_program(open_package(Path(path)))
    with quiet():
        import coremltools as ct
    try:
        model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[compute_units])
    except RuntimeError as error:
        raise GraphError(f"{path}: Core ML could not load the package: {error}") from error
    return DeviceGraph(program, model)
