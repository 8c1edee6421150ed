"""The range map of a bundle's Core ML artifacts: how near each operation comes to float16's end on the golden inputs.

`runtimes.coreml.ranges` measures one run of one artifact. Here every golden case goes through every artifact, and of each
operation the case with the largest magnitude is kept. An operation overflows where a value that it stores is infinite or NaN;
it is near where its largest magnitude, before rounding, is within a factor of two of 65504. What happens inside an operation
(the squares of a layer norm, the sums of a product) is float32 here and on most units, and is not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from runtimes.bundle import BundleError, ComponentEntry, load_manifest
from runtimes.coreml import load_executor
from runtimes.coreml.ranges import ValueRange
from runtimes.golden import Arrays, read_cases
from runtimes.registry import fed
from runtimes.tables import compact_table

FORMAT = "coreml"
NEAR = 0.5  # share of float16's largest number from which an operation is reported as near


@dataclass(frozen=True)
class OperationRange:
    """One operation of one artifact, at the golden case in which its magnitude is largest or it overflows.

    largest: the largest finite magnitude before rounding; share: that over 65504; non_finite: infinite or NaN elements
    stored, of `elements`; place: the operation's number in the program.
    """

    component: str
    artifact: str
    place: int
    operation: str
    name: str
    case: int
    largest: float
    share: float
    non_finite: int
    elements: int

    @property
    def overflows(self) -> bool:
        return self.non_finite > 0

    @property
    def near(self) -> bool:
        return not self.overflows and self.share >= NEAR


@dataclass(frozen=True)
class RangeMap:
    """Every operation with a floating-point result, by artifact in the program's order."""

    model: str
    target: str
    operations: tuple[OperationRange, ...]

    @property
    def overflows(self) -> tuple[OperationRange, ...]:
        return tuple(row for row in self.operations if row.overflows)

    @property
    def near(self) -> tuple[OperationRange, ...]:
        return tuple(row for row in self.operations if row.near)

    @property
    def passed(self) -> bool:
        """Whether nothing overflows."""
        return not self.overflows

    @property
    def failures(self) -> tuple[str, ...]:
        """One line an artifact that overflows: its first such operation, from which later ones have theirs."""
        first: dict[str, OperationRange] = {}
        counts: dict[str, int] = {}
        for row in self.overflows:
            first.setdefault(row.artifact, row)
            counts[row.artifact] = counts.get(row.artifact, 0) + 1
        return tuple(
            f"{artifact}: {row.operation} {row.name!r} overflows float16 first, in golden case {row.case}: "
            f"{row.non_finite:,} of {row.elements:,} values are infinite or NaN; operations that overflow: {counts[artifact]}"
            for artifact, row in first.items()
        )

    def to_json(self) -> str:
        rows = [asdict(row) | {"overflows": row.overflows, "near": row.near} for row in self.operations]
        report = {"model": self.model, "target": self.target, "passed": self.passed, "operations": rows}
        return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self, largest: int = 3) -> Table:
        """Of each artifact every operation that overflows or is near, and its `largest` greatest ones; 80 columns or more."""
        title = f"{self.model} for {self.target}: magnitudes before rounding to float16 (65504)"
        table = compact_table(title, ("artifact", "operation"), ("largest", "share"), "value")
        for artifact in dict.fromkeys(row.artifact for row in self.operations):
            rows = [row for row in self.operations if row.artifact == artifact]
            chosen = [row for row in rows if row.overflows]
            others = sorted((row for row in rows if not row.overflows), key=lambda row: -row.share)
            chosen += [row for number, row in enumerate(others) if row.near or number < largest]
            for number, row in enumerate(chosen):
                share = Text("overflow", "red") if row.overflows else Text(f"{row.share:.1%}", "yellow" if row.near else "")
                name = artifact.removesuffix(".mlpackage") if number == 0 else ""
                table.add_row(name, row.operation, f"{row.largest:,.1f}", share, row.name)
        return table


def measure_ranges(folder: Path, *, on_component: Callable[[str, str], None] | None = None) -> RangeMap:
    """Runs every Core ML artifact of a bundle on its golden inputs, on any system.

    `on_component(component, format)` is called before each. Raises `BundleError` where the bundle has no Core ML artifacts,
    `GraphError` where one cannot be executed.
    """
    manifest = load_manifest(folder)
    if FORMAT not in manifest.formats:
        has = ", ".join(manifest.formats)
        raise BundleError(f"{folder} has no Core ML artifacts, whose float16 ranges could be measured; it holds {has}")
    announce = on_component or (lambda component, format: None)
    rows: list[OperationRange] = []
    for entry in manifest.components:
        if entry.format == FORMAT:
            announce(entry.name, entry.format)
            cases = (case.inputs for case in read_cases(folder, manifest.golden, entry.name))
            rows += component_ranges(folder, entry, cases)
    return RangeMap(manifest.model.name, manifest.target, tuple(rows))


def component_ranges(folder: Path, entry: ComponentEntry, cases: Iterable[Arrays]) -> list[OperationRange]:
    """The operations of one component's artifacts over several inputs, chunks fed as the manifest says."""
    executors = [load_executor(folder / artifact.path) for artifact in entry.artifacts]
    found: dict[tuple[str, str], OperationRange] = {}
    for number, inputs in enumerate(cases):
        values = dict(inputs)
        for artifact, executor in zip(entry.artifacts, executors, strict=True):
            given = {spec.name: fed(artifact.feed(spec.name), values) for spec in executor.inputs}
            for place, measured in enumerate(executor.ranges(given)):
                row = _row(entry.name, artifact.path, place, number, measured)
                before = found.get((artifact.path, row.name))
                found[artifact.path, row.name] = row if before is None or _extent(row) > _extent(before) else before
            if artifact is not entry.artifacts[-1]:
                values |= executor(given)
    return sorted(found.values(), key=lambda row: ([a.path for a in entry.artifacts].index(row.artifact), row.place))


def _row(component: str, artifact: str, place: int, case: int, measured: ValueRange) -> OperationRange:
    return OperationRange(
        component,
        artifact,
        place,
        measured.operation,
        measured.name,
        case,
        measured.largest,
        measured.share,
        measured.non_finite,
        measured.elements,
    )


def _extent(row: OperationRange) -> tuple[int, float]:
    return row.non_finite, row.largest
