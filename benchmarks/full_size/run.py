"""`run` and `growth`: exports of a random checkpoint of true sizes, with time, peak resident memory and bytes by stage.

    python -m benchmarks.full_size run --model DIR --target ios --out runs/full --json full.json

Each piece of work runs in a process of its own. Beside ours stands the transformer alone in the tools that a user would take
instead, where those finish. Host timings.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.full_size.make import make
from benchmarks.full_size.worker import Work

OURS = {"ios": ("coreml",), "android": ("onnx", "executorch")}
OTHER = {"coreml": "coremltools", "onnx": "onnxruntime", "executorch": "executorch"}


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="What `make` wrote; made there if it is missing.")
@click.option("--layers", type=int, default=24, show_default=True, help="Transformer blocks, where it has to be made.")
@click.option("--target", "targets", type=click.Choice([*OURS]), multiple=True, help="Only these [both].")
@click.option("--format", "formats", type=click.Choice([*OTHER]), multiple=True, help="Only these formats.")
@click.option("--bits", type=float, help="Mean bits of a weight [ios 6, android 8].")
@click.option("--calibration/--no-calibration", default=False, show_default=True, help="Calibrated mixed bits.")
@click.option("--resolution", type=int, default=512, show_default=True, help="Pixels each way.")
@click.option("--others/--no-others", default=True, show_default=True, help="Also the tools that a user would take instead.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/full-size"), show_default=True, help="Bundles.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write all figures as JSON.")
def run(
    model: Path,
    layers: int,
    targets: Sequence[str],
    formats: Sequence[str],
    bits: float | None,
    calibration: bool,
    resolution: int,
    others: bool,
    out: Path,
    json_file: Path | None,
) -> None:
    """Makes the checkpoint where it is missing, exports it, and prints time, memory and bytes by stage."""
    _ensure(model, layers)
    console, results = Console(), list[dict[str, Any]]()
    for target in targets or [*OURS]:
        for format in OURS[target]:
            if formats and format not in formats:
                continue
            place = out / f"{format}{'-calibrated' if calibration else ''}"
            works = [Work("ours", str(model), str(place), target, (format,), bits, calibration, resolution)]
            if others:
                theirs = f"{place}-theirs"
                works.append(Work(OTHER[format], str(model), theirs, target, (format,), bits, resolution=resolution))
            for work in works:
                result = measure(work)
                results.append(result)
                console.print(stage_table(result))
                if json_file is not None:
                    json_file.write_text(json.dumps(results, indent=1) + "\n")
    console.print(summary(results))


@click.command()
@click.option("--layers", "counts", type=int, multiple=True, default=(3, 6, 12, 24), show_default=True, help="Sizes to export.")
@click.option("--target", type=click.Choice([*OURS]), default="ios", show_default=True)
@click.option("--bits", type=float, help="Mean bits of a weight [ios 6, android 8].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/growth"), show_default=True, help="Models, bundles.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write all figures as JSON.")
def growth(counts: Sequence[int], target: str, bits: float | None, out: Path, json_file: Path | None) -> None:
    """Exports checkpoints of several depths and fits time and memory against the transformer's weights."""
    console, results = Console(), list[dict[str, Any]]()
    for layers in counts:
        model = out / f"model{layers}"
        _ensure(model, layers)
        result = measure(Work("ours", str(model), str(out / f"{target}{layers}"), target, OURS[target][:1], bits))
        result["weights"] = _transformer_weights(model)
        results.append(result)
        console.print(stage_table(result))
        if json_file is not None:
            json_file.write_text(json.dumps(results, indent=1) + "\n")
    console.print(fit_table(results))


def measure(work: Work) -> dict[str, Any]:
    """Runs a piece of work in a process of its own; a failure is said with the end of its log."""
    out = Path(work.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    done = subprocess.run([sys.executable, "-m", "benchmarks.full_size.worker", json.dumps(asdict(work))])
    if done.returncode:
        log = (out / "log").read_text(errors="replace").splitlines()[-5:] if (out / "log").exists() else []
        return {"work": asdict(work), "stages": [], "bytes": 0, "parity": [], "failed": done.returncode, "log": log}
    return json.loads((out / "measured.json").read_text())


def stage_table(result: dict[str, Any]) -> Table:
    work = result["work"]
    words = "calibrated" if work["calibrate"] else "without calibration"
    what = f"export-flash, whole bundle, {words}" if work["kind"] == "ours" else f"{work['kind']}, transformer alone"
    table = Table("stage", "seconds", "peak GB", title=f"{', '.join(work['formats'])}: {what}")
    for stage in result["stages"]:
        table.add_row(stage["name"], f"{stage['seconds']:.0f}", f"{stage['peak_bytes'] / 1e9:.2f}")
    for row in result["parity"]:
        if row["lowering"] is None:
            continue
        decibels = row["lowering"] if isinstance(row["lowering"], str) else f"{row['lowering']:.1f} dB"
        table.add_row(f"lowering parity of {row['component']} {row['output']}", decibels, "")
    for line in result.get("log", ()):
        table.add_row(f"failed: {line}", "", "")
    return table


def summary(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("format", "what", "minutes", "peak GB", "GB made", title="host timings")
    for result in results:
        work, stages = result["work"], result["stages"]
        if not stages:
            table.add_row(work["formats"][0], work["kind"], "failed", "", "")
            continue
        seconds, peak = sum(s["seconds"] for s in stages), max(s["peak_bytes"] for s in stages)
        size = f"{result['bytes'] / 1e9:.2f}"
        table.add_row(work["formats"][0], work["kind"], f"{seconds / 60:.1f}", f"{peak / 1e9:.2f}", size)
    return table


def fit_table(results: Sequence[dict[str, Any]]) -> Table:
    """Least squares of seconds and peak bytes against weights, and what the lines say of 8.1 billion (SD3.5-Large)."""
    weights = np.array([result["weights"] for result in results]) / 1e9
    seconds = np.array([sum(s["seconds"] for s in result["stages"]) for result in results])
    peaks = np.array([max(s["peak_bytes"] for s in result["stages"]) for result in results]) / 1e9
    table = Table("G weights of the transformer", "minutes", "peak GB", title="growth, host timings")
    for row in zip(weights, seconds / 60, peaks, strict=True):
        table.add_row(*(f"{value:.2f}" for value in row))
    if len(results) > 1:
        lines = [np.polyfit(weights, values, 1) for values in (seconds / 60, peaks)]
        table.add_section()
        table.add_row("a G more", *(f"{line[0]:.2f}" for line in lines))
        table.add_row("8.1 by the fit", *(f"{np.polyval(line, 8.1):.1f}" for line in lines))
    return table


def _ensure(model: Path, layers: int) -> None:
    if not model.exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        make.main([str(model), "--layers", str(layers)], standalone_mode=False)


def _transformer_weights(model: Path) -> int:
    from export.checkpoint import open_checkpoint

    shapes = open_checkpoint(str(model)).shapes("transformer")
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if not name.startswith("pos_embed.pos_embed"))

