"""What the terminal shows of an export: a bar a stage with the time left, tables, and nothing of other libraries' noise."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from export.compression.schemes import Scheme
from export.describing import describe_scheme
from export.planning import ExportPlan


class StageBars:
    """A `Progress` as one bar a stage."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, TimeRemainingColumn(), TextColumn("{task.fields[detail]}"), console=console)
        self._task: TaskID | None = None
        self._begun = False

    def __enter__(self) -> StageBars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        self._finish()
        self._task = self._bars.add_task(f"{name:<18}", total=total, detail="")
        self._begun = False

    def step(self, detail: str) -> None:
        assert self._task is not None
        self._bars.update(self._task, advance=1 if self._begun else 0, detail=detail)
        self._begun = True

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=self._bars.tasks[self._task].total, detail="")


def plan_table(plan: ExportPlan) -> Table:
    """Components, formats, schemes and expected bytes of what is going to be made."""
    graph = plan.graph
    table = Table(title=f"{plan.checkpoint.name} for {plan.target.name}, {graph.width} x {graph.height} px")
    table.add_column("component")
    table.add_column("format")
    table.add_column("pieces", justify="right")
    table.add_column("schemes")
    table.add_column("expected bytes", justify="right")
    for part in plan.parts:
        if part.name not in plan.exported:
            continue
        for format in plan.formats:
            names: dict[str, int] = {}
            for piece in part.plans[format.name]:
                for schemes in piece.candidates.values():
                    words = _candidates(schemes)
                    names[words] = names.get(words, 0) + 1
            listed = ", ".join(f"{words} ({count})" for words, count in names.items())
            table.add_row(part.name, format.name, str(len(part.pieces)), listed, f"{part.expected_bytes(format.name):,}")
    table.add_section()
    table.add_row("all", "", "", f"sigmas {' '.join(f'{s:g}' for s in graph.sigmas)}", f"{plan.expected_bytes:,}")
    return table


def _candidates(schemes: tuple[Scheme, ...]) -> str:
    return " or ".join(describe_scheme(scheme) for scheme in schemes)


@contextmanager
def noise_to(log: Path) -> Iterator[Console]:
    """Inside the block everything that libraries print, log or warn goes to `log`; the console given writes to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    kept = [os.dup(stream) for stream in (1, 2)]
    with log.open("a", encoding="utf-8") as file, terminal:
        handler = logging.StreamHandler(file)
        logging.getLogger().addHandler(handler)
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), warnings.catch_warnings():
                yield Console(file=terminal, force_terminal=os.isatty(kept[1]))
        finally:
            file.flush()
            logging.getLogger().removeHandler(handler)
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
