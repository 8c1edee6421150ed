"""Size against PSNR of the final latents, each method a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLOURS = {True: "#c0392b", False: "#34495e"}


def draw_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a format. Ours by mean bits in red, the others in grey; steps between them as single points."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    figure, panels = plt.subplots(1, len(formats), figsize=(5.2 * len(formats), 4.2), squeeze=False, layout="constrained")
    for format, panel in zip(formats, panels[0], strict=True):
        shown = [row for row in rows if row["format"] == format and math.isfinite(row["latents"])]
        curves = {
            "export-flash, calibrated mixed bits": [r for r in shown if r["method"].startswith("ours,")],
            "export-flash, inputs of 16 bits": [r for r in shown if r["method"].startswith("ours int16")],
            "its steps at 6 bits": [r for r in shown if r["ours"] and not r["method"].startswith("ours")],
            "others": [r for r in shown if not r["ours"]],
        }
        for (label, curve), marker in zip(curves.items(), ("o", "^", "x", "s"), strict=True):
            points = sorted((row["nbytes"] / 1e6, row["latents"]) for row in curve)
            if points:
                line = "solid" if label.startswith("export-flash") else "none"
                colour = COLOURS[label != "others"]
                panel.plot(*zip(*points, strict=True), linestyle=line, marker=marker, label=label, color=colour)
        for row in curves["others"]:
            panel.annotate(
                row["method"], (row["nbytes"] / 1e6, row["latents"]), (6, -14), textcoords="offset points", fontsize=7
            )
        panel.set(title=format, xlabel="stored weights, MB", ylabel="PSNR of the final latents, dB")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper left")
    figure.savefig(path)
    plt.close(figure)
