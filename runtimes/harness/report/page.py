"""The page itself: findings into page.html.j2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from runtimes.bundle import Manifest
from runtimes.harness.devices import DEVICES
from runtimes.harness.drift import Drift, decibels_in_table
from runtimes.harness.parity import IMAGE
from runtimes.harness.ranges import RangeMap
from runtimes.harness.report import charts, sheets
from runtimes.harness.report.collect import Findings, collect
from runtimes.harness.report.recipe import FormatEvidence
from runtimes.harness.results import Result
from runtimes.registry import RUNTIMES
from runtimes.tables import megabytes

REPORT = "report.html"
TEMPLATE = "page.html.j2"

# What stands behind a runtime's name on a computer.
EXECUTED_BY: Mapping[str, str] = {
    "coreml": "our executor of the package's own program, in torch; on macOS Core ML itself",
    "onnxruntime": "ONNX Runtime, on a computer's processor",
    "executorch": "ExecuTorch's own runtime, on a computer's processor",
}


@dataclass(frozen=True)
class Chart:
    """An <svg> element and the line under it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Tile:
    """One figure at the head of the page."""

    value: str
    what: str


def write_report(
    folder: Path,
    manifest: Manifest,
    *,
    benchmark: Result | None = None,
    ranges: RangeMap | None = None,
    drifts: Sequence[Drift] | None = None,
    measured: bool = True,
) -> Path:
    """Writes report.html into a bundle folder that is not yet published, and returns its path.

    The folder holds the manifest and everything else; `manifest` may say more than the file there, such as parity. `ranges` and
    `drifts` None: measured here, or left out where not `measured`. Raises as `collect` does.
    """
    path = folder / REPORT
    findings = collect(folder, manifest, benchmark=benchmark, ranges=ranges, drifts=drifts, measured=measured)
    path.write_text(render_page(findings), encoding="utf-8", newline="\n")
    return path


def render_page(findings: Findings) -> str:
    """The HTML, whole: style, pictures and charts inside it."""
    manifest = findings.manifest
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    devices = list(DEVICES.values())
    return environment.get_template(TEMPLATE).render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        manifest=manifest,
        gallery=findings.gallery,
        decibels=decibels_in_table,
        tiles=_tiles(manifest),
        passed=all(row.passed for row in manifest.parity),
        facts=_facts(manifest),
        sizes=sheets.size_sheet(manifest).narrowed(manifest.formats),
        schemes=sheets.scheme_sheet(manifest).narrowed(manifest.formats),
        parity=sheets.parity_sheet(manifest).narrowed(manifest.formats),
        losses=sheets.losses_sheet(manifest),
        evidence=[(each, _layer_charts(each, manifest)) for each in findings.evidence.values()],
        costly=[sheets.costly_sheet(each) for each in findings.evidence.values() if each.weighed],
        curves=[_curve(each, manifest) for each in findings.evidence.values() if each.weighed],
        drifts=[(_drift_chart(drift), sheets.drift_sheet(drift)) for drift in findings.drifts],
        ranges=None if findings.ranges is None else _ranges(findings.ranges),
        costs=[
            (
                Chart(Markup(charts.memory_chart(cost)), f"{cost.format}: stored weights in memory at each moment"),
                sheets.cost_sheet(cost),
                sheets.floor_sheet(cost, devices),
            )
            for cost in findings.costs
        ],
        benchmark=findings.benchmark,
        latency=None if findings.benchmark is None else _latency(findings.benchmark),
        verified=_verified(findings),
        phone=findings.benchmark if findings.benchmark is not None and not findings.benchmark.host else None,
        MARKS=sheets.MARKS,
    )


def _tiles(manifest: Manifest) -> list[Tile]:
    tiles = []
    for format in manifest.formats:
        entries = [entry for entry in manifest.components if entry.format == format]
        weights = sum(entry.weights for entry in entries)
        tiles.append(Tile(f"{megabytes(sum(entry.bytes for entry in entries))} MB", f"{format}, all artifacts"))
        if weights:
            stored = sum(entry.stored_bytes for entry in entries)
            tiles.append(Tile(f"{8 * stored / weights:.2f}", f"{format}, mean bits of a weight"))
        for row in manifest.parity:
            if (row.component, row.format, row.output) == (IMAGE, format, "image") and row.quality is not None:
                tiles.append(Tile(f"{decibels_in_table(row.quality)} dB", f"{format}, worst picture against the original's"))
    return tiles


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    size, recipe = manifest.image_size, manifest.recipe
    weighed = "weighed by what errors do to the final latents" if recipe.calibrated else "not calibrated"
    return [
        ("model", f"{manifest.model.name} ({manifest.model.family})"),
        ("target", f"{manifest.target}: {', '.join(manifest.formats)}"),
        ("pictures", f"{size.width} x {size.height} px in {manifest.steps} steps"),
        ("sigmas", ", ".join(f"{sigma:.4g}" for sigma in manifest.sigmas)),
        ("weights", f"{recipe.name}, {weighed}"),
        ("contract", manifest.contract),
        ("exact rewrites", ", ".join(manifest.rewrites) or "none"),
        ("licence", f"{manifest.licence.name}, {manifest.licence.attribution}"),
        ("checkpoint", f"sha256 {manifest.model.fingerprint}"),
        ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
    ]


def _layer_charts(evidence: FormatEvidence, manifest: Manifest) -> list[Chart]:
    """One a component, of the weights that had a choice; of all, where none had."""
    found = []
    for component in evidence.components:
        layers = [layer for layer in evidence.layers if layer.component == component]
        bits = sum(layer.bits * layer.weights for layer in layers) / sum(layer.weights for layer in layers)
        shown = [layer for layer in layers if layer.chosen] or layers
        caption = f"{component}, {evidence.format}: {bits:.2f} mean bits; {len(shown)} of {len(layers)} tensors shown"
        chart = charts.layers_chart(evidence.format, component, shown, manifest.recipe.calibrated)
        found.append(Chart(Markup(chart), caption))
    return found


def _curve(evidence: FormatEvidence, manifest: Manifest) -> Chart:
    chosen = evidence.chosen
    caption = f"{evidence.format}: {megabytes(chosen.nbytes)} MB of weights, summed loss {chosen.loss:.3g}"
    return Chart(Markup(charts.curve_chart(evidence, manifest.recipe.calibrated)), caption)


def _drift_chart(drift: Drift) -> Chart:
    caption = f"{drift.runtime}: " + "; ".join(f"prompt {number}: {row.prompt}" for number, row in enumerate(drift.prompts))
    return Chart(Markup(charts.drift_chart(drift)), caption)


def _ranges(ranges: RangeMap) -> tuple[Chart, sheets.Sheet, tuple[str, ...]]:
    counts = f"{len(ranges.overflows)} overflow, {len(ranges.near)} within a factor of two"
    caption = f"{len(ranges.operations):,} operations: {counts}"
    return Chart(Markup(charts.ranges_chart(ranges)), caption), sheets.ranges_sheet(ranges), ranges.failures


def _latency(result: Result) -> tuple[Chart, sheets.Sheet]:
    settings = result.backend_settings
    threads = "the runtime's choice of threads" if settings.threads is None else f"threads: {settings.threads}"
    machine = f"{result.environment_info.device}, {settings.framework} {settings.framework_version}, {threads}"
    return Chart(Markup(charts.latency_chart(result)), f"{charts.timing(result)}, {machine}"), sheets.latency_sheet(result)


def _verified(findings: Findings) -> sheets.Sheet:
    """By format: what executed it, and what came of that."""
    rows = []
    for format in findings.manifest.formats:
        runtime = next((name for name, runtime in RUNTIMES.items() if runtime.format == format), None)
        entries = [row for row in findings.manifest.parity if row.format == format]
        failed = sum(not row.passed for row in entries)
        outcome = sheets.NONE
        if entries:
            outcome = f"{len(entries)} comparisons, " + (f"{failed} failed" if failed else "all passed")
        rows.append((format, runtime or sheets.NONE, EXECUTED_BY.get(runtime or "", "not executed"), outcome))
    return sheets.Sheet("On a computer", ("format", "runtime", "executed by", "parity"), tuple(rows), words=4)


def _breakable(text: str) -> Markup:
    """A name that a narrow screen may break after an underscore or a dot."""
    return Markup(re.sub(r"(?<=[a-z_])([_.])(?=\w)", r"\1<wbr>", str(escape(text))))
