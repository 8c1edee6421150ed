"""Two bundles of one checkpoint side by side: what each stores, and how far A's artifacts and pictures are from B's.

Both get A's golden inputs. B is the reference of every PSNR, as if it were the original: so a recipe can be judged against
another, an iOS bundle against an Android one, or today's export against yesterday's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from runtimes.bundle import BundleError, ComponentEntry, Manifest, load_manifest
from runtimes.golden import read_cases
from runtimes.harness.drift import decibels_in_json, decibels_in_table
from runtimes.harness.parity import IMAGE, psnr
from runtimes.pipeline import REQUIRED, Pipeline
from runtimes.registry import RUNTIMES, Runtime, choose_runtime, load_component
from runtimes.tables import compact_table, megabytes


@dataclass(frozen=True)
class Side:
    """One bundle's part in a row: its format, bytes on disk and mean bits of a weight (None for a row about a latent)."""

    format: str
    bytes: int | None
    bits: float | None


@dataclass(frozen=True)
class Difference:
    """One output of one component, or the pipeline's final latent or image: PSNR of A against B in dB, worst golden case."""

    component: str
    output: str
    a: Side
    b: Side
    psnr: float


@dataclass(frozen=True)
class Against:
    """What `compare_bundles` found. `a` and `b` name the bundles as model and target."""

    a: str
    b: str
    differences: tuple[Difference, ...]

    def to_json(self) -> str:
        """JSON text; a dB is a number, or "identical"."""
        fields = asdict(self)
        for row in fields["differences"]:
            row["psnr"] = decibels_in_json(row["psnr"])
        return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> Table:
        """A line an output, at 80 columns or more."""
        figures = ("MB\nof A", "MB\nof B", "bits\nof A", "bits\nof B", "dB")
        table = compact_table(f"A = {self.a}\nB = {self.b}", ("component", "A's format", "B's format"), figures)
        named: set[tuple[str, str]] = set()
        for row in self.differences:
            first = (row.component, row.a.format) not in named
            named.add((row.component, row.a.format))
            name = row.output if row.component == IMAGE else row.component
            sizes = [_megabytes(side.bytes) for side in (row.a, row.b)]
            bits = [_bits(side.bits) for side in (row.a, row.b)]
            if row.component != IMAGE and first:
                table.add_row(name, row.a.format, row.b.format, *sizes, *bits, "")
            if row.component == IMAGE:
                table.add_row(name, row.a.format, row.b.format, *sizes, *bits, decibels_in_table(row.psnr))
            else:
                table.add_row(f"  {row.output}", "", "", "", "", "", "", decibels_in_table(row.psnr))
        return table


def compare_bundles(
    folder_a: Path,
    folder_b: Path,
    *,
    low_memory: bool = False,
    threads: int | None = None,
    on_component: Callable[[str, str], None] | None = None,
) -> Against:
    """Runs every component and the pipelines of both. A format of A meets the same format of B, or else B's first one.

    `on_component(component, A's format)` is called before each comparison. Raises `BundleError` where the bundles cannot be
    compared or a runtime is missing, `GraphError` where an artifact cannot run.
    """
    a, b = load_manifest(folder_a), load_manifest(folder_b)
    if reason := _unlike(a, b):
        raise BundleError(f"{folder_a} and {folder_b} cannot be compared: {reason}")
    announce = on_component or (lambda component, format: None)
    rows: list[Difference] = []
    for format_a in a.formats:
        runtimes = _runtime(a, format_a), _runtime(b, format_a if format_a in b.formats else b.formats[0])
        for entry in a.components:
            other = b.component(entry.name, runtimes[1].format)
            if entry.format == format_a and other is not None:
                announce(entry.name, format_a)
                rows += _compare_component((folder_a, folder_b), a, (entry, other), runtimes, threads)
        if _draws(a, runtimes[0].format) and _draws(b, runtimes[1].format):
            announce(IMAGE, format_a)
            rows += _compare_pictures((folder_a, folder_b), (a, b), runtimes, low_memory, threads)
    if not rows:
        raise BundleError(f"{folder_a} and {folder_b} have no component in common")
    return Against(_title(a), _title(b), tuple(rows))


def _unlike(a: Manifest, b: Manifest) -> str | None:
    """Why artifacts of the two cannot be given the same inputs."""
    if a.model.fingerprint != b.model.fingerprint:
        return f"they come of different checkpoints ({a.model.fingerprint[:12]} and {b.model.fingerprint[:12]})"
    sizes = [f"{m.image_size.width}x{m.image_size.height}" for m in (a, b)]
    steps = [" ".join(f"{sigma:g}" for sigma in m.sigmas) for m in (a, b)]
    for what, first, second in (("sigmas", *steps), ("image sizes", *sizes), ("contracts", a.contract, b.contract)):
        if first != second:
            return f"their {what} differ ({first} and {second}); export one of them anew"
    for entry in a.components:
        for other in b.components:
            if entry.name == other.name and {*entry.inputs} != {*other.inputs}:
                return f"the inputs of {entry.name} differ; export both with the same rewrites"
    return None


def _compare_component(
    folders: tuple[Path, Path],
    manifest: Manifest,
    entries: tuple[ComponentEntry, ComponentEntry],
    runtimes: tuple[Runtime, Runtime],
    threads: int | None,
) -> list[Difference]:
    first, second = (
        load_component(folder, entry, runtime, threads)
        for folder, entry, runtime in zip(folders, entries, runtimes, strict=True)
    )
    common = [spec.name for spec in first.outputs if spec.name in {other.name for other in second.outputs}]
    worst = dict.fromkeys(common, float("inf"))
    for case in read_cases(folders[0], manifest.golden, entries[0].name):
        made, expected = first(case.inputs), second(case.inputs)
        for name in common:
            worst[name] = min(worst[name], psnr(made[name], expected[name]))
    a, b = (Side(entry.format, entry.bytes, entry.bits) for entry in entries)
    return [Difference(entries[0].name, name, a, b, value) for name, value in worst.items()]


def _compare_pictures(
    folders: tuple[Path, Path],
    manifests: tuple[Manifest, Manifest],
    runtimes: tuple[Runtime, Runtime],
    low_memory: bool,
    threads: int | None,
) -> list[Difference]:
    first, second = (
        Pipeline.open(folder, runtime.name, low_memory=low_memory, threads=threads)
        for folder, runtime in zip(folders, runtimes, strict=True)
    )
    latents, images = [], []
    for golden in manifests[0].golden.prompts:
        ours, theirs = first.generate(golden.prompt, golden.seed), second.generate(golden.prompt, golden.seed)
        latents.append(psnr(ours.latents[-1], theirs.latents[-1]))
        images.append(psnr(ours.pixels, theirs.pixels))
    a, b = (_whole(manifest, runtime.format) for manifest, runtime in zip(manifests, runtimes, strict=True))
    unsized = Side(a.format, None, None), Side(b.format, None, None)
    return [Difference(IMAGE, "final latent", *unsized, min(latents)), Difference(IMAGE, IMAGE, a, b, min(images))]


def _whole(manifest: Manifest, format: str) -> Side:
    """All components of one format."""
    entries = [entry for entry in manifest.components if entry.format == format]
    weights = sum(entry.weights for entry in entries)
    bits = sum(entry.bits * entry.weights for entry in entries) / weights if weights else None
    return Side(format, sum(entry.bytes for entry in entries), bits)


def _runtime(manifest: Manifest, format: str) -> Runtime:
    names = {runtime.format: runtime.name for runtime in RUNTIMES.values()}
    return choose_runtime(manifest, names.get(format, format))


def _draws(manifest: Manifest, format: str) -> bool:
    return all(manifest.component(name, format) is not None for name in REQUIRED)


def _title(manifest: Manifest) -> str:
    return f"{manifest.model.name} for {manifest.target}, {manifest.recipe.name}"


def _megabytes(count: int | None) -> str:
    return "—" if count is None else megabytes(count)


def _bits(bits: float | None) -> str:
    return "—" if bits is None else f"{bits:.2f}"
