"""Runs an ExecuTorch artifact with the runtime of the executorch package."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtimes.graph import GraphError, TensorSpec, check_inputs

CONTRACT_METHOD = "graph_contract"
"""Constant method that returns names, types and shapes of inputs and outputs, JSON in a uint8 tensor."""

_MODULE_FILE_START = slice(4, 8)  # a .pte is a flatbuffer whose identifier is ETxx


@dataclass(frozen=True)
class ExecuTorchGraph:
    """A loaded method with its declared inputs and outputs."""

    path: Path
    program: Any  # owns the memory that the method points into
    method: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = check_inputs(self.inputs, inputs)
        try:
            results = self.method.execute([torch.from_numpy(array) for array in arrays.values()])
        except RuntimeError as error:
            raise GraphError(f"{self.path} failed to run: {_line(error)}") from error
        # The method writes its next outputs into the same memory.
        return {spec.name: result.numpy().copy() for spec, result in zip(self.outputs, results, strict=True)}


def load(path: Path | str, threads: int | None = None) -> ExecuTorchGraph:
    """Loads a .pte that export-flash wrote. `threads` sets the process's XNNPACK thread pool, all cores by default."""
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} does not exist")
    with path.open("rb") as file:
        if file.read(8)[_MODULE_FILE_START][:2] != b"ET":
            raise GraphError(f"{path} is no ExecuTorch program")
    with _silent():
        from executorch.extension.pybindings import _portable_lib
        from executorch.runtime import Runtime

        if threads is not None and threads != _portable_lib._threadpool_get_thread_count():
            _portable_lib._unsafe_reset_threadpool(threads)
        try:
            program = Runtime.get().load_program(path)
            if CONTRACT_METHOD not in program.method_names:
                raise GraphError(f"{path} does not name its inputs and outputs; export it with export-flash")
            (contract,) = program.load_method(CONTRACT_METHOD).execute([])
            method = program.load_method("forward")
        except RuntimeError as error:
            raise GraphError(f"{path} cannot be loaded: {_line(error)}") from error
    declared = json.loads(contract.numpy().tobytes())
    return ExecuTorchGraph(path, program, method, _specs(declared["inputs"]), _specs(declared["outputs"]))


def _specs(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in entries)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what the C++ runtime writes, to Python's stderr and to the process's, off the terminal."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as sink:
            os.dup2(sink.fileno(), 2)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
