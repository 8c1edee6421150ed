"""Size against PSNR of the final latents, each method a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RED, ORANGE, GREY = "#c0392b", "#e67e22", "#34495e"


def draw_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a format. Ours by mean bits in red, the others in grey; what else is ours as single points."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    figure, panels = plt.subplots(1, len(formats), figsize=(5.2 * len(formats), 4.2), squeeze=False, layout="constrained")
    for format, panel in zip(formats, panels[0], strict=True):
        shown = [row for row in rows if row["format"] == format and math.isfinite(row["latents"])]
        others = [row for row in shown if not row["ours"]]
        curves = [
            ("export-flash, calibrated mixed bits", [r for r in shown if r["method"].startswith("ours,")], RED, "o-"),
            ("the same, --activations int16", [r for r in shown if r["method"].startswith("ours int16")], ORANGE, "^"),
            ("its steps at 6 bits", [r for r in shown if r["ours"] and not r["method"].startswith("ours")], RED, "x"),
            ("others", others, GREY, "s"),
        ]
        for label, curve, colour, style in curves:
            points = sorted((row["nbytes"] / 1e6, row["latents"]) for row in curve)
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, color=colour)
        panel.margins(0.06, 0.1)
        middle = sum(panel.get_xlim()) / 2
        for row in others:
            place = row["nbytes"] / 1e6, row["latents"]
            side, aligned = (6, "left") if place[0] < middle else (-6, "right")
            panel.annotate(row["method"], place, (side, -12), textcoords="offset points", ha=aligned, fontsize=7)
        panel.set(title=format, xlabel="stored weights, MB", ylabel="PSNR of the final latents, dB")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper left")
    figure.savefig(path)
    plt.close(figure)
