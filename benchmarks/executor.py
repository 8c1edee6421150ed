"""The Core ML executor beside eager torch on the same graphs: time a run, interleaved, as a ratio. Host timings.

    python -m benchmarks.executor --resolution 128 --bits 6 --rounds 30 --json executor.json

Each component of the checkpoint is emitted as a Core ML package and run by `runtimes/coreml` on any system; beside it runs the
float32 torch module that the package was traced from. Weights stay decompressed under the executor's memory limit.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from export.commands import built_in
from export.compression.rounding import round_weights
from export.console import NOWHERE, noise_to
from export.planning import ExportOptions, make_plan
from export.recording import run as run_eager
from export.targets import TARGETS
from runtimes.coreml import load_executor


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@click.command()
@click.option("--model", help="Folder, hub id or .safetensors file [flash-mini].")
@click.option("--resolution", type=int, help="Pixels each way [the model's own].")
@click.option("--bits", type=int, default=16, show_default=True, help="16, 8 or 6.")
@click.option("--rounds", default=30, show_default=True, help="Pairs of runs a component, after three to warm up.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the rows as JSON.")
def main(model: str | None, resolution: int | None, bits: int, rounds: int, json_file: Path | None) -> None:
    """Median time of each component in the executor and in eager torch, and the ratio of the paired runs."""
    size = (resolution, resolution) if resolution else None
    plan = make_plan(TARGETS["ios"], ExportOptions(model or built_in(), resolution=size, bits=bits, calibrate=False, chunks=1))
    (format,) = plan.formats
    rows = []
    for part in track(plan.parts, "components"):
        (piece,), (piece_plan,) = part.pieces, part.plans[format.name]
        module = piece.load(plan.checkpoint)
        random = np.random.default_rng(0)
        given = {
            spec.name: random.integers(0, 1000, spec.shape).astype(spec.dtype) % 256
            if spec.dtype.startswith("int")
            else random.standard_normal(spec.shape).astype(spec.dtype)
            for spec in piece.inputs
        }
        with tempfile.TemporaryDirectory() as folder, noise_to(NOWHERE):
            stored = round_weights(dict(module.named_parameters()), piece_plan.settled)
            (artifact,) = format.emit(piece, module, stored, Path(folder), plan.emit)
            graph = load_executor(artifact.path)
            pairs = []
            for round_number in range(3 + rounds):
                ours = timed(lambda: graph(given))  # noqa: B023
                eager = timed(lambda: run_eager([(piece, module)], given))  # noqa: B023
                if round_number >= 3:
                    pairs.append((ours, eager))
        times = np.array(pairs)
        low, middle, high = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
        rows.append(
            {
                "component": part.name,
                "executor ms": 1000 * float(np.median(times[:, 0])),
                "eager ms": 1000 * float(np.median(times[:, 1])),
                "ratio": float(middle),
                "ratio quartiles": [float(low), float(high)],
            }
        )
    threads = f"{torch.get_num_threads()} threads"
    table = Table("component", "executor ms", "eager ms", "ratio", "quartiles", title=f"host timings, {threads}, {bits} bits")
    for row in rows:
        quartiles = "{:.2f} to {:.2f}".format(*row["ratio quartiles"])
        table.add_row(row["component"], f"{row['executor ms']:.1f}", f"{row['eager ms']:.1f}", f"{row['ratio']:.2f}", quartiles)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"host": True, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
