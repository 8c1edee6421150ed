"""`verify` beyond the gate: per layer beside the checkpoint, float16 ranges, drift along the steps, against another bundle."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from export.calibrating import CalibrationOptions
from export.choosing import settle
from export.commands import built_in, run_verify
from export.compressing import Compressed, compressed, statistics_for
from export.console import NOWHERE, noise_to, say
from export.errors import UserError
from export.exporter import RECIPE
from export.formats.format import Format
from export.layerwise import reference_of
from export.lora import Lora, as_options, pair_loras
from export.planning import ExportOptions, ExportPlan, make_plan
from export.progress import Silent
from export.recording import run_all
from export.rewrites import Rewrites
from export.targets import TARGETS
from runtimes.bundle import BundleError, ComponentEntry, Manifest, check_files, load_manifest
from runtimes.golden import Arrays, Case, read_cases
from runtimes.harness.against import compare_bundles
from runtimes.harness.drift import measure_drift
from runtimes.harness.layers import FLOAT16_FLOOR, FLOAT32_FLOOR, ROUNDED_FLOOR, ArtifactLayers, LayerReport, compare_layers
from runtimes.harness.parity import psnr
from runtimes.harness.probes import PROBES
from runtimes.harness.ranges import measure_ranges
from runtimes.registry import RUNTIMES, fed

SAME_WEIGHTS = 80.0  # dB of outputs, from which two computers hold the same stored weights


class _Report(Protocol):
    def table(self) -> Table: ...

    def to_json(self) -> str: ...


def run_verify_command(
    *,
    bundle: Path,
    runtimes: tuple[str, ...],
    per_layer: bool,
    ranges: bool,
    drift: bool,
    against: Path | None,
    model: str | None,
    components: tuple[str, ...],
    case: int,
    calibration_prompts: Path | None,
    calibration_images: Path | None,
    calibration_device: str | None,
    json_file: Path | None,
    low_memory: bool,
    loras: tuple[str, ...] = (),
    lora_scales: tuple[float, ...] = (),
) -> None:
    """The gate, or the one report that was asked for in its place. Raises `UserError` for two of them."""
    asked = {"--per-layer": per_layer, "--ranges": ranges, "--drift": drift, "--against": against is not None}
    chosen = [name for name, given in asked.items() if given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} are reports of their own; give one of them")
    of_layers = (model, loras, lora_scales, components, case, calibration_prompts, calibration_images, calibration_device)
    if not per_layer and any(of_layers):
        names = "--model, --lora, --lora-scale, --component, --case and --calibration-..."
        raise UserError(f"{names} belong to --per-layer; give it or leave them out")
    if per_layer:
        calibration = CalibrationOptions(calibration_prompts, calibration_images, calibration_device)
        run_verify_layers(
            bundle=bundle,
            model=model or built_in(),
            loras=pair_loras(loras, lora_scales),
            runtimes=runtimes,
            components=components,
            case=case,
            calibration=calibration,
            json_file=json_file,
        )
    elif ranges:
        run_verify_ranges(bundle=bundle, json_file=json_file)
    elif drift:
        if len(runtimes) > 1:
            raise UserError(f"--drift follows one runtime; give one of {', '.join(runtimes)}")
        run_verify_drift(bundle=bundle, runtime=(*runtimes, "auto")[0], low_memory=low_memory, json_file=json_file)
    elif against is not None:
        run_verify_against(bundle=bundle, against=against, low_memory=low_memory, json_file=json_file)
    else:
        run_verify(bundle=bundle, runtimes=runtimes, json_file=json_file, low_memory=low_memory)


def run_verify_layers(
    *,
    bundle: Path,
    model: str,
    runtimes: tuple[str, ...],
    components: tuple[str, ...],
    case: int,
    calibration: CalibrationOptions,
    json_file: Path | None,
    loras: tuple[Lora, ...] = (),
) -> None:
    """Names the first operation where an artifact and the checkpoint's modules part; exit code 1 where one does."""
    with noise_to(NOWHERE):
        report = verify_layers(bundle, model, runtimes, components, case, calibration, loras)
    _show(report, report.failures, json_file)


def run_verify_ranges(*, bundle: Path, json_file: Path | None) -> None:
    """The float16 range map; exit code 1 where something overflows."""
    with noise_to(NOWHERE):
        ranges = measure_ranges(bundle)
    _show(ranges, ranges.failures, json_file)


def run_verify_drift(*, bundle: Path, runtime: str, low_memory: bool, json_file: Path | None) -> None:
    """How far the latents are from the original's after each step."""
    with noise_to(NOWHERE):
        drift = measure_drift(bundle, runtime, low_memory=low_memory)
    _show(drift, (), json_file)


def run_verify_against(*, bundle: Path, against: Path, low_memory: bool, json_file: Path | None) -> None:
    """What two bundles of one checkpoint store, and how far they lie apart."""
    with noise_to(NOWHERE):
        differences = compare_bundles(bundle, against, low_memory=low_memory)
    _show(differences, (), json_file)


def verify_layers(
    bundle: Path,
    model: str,
    runtimes: tuple[str, ...] = (),
    components: tuple[str, ...] = (),
    case: int = 0,
    calibration: CalibrationOptions | None = None,
    loras: tuple[Lora, ...] = (),
) -> LayerReport:
    """Every artifact of the bundle beside its component, made anew from the checkpoint `model` (with `loras` merged), on golden
    case number `case` (the last one, of a component that has fewer).

    The weights are stored again as the bundle's recipe.json says, from the calibration that the bundle was made with.
    runtimes, components: only these; empty: all. Raises `UserError` where the checkpoint is another one or the weights do not
    come out as the bundle's did, `BundleError` and `GraphError` where the bundle cannot be run.
    """
    manifest = load_manifest(bundle)
    check_files(bundle, manifest)
    entries = [entry for entry in manifest.components if entry.format in _formats(manifest, runtimes)]
    names = list(dict.fromkeys(entry.name for entry in entries))
    if unknown := [name for name in components if name not in names]:
        raise UserError(f"--component {unknown[0]} is not in {bundle}; choose from {', '.join(names)}")
    wanted = [entry for entry in entries if not components or entry.name in components]
    plan = _plan(bundle, manifest, model, loras, wanted, calibration or CalibrationOptions())
    statistics = statistics_for(plan, Silent(), manifest.model.fingerprint)
    rows: list[ArtifactLayers] = []
    for component in compressed(plan, settle(plan, statistics, Silent()), statistics, Silent(), "components"):
        if component.part.name not in plan.exported:
            continue
        cases = list(read_cases(bundle, manifest.golden, component.part.name))
        golden = cases[min(case, len(cases) - 1)]
        for format in plan.formats:
            entry = manifest.component(component.part.name, format.name)
            if entry is not None:
                _check_weights(bundle, component, format, golden)
                rows += component_layers(bundle, entry, component, golden.inputs, min(case, len(cases) - 1))
    return LayerReport(manifest.model.name, manifest.target, tuple(rows))


def component_layers(
    bundle: Path, entry: ComponentEntry, component: Compressed, inputs: Arrays, number: int
) -> Iterator[ArtifactLayers]:
    """One component's artifacts beside its pieces, on one golden case; a chunk takes what the artifacts before it gave."""
    runtime = next(runtime for runtime in RUNTIMES.values() if runtime.format == entry.format)
    floor, values = _floor(entry), inputs
    for piece, artifact in zip(component.part.pieces, entry.artifacts, strict=True):
        path = bundle / artifact.path
        given = {spec.name: fed(artifact.feed(spec.name), values) for spec in piece.inputs}
        module, stored = component.skeleton(piece, entry.format), component.stored_of(piece, entry.format)
        reference = reference_of(entry.format, piece, module, stored)
        layers, operations, nodes = compare_layers(PROBES[entry.format](path), reference, given, floor)
        yield ArtifactLayers(entry.name, entry.format, artifact.path, number, floor, operations, nodes, layers)
        if artifact is not entry.artifacts[-1]:
            values = {**values, **runtime.load(path, entry, None)(given)}


def _plan(
    bundle: Path,
    manifest: Manifest,
    model: str,
    loras: tuple[Lora, ...],
    entries: list[ComponentEntry],
    calibration: CalibrationOptions,
) -> ExportPlan:
    """The plan by which these components of the bundle were made."""
    if manifest.target not in TARGETS:
        raise UserError(f"{bundle} was made for {manifest.target}; --per-layer knows {', '.join(TARGETS)}")
    chunks = max((len(entry.artifacts) for entry in manifest.components if entry.name == "transformer"), default=1)
    options = ExportOptions(
        model=model,
        loras=loras,
        sigmas=manifest.sigmas,
        resolution=(manifest.image_size.width, manifest.image_size.height),
        recipe=bundle / RECIPE,
        calibrate=manifest.recipe.calibrated,
        calibration=calibration if manifest.recipe.calibrated else CalibrationOptions(),
        contract=manifest.contract,
        activations="int8" if any(entry.activations for entry in entries if entry.format == "onnx") else "float",
        rewrites=Rewrites(**{name: name in manifest.rewrites for name in vars(Rewrites())}),
        formats=tuple(dict.fromkeys(entry.format for entry in entries)),
        components=tuple(dict.fromkeys(entry.name for entry in entries)),
        chunks=chunks,
    )
    plan = make_plan(TARGETS[manifest.target], options)
    if plan.checkpoint.fingerprint() != manifest.model.fingerprint:
        name, merged = manifest.model.name, as_options(manifest.model.loras)
        raise UserError(
            f"--model {model} is not the checkpoint that {bundle} was made of; give that of {name} with --model{merged}"
        )
    return plan


def _check_weights(bundle: Path, component: Compressed, format: Format, golden: Case) -> None:
    """Raises `UserError` unless the weights, stored again, give what the bundle's golden case records of them."""
    (outputs,) = run_all(component.references(format) or component.original, [golden.inputs])
    expected = golden.expected(format.name)
    if worst := [name for name in expected if not psnr(outputs[name], expected[name]) >= SAME_WEIGHTS]:
        raise UserError(
            f"the weights of {component.part.name} ({format.name}) do not come out as those of {bundle} did: {worst[0]} "
            "differs from the golden case; give the calibration that the bundle was made with"
        )


def _floor(entry: ComponentEntry) -> float:
    if entry.precision == "float16":
        return FLOAT16_FLOOR
    return ROUNDED_FLOOR if entry.activations else FLOAT32_FLOOR


def _formats(manifest: Manifest, runtimes: tuple[str, ...]) -> set[str]:
    for name in runtimes:
        if name not in RUNTIMES or RUNTIMES[name].format not in manifest.formats:
            usable = [runtime.name for runtime in RUNTIMES.values() if runtime.format in manifest.formats]
            raise BundleError(f"runtime {name!r} runs nothing of this bundle; choose from {', '.join(usable)}")
    return {RUNTIMES[name].format for name in runtimes} or set(manifest.formats)


def _show(report: _Report, failures: tuple[str, ...], json_file: Path | None) -> None:
    console = Console()
    console.print(report.table())
    for failure in failures:
        say(console, f"failed {failure}", "red")
    if json_file is not None:
        try:
            json_file.write_text(report.to_json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error.strerror}; choose another file") from error
    if failures:
        sys.exit(1)
