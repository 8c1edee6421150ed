"""What each command does with its options: checks them, makes the one call, shows the result."""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

from export.console import StageBars, noise_to, plan_table
from export.errors import UserError
from export.exporter import export
from export.families.family import Contract
from export.planning import ExportOptions, ExportPlan, make_plan
from export.publish import GateFailed
from export.rewrites import Rewrites, rewrites_of
from export.targets import TARGETS
from runtimes.bundle import BundleError, load_manifest
from runtimes.harness.parity import Report, verify_bundle
from runtimes.pipeline import Pipeline

BUILT_IN = "flash-mini"


def run_export(
    *,
    target: str,
    model: str | None,
    tokenizer: Path | None,
    out: Path | None,
    steps: int | None,
    sigmas: str | None,
    resolution: str | None,
    bits: int | None,
    contract: Contract,
    deployment_target: str,
    formats: tuple[str, ...],
    components: tuple[str, ...],
    chunks: str,
    rewrite: bool,
    without: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Plans every target before any is made; exit code 1 where a parity gate fails."""
    options = ExportOptions(
        model=model or built_in(),
        tokenizer=tokenizer,
        steps=steps,
        sigmas=_sigmas(sigmas),
        resolution=_resolution(resolution),
        bits=bits,
        contract=contract,
        rewrites=_rewrites(contract, rewrite, without),
        deployment_target=deployment_target,
        formats=formats,
        components=components,
        chunks=_chunks(chunks),
    )
    targets = list(TARGETS.values()) if target == "all" else [TARGETS[target]]
    if formats:  # with --target all a format picks its target
        targets = [t for t in targets if target != "all" or not {*t.formats}.isdisjoint(formats)] or targets
    plans = [make_plan(t, options) for t in targets]
    folder = out or Path("bundles") / plans[0].checkpoint.name
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    if dry_run:
        console = Console()
        for plan in plans:
            console.print(plan_table(plan))
        for note in notes:
            console.print(f"note: {note}")
        return
    _check_writable(folder)
    with noise_to(folder / "export.log") as console:
        for note in notes:
            console.print(f"note: {note}")
        failed = [plan.target.name for plan in plans if not _export_one(plan, folder / plan.target.name, console)]
    if failed:
        sys.exit(1)


def _export_one(plan: ExportPlan, place: Path, console: Console) -> bool:
    try:
        with StageBars(console) as bars:
            report = export(plan, place, bars)
    except GateFailed as error:
        report = error.args[0]
        _show(console, report)
        console.print(f"[red]not published[/red]: what was made lies in {place}.failed")
        return False
    _show(console, report)
    console.print(f"{place} is ready: export-flash generate {place} \"a prompt\"")
    return True


def run_generate(
    *, bundle: Path, prompt: str, seed: int, runtime: str, out: Path, low_memory: bool, threads: int | None
) -> None:
    pipeline = Pipeline.open(bundle, runtime, low_memory=low_memory, threads=threads)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: a picture is .png, .jpg or .webp")
    drawn = pipeline.generate(prompt, seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.image.save(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    table = Table("component", "load s", "run s", "runs", title=f"{pipeline.runtime.name} on this computer (host timings)")
    for name, timing in drawn.timings.items():
        table.add_row(name, f"{timing.load:.3f}", f"{timing.run:.3f}", str(timing.calls))
    console = Console()
    console.print(table)
    console.print(f"{out}: {drawn.image.width} x {drawn.image.height} px, {pipeline.manifest.steps} steps, seed {seed}")


def run_verify(*, bundle: Path, runtimes: tuple[str, ...], json_file: Path | None, low_memory: bool) -> None:
    console = Console()
    load_manifest(bundle)
    try:
        report = verify_bundle(bundle, runtimes or None, low_memory=low_memory)
    except BundleError as error:
        print(f"export-flash: {error}", file=sys.stderr)
        sys.exit(1)
    _show(console, report)
    if json_file is not None:
        try:
            json_file.write_text(report.to_json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error.strerror}") from error
    if not report.passed:
        sys.exit(1)


def run_inspect(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    size = manifest.image_size
    console = Console()
    title = f"{manifest.model.name} for {manifest.target}: {size.width} x {size.height} px, {manifest.steps} steps"
    table = Table("component", "format", "files", "inputs", "outputs", "runs on", title=title)
    for heading in ("bits", "bytes"):
        table.add_column(heading, justify="right")
    for entry in manifest.components:
        inputs, outputs = ("\n".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in ts) for ts in (entry.inputs, entry.outputs))
        files = "\n".join(artifact.path for artifact in entry.artifacts)
        unit = entry.compute_units or entry.backend or "CPU"
        table.add_row(entry.name, entry.format, files, inputs, outputs, unit, f"{entry.bits:.2f}", f"{entry.bytes:,}")
    console.print(table)
    for hint in manifest.resources:
        console.print(
            f"{hint.format}: {hint.all_components:,} bytes of artifacts; {hint.denoising:,} while denoising, "
            f"{hint.largest_component:,} one component at a time"
        )
    console.print(f"sigmas {' '.join(f'{s:g}' for s in manifest.sigmas)}; contract {manifest.contract}")
    console.print(f"exact rewrites: {', '.join(manifest.rewrites) or 'none'}")
    console.print(f"licence {manifest.licence.name}; {manifest.licence.attribution}")
    verdict = "every comparison passed" if all(p.passed for p in manifest.parity) else "a comparison FAILED"
    console.print(f"parity: {len(manifest.parity)} comparisons, {verdict}" if manifest.parity else "parity: never measured")


def built_in() -> str:
    """The folder of flash-mini, which comes with the package."""
    return str(resources.files("distill") / BUILT_IN)


def _show(console: Console, report: Report) -> None:
    console.print(report.table())
    for failure in report.failures:
        console.print(f"[red]failed[/red] {failure}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "export.log").open("a"):
            pass
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from error


def _resolution(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UserError(f"--resolution {text} is no size in pixels; write 512 or 768x512 (width x height)")
    return int(match[1]), int(match[2] or match[1])


def _sigmas(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(value) for value in text.replace(",", " ").split())
    except ValueError:
        raise UserError(f'--sigmas {text} are no numbers; write them as "1 0.9 0.75 0.5 0"') from None


def _chunks(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--chunks {text} is neither auto nor a number of 1 or more")
    return int(text)


def _rewrites(contract: Contract, rewrite: bool, without: tuple[str, ...]) -> Rewrites:
    names = list(vars(Rewrites()))
    for name in without:
        if name not in names:
            raise UserError(f"--without {name} is no rewrite; choose from {', '.join(names)}")
    kept = rewrites_of(contract) if rewrite else Rewrites(**dict.fromkeys(names, False))
    return Rewrites(**{name: on and name not in without for name, on in vars(kept).items()})
