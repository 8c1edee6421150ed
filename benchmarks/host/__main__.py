"""The exported graphs on a computer, beside unmodified diffusers: run in turns, each in a process of its own. Host timings.

    python -m benchmarks.host --threads 2 --rounds 10 --json host.json

pictures   flash-mini from prompt to picture: ONNX and ExecuTorch bundles, diffusers' pipeline eager and under torch.compile
step       four layers of SD3.5-Medium's true width, one step at 512 px, weights of 8 bits; see wide.py
rewrites   the same step with each exact rewrite off in turn (ONNX, int8), and what a step of the whole model costs by the
           cost model

A ratio is of one round, in which every side runs once: how many times as fast as eager diffusers. Its median and quartiles
are over the rounds.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from benchmarks.host.counting import Counted, count, variants
from benchmarks.host.wide import MEASURED, OwnWeights, Prompt, denoising, emit, family, original
from benchmarks.host.worker import Asked
from export.benchmarking import WORKER as ORIGINAL_WORKER
from export.commands import built_in
from export.console import NOWHERE, StageBars, noise_to
from export.exporter import export
from export.planning import ExportOptions, make_plan
from export.progress import Progress
from export.rewrites import Rewrites
from export.targets import TARGETS, load_format
from runtimes.harness.latency import PAUSE, WARM_UP, WORKER, Worker, start_worker
from runtimes.harness.parity import psnr
from runtimes.harness.results import IMAGE
from runtimes.harness.worker import OriginalRequest, Request
from runtimes.registry import RUNTIMES
from runtimes.tables import compact_table

PARTS = ("pictures", "step", "rewrites")
EAGER = "diffusers, eager"
OURS = "benchmarks.host.worker"


@dataclass(frozen=True)
class Side:
    """One process of a comparison. psnr: of its output against eager diffusers', where that is not told elsewhere."""

    name: str
    request: Any
    module: str = OURS
    psnr: float | None = None


@dataclass(frozen=True)
class Row:
    """Seconds a run, and by round how many times as fast as the first side."""

    part: str
    name: str
    samples: tuple[float, ...]
    median: float
    faster: float
    quartiles: tuple[float, float]
    psnr: float | None = None


def in_turns(part: str, sides: Sequence[Side], rounds: int, progress: Progress) -> list[Row]:
    """Every side once a round, after a warm-up of all; the first is what the others are compared with."""
    progress.stage(part, len(sides) + WARM_UP + rounds)
    with ExitStack() as stack:
        workers: list[Worker] = []
        for side in sides:
            progress.step(f"load {side.name}")
            workers.append(stack.enter_context(start_worker(side.request, side.module)))
            workers[-1].load()
        times = np.empty((rounds, len(sides)))
        for number in range(-WARM_UP, rounds):
            progress.step("warm-up" if number < 0 else "round")
            for column, worker in enumerate(workers):
                time.sleep(PAUSE)
                seconds = worker.run()
                if number >= 0:
                    times[number, column] = seconds
    rows = []
    for column, side in enumerate(sides):
        low, middle, high = (float(value) for value in np.percentile(times[:, 0] / times[:, column], [25, 50, 75]))
        samples = tuple(times[:, column].tolist())
        rows.append(Row(part, side.name, samples, float(np.median(samples)), middle, (low, high), side.psnr))
    return rows


def pictures(folder: Path, threads: int, rounds: int, progress: Progress) -> list[Row]:
    """flash-mini's bundles, made where they are not there yet, with default options but for the activations."""
    model = built_in()
    float_bundle, int8_bundle, int16_bundle = (folder / name for name in ("float", "int8", "int16"))
    for place, options in (
        (float_bundle, ExportOptions(model)),
        (int8_bundle, ExportOptions(model, activations="int8")),
        (int16_bundle, ExportOptions(model, activations="int16", formats=("executorch",))),
    ):
        if not place.exists():
            export(make_plan(TARGETS["android"], options), place, progress)

    def ours(bundle: Path, runtime: str) -> Request:
        return Request(bundle=bundle, component=IMAGE, runtime=runtime, threads=threads)

    eager = OriginalRequest(**ours(float_bundle, "onnxruntime").model_dump(), model=model, against="diffusers")
    compiled = Asked(component=IMAGE, kind="pipeline", threads=threads, bundle=float_bundle, model=model)
    sides = [
        Side(EAGER, eager, ORIGINAL_WORKER),
        Side("diffusers, torch.compile", compiled),
        Side("ours, torch.compile", eager.model_copy(update={"against": "torch-compile"}), ORIGINAL_WORKER),
        Side("ONNX, float activations", ours(float_bundle, "onnxruntime"), WORKER),
        Side("ONNX, int8 activations", ours(int8_bundle, "onnxruntime"), WORKER),
        Side("ExecuTorch, some inputs of 16 bits", ours(float_bundle, "executorch"), WORKER),
        Side("ExecuTorch, int8 activations", ours(int8_bundle, "executorch"), WORKER),
        Side("ExecuTorch, int16 activations", ours(int16_bundle, "executorch"), WORKER),
    ]
    return in_turns("pictures", sides, rounds, progress)


def step(threads: int, rounds: int, progress: Progress) -> list[Row]:
    """Four layers of the true width."""
    names = {"onnx float": ("onnx", "float"), "onnx int8": ("onnx", "int8"), "executorch": ("executorch", "float")}
    labels = {
        "onnx float": "ONNX 8-bit, float activations",
        "onnx int8": "ONNX 8-bit, int8 activations",
        "executorch": "ExecuTorch 8da8w",
    }
    progress.stage("wide artifacts", len(names))
    with tempfile.TemporaryDirectory() as folder:
        model, prompt = original(), Prompt.random()
        weights = OwnWeights(model.state_dict())
        expected = model(**prompt.of_diffusers())[0].numpy()
        components = denoising(family(MEASURED, tuple(range(MEASURED))), Rewrites())
        given = prompt.of_ours(components, weights)
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **given)
        sides = [
            Side(EAGER, Asked(component=EAGER, kind="diffusers", threads=threads)),
            Side("diffusers, torch.compile", Asked(component="compiled", kind="diffusers", threads=threads, compiled=True)),
        ]
        for name, (format, activations) in names.items():
            progress.step(labels[name])
            path = emit(load_format(format, activations), components["transformer"], weights, Path(folder) / name)  # type: ignore[arg-type]
            request = Asked(component=name, kind="step", threads=threads, artifact=path, inputs=inputs)
            loader = next(runtime for runtime in RUNTIMES.values() if runtime.format == format)
            made = loader.load(path, None, threads)(given)["velocity"]  # type: ignore[arg-type]
            sides.append(Side(labels[name], request, psnr=psnr(made, expected)))
        del model, weights
        return in_turns("step", sides, rounds, progress)


def rewritten(threads: int, rounds: int, progress: Progress) -> list[Row]:
    """The transformer step with all rewrites, without each that touches it, and with none; eager diffusers first."""
    cases = {name: rewrites for name, rewrites in variants().items() if name != "without latent_scale_in_decoder"}
    progress.stage("wide artifacts", len(cases))
    with tempfile.TemporaryDirectory() as folder:
        model, prompt = original(), Prompt.random()
        weights = OwnWeights(model.state_dict())
        sides = [Side(EAGER, Asked(component=EAGER, kind="diffusers", threads=threads))]
        for number, (name, rewrites) in enumerate(cases.items()):
            progress.step(name)
            components = denoising(family(MEASURED, tuple(range(MEASURED))), rewrites)
            inputs = Path(folder) / f"{number}.npz"
            np.savez(inputs, **prompt.of_ours(components, weights))
            path = emit(load_format("onnx", "int8"), components["transformer"], weights, Path(folder) / str(number))
            sides.append(Side(name, Asked(component=name, kind="step", threads=threads, artifact=path, inputs=inputs)))
        del model, weights
        return in_turns("rewrites", sides, rounds, progress)


def counted(progress: Progress) -> list[Counted]:
    """By the cost model, the whole model."""
    cases = variants()
    progress.stage("cost of the whole model", len(cases))
    rows = []
    for name, rewrites in cases.items():
        progress.step(name)
        rows.append(count(name, rewrites))
    return rows


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    table = compact_table(title, ("",), ("ms", "times as fast", "quartiles", "dB"))
    for row in rows:
        quartiles = "{:.2f} to {:.2f}".format(*row.quartiles)
        decibels = "" if row.psnr is None else f"{row.psnr:.1f}"
        table.add_row(row.name, f"{1000 * row.median:,.0f}", f"{row.faster:.2f}", quartiles, decibels)
    console.print(table, "")


def show_counted(console: Console, rows: Sequence[Counted]) -> None:
    table = compact_table("SD3.5-Medium, 512 px, by the cost model", ("",), ("GMAC a step", "MB of weights, 16 bits"))
    for row in rows:
        table.add_row(row.rewrites, f"{row.macs / 1e9:,.1f}", f"{row.resident / 1e6:,.0f}")
    console.print(table)


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these.")
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True, help="Of every side.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="After three to warm up.")
@click.option("--bundles", type=click.Path(path_type=Path), default=Path("bundles/host"), show_default=True,
              help="Where flash-mini's are kept; made where they are not there.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write everything as JSON.")
def main(parts: tuple[str, ...], threads: int, rounds: int, bundles: Path, json_file: Path | None) -> None:
    """Our graphs beside eager diffusers and torch.compile, each in a process of its own, in turns."""
    work: Mapping[str, tuple[str, Callable[[Progress], list[Row]]]] = {
        "pictures": ("flash-mini, prompt to picture", lambda bars: pictures(bundles, threads, rounds, bars)),
        "step": (f"{MEASURED} layers of SD3.5-Medium's width, one step, 512 px", lambda bars: step(threads, rounds, bars)),
        "rewrites": ("the same, ONNX 8-bit with int8 activations", lambda bars: rewritten(threads, rounds, bars)),
    }
    rows: list[Row] = []
    costs: list[Counted] = []
    with noise_to(NOWHERE) as console:
        for part in parts or PARTS:
            title, measure = work[part]
            with StageBars(console) as bars:
                found = measure(bars)
                costs = counted(bars) if part == "rewrites" else costs
            show(console, f"{title}; {threads} threads", found)
            rows += found
        if costs:
            show_counted(console, costs)
    if json_file is not None:
        text = {"threads": threads, "rows": [asdict(row) for row in rows], "counted": [asdict(row) for row in costs]}
        json_file.write_text(json.dumps({"host": True, **text}, indent=1) + "\n")


if __name__ == "__main__":
    main()
