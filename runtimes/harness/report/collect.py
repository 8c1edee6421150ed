"""Everything that the page says, as data: from the manifest, from the bundle's files, and measured where nobody passed it in.

The range map runs every Core ML artifact on every golden case, and drift draws every golden prompt through every runtime; both
take about as long as `verify` does, and are the only work here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.bundle import BundleError, Manifest
from runtimes.harness.cost import BundleCost, bundle_cost
from runtimes.harness.cost.bundle import READERS
from runtimes.harness.drift import Drift, measure_drift
from runtimes.harness.ranges import FORMAT as RANGED
from runtimes.harness.ranges import RangeMap, measure_ranges
from runtimes.harness.report.pictures import Gallery, read_gallery
from runtimes.harness.report.recipe import FormatEvidence, read_evidence
from runtimes.harness.results import Result, describe_model
from runtimes.pipeline import REQUIRED
from runtimes.registry import RUNTIMES


@dataclass(frozen=True)
class Findings:
    """What the page is made of. evidence: by format, empty where the bundle has no recipe.json; ranges: None without Core ML;
    drifts: one a runtime that can draw; costs: one a format that can be counted."""

    manifest: Manifest
    gallery: Gallery
    evidence: Mapping[str, FormatEvidence]
    ranges: RangeMap | None
    drifts: tuple[Drift, ...]
    costs: tuple[BundleCost, ...]
    benchmark: Result | None


def collect(
    folder: Path,
    manifest: Manifest,
    *,
    benchmark: Result | None = None,
    ranges: RangeMap | None = None,
    drifts: Sequence[Drift] | None = None,
    measured: bool = True,
) -> Findings:
    """`ranges` and `drifts` None: measured here, or left out where not `measured`.

    Raises `BundleError` where the benchmark is of another bundle or a file cannot be read, `GraphError` where an artifact
    cannot be run or counted.
    """
    if benchmark is not None:
        check_benchmark(benchmark, manifest)
    return Findings(
        manifest,
        read_gallery(folder, manifest),
        {name: evidence for name, evidence in read_evidence(folder).items() if name in manifest.formats},
        measure_ranges(folder) if ranges is None and measured and RANGED in manifest.formats else ranges,
        tuple(measure_drift(folder, name) for name in drawing(manifest) if measured) if drifts is None else tuple(drifts),
        tuple(bundle_cost(folder, format) for format in manifest.formats if format in READERS),
        benchmark,
    )


def drawing(manifest: Manifest) -> tuple[str, ...]:
    """The runtimes that have every component they need to draw."""
    return tuple(
        runtime.name
        for runtime in RUNTIMES.values()
        if all(manifest.component(name, runtime.format) is not None for name in REQUIRED)
    )


def check_benchmark(benchmark: Result, manifest: Manifest) -> None:
    """Raises `BundleError` unless the result was measured on this very bundle."""
    if benchmark.benchmark_model != describe_model(manifest):
        found, wanted = benchmark.benchmark_model.digest[:12], manifest.digest[:12]
        raise BundleError(f"the benchmark was measured on a bundle with digest {found}…, this one has {wanted}…: measure again")
