"""Speed and error of our palettes beside coremltools' own k-means, on the same float16 tensor in the same run.

    python -m benchmarks.palettes --json palettes.json

Each pass times ours, theirs, and ours again, so that whatever else the machine does meets both; the ratios are of sums over all
passes. Ours uses every core, coremltools one, as each does by default; the ratio of CPU seconds leaves that out. The ratio of
errors is our mean squared error over theirs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from export.compression.palettes import palettize
from export.compression.stored import PALETTE_BITS
from runtimes.quiet import quiet

with quiet():
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

PER_TENSOR, PER_GROUP = 8.0, 10.0  # how many times as fast as coremltools ours is meant to be


@dataclass
class Clock:
    """Wall-clock and CPU seconds of all calls, and how many there were."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    calls: int = 0

    def time(self, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.calls += 1
        return result


@dataclass(frozen=True)
class Row:
    """One comparison: seconds a call, mean squared errors, and coremltools' time over ours."""

    palettes: str
    wanted: float
    our_seconds: float
    their_seconds: float
    ratio: float
    cpu_ratio: float
    our_error: float
    their_error: float


def compare(label: str, wanted: float, values: np.ndarray, bits: int, group: int, passes: int) -> Row:
    """Ours and theirs on a tensor [out, in], with a palette for every `group` rows."""

    def our_palettes() -> Any:
        return palettize(values, bits, group)

    def their_palettes() -> Any:
        return palettize_weights.blockwise_compress(values, "KMEANS", bits, [group, 0])

    our_palettes()  # the first call of a process also loads numpy's lazy parts
    clocks = Clock(), Clock()
    for _ in range(passes):
        clocks[0].time(our_palettes)
        params = clocks[1].time(their_palettes)
        weight = clocks[0].time(our_palettes)
    seconds = [clock.seconds / clock.calls for clock in clocks]
    cpu_seconds = [clock.cpu_seconds / clock.calls for clock in clocks]
    looked_up = np.take_along_axis(params.lut.reshape(-1, 1 << bits), params.indices.reshape(len(values) // group, -1), axis=1)
    errors = [float(np.square(values.astype(np.float64) - dense.reshape(values.shape)).mean())
              for dense in (weight.dequantize(), looked_up.astype(np.float64))]
    return Row(label, wanted, seconds[0], seconds[1], seconds[1] / seconds[0], cpu_seconds[1] / cpu_seconds[0],
               errors[0], errors[1])


@click.command()
@click.option("--rows", default=6144, show_default=True, help="Output channels of the tensor.")
@click.option("--columns", default=1536, show_default=True, help="Inputs of the tensor.")
@click.option("--bits", default="6", show_default=True, type=click.Choice([str(bits) for bits in PALETTE_BITS]))
@click.option("--group", default=16, show_default=True, help="Rows that share a palette in the second comparison.")
@click.option("--passes", default=1, show_default=True, help="How often both are timed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the rows as JSON.")
def main(rows: int, columns: int, bits: str, group: int, passes: int, json_file: Path | None) -> None:
    """Ours against coremltools' k-means: one palette for a tensor, and one for every group of rows."""
    values = (np.random.default_rng(0).standard_normal((rows, columns)) * 0.02).astype(np.float16)
    found = [compare("per tensor", PER_TENSOR, values, int(bits), rows, passes),
             compare(f"groups of {group}", PER_GROUP, values, int(bits), group, passes)]
    table = Table("palettes", "ours", "coremltools", "ratio (wanted)", "CPU ratio", "error ratio",
                  title=f"{rows} x {columns} float16, {bits} bits")
    for row in found:
        table.add_row(row.palettes, f"{row.our_seconds:.2f} s", f"{row.their_seconds:.2f} s",
                      f"{row.ratio:.1f} ({row.wanted:.0f})", f"{row.cpu_ratio:.1f}", f"{row.our_error / row.their_error:.7f}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
