"""The charts of the page, each one function from data to an <svg> element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from runtimes.harness.cost import BundleCost
from runtimes.harness.drift import Drift
from runtimes.harness.ranges import NEAR, OperationRange, RangeMap
from runtimes.harness.report.recipe import FormatEvidence, Layer, Option
from runtimes.harness.report.svg import FIFTH, FIRST, FOURTH, INK, MUTED, SECOND, THIRD, WRONG, new_figure, styled, to_svg
from runtimes.harness.results import Result

COLOURS = (FIRST, SECOND, THIRD, FOURTH, FIFTH)
BINS = 200  # about what a phone can tell apart across a chart; of the operations in one, the largest is shown


@styled
def layers_chart(format: str, component: str, layers: Sequence[Layer], calibrated: bool) -> str:
    """Bits of every weight above, the loss of those with a choice below."""
    figure, (above, below) = new_figure(2.7, 2, share=True)
    edges = np.arange(len(layers) + 1) - 0.5
    above.stairs([layer.bits for layer in layers], edges, fill=True, color=FIRST)
    above.set(ylabel="bits", ylim=(0, None))
    above.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    points = [(n, layer.loss) for n, layer in enumerate(layers) if layer.loss > 0]
    if points:
        below.plot(*zip(*points, strict=True), ".", color=SECOND, markersize=3.5)
        below.set_yscale("log")
        below.yaxis.set_major_locator(LogLocator(numticks=5))
        below.yaxis.set_minor_locator(NullLocator())
    else:
        below.text(0.5, 0.5, "no weight had a choice", transform=below.transAxes, ha="center", va="center", color=MUTED)
        below.set_yticks([])
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    below.set(ylabel=loss_words(calibrated), xlabel="weight, in the model's order", xlim=(-0.5, len(layers) - 0.5))
    figure.align_ylabels()
    return to_svg(figure, f"layers-{format}-{component}", f"bits and predicted loss of every weight of {component}, {format}")


@styled
def curve_chart(evidence: FormatEvidence, calibrated: bool) -> str:
    """Least summed loss at every size, and what was chosen."""
    figure, (panel,) = new_figure(2.8)
    panel.plot(*_shown(evidence.curve()), "-", color=FIRST, label="least loss that the evidence allows")
    panel.plot(*_shown((evidence.chosen,)), "o", color=SECOND, markersize=7, label="this bundle")
    panel.set(yscale="log", xlabel="all weights, MB", ylabel=loss_words(calibrated))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.legend(loc="upper right")
    return to_svg(figure, f"curve-{evidence.format}", f"predicted loss against size, {evidence.format}")


@styled
def drift_chart(drift: Drift) -> str:
    """PSNR of the latent after each step, a line a prompt. A latent that is identical has no point."""
    figure, (panel,) = new_figure(2.5)
    for number, prompt in enumerate(drift.prompts):
        values = [value if math.isfinite(value) else math.nan for value in prompt.latents]
        panel.plot(values, ".-", color=COLOURS[number % len(COLOURS)], markersize=6, label=f"prompt {number}")
    ticks = ["noise", *(f"step {step}\n{sigma:.3g}" for step, sigma in enumerate(drift.sigmas[1:], 1))]
    panel.set_xticks(range(len(ticks)), ticks)
    panel.set(ylabel="PSNR of the latent, dB", xlabel="after, with its sigma")
    if len(drift.prompts) <= len(COLOURS):
        panel.legend(loc="upper right")
    return to_svg(figure, f"drift-{drift.runtime}", f"PSNR of the latents after each step, {drift.runtime}")


@styled
def ranges_chart(ranges: RangeMap) -> str:
    """Of each artifact, the largest magnitude of its operations in their order as a share of float16's largest number."""
    artifacts = list(dict.fromkeys(row.artifact for row in ranges.operations))
    figure, panels = new_figure(0.3 + 1.05 * len(artifacts), len(artifacts))
    least = min((row.share for row in ranges.operations if row.share > 0), default=1e-3)
    floor = 10 ** math.floor(math.log10(max(least, 1e-6)))
    for artifact, panel in zip(artifacts, panels, strict=True):
        rows = [row for row in ranges.operations if row.artifact == artifact]
        bins = list(_binned(rows))
        edges = np.linspace(0, len(rows), len(bins) + 1)
        shares = [max(row.share, floor) for row in bins]
        panel.stairs(shares, edges, baseline=floor, fill=True, color=FIRST)
        wrong = [1.0 if row.overflows else floor for row in bins]
        if any(row.overflows for row in bins):
            panel.stairs(wrong, edges, baseline=floor, fill=True, color=WRONG)
        panel.axhline(1, color=WRONG, linewidth=0.8)
        panel.axhline(NEAR, color=MUTED, linewidth=0.8, linestyle="--")
        panel.set(yscale="log", ylim=(floor, 2), xlim=(0, len(rows)))
        panel.yaxis.set_major_locator(LogLocator(numticks=4))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_title(artifact.removesuffix(".mlpackage"), loc="left", fontsize=8.5, color=INK)
    panels[-1].set_xlabel("operation, in the program's order")
    figure.supylabel("share of 65504", fontsize=8.5, color=INK)
    return to_svg(figure, "ranges", "largest magnitude of every operation as a share of float16's largest number")


@styled
def memory_chart(cost: BundleCost) -> str:
    """Stored weights in memory at each moment of a generation, component on component."""
    figure, (panel,) = new_figure(1.15 + 0.42 * len(cost.moments))
    stored = {component.name: component.stored_bytes / 1e6 for component in cost.components}
    colours = dict(zip(stored, COLOURS, strict=False))
    for row, moment in enumerate(cost.moments):
        left = 0.0
        for name in moment.components:
            panel.barh(row, stored[name], left=left, color=colours[name], edgecolor="none", height=0.6, label=name)
            left += stored[name]
        panel.annotate(f"{left:,.2f}", (left, row), (4, 0), textcoords="offset points", va="center")
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1)
    panel.set_yticks(range(len(cost.moments)), [moment.name for moment in cost.moments])
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    panel.margins(x=0.15)
    panel.set(xlabel="stored weights in memory, MB", xlim=(0, None))
    return to_svg(figure, f"memory-{cost.format}", f"stored weights in memory at each moment, {cost.format}")


@styled
def latency_chart(result: Result) -> str:
    """Median of each row in milliseconds, a whisker to the 90th percentile."""
    figure, (panel,) = new_figure(0.75 + 0.36 * len(result.rows))
    for place, row in enumerate(result.rows):
        p50, p90 = 1e3 * row.latency.p50, 1e3 * row.latency.p90
        panel.barh(place, p50, color=FIRST, edgecolor="none", height=0.6)
        panel.plot([p50, p90], [place, place], color=INK, linewidth=1.2)
        label = f"{p50:,.3g}" if p50 < 100 else f"{p50:,.0f}"
        panel.annotate(label, (p90, place), (4, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(result.rows)), [row.name for row in result.rows])
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    panel.margins(x=0.15)
    panel.set(xlabel=f"{timing(result)}: median and 90th percentile, ms", xlim=(0, None))
    return to_svg(figure, "latency", f"{timing(result)} of every component and of the picture")


def loss_words(calibrated: bool) -> str:
    """What a loss is: of the final latents by calibration, or of the weight alone."""
    return "predicted loss" if calibrated else "squared error"


def timing(result: Result) -> str:
    """What the times are of."""
    return "host timing" if result.host else "phone timing"


def _shown(options: Sequence[Option]) -> tuple[list[float], list[float]]:
    """Megabytes and losses. A loss of zero has no place on a logarithmic axis."""
    shown = [option for option in options if option.loss > 0]
    return [option.nbytes / 1e6 for option in shown], [option.loss for option in shown]


def _binned(rows: Sequence[OperationRange]) -> Iterable[OperationRange]:
    """At most `BINS` rows: of operations that fall together the one that overflows or is largest."""
    for group in np.array_split(np.arange(len(rows)), min(BINS, len(rows))):
        yield max((rows[index] for index in group), key=lambda row: (row.overflows, row.share))
