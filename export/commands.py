"""What each command does with its options: checks them, makes the one call, shows the result."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from export.analysis import analyze
from export.budgets import parse_size
from export.calibrating import CalibrationOptions
from export.compression.ladders import Activations
from export.console import NOWHERE, StageBars, loss_lines, noise_to, plan_table, recipe_table, say
from export.errors import UserError
from export.exporter import export
from export.families.family import Contract
from export.lora import pair_loras
from export.planning import Check, ExportOptions, ExportPlan, make_plan
from export.publish import GateFailed, check_place
from export.rewrites import Rewrites, rewrites_of
from export.targets import ROUNDING_FORMATS, TARGETS, Target, choose_formats, load_format
from runtimes.bundle import BundleError, load_manifest
from runtimes.harness.parity import Report, verify_bundle
from runtimes.pipeline import Pipeline
from runtimes.registry import choose_runtime
from runtimes.tables import compact_table, megabytes

BUILT_IN = "flash-mini"


def run_export(*, target: str, out: Path | None, dry_run: bool, **given: Any) -> None:
    """Plans every target before any is made; exit code 1 where a parity gate fails."""
    plans = _plans(target, _export_options(**given))
    folder = out or Path("bundles") / plans[0].checkpoint.title
    for plan in plans:
        check_place(folder / plan.target.name, plan.needed_bytes)
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    if dry_run:
        console = Console()
        for plan in plans:
            console.print(plan_table(plan), "")
        for note in notes:
            say(console, f"note: {note}")
        return
    _check_writable(folder / "export.log")
    with noise_to(folder / "export.log") as console:
        for note in notes:
            say(console, f"note: {note}")
        failed = [plan.target.name for plan in plans if not _export_one(plan, folder / plan.target.name, console)]
    if failed:
        sys.exit(1)


def run_analyze(*, target: str, out: Path, **given: Any) -> None:
    """Writes the recipe of every format of the targets. Raises `UserError` where there is nothing to choose."""
    plans = _plans(target, _export_options(**given, chunks="auto", rewrite=True, without=(), recipe=None))
    if all(plan.calibration is None for plan in plans):
        raise UserError("there is nothing to analyze: give --bits below 16, and no --no-calibration")
    _check_writable(out.with_suffix(".log"))
    with noise_to(out.with_suffix(".log")) as console:
        with StageBars(console) as bars:
            found = analyze(plans, bars)
        found.save(out)
        console.print(recipe_table(found))
        say(console, f"{out}: export-flash --target {target} --recipe {out}")


def _export_options(
    *,
    model: str | None,
    tokenizer: Path | None,
    loras: tuple[str, ...],
    lora_scales: tuple[float, ...],
    steps: int | None,
    sigmas: str | None,
    resolution: str | None,
    bits: float | None,
    size_budget: str | None,
    preset: str | None,
    recipe: Path | None,
    calibration: bool,
    calibration_prompts: Path | None,
    calibration_images: Path | None,
    calibration_device: str | None,
    contract: Contract,
    activations: Activations,
    deployment_target: str,
    formats: tuple[str, ...],
    components: tuple[str, ...],
    chunks: str,
    rewrite: bool,
    without: tuple[str, ...],
    check: Check | None = None,
) -> ExportOptions:
    return ExportOptions(
        model=model or built_in(),
        tokenizer=tokenizer,
        loras=pair_loras(loras, lora_scales),
        steps=steps,
        sigmas=_sigmas(sigmas),
        resolution=_resolution(resolution),
        bits=bits,
        size_budget=None if size_budget is None else parse_size(size_budget),
        preset=preset,
        recipe=recipe,
        calibrate=calibration,
        calibration=CalibrationOptions(calibration_prompts, calibration_images, calibration_device),
        contract=contract,
        activations=activations,
        rewrites=_rewrites(contract, rewrite, without),
        deployment_target=deployment_target,
        formats=formats,
        components=components,
        chunks=_chunks(chunks),
        check=check,
    )


def _plans(target: str, options: ExportOptions) -> list[ExportPlan]:
    targets = _targets(target, options.formats)
    with noise_to(NOWHERE):  # their imports have much to say; a download of the checkpoint shows its own progress
        for t in targets:
            for name in choose_formats(t, options.formats):
                load_format(name)
    rounding = [t for t in targets if not ROUNDING_FORMATS.isdisjoint(t.formats)]
    others = replace(options, activations="float") if rounding else options
    return [make_plan(t, options if t in rounding else others) for t in targets]


def _targets(target: str, formats: tuple[str, ...]) -> list[Target]:
    if target != "all":
        return [TARGETS[target]]
    return [t for t in TARGETS.values() if not formats or not {*t.formats}.isdisjoint(formats)] or [*TARGETS.values()]


def _export_one(plan: ExportPlan, place: Path, console: Console) -> bool:
    try:
        with StageBars(console) as bars:
            report = export(plan, place, bars)
    except GateFailed as error:
        _show(console, error.args[0])
        say(console, f"not published: what was made lies in {place}.failed", "red")
        return False
    except UserError:
        logging.getLogger(__name__).exception("%s", place)  # the log alone shows where
        raise
    _show(console, report)
    for line in loss_lines(load_manifest(place).recipe):
        say(console, line)
    say(console, f'{place} is ready: export-flash generate {place} "a prompt"')
    return True


def run_generate(
    *, bundle: Path, prompt: str, seed: int, runtime: str, out: Path, low_memory: bool, threads: int | None
) -> None:
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: a picture is .png, .jpg or .webp")
    with noise_to(NOWHERE):
        pipeline = Pipeline.open(bundle, runtime, low_memory=low_memory, threads=threads)
        drawn = pipeline.generate(prompt, seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.image.save(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}; choose another file") from error
    table = compact_table(f"{pipeline.runtime.name} on this computer", ("component",), ("load s", "run s", "runs"))
    for name, timing in drawn.timings.items():
        table.add_row(name, f"{timing.load:.3f}", f"{timing.run:.3f}", str(timing.calls))
    console = Console()
    console.print(table)
    say(console, f"{out}: {drawn.image.width} x {drawn.image.height} px, {pipeline.manifest.steps} steps, seed {seed}")


def run_verify(*, bundle: Path, runtimes: tuple[str, ...], json_file: Path | None, low_memory: bool) -> None:
    manifest = load_manifest(bundle)
    for name in runtimes:
        choose_runtime(manifest, name)
    try:
        with noise_to(NOWHERE):
            report = verify_bundle(bundle, runtimes or None, low_memory=low_memory)
    except BundleError as error:
        print(f"export-flash: {error}", file=sys.stderr)
        sys.exit(1)
    _show(Console(), report)
    if json_file is not None:
        try:
            json_file.write_text(report.to_json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error.strerror}; choose another file") from error
    if not report.passed:
        sys.exit(1)


def run_inspect(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    size = manifest.image_size
    title = f"{manifest.model.name} for {manifest.target}: {size.width} x {size.height} px, {manifest.steps} steps"
    artifacts = compact_table(title, ("component", "format", "runs on"), ("bits", "MB"), "files")
    for entry in manifest.components:
        files = "\n".join(artifact.path for artifact in entry.artifacts)
        unit = entry.compute_units or entry.backend or "CPU"
        artifacts.add_row(entry.name, entry.format, unit, f"{entry.bits:.2f}", megabytes(entry.bytes), files)
    tensors = compact_table("", ("component", "", "tensor"), (), "type and shape")
    for name, inputs, outputs in dict.fromkeys((entry.name, entry.inputs, entry.outputs) for entry in manifest.components):
        for kind, entries in (("in", inputs), ("out", outputs)):
            for tensor in entries:
                first = kind == "in" and tensor is entries[0]
                tensors.add_row(name if first else "", kind, tensor.name, f"{tensor.dtype} {list(tensor.shape)}")
    lines = []
    for hint in manifest.resources:
        sizes = [megabytes(count) for count in (hint.all_components, hint.denoising, hint.largest_component)]
        lines.append(f"{hint.format}: {sizes[0]} MB in all, {sizes[1]} MB while denoising, largest component {sizes[2]} MB")
    calibrated = "calibrated" if manifest.recipe.calibrated else "not calibrated"
    lines.append(f"weights by {manifest.recipe.name}, {calibrated}")
    lines += loss_lines(manifest.recipe)
    lines.append(f"sigmas {' '.join(f'{s:g}' for s in manifest.sigmas)}; contract {manifest.contract}")
    lines.append(f"exact rewrites: {', '.join(manifest.rewrites) or 'none'}")
    lines.append(f"licence {manifest.licence.name}; {manifest.licence.attribution}")
    verdict = "every comparison passed" if all(p.passed for p in manifest.parity) else "a comparison FAILED"
    lines.append(f"parity: {len(manifest.parity)} comparisons, {verdict}" if manifest.parity else "parity: never measured")
    Console().print(artifacts, "", tensors, "", *(Text(line) for line in lines), sep="\n")


def built_in() -> str:
    """The folder of flash-mini, which comes with the package."""
    return str(resources.files("distill") / BUILT_IN)


def _show(console: Console, report: Report) -> None:
    console.print(report.table())
    for failure in report.failures:
        say(console, f"failed {failure}", "red")


def _check_writable(log: Path) -> None:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a"):
            pass
    except OSError as error:
        raise UserError(f"--out {log.parent} cannot be written: {error.strerror}; choose another folder") from error


def _resolution(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UserError(f"--resolution {text} is no size in pixels; write 512 or 768x512 (width x height)")
    return int(match[1]), int(match[2] or match[1])


def _sigmas(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(value) for value in text.replace(",", " ").split())
    except ValueError:
        raise UserError(f'--sigmas {text} are no numbers; write them as "1 0.9 0.75 0.5 0"') from None


def _chunks(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--chunks {text} is neither auto nor a number of 1 or more")
    return int(text)


def _rewrites(contract: Contract, rewrite: bool, without: tuple[str, ...]) -> Rewrites:
    names = list(vars(Rewrites()))
    for name in without:
        if name not in names:
            raise UserError(f"--without {name} is no rewrite; choose from {', '.join(names)}")
    kept = rewrites_of(contract) if rewrite else Rewrites(**dict.fromkeys(names, False))
    return Rewrites(**{name: on and name not in without for name, on in vars(kept).items()})
