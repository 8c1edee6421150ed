"""One measured piece of work in a process of its own: `python -m benchmarks.full_size.worker '{"model": ..., ...}'`.

Ours is a whole export. Theirs is the transformer alone, as a user of those tools would do it: the module in memory, converted
and compressed in one go, with no comparison.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.full_size.stages import Stages
from export.components.component import Component
from export.console import NOWHERE, noise_to
from export.exporter import export
from export.planning import ExportOptions, ExportPlan, make_plan
from export.targets import TARGETS


@dataclass(frozen=True)
class Work:
    """What a worker is asked for. kind: "ours", or whose tools: "coremltools", "onnxruntime", "executorch"."""

    kind: str
    model: str
    out: str
    target: str
    formats: tuple[str, ...] = ()
    bits: float | None = None
    calibrate: bool = False
    resolution: int = 512


def run(work: Work, tell: Callable[[str], None]) -> dict[str, Any]:
    """Stages with their seconds and peaks, bytes of what was made, and what the comparison found."""
    stages = Stages(by_step=("components", "parity"), tell=tell)
    size = (work.resolution, work.resolution)
    options = ExportOptions(
        work.model, resolution=size, formats=work.formats, bits=work.bits, calibrate=work.calibrate, check="step"
    )
    stages.stage("plan", 1)
    plan = make_plan(TARGETS[work.target], options)
    if work.kind == "ours":
        report = export(plan, Path(work.out) / work.target, stages)
        made = [path for path in (Path(work.out) / work.target).rglob("*") if path.is_file()]
        parity = [entry.model_dump(mode="json") for entry in report.to_entries()]
    else:
        made, parity = THEIRS[work.kind](plan, Path(work.out), stages), []
    return {
        "work": asdict(work),
        "stages": [asdict(stage) for stage in stages.finish()],
        "bytes": sum(path.stat().st_size for path in made),
        "parity": parity,
    }


def _pieces(plan: ExportPlan) -> tuple[Component, ...]:
    return next(part.pieces for part in plan.parts if part.name == "transformer")


def _coremltools(plan: ExportPlan, out: Path, stages: Stages) -> list[Path]:
    """`palettize_weights` with k-means, 6 bits a tensor, of the package that coremltools converted from float16 weights."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    from export.compression.rounding import round_weights
    from export.compression.schemes import FloatScheme
    from export.formats.coreml import CoreMLFormat

    out.mkdir(parents=True, exist_ok=True)
    files = list[Path]()
    for piece in _pieces(plan):
        stages.stage(f"{piece.name}: convert", 1)
        weights = piece.weights(plan.checkpoint)
        module = piece.load(plan.checkpoint)
        stored = round_weights(weights, {name: FloatScheme(16) for name, _ in module.named_parameters()})
        (artifact,) = CoreMLFormat().emit(piece, module, stored, out, plan.emit)
        del module, stored
        stages.stage(f"{piece.name}: palettize", 1)
        model = ct.models.MLModel(str(artifact.path), skip_model_load=True)
        config = cto.OptimizationConfig(global_config=cto.OpPalettizerConfig(mode="kmeans", nbits=6))
        path = out / f"{piece.name}-palettized.mlpackage"
        cto.palettize_weights(model, config).save(str(path))
        files += [found for found in path.rglob("*") if found.is_file()]
    return files


def _onnxruntime(plan: ExportPlan, out: Path, stages: Stages) -> list[Path]:
    """`MatMulNBitsQuantizer`, 8 bits in blocks of 128, on the float32 graph that torch.onnx exports."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    from export.compression.rounding import round_weights
    from export.compression.schemes import FloatScheme
    from export.formats.onnx import OnnxFormat

    files = list[Path]()
    for piece in _pieces(plan):
        stages.stage(f"{piece.name}: export", 1)
        module = piece.load(plan.checkpoint)
        stored = round_weights(
            piece.weights(plan.checkpoint), {name: FloatScheme(32) for name, _ in module.named_parameters()}
        )
        (artifact,) = OnnxFormat().emit(piece, module, stored, out, plan.emit)
        del module, stored
        stages.stage(f"{piece.name}: quantize", 1)
        quantizer = MatMulNBitsQuantizer(onnx.load(str(artifact.path)), 8, 128, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        path = out / f"{piece.name}-quantized" / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        quantizer.model.save_model_to_file(str(path), True)
        files += [found for found in path.parent.rglob("*") if found.is_file()]
    return files


def _executorch(plan: ExportPlan, out: Path, stages: Stages) -> list[Path]:
    """torchao's 8da8w on the module in memory, lowered to XNNPACK."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    from export.components.activation import use_spelled_gelu
    from export.formats.format import export_graph

    out.mkdir(parents=True, exist_ok=True)
    files = list[Path]()
    for piece in _pieces(plan):
        stages.stage(f"{piece.name}: quantize", 1)
        module = use_spelled_gelu(piece.load(plan.checkpoint), True)
        quantize_(module, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)))
        stages.stage(f"{piece.name}: lower", 1)
        program = to_edge_transform_and_lower(export_graph(piece, module), partitioner=[XnnpackPartitioner()]).to_executorch()
        path = out / f"{piece.name}.pte"
        with path.open("wb") as file:
            program.write_to_file(file)
        del module, program
        files.append(path)
    return files


THEIRS: dict[str, Callable[[ExportPlan, Path, Stages], list[Path]]] = {
    "coremltools": _coremltools,
    "onnxruntime": _onnxruntime,
    "executorch": _executorch,
}


def main() -> None:
    asked = json.loads(sys.argv[1])
    work = Work(**{**asked, "formats": tuple(asked.get("formats", ()))})
    with noise_to(Path(asked["out"]) / "log" if asked["out"] else NOWHERE) as console:
        result = run(work, lambda line: console.print(line, style="dim", highlight=False))
    (Path(work.out) / "measured.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
