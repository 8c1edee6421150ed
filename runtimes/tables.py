"""Tables of names and figures that a terminal of 80 columns shows whole."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text


def compact_table(title: str, words: Sequence[str], figures: Sequence[str], last: str = "") -> Table:
    """Columns of words, then columns of figures, none of them ever wrapped; then, where named, a column that may be."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    if last:
        table.add_column(last, overflow="fold")
    return table


def megabytes(count: int) -> str:
    """1234567890 -> "1,234.57"."""
    return f"{count / 1e6:,.2f}"
