"""The built-in checkpoint as it lies in the repository: what a user of plain diffusers gets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from distill.captions import held_out
from distill.scorer import judge

FLASH_MINI = Path(__file__).parents[2] / "distill" / "flash-mini"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(FLASH_MINI, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("steps", ["4", "2"])
def test_it_draws_captions_that_it_never_saw(pipeline: StableDiffusion3Pipeline, steps: str) -> None:
    *sigmas, last = json.loads((FLASH_MINI / "flash.json").read_text())["sigmas"][steps]
    assert last == 0 and len(sigmas) == int(steps)
    shares = []
    for seed, (_, caption) in enumerate(held_out()[:16]):
        image = pipeline(
            caption.text,
            guidance_scale=1,
            num_inference_steps=len(sigmas),
            sigmas=sigmas,
            height=128,
            width=128,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        shares.append(judge(np.asarray(image), caption.facts).share)
    # Of the facts that a caption states, as the model card has them, nine in ten hold; here of few captions, so a little less.
    assert np.mean(shares) > 0.8


def test_it_is_small_half_precision_safetensors_with_card_and_licence() -> None:
    files = [path for path in FLASH_MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    card = (FLASH_MINI / "README.md").read_text()
    for words in ("## Data", "## Training", "## Figures", "## What it is not"):
        assert words in card
    assert "Apache License" in (FLASH_MINI / "LICENSE").read_text()
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
