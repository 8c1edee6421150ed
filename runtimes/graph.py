"""The one interface that every runtime answers: load(path) -> Graph, and a Graph is called with named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name ("float32", "float16", "int32", "int64") and fixed shape of one graph input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class GraphError(Exception):
    """A graph that cannot be loaded or run; the message is the one line that the user sees."""


class Graph(Protocol):
    """An executable artifact."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph. Raises `GraphError` naming any missing, unexpected or mis-shaped input."""
        ...


def check_inputs(specs: tuple[TensorSpec, ...], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs as contiguous arrays of the declared dtypes, in the declared order."""
    wanted = {spec.name for spec in specs}
    if inputs.keys() != wanted:
        missing, extra = sorted(wanted - inputs.keys()), sorted(inputs.keys() - wanted)
        raise GraphError(f"graph inputs do not fit: missing {missing}, unexpected {extra}")
    checked = {}
    for spec in specs:
        array = np.asarray(inputs[spec.name])
        if array.shape != spec.shape:
            raise GraphError(f"input {spec.name!r} has shape {array.shape}; the graph takes {spec.shape}")
        checked[spec.name] = np.ascontiguousarray(array, dtype=spec.dtype)
    return checked
