"""`export-flash report`: the page about a bundle, beside the bundle, since a published bundle is not written to."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from export.console import NOWHERE, noise_to, say
from export.errors import UserError
from runtimes.bundle import check_files, load_manifest
from runtimes.harness.report import collect, render_page
from runtimes.harness.results import read_result


def run_report(*, bundle: Path, benchmark_file: Path | None, out: Path | None) -> None:
    """Measures what the page needs, and writes it to `out` (by default <bundle>-report.html beside the bundle).

    Raises `UserError` for a place that is inside the bundle or cannot be written, `BundleError` for a bundle that is altered or
    a benchmark of another one, and `GraphError` for an artifact that cannot be run.
    """
    manifest = load_manifest(bundle)
    home = bundle.resolve()
    place = home.with_name(f"{home.name}-report.html") if out is None else out
    if place.resolve().is_relative_to(home):
        raise UserError(f"--out {place} is inside the bundle, which is sealed; choose a place outside of {bundle}")
    if not place.parent.is_dir():
        raise UserError(f"--out {place} cannot be written: there is no folder {place.parent}; choose another file")
    result = None if benchmark_file is None else read_result(benchmark_file)
    check_files(bundle, manifest)
    with noise_to(NOWHERE):
        page = render_page(collect(bundle, manifest, benchmark=result))
    try:
        place.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--out {place} cannot be written: {error.strerror}; choose another file") from error
    say(Console(), f"wrote {place}")
