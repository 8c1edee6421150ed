"""Drift along the steps: an artifact's own trajectory, step by step, beside the one that unmodified diffusers drew.

The pipeline starts from the golden prompt's noise and goes on from its own latents, so that every step adds to what the steps
before it lost. Parity by golden case, in contrast, gives each step the original's latent. All figures are PSNR in dB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from runtimes.bundle import BundleError
from runtimes.golden import Drawing, read_drawings
from runtimes.harness.parity import psnr
from runtimes.pipeline import Drawn, Pipeline
from runtimes.tables import compact_table


@dataclass(frozen=True)
class PromptDrift:
    """One golden prompt's trajectory. latents: dB of the noise, then of the latent after each step; image: of the picture."""

    prompt: str
    seed: int
    latents: tuple[float, ...]
    image: float


@dataclass(frozen=True)
class Drift:
    """What `measure_drift` found of one runtime. `sigmas` are the bundle's, steps + 1 of them."""

    model: str
    target: str
    runtime: str
    sigmas: tuple[float, ...]
    prompts: tuple[PromptDrift, ...]

    def to_json(self) -> str:
        """JSON text; a dB is a number, or "identical"."""
        fields = asdict(self)
        for row in fields["prompts"]:
            row["latents"] = [decibels_in_json(value) for value in row["latents"]]
            row["image"] = decibels_in_json(row["image"])
        return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> Table:
        """A line for the noise, each step and the picture; the worst and the mean of all prompts."""
        title = f"{self.model} for {self.target}: drift by step"
        table = compact_table(title, ("runtime", "after"), ("sigma", "worst\ndB", "mean\ndB"))
        for step, sigma in enumerate(self.sigmas):
            values = [prompt.latents[step] for prompt in self.prompts]
            after = "noise" if step == 0 else f"step {step}"
            table.add_row(self.runtime if step == 0 else "", after, f"{sigma:.4g}", *_worst_and_mean(values))
        table.add_row("", "image", "—", *_worst_and_mean([prompt.image for prompt in self.prompts]))
        return table


def measure_drift(folder: Path, runtime: str = "auto", *, low_memory: bool = False, threads: int | None = None) -> Drift:
    """Draws every golden prompt through one runtime. Raises `BundleError` where the folder is no bundle that can draw,
    `GraphError` where an artifact cannot run."""
    pipeline = Pipeline.open(folder, runtime, low_memory=low_memory, threads=threads)
    manifest = pipeline.manifest
    rows = follow(pipeline, read_drawings(folder, manifest.golden))
    return Drift(manifest.model.name, manifest.target, pipeline.runtime.name, manifest.sigmas, rows)


def follow(pipeline: Pipeline, drawings: Iterable[Drawing]) -> tuple[PromptDrift, ...]:
    """The pipeline's trajectory beside each drawing's. Raises `BundleError` where a drawing has another number of latents."""
    return tuple(prompt_drift(pipeline.generate(drawing.prompt, drawing.seed), drawing) for drawing in drawings)


def prompt_drift(drawn: Drawn, drawing: Drawing) -> PromptDrift:
    """What a pipeline drew beside the original's drawing of the same prompt and seed. Raises `BundleError` as `follow` does."""
    made = np.concatenate(drawn.latents)
    if made.shape != drawing.latents.shape:
        expected, found = list(made.shape), list(drawing.latents.shape)
        raise BundleError(f"the golden latents of {drawing.prompt!r} have shape {found}; this bundle draws {expected}")
    latents = tuple(psnr(ours, theirs) for ours, theirs in zip(made, drawing.latents, strict=True))
    return PromptDrift(drawing.prompt, drawing.seed, latents, psnr(drawn.pixels, drawing.image))


def decibels_in_json(value: float) -> float | str | None:
    """A dB as JSON holds it: a number, "identical" for infinity, null for what is no figure."""
    if value == math.inf:
        return "identical"
    return value if math.isfinite(value) else None


def decibels_in_table(value: float) -> str:
    """A dB as a table shows it."""
    return "identical" if value == math.inf else f"{value:.1f}"


def _worst_and_mean(values: Sequence[float]) -> tuple[str, str]:
    return decibels_in_table(min(values)), decibels_in_table(sum(values) / len(values))
