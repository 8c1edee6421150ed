"""Prompt adherence of flash-mini through its bundles: what compression costs in pictures that people would call wrong.

    python -m benchmarks.adherence bundles/flash-mini/ios bundles/flash-mini/android --captions 512 --json adherence.json

Draws the same held-out captions from the same noise with unmodified diffusers (float32) and through every runtime of every
bundle, and judges each picture by the rules of `distill/scorer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from distill.captions import held_out
from distill.scorer import judge
from export.checkpoint import open_checkpoint
from export.commands import built_in
from export.reference import reference_pipeline
from runtimes.bundle import load_manifest
from runtimes.harness.parity import psnr
from runtimes.pipeline import Pipeline
from runtimes.registry import RUNTIMES

Draw = Callable[[str, int], np.ndarray]  # prompt, seed -> float [3, H, W] in [0, 1]


def runtimes_of(bundle: Path) -> Iterator[tuple[str, Draw]]:
    """(label, draw) of every runtime that the bundle has artifacts for."""
    manifest = load_manifest(bundle)
    for runtime in RUNTIMES.values():
        if runtime.format in manifest.formats:
            pipeline = Pipeline.open(bundle, runtime.name)
            label = f"{bundle} {runtime.name}, {manifest.recipe.bits} bits"
            yield label, lambda prompt, seed, pipeline=pipeline: pipeline.generate(prompt, seed).pixels  # type: ignore[misc]


def original(sigmas: tuple[float, ...]) -> Draw:
    """Unmodified diffusers in float32."""
    pipeline = reference_pipeline(open_checkpoint(built_in()), resident=True)

    def draw(prompt: str, seed: int) -> np.ndarray:
        return (
            pipeline(
                prompt,
                height=128,
                width=128,
                num_inference_steps=len(sigmas) - 1,
                sigmas=list(sigmas[:-1]),
                guidance_scale=1.0,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np",
            )
            .images[0]
            .transpose(2, 0, 1)
        )

    return draw


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--captions", default=512, show_default=True, help="How many held-out captions.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the rows as JSON.")
def main(bundles: tuple[Path, ...], captions: int, json_file: Path | None) -> None:
    """Adherence of each bundle's runtimes, beside unmodified diffusers."""
    cases = [caption for _, caption in held_out()[:captions]]
    rows = []
    reference: list[np.ndarray] = []
    draws = [("diffusers, float32", original(load_manifest(bundles[0]).sigmas))]
    for label, draw in (*draws, *(pair for bundle in bundles for pair in runtimes_of(bundle))):
        drawn = [draw(case.text, seed) for seed, case in enumerate(track(cases, label))]
        reference = reference or drawn
        verdicts = [
            judge((image.transpose(1, 2, 0) * 255).round().astype(np.uint8), case.facts)
            for image, case in zip(drawn, cases, strict=True)
        ]
        decibels = [psnr(image, true) for image, true in zip(drawn, reference, strict=True)]
        rows.append(
            {
                "drawn by": label,
                "adherence": float(np.mean([v.adheres for v in verdicts])),
                "facts": float(np.mean([v.share for v in verdicts])),
                "median image PSNR": float(np.median(decibels)),
            }
        )
    table = Table("drawn by", "adherence", "facts", "median image PSNR", title=f"{len(cases)} held-out captions")
    for row in rows:
        decibels_text = "—" if np.isinf(row["median image PSNR"]) else f"{row['median image PSNR']:.1f} dB"
        table.add_row(row["drawn by"], f"{row['adherence']:.1%}", f"{row['facts']:.1%}", decibels_text)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
