"""`conditioner`: everything the transformer needs that depends on the prompt and the sigmas alone, once a prompt.

hidden_states [1, T, C1], hidden_states_2 [1, T, C2], pooled [1, P1], pooled_2 [1, P2]
    -> encoder_hidden_states [1, T + n, W] with n = 1 null token (256 without the fold), and modulation [S, M, W] (mmdit.py).
Joined as diffusers does: states on channels, then zeros up to joint_attention_dim; pooled on channels; null tokens behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.components.component import Component, Source
from export.components.mmdit import ModulationLinear, TimestepAngles, TransformerConfig
from export.components.text_encoder import TextEncoderConfig
from runtimes.graph import TensorSpec

TRAIN_TIMESTEPS = 1000
"""Timestep of sigma 1, in every SD3 scheduler."""


class Modulation(nn.Module):
    """Prompt embedding, pooled embedding and timestep angles to the transformer's context and modulation.

    Weights named as in SD3Transformer2DModel. `context_width` is the width of the prompt embedding: joint_attention_dim, or
    its first columns where the others would meet zeros only.
    """

    def __init__(self, config: TransformerConfig, context_width: int) -> None:
        super().__init__()
        self.context_embedder = nn.Linear(context_width, config.width)
        self.time_text_embed = _TimeTextEmbed(config)
        self.transformer_blocks = nn.ModuleList([_BlockModulation(config, layer) for layer in range(config.num_layers)])
        self.norm_out = ModulationLinear(config.width, 2)

    def embed(self, prompt: Tensor, pooled: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """prompt [1, tokens, context_width], pooled [1, P], angles [S, 256] -> context [1, tokens, W], modulation [S, M, W]."""
        embedding = F.silu(self.time_text_embed(angles, pooled))
        rows = [block(embedding) for block in self.transformer_blocks]
        return self.context_embedder(prompt), torch.cat([*rows, self.norm_out(embedding)], dim=1)


class Conditioner(Modulation):
    """The component: from the text encoders' outputs, for the fixed timesteps 1000 * sigma of the steps."""

    def __init__(self, config: TransformerConfig, context_width: int, null_tokens: int, sigmas: Sequence[float]) -> None:
        super().__init__(config, context_width)
        self.null_tokens = null_tokens
        timesteps = torch.tensor(sigmas[:-1], dtype=torch.float32, device="cpu") * TRAIN_TIMESTEPS
        self.angles: Tensor
        self.register_buffer("angles", TimestepAngles()(timesteps), persistent=False)

    def forward(self, hidden_states: Tensor, hidden_states_2: Tensor, pooled: Tensor, pooled_2: Tensor) -> tuple[Tensor, ...]:
        prompt = torch.cat([hidden_states, hidden_states_2], dim=-1)
        prompt = F.pad(prompt, (0, 0, 0, self.null_tokens))
        return self.embed(prompt, torch.cat([pooled, pooled_2], dim=-1), self.angles)


class _TimeTextEmbed(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.timestep_embedder = _Mlp(TimestepAngles.WIDTH, config.width)
        self.text_embedder = _Mlp(config.pooled_projection_dim, config.width)

    def forward(self, angles: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(angles) + self.text_embedder(pooled)


class _Mlp(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width_out)
        self.linear_2 = nn.Linear(width_out, width_out)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(states)))


class _BlockModulation(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = ModulationLinear(config.width, config.image_rows(layer))
        self.norm1_context = ModulationLinear(config.width, config.context_rows(layer))

    def forward(self, embedding: Tensor) -> Tensor:
        return torch.cat([self.norm1(embedding), self.norm1_context(embedding)], dim=1)


def conditioner(
    config: TransformerConfig,
    encoders: tuple[TextEncoderConfig, TextEncoderConfig],
    tokens: int,
    null_tokens: int,
    sigmas: tuple[float, ...],
) -> Component:
    """The component for one list of sigmas (the last of which, 0, is no step)."""
    first, second = encoders
    context_width = first.hidden_size + second.hidden_size
    columns = Source(
        "context_embedder.weight", (config.width, config.joint_attention_dim), lambda weight: weight[:, :context_width]
    )
    rows = config.modulation_rows(0, config.num_layers)
    return Component(
        name="conditioner",
        folder="transformer",
        inputs=(
            TensorSpec("hidden_states", "float32", (1, tokens, first.hidden_size)),
            TensorSpec("hidden_states_2", "float32", (1, tokens, second.hidden_size)),
            TensorSpec("pooled", "float32", (1, first.projection_dim)),
            TensorSpec("pooled_2", "float32", (1, second.projection_dim)),
        ),
        outputs=(
            TensorSpec("encoder_hidden_states", "float32", (1, tokens + null_tokens, config.width)),
            TensorSpec("modulation", "float32", (len(sigmas) - 1, rows.stop, config.width)),
        ),
        make=lambda: Conditioner(config, context_width, null_tokens, sigmas),
        sources={"context_embedder.weight": columns},
    )
