"""`interrupted`: an export that is killed at random moments and started again, beside one that nothing disturbed.

    python -m benchmarks.full_size interrupted --model DIR --target ios

Each time the command must go on where it was: what was finished before a kill is never made again, and the last run's bundle
has the bytes of the undisturbed one. Ends with exit code 1 where that is not so. Host timings.
"""

from __future__ import annotations

import filecmp
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.full_size.run import OURS, measure, stage_table
from benchmarks.full_size.worker import Work
from export.journal import FOLDER as JOURNAL
from export.publish import BUNDLE


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, help="What `make` wrote.")
@click.option("--target", type=click.Choice([*OURS]), default="ios", show_default=True)
@click.option("--format", "formats", type=click.Choice(["coreml", "onnx", "executorch"]), multiple=True, help="Only these.")
@click.option("--bits", type=float, help="Mean bits of a weight [ios 6, android 8].")
@click.option("--kills", default=10, show_default=True, help="How many times it is killed.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/interrupted"), show_default=True, help="Bundles.")
def interrupted(model: Path, target: str, formats: Sequence[str], bits: float | None, kills: int, seed: int, out: Path) -> None:
    """Kills an export at random moments until it is left alone, and compares its bundle with that of one never disturbed."""
    console, rng = Console(), random.Random(seed)
    works = [Work("ours", str(model), str(out / name), target, tuple(formats), bits) for name in ("undisturbed", "killed")]
    undisturbed = measure(works[0])
    console.print(stage_table(undisturbed))
    if undisturbed.get("failed"):
        raise click.ClickException("the undisturbed export failed; there is nothing to compare with")
    ends, whole = finished_at(undisturbed["stages"]), sum(stage["seconds"] for stage in undisturbed["stages"])
    shutil.rmtree(out / "killed", ignore_errors=True)
    (out / "killed").mkdir(parents=True)
    table = Table("run", "killed after, s", "finished", title="host timings")
    units, made, started = set[str](), dict[str, int](), time.perf_counter()
    again = list[str]()
    for number in range(kills):
        left = whole - max((ends.get(unit, 0.0) for unit in units), default=0.0)
        seconds = rng.uniform(0, left)
        if not _killed_after(works[1], seconds):
            raise click.ClickException(f"run {number + 1} ended by itself before {seconds:.0f} s")
        units, files = _noted(out / "killed")
        again += [f"{name}, by run {number + 1}" for name, at in files.items() if made.setdefault(name, at) != at]
        table.add_row(str(number + 1), f"{seconds:.0f}", ", ".join(sorted(units)))
    last = time.perf_counter()
    if subprocess.run(_command(works[1])).returncode:
        raise click.ClickException(f"the run that nothing disturbed any more failed; see {out / 'killed' / 'log'}")
    table.add_row("last", "", f"all, in {time.perf_counter() - last:.0f} s")
    console.print(table)
    bundles = [out / name / target for name in ("undisturbed", "killed")]
    again += [f"{name}, by the last run" for name, at in made.items() if (bundles[1] / name).stat().st_mtime_ns != at]
    different = unequal(*bundles)
    total = time.perf_counter() - started
    console.print(f"{whole / 60:.1f} minutes undisturbed; {total / 60:.1f} in {kills + 1} runs, {kills} of them killed")
    console.print(f"files finished before a kill: {len(made)}; made again: {', '.join(again) or 'none'}")
    console.print(f"files that differ from the undisturbed bundle's: {', '.join(different) or 'none'}")
    sys.exit(bool(again or different))


def finished_at(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds into the undisturbed export at which each of the journal's units was finished."""
    ends, passed = dict[str, float](), 0.0
    for stage in stages:
        passed += stage["seconds"]
        if stage["name"] == "reference pictures":
            ends["drawings"] = passed
        elif stage["name"].startswith("components: "):
            ends[stage["name"].split(": ")[1]] = passed
    return ends


def unequal(one: Path, other: Path) -> list[str]:
    """Files, relative, that are not in both folders with the same bytes."""
    files = {path.relative_to(folder).as_posix() for folder in (one, other) for path in folder.rglob("*") if path.is_file()}
    _, mismatch, missing = filecmp.cmpfiles(one, other, sorted(files), shallow=False)
    return sorted([*mismatch, *missing])


def _command(work: Work) -> list[str]:
    return [sys.executable, "-m", "benchmarks.full_size.worker", json.dumps(asdict(work))]


def _killed_after(work: Work, seconds: float) -> bool:
    """Whether the work was still going on by then."""
    process = subprocess.Popen(_command(work), stdout=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def _noted(folder: Path) -> tuple[set[str], dict[str, int]]:
    """The units that the export in work has finished, and when each of their files was written."""
    units, files = set[str](), dict[str, int]()
    for note in folder.glob(f".*/{JOURNAL}/*.json"):
        found = json.loads(note.read_text())
        units.add(found["unit"])
        bundle = note.parent.parent / BUNDLE
        files |= {entry["path"]: (bundle / entry["path"]).stat().st_mtime_ns for entry in found["files"]}
    return units, files
