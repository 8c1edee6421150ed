"""Training data of the transformer: latents of training scenes made once, captions and their embeddings made anew each time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.autoencoder import encode
from distill.captions import describe, training_scenes
from distill.loop import Run
from distill.scenes import COLOURS, SHAPES, Scene, render, shape_mask
from distill.settings import Settings
from distill.text import TextEncoders

SHARD = 1024
PATCHES = 8  # the transformer sees 8 x 8 patches of 16 px


@dataclass(frozen=True)
class Batch:
    """Latents float32 [batch, 16, 16, 16], captions, and what stands at each patch (`layout_of`): int64 [batch, 2, 8, 8]."""

    latents: Tensor
    captions: list[str]
    layout: Tensor


class Data:
    """The scenes of a run, their latents (cached in shards) and layouts."""

    def __init__(self, run: Run, settings: Settings, vae: AutoencoderKL) -> None:
        rng = np.random.default_rng(run.seed + 7)
        self.scenes: list[Scene] = list(islice(training_scenes(rng), settings.scenes))
        folder = run.folder / "latents"
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(self.scenes), SHARD)
        todo = [s for s in starts if not (folder / f"{s:06d}.safetensors").exists()]
        for start in track(todo, "latents", disable=not todo):
            scenes = self.scenes[start : start + SHARD]
            latents = [encode(vae, [render(s) for s in scenes[i : i + 32]]).half() for i in range(0, len(scenes), 32)]
            layout = torch.from_numpy(np.stack([layout_of(s) for s in scenes]))
            path = folder / f"{start:06d}.safetensors"
            save_file({"latents": torch.cat(latents).cpu().contiguous(), "layout": layout}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        shards = [load_file(folder / f"{s:06d}.safetensors") for s in starts]
        self.latents = torch.cat([s["latents"] for s in shards])
        self.layout = torch.cat([s["layout"] for s in shards])

    def sample(self, generator: torch.Generator, count: int) -> Batch:
        """Random scenes, each with a sentence about it that need not have been used before."""
        chosen = torch.randint(len(self.scenes), (count,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        captions = [describe(self.scenes[i], rng).text for i in chosen.tolist()]
        return Batch(self.latents[chosen].float(), captions, self.layout[chosen].long())


@torch.no_grad()
def embed(text: TextEncoders, captions: list[str], generator: torch.Generator, dropout: float) -> tuple[Tensor, Tensor]:
    """Context and pooled embeddings, a share `dropout` of the captions replaced by the empty one (for guidance)."""
    dropped = torch.rand(len(captions), generator=generator) < dropout
    return text.embed(["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)])


def layout_of(scene: Scene) -> np.ndarray:
    """uint8 [2, 8, 8]: of the thing in front at each patch, 1 + the indices of its colour and shape; 0: nothing."""
    layout = np.zeros((2, PATCHES, PATCHES), dtype=np.uint8)
    for thing in reversed(scene.things):
        mask = shape_mask(thing.shape, thing.outlined, thing.x, thing.y, thing.radius)
        covered = mask.reshape(PATCHES, 16, PATCHES, 16).mean((1, 3)) > 0.15
        layout[0][covered] = 1 + tuple(COLOURS).index(thing.colour)
        layout[1][covered] = 1 + SHAPES.index(thing.shape)
    return layout
