"""What each exact rewrite saves at the size of the whole model, counted by the cost model; no weight is ever made.

A component is traced with weights that have shapes and no values, and its ONNX graph is written without them: the cost model
reads no values. Weights are counted at 16 bits.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from torch._subclasses import FakeTensorMode

from benchmarks.host.wide import DUAL, LAYERS, denoising, family
from export.components.component import Component
from export.formats.onnx import OPSET
from export.formats.onnx_kernels import TRANSLATIONS, use_kernels
from export.rewrites import Rewrites
from runtimes.harness.cost import ArtifactCost, artifact_cost
from runtimes.quiet import quiet


@dataclass(frozen=True)
class Counted:
    """One step of the transformer: multiply-accumulates, and the bytes of the weights that stay in memory while denoising."""

    rewrites: str
    macs: int
    resident: int


def variants() -> dict[str, Rewrites]:
    """All rewrites, all but each, none."""
    names = list(vars(Rewrites()))
    without = {f"without {name}": replace(Rewrites(), **{name: False}) for name in names}
    return {"all rewrites": Rewrites(), **without, "none": Rewrites(**dict.fromkeys(names, False))}


def count(label: str, rewrites: Rewrites, layers: int = LAYERS, dual: tuple[int, ...] = DUAL) -> Counted:
    """SD3.5-Medium at 512 px."""
    cost = shape_cost(denoising(family(layers, dual), rewrites)["transformer"])
    return Counted(label, cost.macs, cost.stored_bytes // 2)  # the graph declares float32


def shape_cost(component: Component) -> ArtifactCost:
    """The cost of a component whose weights are never made."""
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = use_kernels(component.make()).eval().requires_grad_(False)
        given = tuple(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in component.inputs)
        program = torch.onnx.export(
            torch.export.export(module, given),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    for name, value in program.model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None and value.shape is not None
        if tensor.size > 1:
            dtype, size = tensor.dtype, tensor.nbytes
            value.const_value = ir.ExternalTensor("none", 0, size, dtype, shape=ir.Shape(value.shape.numpy()), name=name)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(ir.to_proto(program.model).SerializeToString())
        return artifact_cost(path, "onnx")


if __name__ == "__main__":
    for label, rewrites in variants().items():
        found = count(label, rewrites)
        print(label, np.round(found.macs / 1e9, 1), found.resident / 1e6)
