"""A multi-head latent discriminator: one small head on the image tokens of each of the proxy's blocks.

Heads see features of noisy latents, so real and drawn pictures are compared at the student's own noise levels. Each head is
re-initialised with probability 0.005 a step (arXiv 2509.21318), which keeps any one of them from winning for good.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from distill.model import velocity
from distill.student.steps import Condition

REFRESH = 0.005


class Heads(nn.Module):
    """Realness logits [batch, 64] of each block's image tokens."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 1)) for _ in range(blocks)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """[heads, batch, 64], float32."""
        return torch.stack([head(f.float()).squeeze(-1) for head, f in zip(self.heads, features, strict=True)])

    @torch.no_grad()
    def refresh(self, generator: torch.Generator) -> None:
        for head in self.heads:
            if torch.rand((), generator=generator) < REFRESH:
                for layer in head.children():
                    if isinstance(layer, nn.Linear | nn.LayerNorm):
                        layer.reset_parameters()


def features(proxy: SD3Transformer2DModel, state: Tensor, level: Tensor, condition: Condition) -> tuple[Tensor, list[Tensor]]:
    """The proxy's velocity at (state, level) and the image tokens [batch, 64, width] after each of its blocks."""
    seen: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _, __, out: seen.append(out[1])) for b in proxy.transformer_blocks]
    try:
        dtype = next(proxy.parameters()).dtype
        return velocity(proxy, state.to(dtype), level, *(c.to(dtype) for c in condition)), seen
    finally:
        for hook in hooks:
            hook.remove()
