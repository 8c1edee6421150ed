"""Two bundles side by side."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from runtimes.bundle import BundleError, ComponentEntry, load_manifest, write_manifest
from runtimes.golden import read_cases
from runtimes.graph import Graph
from runtimes.harness.against import compare_bundles
from runtimes.registry import RUNTIMES
from tests.bundles import TORCH, load_torch

OFFSET = 0.02


class Darker:
    """A real decoder whose images are darker by a constant."""

    def __init__(self, graph: Graph) -> None:
        self.inputs, self.outputs, self._graph = graph.inputs, graph.outputs, graph

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array - np.float32(OFFSET) for name, array in self._graph(inputs).items()}


def altered(bundle: Path, folder: Path, changes: dict) -> Path:
    """A copy with other fields in its manifest; its files are never checked."""
    shutil.copytree(bundle, folder)
    write_manifest(folder, load_manifest(bundle).model_copy(update=changes))
    return folder


def test_what_differs_is_measured_and_what_does_not_is_identical(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = tuple(entry.model_copy(update={"bits": 6.0}) for entry in load_manifest(tiny_bundle).components)
    other = altered(tiny_bundle, tmp_path / "other", {"components": smaller})

    def load(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
        graph = load_torch(path, component, threads)
        return Darker(graph) if component.name == "vae_decoder" and path.is_relative_to(other) else graph

    monkeypatch.setitem(RUNTIMES, "torch", replace(TORCH, load=load))
    seen: list[str] = []
    report = compare_bundles(tiny_bundle, other, on_component=lambda component, format: seen.append(component))
    assert seen == ["text_encoder", "text_encoder_2", "conditioner", "transformer", "vae_decoder", "image"]
    *encoders, decoder, latent, image = report.differences
    assert all(row.psnr == math.inf and (row.a.bits, row.b.bits) == (32, 6) for row in encoders) and latent.psnr == math.inf
    cases = read_cases(tiny_bundle, load_manifest(tiny_bundle).golden, "vae_decoder")
    spans = [float(np.ptp(case.reference["image"])) for case in cases]  # of B's images: the same, the offset being constant
    assert decoder.psnr == pytest.approx(20 * math.log10(min(spans) / OFFSET), abs=0.01)
    assert image.psnr == pytest.approx(decoder.psnr, abs=0.05) and (image.a.bits, image.b.bits) == (32, 6)
    assert image.a.bytes == sum(entry.bytes for entry in load_manifest(tiny_bundle).components)
    fields = json.loads(report.to_json())
    assert fields["differences"][0]["psnr"] == "identical" and fields["a"] == "tiny for test, none"

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split()[:3] == ["image", "torch", "torch"] and "6.00" in lines[-1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sigmas": (1.0, 0.5, 0.0)}, r"their sigmas differ \(1 0.75 0 and 1 0.5 0\); export one of them anew"),
        ({"contract": "diffusers"}, r"their contracts differ \(flash and diffusers\)"),
    ],
)
def test_bundles_that_cannot_be_compared_are_one_line(
    changes: dict, reason: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "torch", TORCH)
    other = altered(tiny_bundle, tmp_path / "other", changes)
    with pytest.raises(BundleError, match=reason) as caught:
        compare_bundles(tiny_bundle, other)
    assert "\n" not in str(caught.value)


def test_another_checkpoint_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load_manifest(tiny_bundle).model.model_copy(update={"fingerprint": "1" * 64})
    other = altered(tiny_bundle, tmp_path / "other", {"model": model})
    with pytest.raises(BundleError, match=r"different checkpoints \(000000000000 and 111111111111\)"):
        compare_bundles(tiny_bundle, other)
