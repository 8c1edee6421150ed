"""Drift along the steps, against closed forms and numpy in float64."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from runtimes.bundle import BundleError, ComponentEntry, load_manifest
from runtimes.golden import read_drawings
from runtimes.graph import Graph
from runtimes.harness.drift import Drift, PromptDrift, follow, measure_drift
from runtimes.pipeline import Pipeline
from runtimes.registry import RUNTIMES
from tests.bundles import TORCH, load_torch

OFFSET = 0.01


class Offset:
    """A real transformer whose velocity is too large by a constant."""

    def __init__(self, graph: Graph) -> None:
        self.inputs, self.outputs, self._graph = graph.inputs, graph.outputs, graph

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array + np.float32(OFFSET) for name, array in self._graph(inputs).items()}


def load_offset(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
    graph = load_torch(path, component, threads)
    return Offset(graph) if component.name == "transformer" else graph


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 10 * math.log10(np.ptp(b) ** 2 / np.mean((a - b) ** 2))


def test_a_faithful_pipeline_stays_on_the_originals_trajectory(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "torch", TORCH)
    drift = measure_drift(tiny_bundle, "torch")
    assert [prompt.prompt for prompt in drift.prompts] == ["the red circle", "a blue and the"]
    for prompt in drift.prompts:
        assert len(prompt.latents) == 3 and min(prompt.latents) > 90 and prompt.image > 80
    fields = json.loads(drift.to_json())
    assert fields["sigmas"] == [1.0, 0.75, 0.0] and len(fields["prompts"][0]["latents"]) == 3


def test_an_error_of_every_step_is_seen_to_add_up(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "torch", replace(TORCH, load=load_offset))
    manifest = load_manifest(tiny_bundle)
    drawings = list(read_drawings(tiny_bundle, manifest.golden))
    first, second = measure_drift(tiny_bundle, "torch").prompts
    for found, drawing in zip((first, second), drawings, strict=True):
        assert found.latents[0] > 100  # the noise knows no transformer
        span = float(np.ptp(drawing.latents[1].astype(np.float64)))
        assert found.latents[1] == pytest.approx(20 * math.log10(span / (0.25 * OFFSET)), abs=0.05)
        made = Pipeline.open(tiny_bundle, "torch").generate(drawing.prompt, drawing.seed)
        assert found.latents[2] == pytest.approx(decibels(made.latents[2][0], drawing.latents[2]), abs=0.01)
        assert found.image == pytest.approx(decibels(made.pixels, drawing.image), abs=0.01)


def test_golden_latents_of_other_steps_are_one_line(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "torch", TORCH)
    manifest = load_manifest(tiny_bundle)
    drawing = next(iter(read_drawings(tiny_bundle, manifest.golden)))
    short = replace(drawing, latents=drawing.latents[:2])
    with pytest.raises(BundleError, match=r"have shape \[2, 4, 12, 8\]; this bundle draws \[3, 4, 12, 8\]"):
        follow(Pipeline.open(tiny_bundle, "torch"), [short])


def test_table_shows_the_worst_and_the_mean_of_each_step() -> None:
    prompts = (PromptDrift("a", 0, (math.inf, 50.0), 40.0), PromptDrift("b", 1, (120.0, 60.0), 30.0))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Drift("tiny", "ios", "coreml", (1.0, 0.0), prompts).table())
    rows = [line.split() for line in console.export_text().splitlines()]
    assert rows[-3:-1] == [["coreml", "noise", "1", "120.0", "identical"], ["step", "1", "0", "50.0", "55.0"]]
    assert rows[-1] == ["image", "—", "30.0", "35.0"]
