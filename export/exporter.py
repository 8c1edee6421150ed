"""The steps of an export, in their order: calibration, the recipe, reference pictures, then component by component weights,
golden cases and artifacts; then the manifest, the parity gate, pictures, the page, and publication.

What is finished is noted in a journal: an export that was stopped goes on with what is left.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from calibration.prompts import golden_prompts
from calibration.statistics import Statistics
from export.choosing import recipe_file, settle, with_measured
from export.compressing import Compressed, Trials, compress, contract_of, statistics_for
from export.compression.recipe import FormatRecipe
from export.describing import TOOLS, component_entry, make_manifest, make_recipe_entry, scheme_uses
from export.diffusers_layout import write_layout
from export.journal import Journal
from export.measuring import Loss, loss_of
from export.memory import keep_large_blocks_apart, release
from export.planning import ExportPlan, Part
from export.progress import Progress
from export.publish import GateFailed, publishing
from export.recording import Recorder, entries
from export.reference import draw, reference_pipeline
from export.stopping import Heeding
from runtimes.bundle import (
    ComponentEntry,
    FileEntry,
    GoldenPrompt,
    GoldenTensors,
    Manifest,
    SchemeUse,
    describe_files,
    write_manifest,
)
from runtimes.golden import IMAGES, Drawing, golden_entry, read_entry, read_images, write_cases, write_drawings
from runtimes.harness.parity import Report, verify_bundle
from runtimes.harness.report import REPORT, write_report
from runtimes.pipeline import Drawn, to_image
from runtimes.registry import RUNTIMES
from runtimes.selftest import write_selftest

RECIPE = "recipe.json"
PICTURES = "pictures"
FINISHED = "finished before"  # by an export that was stopped


def export(plan: ExportPlan, place: Path, progress: Progress) -> Report:
    """Makes the bundle of a plan at `place`, which holds the old one until the new one has passed.

    Returns the parity report. Raises `GateFailed`, with the report as its argument, where a comparison failed; what was made
    then lies in `<place>.failed`. Stopped and called again for the same plan, it repeats nothing that was finished.
    """
    progress.stage("checkpoint", 1)
    progress.step("fingerprint")
    fingerprint = plan.checkpoint.fingerprint()
    if plan.is_large:
        keep_large_blocks_apart()
    with publishing(place, plan.needed_bytes, key_of(plan, fingerprint)) as folder:
        return _Export(plan, folder, fingerprint, Heeding(progress)).make()


def key_of(plan: ExportPlan, fingerprint: str) -> str:
    """Equal for two exports that make the same: a hash of the checkpoint's content, the plan, this package and its tools."""
    here = Path(__file__).parent
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(here.rglob("*.py"))]
    calibration = None if plan.calibration is None else {k: str(v) for k, v in asdict(plan.calibration).items()}
    recipe = None if plan.recipe is None else plan.recipe.model_dump(mode="json")
    asked = [
        fingerprint,
        plan.target.name,
        asdict(plan.graph),
        asdict(plan.emit),
        [asdict(plan.budget), dict(plan.budgets), plan.activations],
        recipe,
        calibration,
        [repr(format) for format in plan.formats],
        [repr(part.plans) for part in plan.parts],
        sorted(plan.exported),
        [plan.golden_prompts, plan.check],
        {name: importlib.metadata.version(name) for name in TOOLS},
        sources,
    ]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class _Made:
    """What came of a component in every format."""

    entries: tuple[ComponentEntry, ...]
    schemes: tuple[SchemeUse, ...]
    golden: GoldenTensors | None


@dataclass
class _Export:
    """One export into the folder of the bundle in work."""

    plan: ExportPlan
    folder: Path
    fingerprint: str
    progress: Progress
    drawn: dict[str, list[Drawn]] = field(default_factory=dict)  # by format, prompt by prompt

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder)
        # A bundle of some components draws nothing: what its weights cost is seen by their compressed references.
        partial = self.plan.exported != {part.name for part in self.plan.parts}
        prompts = golden_prompts(self.plan.checkpoint.flash, self.plan.measured_prompts)
        self.trials = Trials(self.plan, prompts) if partial and self.plan.check == "pictures" else None

    @cached_property
    def statistics(self) -> Statistics | None:
        return statistics_for(self.plan, self.progress, self.fingerprint)

    def make(self) -> Report:
        recipes = self._recipes()
        drawings = self._drawings()
        made = self._components(recipes, drawings)
        others = self._copy_texts()
        golden = [item.golden for item in made if item.golden is not None]
        uses = [use for item in made for use in item.schemes]
        prompts = [GoldenPrompt(prompt=drawing.prompt, seed=drawing.seed) for drawing in drawings]
        manifest = make_manifest(
            self.folder,
            self.plan,
            [entry for item in made for entry in item.entries],
            make_recipe_entry(self.plan, recipes, {}, uses),
            golden_entry(self.folder, prompts, golden),
            self.fingerprint,
            self.plan.tokenizers,
            others,
        )
        write_manifest(self.folder, manifest)
        report = self._verify(manifest)
        losses = {format: _loss(drawn, drawings) for format, drawn in self.drawn.items()}
        if self.trials is not None:
            losses = self.trials.losses()
        others = (*others, self._write_recipe(with_measured(recipes, losses)), *self._pictures())
        finished: dict[str, object] = {
            "recipe": make_recipe_entry(self.plan, recipes, losses, uses),
            "parity": report.to_entries(),
            "other_files": others,
        }
        if report.passed and self.drawn:
            runtimes = {runtime.format: runtime.name for runtime in RUNTIMES.values()}
            first = {format: (runtimes[format], drawn[0]) for format, drawn in self.drawn.items()}
            finished["selftest"] = write_selftest(self.folder, manifest, manifest.golden.prompts[0], first)
        manifest = manifest.model_copy(update=finished)
        if report.passed:
            self.progress.stage("report", 1)
            self.progress.step(REPORT)
            write_manifest(self.folder, manifest)
            page = write_report(self.folder, manifest, measured=self.plan.check == "pictures")
            manifest = manifest.model_copy(update={"other_files": (*others, *describe_files(self.folder, [page.name]))})
        write_manifest(self.folder, manifest)
        if not report.passed:
            raise GateFailed(report)
        return report

    def _recipes(self) -> dict[str, FormatRecipe]:
        found = self.journal.recall("recipe")
        if found is not None:
            return {format: FormatRecipe.model_validate(recipe) for format, recipe in found.items()}
        recipes = settle(self.plan, self.statistics, self.progress)
        self.journal.note("recipe", {format: recipe.model_dump(mode="json") for format, recipe in recipes.items()}, [])
        return recipes

    def _drawings(self) -> list[Drawing]:
        """What unmodified diffusers draws of the golden prompts."""
        prompts = golden_prompts(self.plan.checkpoint.flash, self.plan.golden_prompts)
        entries = [GoldenPrompt(prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]
        self.progress.stage("reference pictures", len(prompts))
        if self.journal.recall("drawings") is not None:
            for _ in entries:
                self.progress.step(FINISHED)
        else:
            pipeline = reference_pipeline(self.plan.checkpoint)
            drawings = []
            for entry in entries:
                self.progress.step(entry.prompt)
                drawings.append(draw(pipeline, self.plan.graph, entry.prompt, entry.seed))
            write_drawings(self.folder, drawings)
            (self.folder / PICTURES).mkdir(exist_ok=True)
            for p, drawing in enumerate(drawings):
                to_image(drawing.image).save(self.folder / PICTURES / f"prompt{p}-original.png")
            paths = [IMAGES, *(f"{PICTURES}/prompt{p}-original.png" for p in range(len(drawings)))]
            self.journal.note("drawings", True, paths)
            del pipeline
            release()
        return list(read_images(self.folder, entries))

    def _components(self, recipes: Mapping[str, FormatRecipe], drawings: Sequence[Drawing]) -> list[_Made]:
        """Every component in the order of use: stored weights, golden cases and artifacts."""
        plan = self.plan
        transformer = next(part for part in plan.parts if part.name == "transformer")
        pair = [plan.tokenizers["tokenizer"], plan.tokenizers["tokenizer_2"]]
        steps = None if plan.check == "pictures" else (0,)
        recorder = Recorder(contract_of(plan), pair, drawings, entries(transformer.pieces[0].inputs), steps)
        self.progress.stage("components", len(plan.parts) * (2 * len(plan.formats) + 1))
        made = []
        for part in plan.parts:
            made.append(self._component(part, recipes, recorder))
            release()
        return made

    def _component(self, part: Part, recipes: Mapping[str, FormatRecipe], recorder: Recorder) -> _Made:
        found = self.journal.recall(part.name)
        if found is None or self.trials is not None:
            return self._make_component(part, recipes, recorder)
        for _ in range(2 * len(self.plan.formats) + 1):
            self.progress.step(f"{part.name}: {FINISHED}")
        golden = GoldenTensors.model_validate(found["golden"])
        recorder.recall(part.name, list(read_entry(self.folder, golden)))
        return _Made(
            tuple(ComponentEntry.model_validate(entry) for entry in found["entries"]),
            tuple(SchemeUse.model_validate(use) for use in found["schemes"]),
            golden if part.name in self.plan.exported else None,
        )

    def _make_component(self, part: Part, recipes: Mapping[str, FormatRecipe], recorder: Recorder) -> _Made:
        plan, progress = self.plan, self.progress
        component = compress(plan, part, recipes, self.statistics, progress)
        progress.step(f"{part.name}: golden cases")
        references = {format.name: component.references(format) for format in plan.formats}
        cases = recorder.record(part.name, component.original, {name: found for name, found in references.items() if found})
        golden = write_cases(self.folder, part.name, cases)
        if self.trials is not None:
            self.trials.advance(component, references)
        paths, entries, uses = [golden.path], list[ComponentEntry](), list[SchemeUse]()
        for format in plan.formats:
            progress.step(f"{part.name}: {format.name}")
            if part.name in plan.exported:
                entry = self._emit(component, format.name)
                entries.append(entry)
                uses += scheme_uses(part.name, format.name, component.stored[format.name])
                paths += [file.path for artifact in entry.artifacts for file in artifact.files]
        note = {
            "golden": golden.model_dump(mode="json"),
            "entries": [entry.model_dump(mode="json") for entry in entries],
            "schemes": [use.model_dump(mode="json") for use in uses],
        }
        self.journal.note(part.name, note, paths)
        return _Made(tuple(entries), tuple(uses), golden if part.name in plan.exported else None)

    def _emit(self, component: Compressed, name: str) -> ComponentEntry:
        part, (format,) = component.part, [format for format in self.plan.formats if format.name == name]
        artifacts = []
        for piece in part.pieces:
            skeleton, stored = component.skeleton(piece, name), component.stored_of(piece, name)
            artifacts += format.emit(piece, skeleton, stored, self.folder, self.plan.emit)
            release()
        return component_entry(self.folder, self.plan, part, artifacts, component.stored[name])

    def _copy_texts(self) -> tuple[FileEntry, ...]:
        """Tokenizers as phones read them, and as transformers does, the checkpoint's licence, and diffusers' layout."""
        plan, folder = self.plan, self.folder
        for name, tokenizer in plan.tokenizers.items():
            tokenizer.save(folder / name)
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):  # what transformers reads
                if (plan.checkpoint.tokenizers[name] / file).is_file():
                    shutil.copyfile(plan.checkpoint.tokenizers[name] / file, folder / name / file)
        for path in plan.checkpoint.licence_files:
            shutil.copyfile(path, folder / path.name)
        # The cases of a component that is not exported served the next ones.
        for part in plan.parts:
            if part.name not in plan.exported:
                (folder / "golden" / f"{part.name}.safetensors").unlink(missing_ok=True)
        others = describe_files(folder, [PICTURES])
        if plan.graph.contract == "diffusers" and any(format.name == "onnx" for format in plan.formats):
            others = (*others, *write_layout(folder, plan.checkpoint))
        return others

    def _verify(self, manifest: Manifest) -> Report:
        pictures = self.plan.check == "pictures"
        self.progress.stage("parity", len(manifest.components) + pictures * len(manifest.formats))

        def keep(format: str, drawn: Drawn) -> None:
            self.drawn.setdefault(format, []).append(drawn)

        return verify_bundle(
            self.folder,
            low_memory=not pictures,
            pictures=pictures,
            on_component=lambda component, format: self.progress.step(f"{component}: {format}"),
            on_drawn=keep,
        )

    def _pictures(self) -> tuple[FileEntry, ...]:
        """pictures/prompt<p>-<format>.png: what the bundle draws."""
        paths = []
        for format, drawn in self.drawn.items():
            for p, result in enumerate(drawn):
                paths.append(f"{PICTURES}/prompt{p}-{format}.png")
                result.image.save(self.folder / paths[-1])
        return describe_files(self.folder, paths)

    def _write_recipe(self, recipes: Mapping[str, FormatRecipe]) -> FileEntry:
        """recipe.json, which `--recipe` takes."""
        prompts = None if self.statistics is None else len(self.statistics.subject.prompts)
        recipe_file(self.plan, self.fingerprint, recipes, prompts).save(self.folder / RECIPE)
        (entry,) = describe_files(self.folder, [RECIPE])
        return entry


def _loss(drawn: Sequence[Drawn], drawings: Sequence[Drawing]) -> Loss:
    """What a bundle's own pictures lost against those of unmodified diffusers."""
    return loss_of(
        [(result.latents[-1][0], result.pixels) for result in drawn],
        [(drawing.latents[-1], drawing.image) for drawing in drawings],
    )
