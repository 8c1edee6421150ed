"""What a result says beyond its rows, as tables and lines that a terminal of 80 columns shows whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from runtimes.harness.bench_tables import three_figures
from runtimes.harness.results import Condition, Placement, Result, Sustained, Unit
from runtimes.tables import compact_table

_FALLBACK = 2  # kinds of operations that are named
_UNITS: tuple[Unit, ...] = ("neural_engine", "gpu", "cpu", "unknown")
_SHORT: dict[Unit, str] = {"neural_engine": "Neural\nEngine", "gpu": "GPU", "cpu": "CPU", "unknown": "not\ntold"}


def placement_table(placements: Sequence[Placement]) -> Table:
    """A line an artifact: the units asked for, where Core ML means to run the cost, and the costliest off the Neural Engine."""
    title = "where Core ML means to run them (its own estimate): share of the cost, %"
    table = compact_table(title, ("component", "asked for"), [_SHORT[unit] for unit in _UNITS], "costliest elsewhere")
    for placement in placements:
        shares = [f"{100 * placement.cost[unit]:.0f}" if unit in placement.cost else "" for unit in _UNITS]
        elsewhere = [placed for placed in placement.operations if placed.unit != "neural_engine" and placed.cost > 0]
        words = ", ".join(f"{placed.count} {placed.operator}" for placed in elsewhere[:_FALLBACK])
        table.add_row(placement.name, placement.requested, *shares, words)
    return table


def notes(result: Result) -> Iterator[str]:
    """Lines about warnings of placement, heat, charge and the sustained run."""
    for placement in result.placements:
        if placement.warning is not None:
            yield f"warning: {placement.artifact}: {placement.warning}"
    if result.conditions is not None:
        before, after = map(_describe, (result.conditions.before, result.conditions.after))
        yield f"before: {before}"
        yield f"after: {after}"
    if result.sustained is not None:
        yield _trend(result.sustained)


def _trend(run: Sustained) -> str:
    first, last = (three_figures(1000 * value) for value in (run.first, run.last))
    return (
        f"{run.name} for {run.asked:g} s: {run.latency.measured_samples} runs, {first} ms at first and {last} ms at last "
        f"(medians of a quarter), {three_figures(run.trend)} times"
    )


def _describe(condition: Condition) -> str:
    """Such as "thermal status none, warmest CPU0 at 41.2 °C, battery 80 % at 30.1 °C, charging"."""
    said = [f"thermal status {condition.thermal_status or 'not told'}"]
    if condition.temperatures:
        sensor, warmest = max(condition.temperatures.items(), key=lambda item: item[1])
        said.append(f"warmest {sensor} at {warmest:.1f} °C")
    if condition.battery_level is not None:
        warm = "" if condition.battery_temperature is None else f" at {condition.battery_temperature:.1f} °C"
        said.append(f"battery {condition.battery_level:.0%}{warm}")
    if condition.powered is not None:
        said.append("on a charger" if condition.powered else "on its battery")
    return ", ".join(said)
