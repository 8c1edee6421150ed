"""matplotlib's figures as SVG to stand inside a page: the page's own colours and type, and the same bytes every time."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from html import escape
from typing import ParamSpec

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Given = ParamSpec("Given")
WIDTH = 4.5  # inches: as wide as a phone, so that its type stays legible there

# matplotlib writes a colour as #rrggbb. These stand for what page.css defines, in light and in dark.
INK, MUTED, FIRST, SECOND, THIRD, FOURTH, FIFTH, WRONG = (f"#00000{digit}" for digit in range(1, 9))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
    FIFTH: "var(--fifth)",
    WRONG: "var(--wrong)",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "export-flash",  # ids are hashes of what they name, and not random
    "font.family": "DejaVu Sans",  # comes with matplotlib, and is wider than what a browser puts in its place
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "path.simplify": True,
}


def styled(chart: Callable[Given, str]) -> Callable[Given, str]:
    """Of a function that draws a chart: it draws in the page's style, whatever the user's matplotlibrc says."""

    @functools.wraps(chart)
    def draw(*args: Given.args, **kwargs: Given.kwargs) -> str:
        with style.context(["default", _STYLE]):
            return chart(*args, **kwargs)

    return draw


def new_figure(height: float, rows: int = 1, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with panels one under another; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False, sharex=share)
    return figure, list(panels[:, 0])


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The <svg> element. name: of its own in the page, since it begins every id; label: what a screen reader says."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode("utf-8")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head = rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">'
    text = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', head, text, count=1)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    return re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found.group()], text)
