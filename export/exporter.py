"""The steps of an export, in their order: reference pictures, then component by component weights, golden cases, artifacts;
then the manifest, the parity gate, and publication."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from calibration.prompts import golden_prompts
from export.compression.allocation import recipe
from export.compression.compress import compress
from export.compression.stored import IntegerWeight, StoredWeight
from export.describing import component_entry, make_manifest, scheme_uses
from export.diffusers_layout import write_layout
from export.formats.format import Format
from export.planning import ExportPlan, Part
from export.progress import Progress
from export.publish import GateFailed, publishing
from export.recording import Recorder, entries
from export.reference import draw, reference_pipeline
from runtimes.bundle import ComponentEntry, FileEntry, Manifest, SchemeUse, describe_files, write_manifest
from runtimes.conditioning import NAMES, Contract
from runtimes.golden import Case, Drawing, write_golden
from runtimes.harness.parity import Report, verify_bundle
from runtimes.pipeline import Pipeline, to_image
from runtimes.registry import RUNTIMES


@dataclass(frozen=True)
class Made:
    """What came of a component in every format."""

    entries: tuple[ComponentEntry, ...]
    schemes: tuple[SchemeUse, ...]
    cases: tuple[Case, ...]


def export(plan: ExportPlan, place: Path, progress: Progress) -> Report:
    """Makes the bundle of a plan at `place`, which holds the old one until the new one has passed.

    Returns the parity report. Raises `GateFailed`, with the report as its argument, where a comparison failed; what was made
    then lies in `<place>.failed`.
    """
    with publishing(place, plan.needed_bytes) as folder:
        progress.stage("checkpoint", 1)
        progress.step("fingerprint")
        fingerprint = plan.checkpoint.fingerprint()
        drawings = _draw(plan, progress)
        made = _components(folder, plan, drawings, progress)
        _copy_texts(folder, plan)
        others = _pictures(folder, drawings)
        if plan.graph.contract == "diffusers" and any(format.name == "onnx" for format in plan.formats):
            others = (*others, *write_layout(folder, plan.checkpoint))
        cases = {part.name: made[part.name].cases for part in plan.parts if part.name in plan.exported}
        manifest = make_manifest(
            folder,
            plan,
            [entry for item in made.values() for entry in item.entries],
            [use for item in made.values() for use in item.schemes],
            write_golden(folder, cases, drawings),
            fingerprint,
            plan.tokenizers,
            others,
        )
        write_manifest(folder, manifest)
        report = _verify(folder, manifest, progress)
        if report.passed and plan.exported == {part.name for part in plan.parts}:
            others = (*others, *_drawn_pictures(folder, manifest, progress))
        write_manifest(folder, manifest.model_copy(update={"parity": report.to_entries(), "other_files": others}))
        if not report.passed:
            raise GateFailed(report)
    return report


def _draw(plan: ExportPlan, progress: Progress) -> list[Drawing]:
    """What unmodified diffusers draws of the golden prompts."""
    prompts = golden_prompts(plan.checkpoint.flash, plan.golden_prompts)
    progress.stage("reference pictures", len(prompts))
    pipeline = reference_pipeline(plan.checkpoint)
    drawings = []
    for seed, prompt in enumerate(prompts):
        progress.step(prompt)
        drawings.append(draw(pipeline, plan.graph, prompt, seed))
    return drawings


def _components(folder: Path, plan: ExportPlan, drawings: Sequence[Drawing], progress: Progress) -> dict[str, Made]:
    """Every component in the order of use; one in memory at a time."""
    layout = plan.family.latent_layout(plan.graph)
    scaled = plan.graph.rewrites.latent_scale_in_decoder
    contract = Contract(NAMES[plan.graph.contract], scaled, layout, plan.graph.sigmas)
    transformer = next(part for part in plan.parts if part.name == "transformer")
    pair = [plan.tokenizers["tokenizer"], plan.tokenizers["tokenizer_2"]]
    recorder = Recorder(contract, pair, drawings, entries(transformer.pieces[0].inputs))
    progress.stage("components", len(plan.parts) * (1 + len(plan.formats)))
    made = {}
    for part in plan.parts:
        progress.step(f"{part.name}: weights")
        modules = [piece.load(plan.checkpoint) for piece in part.pieces]
        made[part.name] = _component(folder, plan, part, modules, recorder, progress)
    return {name: item for name, item in made.items() if name in plan.exported}


def _component(
    folder: Path, plan: ExportPlan, part: Part, modules: list[nn.Module], recorder: Recorder, progress: Progress
) -> Made:
    original = list(zip(part.pieces, modules, strict=True))
    if part.name not in plan.exported:
        recorder.record(part.name, original, {})
        return Made((), (), ())
    entries, uses, compressed = [], list[SchemeUse](), {}
    for format in plan.formats:
        progress.step(f"{part.name}: {format.name}")
        stored = [compress(m, recipe(p, m)) for m, p in zip(modules, part.plans[format.name], strict=True)]
        if not _is_exact(modules, stored):
            references = [format.reference(m, s) for m, s in zip(modules, stored, strict=True)]
            compressed[format.name] = list(zip(part.pieces, references, strict=True))
        entries.append(_emit(folder, plan, part, modules, stored, format))
        uses += scheme_uses(part.name, format.name, stored)
    cases = recorder.record(part.name, original, compressed)
    return Made(tuple(entries), tuple(uses), tuple(cases))


def _emit(
    folder: Path,
    plan: ExportPlan,
    part: Part,
    modules: Sequence[nn.Module],
    stored: Sequence[Mapping[str, StoredWeight]],
    format: Format,
) -> ComponentEntry:
    artifacts = [
        artifact
        for piece, module, weights in zip(part.pieces, modules, stored, strict=True)
        for artifact in format.emit(piece, module, weights, folder, plan.emit)
    ]
    return component_entry(folder, plan, part, artifacts, stored)


def _is_exact(modules: Sequence[nn.Module], stored: Sequence[Mapping[str, StoredWeight]]) -> bool:
    """Whether the stored weights are the originals, so that the original is its own compressed reference."""
    return all(
        not isinstance(weight, IntegerWeight) and np.array_equal(weight.dequantize(), module.get_parameter(name).numpy())
        for module, weights in zip(modules, stored, strict=True)
        for name, weight in weights.items()
    )


def _copy_texts(folder: Path, plan: ExportPlan) -> None:
    """Tokenizers as phones read them, and as transformers does, and the checkpoint's licence."""
    for name, tokenizer in plan.tokenizers.items():
        tokenizer.save(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):  # what transformers reads
            if (plan.checkpoint.tokenizers[name] / file).is_file():
                shutil.copyfile(plan.checkpoint.tokenizers[name] / file, folder / name / file)
    for path in plan.checkpoint.licence_files:
        shutil.copyfile(path, folder / path.name)


def _pictures(folder: Path, drawings: Sequence[Drawing]) -> tuple[FileEntry, ...]:
    """pictures/prompt<p>-original.png: what unmodified diffusers draws."""
    (folder / "pictures").mkdir()
    for p, drawing in enumerate(drawings):
        to_image(drawing.image).save(folder / "pictures" / f"prompt{p}-original.png")
    return describe_files(folder, ["pictures"])


def _verify(folder: Path, manifest: Manifest, progress: Progress) -> Report:
    runs = len(manifest.components) + len(manifest.formats)
    progress.stage("parity", runs)
    return verify_bundle(folder, on_component=lambda component, format: progress.step(f"{component}: {format}"))


def _drawn_pictures(folder: Path, manifest: Manifest, progress: Progress) -> tuple[FileEntry, ...]:
    """pictures/prompt<p>-<format>.png: what the bundle's own artifacts draw."""
    progress.stage("pictures", len(manifest.formats) * len(manifest.golden.prompts))
    paths = []
    for runtime in RUNTIMES.values():
        if runtime.format not in manifest.formats:
            continue
        pipeline = Pipeline.open(folder, runtime.name)
        for p, golden in enumerate(manifest.golden.prompts):
            progress.step(f"{runtime.format}: {golden.prompt}")
            paths.append(f"pictures/prompt{p}-{runtime.format}.png")
            pipeline.generate(golden.prompt, golden.seed).image.save(folder / paths[-1])
    return describe_files(folder, paths)
