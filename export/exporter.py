"""The steps of an export, in their order: calibration, the recipe, reference pictures, then component by component weights,
golden cases, artifacts; then the manifest, the parity gate, and publication."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.prompts import golden_prompts
from calibration.statistics import Statistics
from export.choosing import recipe_file, settle, with_measured
from export.compressing import Compressed, Trials, compressed, contract_of, statistics_for
from export.compression.recipe import FormatRecipe
from export.describing import component_entry, make_manifest, make_recipe_entry, scheme_uses
from export.diffusers_layout import write_layout
from export.measuring import Loss
from export.planning import ExportPlan
from export.progress import Progress
from export.publish import GateFailed, publishing
from export.recording import Recorder, entries
from export.reference import draw, reference_pipeline
from runtimes.bundle import ComponentEntry, FileEntry, Manifest, SchemeUse, SelfTestEntry, describe_files, write_manifest
from runtimes.golden import Case, Drawing, write_golden
from runtimes.harness.parity import Report, verify_bundle
from runtimes.harness.report import REPORT, write_report
from runtimes.pipeline import Drawn, Pipeline, to_image
from runtimes.registry import RUNTIMES
from runtimes.selftest import write_selftest

RECIPE = "recipe.json"


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
        statistics = statistics_for(plan, progress, fingerprint)
        recipes = settle(plan, statistics, progress)
        drawings = _draw(plan, progress)
        trials = Trials(plan, golden_prompts(plan.checkpoint.flash, plan.measured_prompts))
        made = _components(folder, plan, compressed(plan, recipes, statistics, progress, "components"), drawings, trials)
        losses = trials.losses()
        _write_recipe(folder, plan, fingerprint, recipes, losses, statistics)
        _copy_texts(folder, plan)
        others = (*_pictures(folder, drawings), *describe_files(folder, [RECIPE]))
        if plan.graph.contract == "diffusers" and any(format.name == "onnx" for format in plan.formats):
            others = (*others, *write_layout(folder, plan.checkpoint))
        cases = {part.name: made[part.name].cases for part in plan.parts if part.name in plan.exported}
        manifest = make_manifest(
            folder,
            plan,
            [entry for item in made.values() for entry in item.entries],
            make_recipe_entry(plan, recipes, losses, [use for item in made.values() for use in item.schemes]),
            write_golden(folder, cases, drawings),
            fingerprint,
            plan.tokenizers,
            others,
        )
        write_manifest(folder, manifest)
        report = _verify(folder, manifest, progress)
        selftest = None
        if report.passed and plan.exported == {part.name for part in plan.parts}:
            drawn, selftest = _drawn_pictures(folder, manifest, progress)
            others = (*others, *drawn)
        finished = {"parity": report.to_entries(), "other_files": others, "selftest": selftest}
        manifest = manifest.model_copy(update=finished)
        if report.passed:
            progress.stage("report", 1)
            progress.step(REPORT)
            page = describe_files(folder, [write_report(folder, manifest).name])
            manifest = manifest.model_copy(update={"other_files": (*others, *page)})
        write_manifest(folder, manifest)
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


def _components(
    folder: Path, plan: ExportPlan, components: Iterator[Compressed], drawings: Sequence[Drawing], trials: Trials
) -> dict[str, Made]:
    """Every component in the order of use: golden cases, artifacts, and what its stored weights change in the pictures."""
    transformer = next(part for part in plan.parts if part.name == "transformer")
    pair = [plan.tokenizers["tokenizer"], plan.tokenizers["tokenizer_2"]]
    recorder = Recorder(contract_of(plan), pair, drawings, entries(transformer.pieces[0].inputs))
    made = {}
    for component in components:
        references = {format.name: component.references(format) for format in plan.formats}
        cases = recorder.record(component.part.name, component.original, {k: v for k, v in references.items() if v})
        trials.advance(component, references)
        if component.part.name in plan.exported:
            made[component.part.name] = _emit(folder, plan, component, cases)
    return made


def _emit(folder: Path, plan: ExportPlan, component: Compressed, cases: Sequence[Case]) -> Made:
    part, entries, uses = component.part, [], list[SchemeUse]()
    for format in plan.formats:
        stored = component.stored[format.name]
        artifacts = [
            artifact
            for piece, module, weights in zip(part.pieces, component.modules, stored, strict=True)
            for artifact in format.emit(piece, module, weights, folder, plan.emit)
        ]
        entries.append(component_entry(folder, plan, part, artifacts, stored))
        uses += scheme_uses(part.name, format.name, stored)
    return Made(tuple(entries), tuple(uses), tuple(cases))


def _write_recipe(
    folder: Path,
    plan: ExportPlan,
    fingerprint: str,
    recipes: Mapping[str, FormatRecipe],
    losses: Mapping[str, Loss],
    statistics: Statistics | None,
) -> None:
    """recipe.json, which `--recipe` takes."""
    prompts = None if statistics is None else len(statistics.subject.prompts)
    recipe_file(plan, fingerprint, with_measured(recipes, losses), prompts).save(folder / RECIPE)


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


def _drawn_pictures(folder: Path, manifest: Manifest, progress: Progress) -> tuple[tuple[FileEntry, ...], SelfTestEntry]:
    """pictures/prompt<p>-<format>.png: what the bundle draws; apps test themselves by the first of them."""
    progress.stage("pictures", len(manifest.formats) * len(manifest.golden.prompts))
    paths, drawn = list[str](), dict[str, tuple[str, Drawn]]()
    for runtime in RUNTIMES.values():
        if runtime.format not in manifest.formats:
            continue
        pipeline = Pipeline.open(folder, runtime.name)
        for p, golden in enumerate(manifest.golden.prompts):
            progress.step(f"{runtime.format}: {golden.prompt}")
            paths.append(f"pictures/prompt{p}-{runtime.format}.png")
            result = pipeline.generate(golden.prompt, golden.seed)
            result.image.save(folder / paths[-1])
            drawn.setdefault(runtime.format, (runtime.name, result))
    return describe_files(folder, paths), write_selftest(folder, manifest, manifest.golden.prompts[0], drawn)
