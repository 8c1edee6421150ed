"""Benchmark results as tables that a terminal of 80 columns shows whole. Times in milliseconds, sizes in MB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC

from rich.table import Table

from runtimes.harness.history import Verdict
from runtimes.harness.results import Comparison, Memory, Result
from runtimes.tables import compact_table


def result_table(result: Result) -> Table:
    """A line a row: loads, percentiles, peak of resident memory, and how much of it is above the process's beginning."""
    settings, first = result.backend_settings, result.rows[0].latency
    threads = "its own choice of threads" if settings.threads is None else _count(settings.threads, "thread")
    model, machine = result.benchmark_model, result.environment_info
    title = (
        f"{model.name} for {model.target}, {settings.framework} {settings.framework_version}, {threads}\n"
        f"{'host' if result.host else 'phone'} timings, {machine.device}: {_count(first.measured_samples, 'run')}, ms"
    )
    figures = ("first\nload", "warm\nload", "p50", "p90", "p99", "peak\nMB", "above\nstart", "files\nMB")
    table = compact_table(title, ("component", "read"), figures)
    for row in result.rows:
        load, latency, memory = row.model_load_time, row.latency, row.memory
        table.add_row(
            row.name,
            row.load_mode or "—",
            *map(_ms, (load.first, load.warm, latency.p50, latency.p90, latency.p99)),
            "—" if memory is None else _megabytes(memory.peak_resident),
            _above_start(memory),
            _megabytes(row.bytes),
        )
    return table


def pairs_table(comparison: Comparison) -> Table:
    """A line a pair: medians of both, and the ratio of paired runs with its quartiles."""
    count = comparison.pairs[0].artifact.measured_samples
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    runs = f"{_count(count, 'pair')} of runs, ms; a ratio below 1: the artifact is faster"
    title = f"in turns with {comparison.against} ({versions})\n{runs}"
    table = compact_table(title, ("component",), ("artifact\np50", f"{comparison.against}\np50", "ratio", "quartiles"))
    for pair in comparison.pairs:
        ratio = pair.ratio
        spread = f"{three_figures(ratio.q25)} to {three_figures(ratio.q75)}"
        table.add_row(pair.name, _ms(pair.artifact.p50), _ms(pair.other.p50), three_figures(ratio.median), spread)
    return table


def verdict_table(old: Result, verdicts: Sequence[Verdict]) -> Table:
    """A line a row that both results have: medians before and now, and what that means."""
    title = f"beside the result of {old.start_datetime.astimezone(UTC):%Y-%m-%d %H:%M} UTC: medians, ms"
    table = compact_table(title, ("component",), ("before", "now"), "verdict")
    for verdict in verdicts:
        table.add_row(verdict.name, _ms(verdict.before), _ms(verdict.after), verdict.words)
    return table


def three_figures(value: float) -> str:
    """Three significant figures without an exponent, down to 0.00001: 0.00126, 0.129, 4.20, 15300."""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 2
    return f"{value:.{min(max(places, 0), 5)}f}"


def _ms(value: float) -> str:
    """Seconds as milliseconds, in six characters at most below 1,000 seconds."""
    return three_figures(1000 * value)


def _above_start(memory: Memory | None) -> str:
    if memory is None or memory.baseline_resident is None:
        return "—"
    return _megabytes(memory.peak_resident - memory.baseline_resident)


def _megabytes(count: int) -> str:
    return three_figures(count / 1e6)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
