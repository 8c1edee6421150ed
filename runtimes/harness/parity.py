"""Parity as a gate: every artifact is run on the golden inputs and compared with both references, and pictures are drawn.

lowering: the artifact against the compressed reference; it finds bugs, and has a floor for every component.
quality: the artifact against the original; what compression costs. Of the final image it has a floor at 16 bits.
All figures are PSNR in dB, of the worst golden case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from runtimes.bundle import ComponentEntry, Manifest, ParityEntry, check_files, load_manifest
from runtimes.golden import Case, Drawing, read_cases, read_drawings
from runtimes.graph import Graph, GraphError
from runtimes.pipeline import REQUIRED, Drawn, Pipeline
from runtimes.registry import RUNTIMES, Runtime, choose_runtime, load_component
from runtimes.tables import compact_table, megabytes

FLOAT32_FLOOR = 80.0  # dB, lowering, of an uncompressed component that computes in float32
FLOAT16_FLOOR = 45.0  # dB, lowering, of an uncompressed component that computes in float16
COMPRESSED_FLOOR = 40.0  # dB, lowering, of every compressed component
IMAGE_FLOOR = 40.0  # dB, quality, of the final image of an uncompressed bundle
# An artifact may be larger than its stored weights by the graph itself: this share of them and this many bytes.
OVERHEAD_SHARE, OVERHEAD_BYTES = 0.05, 1 << 20

OnDrawn = Callable[[str, Drawn], None]
IMAGE = "image"  # stands in the place of a component for the rows about the pipeline's picture


@dataclass(frozen=True)
class Comparison:
    """One row of the table. `output` is None for a row about the artifact itself; dB are None where they do not apply.

    `floor` is of the lowering parity, for the image of the quality parity. `reason` says why it failed; None: it passed.
    """

    component: str
    format: str
    output: str | None
    bytes: int | None
    bits: float | None
    lowering: float | None
    quality: float | None
    floor: float | None
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    model: str
    target: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line a failed row."""
        return tuple(
            " ".join(part for part in (c.component, c.format, c.output) if part) + f": {c.reason}"
            for c in self.comparisons
            if not c.passed
        )

    def to_entries(self) -> tuple[ParityEntry, ...]:
        """The rows as the manifest carries them."""
        return tuple(
            ParityEntry(
                component=c.component,
                format=c.format,
                output=c.output or "",
                lowering=_reported(c.lowering),
                quality=_reported(c.quality),
                floor=c.floor,
                passed=c.passed,
            )
            for c in self.comparisons
        )

    def to_json(self) -> str:
        """JSON text; a dB is a number, "identical", or null."""
        rows = []
        for comparison in self.comparisons:
            row = asdict(comparison) | {"passed": comparison.passed}
            for kind in ("lowering", "quality"):
                row[kind] = "identical" if row[kind] == math.inf else _reported(row[kind])
            rows.append(row)
        report = {"model": self.model, "target": self.target, "passed": self.passed, "comparisons": rows}
        return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> Table:
        """For rich's console, at 80 columns or more: a line a component, the worst of its outputs. "—" is not applicable."""
        figures = ("MB", "bits", "lowering\ndB", "quality\ndB", "floor\ndB")
        table = compact_table(f"{self.model} for {self.target}", ("component", "format"), figures, "verdict")
        lines: dict[tuple[str, str], list[Comparison]] = {}
        for c in self.comparisons:
            name = c.output or IMAGE if c.component == IMAGE else c.component
            lines.setdefault((name, c.format), []).append(c)
        for (name, format), rows in lines.items():
            lowering, quality = _worst(c.lowering for c in rows), _worst(c.quality for c in rows)
            size, bits, floor = rows[0].bytes, rows[0].bits, _worst(c.floor for c in rows)
            passed = all(c.passed for c in rows)
            table.add_row(
                name,
                format,
                "—" if size is None else megabytes(size),
                "—" if bits is None else f"{bits:.2f}",
                _decibels(lowering),
                _decibels(quality),
                "—" if floor is None else f"{floor:.0f}",
                Text("passed", "green") if passed else Text("failed", "red"),
            )
        return table


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10((max b - min b)^2 / mean((a - b)^2)) in dB, b the reference, in float64.

    Identical arrays give infinity; a constant reference that is not met gives minus infinity; NaN gives NaN.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} cannot be compared")
    a, b = a.astype(np.float64), b.astype(np.float64)
    error, span = float(np.mean((a - b) ** 2)), float(np.max(b) - np.min(b))
    if error == 0:
        return math.inf
    return 20 * math.log10(span) - 10 * math.log10(error) if span > 0 else -math.inf


def floor_of(entry: ComponentEntry) -> float:
    """The least lowering parity accepted of a component, in dB."""
    if entry.compressed:
        return COMPRESSED_FLOOR
    return FLOAT32_FLOOR if entry.precision == "float32" else FLOAT16_FLOOR


def compare_component(entry: ComponentEntry, graph: Graph, cases: Iterable[Case]) -> tuple[Comparison, ...]:
    """Runs the graph on every case: one row for each output, worst case. A graph that cannot run is a failed row."""
    lowering: dict[str, list[float]] = {tensor.name: [] for tensor in entry.outputs}
    quality: dict[str, list[float]] = {tensor.name: [] for tensor in entry.outputs}
    reasons: dict[str, str] = {}
    for number, case in enumerate(cases):
        try:
            outputs = graph(case.inputs)
        except GraphError as error:
            return (_about_artifact(entry, str(error)),)
        for name in lowering:
            expected, original = case.expected(entry.format).get(name), case.reference.get(name)
            if expected is None or original is None:
                reasons.setdefault(name, f"golden case {number} does not record it")
            elif fault := _fault(outputs[name], expected):
                reasons.setdefault(name, f"golden case {number}: {fault}")
            else:
                lowering[name].append(psnr(outputs[name], expected))
                quality[name].append(psnr(outputs[name], original))
    return tuple(_judge(entry, name, lowering[name], quality[name], reasons.get(name)) for name in lowering)


def check_artifact(entry: ComponentEntry) -> tuple[Comparison, ...]:
    """Failed rows for an artifact that did not shrink, or of which too little was delegated; usually none."""
    reasons = []
    allowed = int(entry.stored_bytes * (1 + OVERHEAD_SHARE)) + OVERHEAD_BYTES
    if entry.bytes > allowed:
        reasons.append(f"did not shrink: {entry.bytes:,} bytes for stored weights of {entry.stored_bytes:,}")
    if entry.delegated_floor is not None and (entry.delegated is None or entry.delegated < entry.delegated_floor):
        share = "an unknown share" if entry.delegated is None else f"{entry.delegated:.1%}"
        reasons.append(f"{entry.backend} took {share} of the operations; at least {entry.delegated_floor:.1%} expected")
    return tuple(_about_artifact(entry, reason) for reason in reasons)


def compare_image(
    pipeline: Pipeline, drawings: Iterable[Drawing], on_drawn: OnDrawn | None = None
) -> tuple[Comparison, ...]:
    """Draws every golden prompt: a row for the final latents, and one for the image, which at 16 bits has a floor."""
    format = pipeline.runtime.format
    components = [entry for entry in pipeline.manifest.components if entry.format == format]
    floor = None if any(entry.compressed for entry in components) else IMAGE_FLOOR
    size, bits = sum(entry.bytes for entry in components), _mean_bits(components)
    latents, images = [], []
    for drawing in drawings:
        try:
            drawn = pipeline.generate(drawing.prompt, drawing.seed)
        except GraphError as error:
            return (Comparison(IMAGE, format, None, size, bits, None, None, floor, f"{drawing.prompt!r}: {error}"),)
        if on_drawn is not None:
            on_drawn(format, drawn)
        for made, reference in ((drawn.latents[-1][0], drawing.latents[-1]), (drawn.pixels, drawing.image)):
            if fault := _fault(made, reference):
                return (Comparison(IMAGE, format, None, size, bits, None, None, floor, f"{drawing.prompt!r}: {fault}"),)
        latents.append(psnr(drawn.latents[-1][0], drawing.latents[-1]))
        images.append(psnr(drawn.pixels, drawing.image))
    worst = min(images)
    met = floor is None or worst >= floor
    reason = None if met else f"{worst:.1f} dB from the original's image; at least {floor:.0f} expected"
    return (
        Comparison(IMAGE, format, "final latent", None, None, None, min(latents), None, None),
        Comparison(IMAGE, format, "image", size, bits, None, worst, floor, reason),
    )


def verify_bundle(
    folder: Path,
    runtimes: Sequence[str] | None = None,
    *,
    low_memory: bool = False,
    pictures: bool = True,
    threads: int | None = None,
    on_component: Callable[[str, str], None] | None = None,
    on_drawn: OnDrawn | None = None,
) -> Report:
    """Checks the manifest and every file's bytes, then runs every artifact and the pipeline through the named runtimes.

    `runtimes` None: one for each format in the bundle. `low_memory`: one artifact in memory at a time. `pictures` False: the
    artifacts alone. `on_component(component, format)` is called before each comparison, `on_drawn(format, drawn)` after each
    picture. Raises `BundleError` where the folder is no bundle, is altered, or a runtime is missing; a comparison that fails is
    a row.
    """
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    names = runtimes if runtimes is not None else _runtimes_for(manifest)
    chosen = [choose_runtime(manifest, name) for name in names]
    announce = on_component or (lambda component, format: None)
    rows: list[Comparison] = []
    for runtime in chosen:
        for entry in manifest.components:
            if entry.format == runtime.format:
                announce(entry.name, entry.format)
                rows += _verify_component(folder, manifest, entry, runtime, threads, low_memory)
    for runtime in chosen if pictures else ():
        if any(manifest.component(name, runtime.format) is None for name in REQUIRED):
            continue  # a bundle of some components draws nothing
        announce(IMAGE, runtime.format)
        pipeline = Pipeline.open(folder, runtime.name, low_memory=low_memory, threads=threads)
        rows += compare_image(pipeline, read_drawings(folder, manifest.golden), on_drawn)
    return Report(manifest.model.name, manifest.target, tuple(rows))


def _verify_component(
    folder: Path, manifest: Manifest, entry: ComponentEntry, runtime: Runtime, threads: int | None, low_memory: bool
) -> tuple[Comparison, ...]:
    try:
        graph = load_component(folder, entry, runtime, threads, low_memory=low_memory)
    except GraphError as error:
        return (*check_artifact(entry), _about_artifact(entry, str(error)))
    return (*compare_component(entry, graph, read_cases(folder, manifest.golden, entry.name)), *check_artifact(entry))


def _runtimes_for(manifest: Manifest) -> list[str]:
    """A runtime for each format; a format that none can run is as much of an error as a missing one."""
    by_format: Mapping[str, str] = {runtime.format: runtime.name for runtime in RUNTIMES.values()}
    return [by_format.get(format, format) for format in manifest.formats]


def _judge(
    entry: ComponentEntry, output: str, lowering: Sequence[float], quality: Sequence[float], reason: str | None
) -> Comparison:
    floor = floor_of(entry)
    if reason is None and not lowering:
        reason = "no golden case was recorded"
    elif reason is None and not min(lowering) >= floor:
        reason = f"{min(lowering):.1f} dB from the compressed reference; at least {floor:.0f} expected"
    return Comparison(
        entry.name,
        entry.format,
        output,
        entry.bytes,
        entry.bits,
        min(lowering, default=None),
        min(quality, default=None),
        floor,
        reason,
    )


def _fault(output: np.ndarray, expected: np.ndarray) -> str | None:
    """Why two arrays cannot be compared at all."""
    if output.shape != expected.shape:
        return f"shape {output.shape} where the reference has {expected.shape}"
    for name, array in (("the artifact's output", output), ("the reference", expected)):
        if wrong := np.count_nonzero(~np.isfinite(array)):
            return f"{wrong} of {array.size} values of {name} are NaN or infinite"
    return None


def _about_artifact(entry: ComponentEntry, reason: str) -> Comparison:
    return Comparison(entry.name, entry.format, None, entry.bytes, entry.bits, None, None, None, reason)


def _mean_bits(components: Sequence[ComponentEntry]) -> float | None:
    weights = sum(entry.weights for entry in components)
    return sum(entry.bits * entry.weights for entry in components) / weights if weights else None


def _worst(decibels: Iterable[float | None]) -> float | None:
    return min((value for value in decibels if value is not None), default=None)


def _reported(decibels: float | None) -> float | None:
    """Infinity (identical) stays; what is no figure becomes None."""
    return None if decibels is None or math.isnan(decibels) or decibels == -math.inf else decibels


def _decibels(value: float | None) -> str:
    if value is None:
        return "—"
    return "identical" if value == math.inf else f"{value:.1f}"
