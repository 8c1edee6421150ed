"""An export at true widths, three blocks deep and at few pixels: every stage of the full size, in a few minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.full_size.__main__ import main
from runtimes.bundle import load_manifest

MEMORY = 8e9  # bytes, what the whole model may take


def test_true_widths_are_exported_and_compared_in_little_memory(tmp_path: Path) -> None:
    arguments = ("--layers", 3, "--resolution", 128, "--target", "ios", "--no-others")
    files = ("--model", tmp_path / "model", "--out", tmp_path / "out", "--json", tmp_path / "figures.json")
    done = CliRunner().invoke(main, ["run", *map(str, (*arguments, *files))], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (result,) = json.loads((tmp_path / "figures.json").read_text())
    assert result["stages"], result
    assert max(stage["peak_bytes"] for stage in result["stages"]) < MEMORY
    manifest = load_manifest(tmp_path / "out" / "coreml" / "ios")
    assert {entry.name for entry in manifest.components} == {
        "text_encoder", "text_encoder_2", "conditioner", "transformer", "vae_decoder"
    }
    assert all(entry.passed for entry in manifest.parity)
    (transformer,) = [entry for entry in manifest.components if entry.name == "transformer"]
    assert transformer.bits == pytest.approx(6, abs=0.1)
