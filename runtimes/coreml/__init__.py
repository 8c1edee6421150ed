"""Runs a Core ML package: on macOS with Core ML itself, anywhere else with the executor in this folder.

    graph = runtimes.coreml.load("transformer.mlpackage")
    outputs = graph({"latent": ..., ...})

The executor (`load_executor`, on any system) also yields every intermediate value and reports how near each comes to
float16's range. `executor.py` says exactly which arithmetic it models.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runtimes.coreml import device
from runtimes.coreml.device import ComputeUnits
from runtimes.coreml.executor import DEFAULT_MEMORY_LIMIT, Executor
from runtimes.graph import Graph

__all__ = ["DEFAULT_MEMORY_LIMIT", "ComputeUnits", "Executor", "load", "load_executor"]


def load(path: str | Path, *, memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT, compute_units: ComputeUnits = "ALL") -> Graph:
    """The package at `path`, ready to run. Raises `GraphError` for anything that is not a runnable ML program.

    On macOS Core ML manages the memory and `compute_units` chooses the processors; elsewhere the executor runs on the
    CPU and keeps at most `memory_limit_bytes` of decompressed weights.
    """
    if sys.platform == "darwin":
        return device.load(path, compute_units)
    return load_executor(path, memory_limit_bytes=memory_limit_bytes)


def load_executor(path: str | Path, *, memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT) -> Executor:
    """The package at `path` in our own executor, on any system."""
    return Executor(Path(path), memory_limit_bytes)
