"""The teacher: a rectified-flow transformer on latents of scenes, with caption dropout for classifier-free guidance.

Loss (Liu et al. 2022; Esser et al. 2024, eqs. 2 and 14): x_s = (1 - s) x_0 + s e, the velocity e - x_0 regressed at
logit-normal s = sigmoid(m + n). Beside it, early blocks learn to tell what stands at each patch, by a linear head that is
thrown away afterwards: representation alignment (Yu et al. 2024), here with the true layout in the role of the image encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from distill import model
from distill.data import Data, embed
from distill.loop import HalfCopy, Run, linear, set_rate, step_all, train
from distill.muon import Muon, split_parameters
from distill.scenes import COLOURS, SHAPES
from distill.settings import Settings
from distill.text import TextEncoders


class LayoutHead(nn.Module):
    """Colour and shape logits of each patch from one block's image tokens: [batch, 64, width] to two [batch, classes, 8, 8]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(COLOURS) + 1, len(SHAPES) + 1]
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor) -> Sequence[Tensor]:
        return self.linear(self.norm(tokens)).transpose(1, 2).unflatten(-1, (8, 8)).split(self.sizes, 1)


class TeacherStep(nn.Module):
    """Velocity and layout logits in one forward."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.transformer = model.build(settings)
        self.layout = LayoutHead(64 * settings.heads)
        self.layout_block = settings.layout_block

    def forward(self, latents: Tensor, sigmas: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        seen: list[Tensor] = []
        block = self.transformer.transformer_blocks[self.layout_block]
        hook = block.register_forward_hook(lambda _, __, out: seen.append(out[1]))
        velocity = model.velocity(self.transformer, latents, sigmas, context, pooled)
        hook.remove()
        return velocity, [logits.float() for logits in self.layout(seen[0])]


def fit(run: Run, settings: Settings, data: Data, text: TextEncoders) -> SD3Transformer2DModel:
    """Trains the teacher, or goes on where it stopped. With `run.start` it begins at that checkpoint's transformer."""
    torch.manual_seed(run.seed + 2)
    device = run.accelerator.device
    step_module = TeacherStep(settings)
    if run.start is not None:
        begun = SD3Transformer2DModel.from_pretrained(run.start / "transformer", torch_dtype=torch.float32)
        step_module.transformer.load_state_dict(begun.state_dict())
    step_module.to(device)
    half = HalfCopy(step_module, run.accelerator)
    matrices, rest = split_parameters(
        step_module, adam=("pos_embed", "proj_out", "layout", "norm1", "norm_out", "time_text_embed")
    )
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": Muon(matrices, settings.teacher_rate, weight_decay=0.01),
        "adam": torch.optim.AdamW(rest, settings.teacher_rate, betas=(0.9, 0.95), weight_decay=0.0),
    }

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizers, linear(step, settings.teacher_steps, settings.teacher_rate))
        batch = data.sample(generator, settings.teacher_batch)
        context, pooled = embed(text, batch.captions, generator, dropout=0.1)
        sigmas = torch.sigmoid(settings.logit_mean + torch.randn(settings.teacher_batch, generator=generator)).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        clean, layout = batch.latents.to(device), batch.layout.to(device)
        mixed = torch.lerp(clean, noise, sigmas[:, None, None, None])
        with half.fresh() as forward:
            out, logits = forward(*half.cast(mixed), sigmas, *half.cast(context, pooled))
            flow = (out - (noise - clean)).pow(2).mean()
            told = torch.stack([nn.functional.cross_entropy(part, layout[:, i]) for i, part in enumerate(logits)]).sum()
            run.accelerator.backward(flow + settings.layout_weight * told)
        nn.utils.clip_grad_norm_(step_module.parameters(), 1.0)
        step_all(optimizers)
        return {"flow": flow.item(), "layout": told.item()}

    train(run, "teacher", {"step": step_module}, optimizers, step_fn, settings.teacher_steps)
    step_module.eval().requires_grad_(False)
    return step_module.transformer


@torch.no_grad()
def sample(
    transformer: nn.Module,
    noise: Tensor,
    sigmas: Sequence[float],
    condition: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor] | None = None,
    guidance: float = 1.0,
) -> list[Tensor]:
    """Euler along `sigmas` (steps + 1, ending in 0) from noise; all states, the first being the noise.

    With `guidance` w > 1: v = v_empty + w (v_condition - v_empty) (Ho & Salimans 2022).
    """
    states = [noise]
    for now, after in itertools.pairwise(sigmas):
        states.append(states[-1] + (after - now) * guided_velocity(transformer, states[-1], now, condition, empty, guidance))
    return states


def guided_velocity(
    transformer: nn.Module,
    latents: Tensor,
    sigma: float | Tensor,
    condition: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor] | None,
    guidance: float,
) -> Tensor:
    """The (guided) velocity in float32, computed in bfloat16."""
    dtype = next(transformer.parameters()).dtype
    levels = torch.as_tensor(sigma, device=latents.device, dtype=torch.float32).expand(len(latents))
    if guidance == 1.0 or empty is None:
        return model.velocity(transformer, latents.to(dtype), levels, *(c.to(dtype) for c in condition))
    both = [torch.cat([e.expand_as(c), c]).to(dtype) for e, c in zip(empty, condition, strict=True)]
    out = model.velocity(transformer, torch.cat([latents, latents]).to(dtype), torch.cat([levels, levels]), *both)
    without, with_caption = out.chunk(2)
    return without + guidance * (with_caption - without)


def schedule(steps: int, shift: float) -> list[float]:
    """Sigmas evenly spaced from 1 to 1 / steps, shifted by s -> a s / (1 + (a - 1) s) (Esser et al. 2024, eq. 23), then 0."""
    even = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in even] + [0.0]
