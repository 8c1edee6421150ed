"""What `conditioner` and `transformer` both know of SD3's transformer: its configuration and the layout of `modulation`.

modulation [S, M, W] holds, for each of S steps, every vector that adaptive layer norm takes from the prompt and the timestep,
in the order of use: block by block the image stream's (shift, scale, gate of attention; the same of the feed-forward; in dual
attention blocks the same of attn2), then the context stream's (the same six; in the last block scale, shift), and in the end
norm_out's scale and shift. It is the order in which diffusers' own linears emit them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.components.config import require


@dataclass(frozen=True)
class TransformerConfig:
    """diffusers' SD3Transformer2DModel: its names, and its defaults, which old config.json files leave out."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    pos_embed_max_size: int
    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def check(self, where: str) -> None:
        """Raises `UserError` for a transformer that these files do not build."""
        require(self.qk_norm in (None, "rms_norm"), where, "qk_norm", self.qk_norm, "rms_norm and null")
        same = self.caption_projection_dim == self.width
        require(same, where, "caption_projection_dim", self.caption_projection_dim, f"heads x head size = {self.width}")
        equal = self.out_channels == self.in_channels
        require(equal, where, "out_channels", self.out_channels, f"as many as in_channels, {self.in_channels}")
        inside = all(0 <= layer < self.num_layers for layer in self.dual_attention_layers)
        require(inside, where, "dual_attention_layers", self.dual_attention_layers, f"layers below {self.num_layers}")

    def is_last(self, layer: int) -> bool:
        """The last block drops its context: diffusers' context_pre_only."""
        return layer == self.num_layers - 1

    def is_dual(self, layer: int) -> bool:
        return layer in self.dual_attention_layers

    def image_rows(self, layer: int) -> int:
        """Modulation vectors of a block's image stream."""
        return 9 if self.is_dual(layer) else 6

    def context_rows(self, layer: int) -> int:
        """Modulation vectors of a block's context stream."""
        return 2 if self.is_last(layer) else 6

    def modulation_rows(self, first: int, last: int) -> slice:
        """Rows of `modulation` that blocks first to last - 1 use; norm_out's two belong to the last block's."""
        counts = [self.image_rows(layer) + self.context_rows(layer) for layer in range(self.num_layers)]
        counts[-1] += 2
        return slice(sum(counts[:first]), sum(counts[:last]))


class ModulationLinear(nn.Module):
    """The linear of an adaptive layer norm, [S, W] -> [S, rows, W]. Named `linear`, as in diffusers."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.linear = nn.Linear(width, rows * width)

    def forward(self, embedding: Tensor) -> Tensor:
        steps, width = embedding.shape
        return self.linear(embedding).reshape(steps, self.rows, width)


class TimestepAngles(nn.Module):
    """Sinusoidal embedding of timesteps [S] -> [S, 256], cosines first (Vaswani et al. 2017, 3.5; base 10,000).

    Needs float32: fp16 is off by up to a quarter of a radian at timestep 1000.
    """

    WIDTH = 256

    def __init__(self) -> None:
        super().__init__()
        half = self.WIDTH // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(exponents), persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] * self.frequencies[None, :]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
