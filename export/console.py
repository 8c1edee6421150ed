"""What the terminal shows of an export: a bar a stage with the time left, tables, and nothing of other libraries' noise."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from export.compression.recipe import RecipeFile
from export.compression.schemes import Scheme, stored_bytes
from export.describing import describe_scheme
from export.planning import ExportPlan
from runtimes.bundle import RecipeEntry
from runtimes.tables import compact_table, megabytes

NOWHERE = Path(os.devnull)
_DAY = 86_400.0  # seconds; rich forgets steps that are older than a period, and a step may take minutes


class StageBars:
    """A `Progress` as one bar a stage."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
        rest = Column(ratio=1, no_wrap=True)  # of the line: a long prompt is cut there and takes no room from the others
        detail = TextColumn("{task.fields[detail]}", markup=False, table_column=rest)
        # Redirected, what libraries print would come out above the bars instead of where `noise_to` sends it.
        self._bars = Bars(
            *columns,
            TimeRemainingColumn(),
            detail,
            console=console,
            expand=True,
            speed_estimate_period=_DAY,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._in_terminal = console.is_terminal
        self._task: TaskID | None = None
        self._begun = False

    def __enter__(self) -> StageBars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif not self._in_terminal:
            self._bars.live.transient = True  # a file or pipe gets whole bars, or none
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
    title = f"{plan.checkpoint.title} for {plan.target.name}, {graph.width} x {graph.height} px"
    table = compact_table(title, ("component", "format"), ("pieces", "expected\nMB"), "weights: scheme")
    for part in plan.parts:
        if part.name not in plan.exported:
            continue
        for format in plan.formats:
            counts: Counter[str] = Counter()
            for piece in part.plans[format.name]:
                counts.update(_candidates(schemes) for schemes in piece.candidates.values())
            listed = "\n".join(f"{count}: {words}" for words, count in counts.items())
            table.add_row(part.name, format.name, str(len(part.pieces)), megabytes(part.expected_bytes(format.name)), listed)
    table.add_section()
    table.add_row("all", "", "", megabytes(plan.expected_bytes), f"sigmas {' '.join(f'{s:g}' for s in graph.sigmas)}")
    return table


def recipe_table(found: RecipeFile) -> Table:
    """What an analysis chose: bits and loss by component, and of each format the loss predicted and measured."""
    title = f"{found.model}: what storing the weights costs the final latents"
    table = compact_table(title, ("component", "format"), ("MB", "bits", "loss"), "most used schemes")
    for format, recipe in found.formats.items():
        for component, weights in recipe.components.items():
            nbytes = sum(stored_bytes(choice.scheme.scheme(), choice.shape) for choice in weights.values())
            count = sum(math.prod(choice.shape) for choice in weights.values())
            schemes = Counter[str]()
            for choice in weights.values():
                if choice.weighed:
                    schemes[describe_scheme(choice.scheme.scheme())] += math.prod(choice.shape)
            words = "\n".join(f"{share / count:.0%} {name}" for name, share in schemes.most_common(3))
            loss = sum(choice.loss for choice in weights.values())
            table.add_row(component, format, megabytes(nbytes), f"{8 * nbytes / count:.2f}", f"{loss:.1e}", words)
        table.add_section()
        for name, figure in (("predicted", recipe.predicted_loss), ("measured", recipe.measured_loss)):
            shown = "" if figure is None else f"{figure:.1e}"
            table.add_row(name, format, megabytes(recipe.bytes), f"{recipe.mean_bits:.2f}", shown, "")
        table.add_section()
    return table


def loss_lines(recipe: RecipeEntry) -> list[str]:
    """What storing the weights costs the pictures, a line a format."""
    lines = []
    for found in recipe.losses:
        predicted = "" if found.predicted is None else f", predicted {found.predicted:.1e}"
        lines.append(
            f"{found.format} weights cost the final latents {found.measured:.1e} of their variance{predicted}: "
            f"{found.latents:.1f} dB, pictures {found.image:.1f} dB ({found.prompts} prompts)"
        )
    return lines


def _candidates(schemes: tuple[Scheme, ...]) -> str:
    if len(schemes) > 2:
        return f"one of {len(schemes)}, by calibration"
    return " or ".join(describe_scheme(scheme) for scheme in schemes)


def say(console: Console, line: str, style: str | None = None) -> None:
    """One line as it is: a path or a command in it can be copied whole."""
    console.print(Text(line, style or ""), soft_wrap=True)


class _Log(io.TextIOWrapper):
    """A log that a full disk cuts short, where another file would fail whoever writes to it."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextmanager
def noise_to(log: Path) -> Iterator[Console]:
    """Inside the block everything that libraries print, log or warn goes to `log`; the console given writes to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    kept = [os.dup(stream) for stream in (1, 2)]
    file = _Log(log.open("ab"), encoding="utf-8", errors="replace", write_through=True)
    handler = logging.StreamHandler(file)
    logging.getLogger().addHandler(handler)
    try:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), warnings.catch_warnings():
            yield Console(file=terminal, force_terminal=os.isatty(kept[1]))
    finally:
        logging.getLogger().removeHandler(handler)
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        for opened in (terminal, file):
            with contextlib.suppress(OSError):
                opened.close()
