"""`export-flash cost`: what an image takes by the artifacts themselves, as tables and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from export.errors import UserError
from runtimes.bundle import BundleError, load_manifest
from runtimes.harness.cost import bundle_cost, cost_table, floor_table, memory_table
from runtimes.harness.devices import DEVICES


def run_cost(*, bundle: Path, formats: tuple[str, ...], json_file: Path | None) -> None:
    """Raises `BundleError` for a format that the bundle does not hold, `GraphError` for an artifact that cannot be counted."""
    manifest = load_manifest(bundle)
    for name in formats:
        if name not in manifest.formats:
            raise BundleError(f"--format {name}: the bundle holds {', '.join(manifest.formats)}; choose from those")
    costs = [bundle_cost(bundle, name) for name in formats or manifest.formats]
    console, devices = Console(), list(DEVICES.values())
    for cost in costs:
        console.print(cost_table(cost), "", floor_table(cost, devices), "", memory_table(cost, devices), "", sep="\n")
    if json_file is not None:
        try:
            json_file.write_text(json.dumps([json.loads(cost.to_json()) for cost in costs], indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error.strerror}; choose another file") from error
