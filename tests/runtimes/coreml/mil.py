"""Writes MIL programs as packages, with coremltools' builder and no passes: each operation arrives as it was built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.coreml import Executor, load_executor
from runtimes.quiet import quiet

with quiet():
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.backend.mil.load import load as to_model
    from coremltools.converters.mil.mil import types

__all__ = ["ct", "mb", "package", "program", "run", "types", "write"]

MODEL = "com.apple.CoreML/model.mlmodel"
Build = Callable[..., Any]

_TYPES = {
    np.dtype(np.float16): types.fp16,
    np.dtype(np.float32): types.fp32,
    np.dtype(np.int32): types.int32,
}
_OPSETS = {9: ct.target.iOS18, 8: ct.target.iOS17, 7: ct.target.iOS16, 6: ct.target.iOS15}


def program(build: Build, inputs: dict[str, np.ndarray], specification: int) -> Any:
    """A MIL program over inputs like the given arrays.

    Core ML's own inputs and outputs are float16, float32 or int32: other types go in and out as int32 and are cast.
    """
    names = list(inputs)
    specs = [mb.TensorSpec(array.shape, dtype=_TYPES.get(array.dtype, types.int32)) for array in inputs.values()]

    def body(values: tuple[Any, ...]) -> Any:
        named = dict(zip(names, values, strict=True))
        for name, array in inputs.items():
            if array.dtype not in _TYPES:
                named[name] = mb.cast(x=named[name], dtype=array.dtype.name)
        results = build(**named)
        outputs = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(each if each.dtype in _TYPES.values() else mb.cast(x=each, dtype="int32") for each in outputs)

    # The builder reads the parameters' names for the inputs; each arity needs a function of its own.
    arguments = ", ".join(names)
    scope: dict[str, Any] = {"body": body}
    exec(f"def function({arguments}):\n    return body(({arguments},))", scope)
    return mb.program(input_specs=specs, opset_version=_OPSETS[specification])(scope["function"])


def write(path: Path, model: Any) -> Path:
    """The package around a serialized model; its weights must already lie in `weights`."""
    folder = (path / "Data" / MODEL).parent
    folder.mkdir(parents=True, exist_ok=True)
    (path / "Data" / MODEL).write_bytes(model.SerializeToString())
    manifest = {"fileFormatVersion": "1.0.0", "rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": MODEL}}}
    (path / "Manifest.json").write_text(json.dumps(manifest))
    return path


def package(path: Path, build: Build, inputs: dict[str, np.ndarray], specification: int = 9) -> Path:
    """Builds the program and writes its package."""
    weights = (path / "Data" / MODEL).parent / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    built = program(build, inputs, specification)
    return write(path, to_model(built, str(weights), specification_version=specification))


def run(path: Path, build: Build, inputs: dict[str, np.ndarray], specification: int = 9) -> list[np.ndarray]:
    """Builds, writes, loads and runs; the outputs in their order."""
    executor: Executor = load_executor(package(path, build, inputs, specification))
    return list(executor(inputs).values())
