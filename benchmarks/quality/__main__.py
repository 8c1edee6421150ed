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
from export.measuring import Trial
from export.planning import ExportOptions, ExportPlan, make_plan
from export.recording import loaded
from export.targets import ROUNDING_TWICE, TARGETS
from runtimes.harness.parity import psnr
from runtimes.tables import compact_table, megabytes

BITS = {"coreml": (3.5, 4, 4.5, 5, 6), "onnx": (5, 6, 7, 8), "executorch": (5, 6, 7, 8)}


@dataclass(frozen=True)
class Row:
    """One method: bytes of the stored weights, their mean bits, PSNR in dB, and adherence.

    latents, image: PSNR of a caption's final latents and picture, the mean over captions; pooled: of all captions' latents as
    one, in which the few that went another way weigh most
    """

    format: str
    method: str
    ours: bool
    nbytes: int
    mean_bits: float
    latents: float
    image: float
    pooled: float
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
        same, adherence = math.inf, self._adherence(self.original)
        return Row(self.format.name, "float32", False, 4 * self.count, 32.0, same, same, same, adherence)

    def measure(self, method: Method, ours: bool) -> Row:
        self.bars.stage(method.name[:40], len(self.plan.parts))
        trial, nbytes = self._trial(), 0
        for part in self.plan.parts:
            self.bars.step(part.name)
            made = method.make(part, self.modules[part.name])
            trial.advance(part.name, loaded(made.pieces))
            nbytes += made.nbytes
        latents = _mean_psnr(trial.latents, self.original.latents)
        image = _mean_psnr(trial.images, self.original.images)
        bits, pooled = 8 * nbytes / self.count, psnr(trial.latents, self.original.latents)
        return Row(self.format.name, method.name, ours, nbytes, bits, latents, image, pooled, self._adherence(trial))

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


def _mean_psnr(results: np.ndarray, originals: np.ndarray) -> float:
    return float(np.mean([psnr(result, original) for result, original in zip(results, originals, strict=True)]))


def rows_of(bench: Bench, only: Sequence[str] = ()) -> Iterator[Row]:
    """The float32 modules, the others, each of our steps at 6 bits, and our curve by mean bits and at the others' bytes.

    only: parts of the names of the rows that are wanted; all if empty
    """

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    if wanted("float32"):
        yield bench.float32()
    theirs = [bench.measure(method, ours=False) for method in OTHERS[bench.format.name] if wanted(method.name)]
    yield from theirs
    for method in (*_steps(bench), *_curve(bench, theirs)):
        if wanted(method.name):
            yield bench.measure(method, ours=True)


def _steps(bench: Bench) -> list[Method]:
    """What each of our steps brings, where the format has palettes."""
    if bench.format.name != "coreml":
        return []
    palette, groups = uniform(PaletteScheme(6)), uniform(PaletteScheme(6, 16))
    return [
        bench.rounded("exact palettes, 6 bits", palette, plain),
        bench.rounded("+ sensitivity", palette, by_sensitivity),
        bench.rounded("+ groups of 16", groups, by_sensitivity),
        bench.rounded("+ error feedback", groups, with_feedback),
        bench.rounded("+ corrected biases", groups, None),
    ]


def _curve(bench: Bench, theirs: Sequence[Row]) -> Iterator[Method]:
    candidates = bench.candidates()
    budgets = {f"at {row.method}": row.nbytes for row in theirs}
    budgets |= {f"--bits {bits:g}": bench.budget(bits) for bits in BITS[bench.format.name]}
    for name, nbytes in budgets.items():
        yield bench.rounded(f"ours, {name}", mixed(candidates, bench.settled, nbytes), None)
    if bench.format.name in ROUNDING_TWICE:
        for row in theirs:
            recipe = mixed(candidates, bench.settled, row.nbytes, "int16")
            yield bench.rounded(f"ours int16, at {row.method}", recipe, None)


@click.command()
@click.option("--format", "formats", multiple=True, type=click.Choice([*OTHERS]), help="Only these formats.")
@click.option("--captions", default=64, show_default=True, help="How many held-out captions.")
@click.option("--only", multiple=True, help="Only the rows with this in their name, such as float32.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the rows as JSON.")
@click.option("--chart", type=click.Path(path_type=Path), help="Also draw size against PSNR, as .svg or .png.")
def main(formats: tuple[str, ...], captions: int, only: tuple[str, ...], json_file: Path | None, chart: Path | None) -> None:
    """Ours beside coremltools, ONNX Runtime and torchao on flash-mini."""
    rows: list[Row] = []
    with noise_to(NOWHERE) as console:
        for format in formats or tuple(OTHERS):
            target = TARGETS["ios" if format == "coreml" else "android"]
            plan = make_plan(target, ExportOptions(built_in(), formats=(format,), bits=6, chunks=1))
            with StageBars(console) as bars:
                statistics = calibrate(plan.checkpoint, plan.family, plan.graph, CalibrationOptions(), bars)
                found = []
                for row in rows_of(Bench(plan, statistics, captions, bars), only):
                    found.append(row)
                    if json_file is not None:
                        json_file.write_text(json.dumps([asdict(r) for r in [*rows, *found]], indent=1) + "\n")
            show(console, found, captions)
            rows += found
    if chart is not None:
        draw_chart([asdict(row) for row in rows], chart)


def show(console: Console, rows: Sequence[Row], captions: int) -> None:
    title = f"{rows[0].format}: {captions} held-out captions, against float32"
    table = compact_table(title, ("method",), ("MB", "bits", "latents\ndB", "image\ndB", "pooled\ndB", "adherence"))
    for row in rows:
        decibels = ["" if math.isinf(value) else f"{value:.1f}" for value in (row.latents, row.image, row.pooled)]
        table.add_row(row.method, megabytes(row.nbytes), f"{row.mean_bits:.2f}", *decibels, f"{row.adherence:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
