"""What a user would use instead: coremltools' palettes, ONNX Runtime's MatMulNBits quantizer, torchao's dynamic 8-bit linears.

Each works on the same graphs that our formats emit, with float16 (Core ML) or float32 weights in them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.quality.methods import Made, Method
from export.components.component import Component
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, weight_infos
from export.compression.stored import packed_bytes
from export.formats.coreml import CoreMLFormat
from export.formats.format import Artifact, EmitOptions
from export.formats.onnx import OnnxFormat
from export.planning import Part
from export.recording import Piece
from runtimes.coreml import load_executor
from runtimes.graph import Graph
from runtimes.onnx import load as load_onnx
from runtimes.quiet import quiet

with quiet():
    import coremltools as ct
    import coremltools.optimize as cto
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

SCALES = "_scales"  # how the names of MatMulNBits' scales end, which have to stay float32
OPTIONS = EmitOptions(deployment_target="iOS18")


class GraphModule(nn.Module):
    """A runtime's graph in the place of a torch module."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = {spec.name: tensor.numpy() for spec, tensor in zip(self.graph.inputs, inputs, strict=True)}
        outputs = self.graph(named)
        return tuple(torch.from_numpy(np.array(outputs[spec.name])) for spec in self.graph.outputs)


@dataclass
class CoreMLTools:
    """`palettize_weights` with k-means, one palette a tensor, executed from the package that it saves.

    bytes: those of our float16 weights, less what the weight file has shrunk by.
    """

    bits: int
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))

    @property
    def name(self) -> str:
        return f"coremltools {self.bits} bits"

    def make(self, part: Part, modules: list[nn.Module]) -> Made:
        pieces, nbytes = list[Piece](), 0
        for piece, module in zip(part.pieces, modules, strict=True):
            parameters = dict(module.named_parameters())
            stored = round_weights(parameters, dict.fromkeys(parameters, FloatScheme(16)))
            with quiet():
                (artifact,) = CoreMLFormat().emit(piece, module, stored, self.folder, OPTIONS)
                model = ct.models.MLModel(str(artifact.path), skip_model_load=True)
                config = cto.coreml.OptimizationConfig(
                    global_config=cto.coreml.OpPalettizerConfig(mode="kmeans", nbits=self.bits)
                )
                palettized = self.folder / f"{piece.name}-{self.bits}.mlpackage"
                cto.coreml.palettize_weights(model, config).save(str(palettized))
            shrunk = _weight_file(artifact.path) - _weight_file(palettized)
            nbytes += sum(weight.nbytes for weight in stored.values()) - shrunk
            pieces.append((piece, GraphModule(load_executor(palettized))))
        return Made(pieces, nbytes)


def _weight_file(package: Path) -> int:
    return sum(path.stat().st_size for path in package.rglob("weight.bin"))


@dataclass
class OnnxRuntime:
    """`MatMulNBitsQuantizer` (bits/block) on the float32 graph, executed by ONNX Runtime.

    bytes: of all initializers, what it leaves in float32 counted as float16, in which a careful user would store it.
    """

    bits: int
    block: int
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))

    @property
    def name(self) -> str:
        return f"ONNX Runtime {self.bits}/{self.block}"

    def make(self, part: Part, modules: list[nn.Module]) -> Made:
        pieces, nbytes = list[Piece](), 0
        for piece, module in zip(part.pieces, modules, strict=True):
            artifact = self._float32(piece, module)
            with quiet():
                quantizer = MatMulNBitsQuantizer(
                    onnx.load(str(artifact.path)), self.bits, self.block, is_symmetric=True, accuracy_level=4
                )
                quantizer.process()
            path = self.folder / f"{piece.name}-{self.bits}.onnx"
            quantizer.model.save_model_to_file(str(path), True)
            nbytes += sum(_initializer_bytes(tensor) for tensor in onnx.load(str(path)).graph.initializer)
            pieces.append((piece, GraphModule(load_onnx(path))))
        return Made(pieces, nbytes)

    def _float32(self, piece: Component, module: nn.Module) -> Artifact:
        parameters = dict(module.named_parameters())
        stored = round_weights(parameters, dict.fromkeys(parameters, FloatScheme(32)))
        with quiet():
            (artifact,) = OnnxFormat().emit(piece, module, stored, self.folder, OPTIONS)
        return artifact


def _initializer_bytes(tensor: onnx.TensorProto) -> int:
    nbytes = onnx.numpy_helper.to_array(tensor).nbytes
    kept = tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.endswith(SCALES)
    return nbytes // 2 if kept else nbytes


@dataclass
class TorchAO:
    """`Int8DynamicActivationIntxWeightConfig` on every linear whose width the groups divide, executed eagerly.

    bytes: packed integers with bfloat16 scales a group, or float32 scales a row; float32 for all else, as XNNPACK keeps them.
    """

    bits: int

    @property
    def name(self) -> str:
        return f"torchao 8da{self.bits}w"

    def make(self, part: Part, modules: list[nn.Module]) -> Made:
        pieces, nbytes = list[Piece](), 0
        granularity = PerGroup(32) if self.bits == 4 else PerAxis(0)
        dtype = getattr(torch, f"int{self.bits}")
        for piece, module in zip(part.pieces, modules, strict=True):
            quantized = copy.deepcopy(module)
            taken = {name for name, child in module.named_modules() if _is_taken(child, self.bits)}
            with quiet():
                config = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
                quantize_(quantized, config, filter_fn=lambda _, name, taken=taken: name in taken)
            for info in weight_infos(module):
                if info.name.removesuffix(".weight") in taken:
                    scales = 2 * info.count // 32 if self.bits == 4 else 4 * info.shape[0]
                    nbytes += packed_bytes(info.count, self.bits) + scales
                else:
                    nbytes += 4 * info.count
            pieces.append((piece, quantized))
        return Made(pieces, nbytes)


def _is_taken(child: nn.Module, bits: int) -> bool:
    return isinstance(child, nn.Linear) and (bits == 8 or child.in_features % 32 == 0)


OTHERS: Mapping[str, tuple[Method, ...]] = {
    "coreml": tuple(CoreMLTools(bits) for bits in (4, 6, 8)),
    "onnx": (OnnxRuntime(8, 128), OnnxRuntime(8, 32), OnnxRuntime(4, 128), OnnxRuntime(4, 32)),
    "executorch": (TorchAO(8), TorchAO(4)),
}
