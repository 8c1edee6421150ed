"""ExecuTorch: one .pte a component, lowered to XNNPACK.

Linears of 8 bits are 8da8w (one scale an output channel), of 4 bits 8da4w (groups of 32): XNNPACK rounds their inputs to 8
bits, with a scale and a zero point a token, and multiplies integers; where a scheme asks for inputs of 16 bits it does so twice
(executorch_inputs.py). That rounding is part of `reference`. Token embeddings of
8 bits are gathered as int8 rows by portable operations. Everything else is stored and computed in float32: XNNPACK has no
float16 weights beside float32 activations, the CPU kernel's float16 layer norm is wrong from width 256, and weight-only
integers lower without an error and compute something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from calibration.statistics import InputRounding
from export.components.activation import use_spelled_gelu
from export.compression.compress import mean_bits, with_tensors
from export.compression.schemes import FloatScheme, PaletteScheme, Scheme, WeightInfo
from export.compression.stored import IntegerWeight, StoredWeight
from export.errors import UserError
from export.formats.executorch_inputs import TwiceRounded, round_per_token, round_twice
from export.formats.format import Artifact, EmitOptions, artifact_files, export_graph, refuse_schemes, with_rounded_inputs
from runtimes.executorch import CONTRACT_METHOD
from runtimes.graph import TensorSpec
from runtimes.quiet import quiet

with quiet():  # torchao names every compiled extension that it cannot load
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization import IntxUnpackedToInt8Tensor

if TYPE_CHECKING:
    from export.components.component import Component

GROUP = 32
_TARGET_DTYPES = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ExecuTorchFormat:
    """`<component>.pte` for the XNNPACK backend."""

    name: str = "executorch"
    rounding: InputRounding | None = "row"

    def refuse(self, component: Component, schemes: Mapping[str, Scheme], options: EmitOptions) -> list[str]:
        return refuse_schemes(component, schemes, _refuse_scheme)

    def reference(self, module: nn.Module, stored: Mapping[str, StoredWeight]) -> nn.Module:
        """Decompressed weights, and the inputs of integer linears rounded to 8 bits a token."""
        return with_rounded_inputs(module, stored, lambda weight: round_twice if weight.input_bits == 16 else round_per_token)

    def emit(self, component: Component, module: nn.Module, stored: Mapping[str, StoredWeight], folder: Path,
             options: EmitOptions) -> list[Artifact]:
        exported = export_graph(component, lowerable(module, stored))
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            constant_methods={CONTRACT_METHOD: _contract(component)},
        )
        delegated = delegated_share(edge.exported_program().graph_module)
        path = folder / f"{component.name}.pte"
        with path.open("wb") as file:
            edge.to_executorch().write_to_file(file)
        files, nbytes = artifact_files(path, folder)
        details = {"backend": "xnnpack", "floats": "float32"}
        details["activations"] = "int8 before integer linears, scale and zero point a token"
        if any(isinstance(weight, IntegerWeight) and weight.input_bits == 16 for weight in stored.values()):
            details["activations"] += "; before some twice, the rest of the first time"
        return [Artifact(component.name, self.name, path, files, nbytes, mean_bits(stored), component.inputs, component.outputs,
                         delegated, details)]


def _refuse_scheme(name: str, info: WeightInfo, scheme: Scheme) -> str | None:
    if isinstance(scheme, PaletteScheme):
        return f"{name}: ExecuTorch has no palettes; use 4- or 8-bit integers"
    if isinstance(scheme, FloatScheme):
        return None if scheme.bits == 32 else (
            f"{name}: XNNPACK takes no float16 weights beside float32 activations, and with float16 activations the layer norm "
            "of width 256 and more is wrong; store float32"
        )
    if info.kind == "conv":
        return f"{name}: XNNPACK computes convolutions with weight-only integers wrongly; store float32"
    if info.kind != "linear" and scheme.input_bits != 8:
        return f"{name}: only linears have inputs of {scheme.input_bits} bits"
    if info.kind == "other":
        return f"{name}: only linears and embeddings are stored as integers"
    if scheme.bits == 8:
        return None if scheme.block is None else f"{name}: 8-bit integers have one scale a row, not blocks of {scheme.block}"
    if scheme.bits != 4:
        return f"XNNPACK does not hold integers of {scheme.bits} bits; choose from 4, 8"
    if info.kind == "embedding":
        return f"{name}: embeddings are stored with 8 bits, not 4"
    if scheme.block != GROUP or not scheme.bfloat16_scales:
        return f"{name}: 4-bit integers come in groups of {GROUP} with bfloat16 scales"
    return f"{name}: groups of {GROUP} do not divide its {info.row} inputs" if info.row % GROUP else None


def lowerable(module: nn.Module, stored: Mapping[str, StoredWeight]) -> nn.Module:
    """A copy of the module whose integer weights are torchao tensors that hold our integers and scales."""
    tensors: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    for name, weight in stored.items():
        if not isinstance(weight, IntegerWeight):
            tensors[name] = torch.from_numpy(weight.dequantize())
        elif isinstance(_owner(module, name), nn.Linear):
            tensors[name] = _dynamic(weight)
        elif isinstance(_owner(module, name), nn.Embedding):
            embeddings.add(name)
        else:
            raise UserError(f"{name} is no linear or embedding; ExecuTorch stores it as float32")
    copy = with_tensors(module, tensors)
    for name, weight in stored.items():
        if not isinstance(weight, IntegerWeight):
            continue
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        if name in embeddings:
            setattr(copy.get_submodule(parent), child, IntegerEmbedding(weight))
        elif weight.input_bits == 16:
            linear = _owner(copy, name)
            assert isinstance(linear, nn.Linear)
            setattr(copy.get_submodule(parent), child, TwiceRounded(linear))
    return use_spelled_gelu(copy, True)


def _dynamic(weight: IntegerWeight) -> Tensor:
    """Our integers and scales as the tensor that lowers to a linear with dynamically rounded inputs."""
    scales = torch.from_numpy(weight.scales)
    return IntxUnpackedToInt8Tensor(
        qdata=torch.from_numpy(weight.ints),
        scale=scales,
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=_TARGET_DTYPES[weight.bits],
        block_size=(1, weight.block),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )


class IntegerEmbedding(nn.Module):
    """ids -> rows: int8 rows and their scales are looked up, only those are widened. Portable operations alone."""

    ints: Tensor
    scales: Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__()
        self.register_buffer("ints", torch.from_numpy(weight.ints))
        self.register_buffer("scales", torch.from_numpy(weight.scales))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.ints).to(torch.float32) * nn.functional.embedding(ids, self.scales)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _contract(component: Component) -> Tensor:
    """Names, types and shapes as JSON bytes: a .pte itself knows its inputs by position only."""

    def listed(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [asdict(spec) for spec in specs]

    text = json.dumps({"inputs": listed(component.inputs), "outputs": listed(component.outputs)}, sort_keys=True)
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def delegated_share(graph_module: Any) -> float:
    """Multiply-accumulates inside delegates over all of the lowered graph; 1 where there are none at all."""
    outside = sum(_macs(graph_module.graph))
    inside = sum(sum(_macs(child.original_module.graph_module.graph)) for child in graph_module.children()
                 if hasattr(child, "original_module"))
    return inside / (inside + outside) if inside + outside else 1.0


def _macs(graph: Graph) -> Iterator[int]:
    """Multiply-accumulates of every matrix product and convolution of a graph."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        operation = str(getattr(node.target, "__name__", node.target))
        if operation in ("aten.linear.default", "aten.mm.default", "aten.bmm.default", "aten.matmul.default"):
            yield _value(node).numel() * _value(node.args[0]).shape[-1]
        elif operation == "aten.addmm.default":
            yield _value(node).numel() * _value(node.args[1]).shape[-1]
        elif operation in ("aten.convolution.default", "aten.conv2d.default"):
            weight = _value(node.args[1])
            yield _value(node).numel() * (weight.numel() // weight.shape[0])


def _value(node: Any) -> Tensor:
    assert isinstance(node, Node)
    return node.meta["val"]
