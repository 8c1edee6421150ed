"""What every way to compress flash-mini costs its pictures, beside what a user would use instead.

    python -m benchmarks.quality --json quality.json --chart quality.svg

Every method draws the same held-out captions from the same noise, whole, at the student's own sigmas; final latents and
pictures are compared with those of the float32 modules, and each picture is judged by the rules of `distill/scorer.py`.
Calibration never saw these captions. Ours are compressed references, which artifacts equal (lowering parity); the others are
executed as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from benchmarks.quality.chart import draw_chart
from benchmarks.quality.methods import (
    Method,
    Rounded,
    by_sensitivity,
    mixed,
    plain,
    statistics_layers,
    uniform,
    with_feedback,
)
from benchmarks.quality.others import OTHERS
from calibration.statistics import Statistics
from distill.captions import held_out
from distill.scorer import judge
from export.calibrating import CalibrationOptions, calibrate
from export.choosing import weigh
from export.commands import built_in
from export.compressing import contract_of
from export.compression.schemes import PaletteScheme, stored_bytes
from export.console import NOWHERE, StageBars, noise_to
from export.measuring import Trial, loss
from export.planning import ExportOptions, ExportPlan, make_plan
from export.recording import loaded
from export.targets import TARGETS
from runtimes.tables import compact_table, megabytes

BITS = {"coreml": (3.5, 4, 4.5, 5, 6), "onnx": (5, 6, 7, 8), "executorch": (5, 6, 7, 8)}


@dataclass(frozen=True)
class Row:
    """One method: bytes of the stored weights, their mean bits, PSNR in dB of latents and pictures, and adherence."""

    format: str
    method: str
    ours: bool
    nbytes: int
    mean_bits: float
    latents: float
    image: float
    adherence: float


@dataclass
class Bench:
    """One format of one plan, its captions drawn once by the original modules."""

    plan: ExportPlan
    statistics: Statistics
    captions: int
    bars: StageBars

    def __post_init__(self) -> None:
        self.cases = [caption for _, caption in held_out()[: self.captions]]
        self.format = self.plan.formats[0]
        self.modules = {part.name: [piece.load(self.plan.checkpoint) for piece in part.pieces] for part in self.plan.parts}
        self.original = self._trial()
        self.bars.stage(f"{self.format.name}: float32", len(self.plan.parts))
        for part in self.plan.parts:
            self.bars.step(part.name)
            self.original.advance(part.name, loaded(list(zip(part.pieces, self.modules[part.name], strict=True))))
        self.layers = statistics_layers(self.statistics)
        plans = [(part.name, plan) for part in self.plan.parts for plan in part.plans[self.format.name]]
        self.settled = {
            (name, info.name): (plan.settled[info.name], info.shape)
            for name, plan in plans
            for info in plan.weights
            if info.name in plan.settled
        }
        self.count = sum(info.count for _, plan in plans for info in plan.weights)

    def _trial(self) -> Trial:
        tokenizers = [self.plan.tokenizers["tokenizer"], self.plan.tokenizers["tokenizer_2"]]
        return Trial(contract_of(self.plan), tokenizers, tuple(case.text for case in self.cases))

    def float32(self) -> Row:
        return Row(self.format.name, "float32", False, 4 * self.count, 32.0, math.inf, math.inf, self._adherence(self.original))

    def measure(self, method: Method, ours: bool) -> Row:
        self.bars.stage(method.name[:40], len(self.plan.parts))
        trial, nbytes = self._trial(), 0
        for part in self.plan.parts:
            self.bars.step(part.name)
            made = method.make(part, self.modules[part.name])
            trial.advance(part.name, loaded(made.pieces))
            nbytes += made.nbytes
        lost = loss(trial, self.original)
        bits, adherence = 8 * nbytes / self.count, self._adherence(trial)
        return Row(self.format.name, method.name, ours, nbytes, bits, lost.latents_psnr, lost.image_psnr, adherence)

    def _adherence(self, trial: Trial) -> float:
        pictures = (trial.images.transpose(0, 2, 3, 1).clip(0, 1) * 255).round().astype(np.uint8)
        return float(np.mean([judge(picture, case.facts).adheres for picture, case in zip(pictures, self.cases, strict=True)]))

    def candidates(self) -> dict[tuple[str, str], Any]:
        self.bars.stage("analysis", len(self.plan.parts))
        found: dict[tuple[str, str], Any] = {}
        for part in self.plan.parts:
            self.bars.step(part.name)
            for module, plan in zip(self.modules[part.name], part.plans[self.format.name], strict=True):
                weights = dict(module.named_parameters())
                found |= weigh(part.name, weights, plan, self.format.rounding, self.layers(part.name))
        return found

    def budget(self, bits: float) -> int:
        """Bytes of all weights, where those that have a choice take so many bits on average, as --bits means it."""
        fixed = [stored_bytes(scheme, shape) for scheme, shape in self.settled.values()]
        chosen = self.count - sum(math.prod(shape) for _, shape in self.settled.values())
        return sum(fixed) + int(bits * chosen / 8)

    def rounded(self, name: str, recipe: Any, rounder: Any) -> Rounded:
        return Rounded(name, recipe, self.format, self.layers, rounder)


def rows_of(bench: Bench) -> Iterator[Row]:
    """The float32 modules, the others, each of our steps at 6 bits, and our curve by mean bits and at the others' bytes."""
    yield bench.float32()
    theirs = [bench.measure(method, ours=False) for method in OTHERS[bench.format.name]]
    yield from theirs
    if bench.format.name == "coreml":
        palette, groups = uniform(PaletteScheme(6)), uniform(PaletteScheme(6, 16))
        yield bench.measure(bench.rounded("exact palettes, 6 bits", palette, plain), ours=True)
        yield bench.measure(bench.rounded("+ sensitivity", palette, by_sensitivity), ours=True)
        yield bench.measure(bench.rounded("+ groups of 16", groups, by_sensitivity), ours=True)
        yield bench.measure(bench.rounded("+ error feedback", groups, with_feedback), ours=True)
        yield bench.measure(bench.rounded("+ corrected biases", groups, None), ours=True)
    candidates = bench.candidates()
    for row in theirs:
        recipe = mixed(candidates, bench.settled, row.nbytes)
        yield bench.measure(bench.rounded(f"ours, size of {row.method}", recipe, None), ours=True)
    for bits in BITS[bench.format.name]:
        recipe = mixed(candidates, bench.settled, bench.budget(bits))
        yield bench.measure(bench.rounded(f"ours, --bits {bits:g}", recipe, None), ours=True)


@click.command()
@click.option("--format", "formats", multiple=True, type=click.Choice([*OTHERS]), help="Only these formats.")
@click.option("--captions", default=64, show_default=True, help="How many held-out captions.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the rows as JSON.")
@click.option("--chart", type=click.Path(path_type=Path), help="Also draw size against PSNR, as .svg or .png.")
def main(formats: tuple[str, ...], captions: int, json_file: Path | None, chart: Path | None) -> None:
    """Ours beside coremltools, ONNX Runtime and torchao on flash-mini."""
    rows: list[Row] = []
    with noise_to(NOWHERE) as console:
        for format in formats or tuple(OTHERS):
            target = TARGETS["ios" if format == "coreml" else "android"]
            plan = make_plan(target, ExportOptions(built_in(), formats=(format,), bits=6, chunks=1))
            with StageBars(console) as bars:
                statistics = calibrate(plan.checkpoint, plan.family, plan.graph, CalibrationOptions(), bars)
                found = []
                for row in rows_of(Bench(plan, statistics, captions, bars)):
                    found.append(row)
                    if json_file is not None:
                        json_file.write_text(json.dumps([asdict(r) for r in [*rows, *found]], indent=1) + "\n")
            show(console, found, captions)
            rows += found
    if chart is not None:
        draw_chart([asdict(row) for row in rows], chart)


def show(console: Console, rows: Sequence[Row], captions: int) -> None:
    title = f"{rows[0].format}: {captions} held-out captions, against float32"
    table = compact_table(title, ("method",), ("MB", "bits", "latents\ndB", "image\ndB", "adherence"))
    for row in rows:
        decibels = ["" if math.isinf(value) else f"{value:.1f}" for value in (row.latents, row.image)]
        table.add_row(row.method, megabytes(row.nbytes), f"{row.mean_bits:.2f}", *decibels, f"{row.adherence:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
