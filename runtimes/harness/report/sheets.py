"""The tables of the page: strings in rows, words first and figures after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtimes.bundle import ComponentEntry, Manifest
from runtimes.harness.cost import BundleCost, floor_seconds
from runtimes.harness.devices import Device
from runtimes.harness.drift import Drift, decibels_in_table
from runtimes.harness.ranges import RangeMap
from runtimes.harness.report.recipe import FormatEvidence
from runtimes.harness.results import Result
from runtimes.tables import megabytes

NONE = "—"
FORMAT = "format"
PASSED, FAILED, OVERFLOW = "passed", "failed", "overflow"
MARKS = {PASSED: PASSED, FAILED: FAILED, OVERFLOW: FAILED}  # cells that are set off, and as what


@dataclass(frozen=True)
class Sheet:
    """words: how many columns at the left are words."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1

    def narrowed(self, formats: Sequence[str]) -> Sheet:
        """Without the column of formats, where there is only one."""
        if len(formats) > 1 or FORMAT not in self.headings:
            return self
        place = self.headings.index(FORMAT)
        headings, *rows = (row[:place] + row[place + 1 :] for row in (self.headings, *self.rows))
        return Sheet(self.caption, headings, tuple(rows), self.words - 1)


def size_sheet(manifest: Manifest) -> Sheet:
    """A row a component and format, and one for each format."""
    rows = []
    for format in manifest.formats:
        entries = [entry for entry in manifest.components if entry.format == format]
        rows += [_size_row(entry) for entry in entries]
        files, stored = sum(entry.bytes for entry in entries), sum(entry.stored_bytes for entry in entries)
        weights = sum(entry.weights for entry in entries)
        bits = f"{8 * stored / weights:.2f}" if weights else NONE
        rows.append(("all", format, "", megabytes(files), megabytes(stored), bits, f"{weights:,}"))
    headings = ("component", FORMAT, "runs on", "files, MB", "weights, MB", "mean bits", "weights")
    return Sheet("Bytes and mean bits", headings, tuple(rows), words=3)


def scheme_sheet(manifest: Manifest) -> Sheet:
    """How many tensors are stored how."""
    rows = tuple(
        (use.component, use.format, use.scheme, f"{use.tensors:,}", f"{use.weights:,}", megabytes(use.bytes))
        for use in manifest.recipe.schemes
    )
    return Sheet("How weights are stored", ("component", FORMAT, "scheme", "tensors", "weights", "MB"), rows, words=3)


def parity_sheet(manifest: Manifest) -> Sheet:
    """The gate's rows, worst golden case, dB."""
    rows = tuple(
        (
            row.component,
            row.format,
            row.output or NONE,
            _decibels(row.lowering),
            _decibels(row.quality),
            NONE if row.floor is None else f"{row.floor:.0f}",
            PASSED if row.passed else FAILED,
        )
        for row in manifest.parity
    )
    headings = ("component", FORMAT, "output", "lowering, dB", "quality, dB", "floor, dB", "verdict")
    return Sheet("Parity, worst golden case", headings, rows, words=3)


def losses_sheet(manifest: Manifest) -> Sheet:
    """Predicted and measured loss of each format."""
    rows = tuple(
        (
            loss.format,
            NONE if loss.predicted is None else f"{loss.predicted:.3g}",
            f"{loss.measured:.3g}",
            decibels_in_table(loss.latents),
            decibels_in_table(loss.image),
            str(loss.prompts),
        )
        for loss in manifest.recipe.losses
    )
    headings = ("format", "predicted", "measured", "latents, dB", "pictures, dB", "prompts")
    return Sheet("Loss: squared error of the final latents over their variance", headings, rows)


def costly_sheet(evidence: FormatEvidence, most: int = 8) -> Sheet:
    """The weights whose storing is predicted to cost most."""
    ranked = sorted(evidence.weighed, key=lambda layer: -layer.loss)[:most]
    rows = tuple((layer.component, layer.name, layer.scheme, f"{layer.bits:.2f}", f"{layer.loss:.2g}") for layer in ranked)
    caption = f"{evidence.format}: the weights that cost most"
    return Sheet(caption, ("component", "weight", "scheme", "bits", "loss"), rows, words=3)


def drift_sheet(drift: Drift) -> Sheet:
    """A row for the noise, each step and the picture."""
    rows = []
    for step, sigma in enumerate(drift.sigmas):
        after = "noise" if step == 0 else f"step {step}"
        rows.append((after, f"{sigma:.4g}", *_worst_and_mean([prompt.latents[step] for prompt in drift.prompts])))
    rows.append(("picture", NONE, *_worst_and_mean([prompt.image for prompt in drift.prompts])))
    return Sheet(f"{drift.runtime}: PSNR along the steps", ("after", "sigma", "worst, dB", "mean, dB"), tuple(rows))


def ranges_sheet(ranges: RangeMap) -> Sheet:
    """Of each artifact what overflows or is near float16's end, and its largest operation."""
    rows = []
    for artifact in dict.fromkeys(row.artifact for row in ranges.operations):
        found = [row for row in ranges.operations if row.artifact == artifact]
        largest = max(found, key=lambda row: (row.overflows, row.share))
        for row in found:
            if row.overflows or row.near or row is largest:
                share = OVERFLOW if row.overflows else f"{row.share:.2%}"
                name = artifact.removesuffix(".mlpackage")
                rows.append((name, row.operation, row.name, f"{row.largest:,.1f}", share))
    headings = ("artifact", "operation", "value", "largest", "of 65504")
    return Sheet("Largest magnitudes before rounding to float16", headings, tuple(rows), words=3)


def cost_sheet(cost: BundleCost) -> Sheet:
    """A row a component, and one for the picture."""
    rows = [
        (
            each.name,
            str(each.runs),
            _giga(each.macs),
            _giga(each.macs_per_image),
            megabytes(each.stored_bytes),
            megabytes(each.weight_bytes_per_image),
            megabytes(each.activation_bytes_per_image),
        )
        for each in cost.components
    ]
    stored = sum(each.stored_bytes for each in cost.components)
    moved = (megabytes(cost.weight_bytes), megabytes(cost.activation_bytes))
    rows.append(("picture", "", "", _giga(cost.macs), megabytes(stored), *moved))
    headings = (
        "component",
        "runs",
        "GMAC a run",
        "GMAC a picture",
        "MB stored",
        "MB of weights read",
        "MB of activations moved",
    )
    return Sheet(f"{cost.format}: what a picture takes", headings, tuple(rows))


def floor_sheet(cost: BundleCost, devices: Sequence[Device]) -> Sheet:
    """A row a device: the least time of a picture, and what the largest moment takes of an app's memory."""
    largest = max((moment.stored_bytes for moment in cost.moments), default=0)
    rows = []
    for device in devices:
        floor = floor_seconds(cost, device)
        compute = NONE if floor.compute is None else _milliseconds(floor.compute)
        times = (compute, _milliseconds(floor.memory), _milliseconds(floor.seconds), _milliseconds(floor.unfused))
        rows.append((f"{device.name} ({device.product})", *times, f"{largest / device.app_limit.value:.1%}"))
    headings = ("device", "compute, ms", "memory, ms", "floor, ms", "unfused, ms", "of an app's memory")
    return Sheet(f"{cost.format}: least time of a picture, estimate", headings, tuple(rows))


def latency_sheet(result: Result) -> Sheet:
    """A row a component and one for the picture, milliseconds."""
    rows = []
    for row in result.rows:
        load, latency, memory = row.model_load_time, row.latency, row.memory
        times = (load.first, load.warm, latency.p50, latency.p90, latency.p99)
        peak = NONE if memory is None else megabytes(memory.peak_resident)
        rows.append((row.name, *map(_milliseconds, times), str(latency.measured_samples), peak))
    headings = ("component", "first load", "warm load", "p50", "p90", "p99", "runs", "peak MB")
    return Sheet("Milliseconds", headings, tuple(rows))


def _size_row(entry: ComponentEntry) -> tuple[str, ...]:
    place = entry.compute_units or entry.backend or NONE
    if entry.delegated is not None:
        place += f", {entry.delegated:.0%} of the operations"
    sizes = (megabytes(entry.bytes), megabytes(entry.stored_bytes), f"{entry.bits:.2f}", f"{entry.weights:,}")
    return (entry.name, entry.format, place, *sizes)


def _worst_and_mean(values: Sequence[float]) -> tuple[str, str]:
    return decibels_in_table(min(values)), decibels_in_table(math.fsum(values) / len(values))


def _decibels(value: float | None) -> str:
    return NONE if value is None else decibels_in_table(value)


def _giga(macs: int) -> str:
    return f"{macs / 1e9:,.3f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"
