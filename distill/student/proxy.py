"""The proxy: a copy of the teacher that learns the velocities of what the student draws (the "fake" score of DMD2).

Distribution matching reads the student's fault as the difference of teacher and proxy, so the proxy must know the student
before that difference means anything: the guided teacher and the plain one differ by their guidance alone. Hence this
stage, which teaches the proxy on the student's pictures while the student stands still.
"""

from __future__ import annotations

import copy

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from distill.data import Data
from distill.loop import HalfCopy, Run, linear, set_rate, step_all, train
from distill.model import velocity
from distill.muon import Muon, split_parameters
from distill.settings import Settings
from distill.student.steps import SIGMAS, draw
from distill.text import TextEncoders


def fit(
    run: Run,
    settings: Settings,
    data: Data,
    text: TextEncoders,
    teacher: SD3Transformer2DModel,
    student: SD3Transformer2DModel,
) -> SD3Transformer2DModel:
    """The teacher's weights taught by rectified flow on pictures of `student`, at sigmas of both modes and between."""
    torch.manual_seed(run.seed + 5)
    device = run.accelerator.device
    painter = copy.deepcopy(student).bfloat16()
    proxy = copy.deepcopy(teacher).requires_grad_(True)
    half = HalfCopy(proxy, run.accelerator)
    matrices, rest = split_parameters(proxy, adam=("pos_embed", "proj_out", "norm1", "norm_out", "time_text_embed"))
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": Muon(matrices, settings.proxy_rate),
        "adam": torch.optim.AdamW(rest, settings.proxy_rate, betas=(0.9, 0.95), weight_decay=0.0),
    }
    modes = list(SIGMAS)

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizers, linear(step, settings.proxy_warmup, settings.proxy_rate, warmup=10))
        batch = data.sample(generator, settings.matching_batch)
        with torch.no_grad():
            condition = text.embed(batch.captions)
        mode = modes[int(torch.randint(len(modes), (), generator=generator))]
        shape = batch.latents.shape
        drawn = draw(painter, torch.randn(shape, generator=generator).to(device), mode, condition)
        # Half of them at the levels where matching will ask, half anywhere.
        shared = torch.tensor([sigma for sigma in SIGMAS[mode][1:] if sigma > 0])
        chosen = shared[torch.randint(len(shared), (shape[0],), generator=generator)]
        levels = torch.where(
            torch.rand(shape[0], generator=generator) < 0.5, chosen, 0.02 + 0.96 * torch.rand(shape[0], generator=generator)
        ).to(device)
        noise = torch.randn(shape, generator=generator).to(device)
        mixed = torch.lerp(drawn, noise, levels[:, None, None, None])
        with half.fresh() as forward:
            state, context, pooled = half.cast(mixed, *condition)
            loss = (velocity(forward, state, levels, context, pooled) - (noise - drawn)).pow(2).mean()
            run.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
        step_all(optimizers)
        return {"proxy": loss.item()}

    train(run, "proxy", {"proxy": proxy}, optimizers, step_fn, settings.proxy_warmup)
    return proxy.eval().requires_grad_(False)
