"""`transformer` without the conditioner hoist: modulation and blocks in one graph, with diffusers' own inputs.

latent [1, C, h, w], encoder_hidden_states [1, T + n, joint_attention_dim] (the prompt embedding, with n zero tokens behind),
pooled_projections [1, P1 + P2], timestep [1] = 1000 * sigma -> velocity [1, C, h, w]. Contract "diffusers" calls latent
`hidden_states` and velocity `out_hidden_states`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from export.components.component import Component, Source
from export.components.conditioner import Modulation
from export.components.mmdit import TimestepAngles, TransformerConfig
from export.components.transformer import Layout, Transformer, position_source, unread
from runtimes.graph import TensorSpec


class WholeTransformer(nn.Module):
    """Modulation, then all blocks; the weights of each keep their upstream names behind `conditioner.` and `transformer.`."""

    def __init__(self, config: TransformerConfig, layout: Layout) -> None:
        super().__init__()
        self.angles = TimestepAngles()
        self.conditioner = Modulation(config, config.joint_attention_dim)
        self.transformer = Transformer(config, layout, 0, config.num_layers)

    def forward(
        self, latent: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> tuple[Tensor, ...]:
        context, modulation = self.conditioner.embed(encoder_hidden_states, pooled_projections, self.angles(timestep))
        return self.transformer(latent, context, modulation)


def whole_transformer(config: TransformerConfig, layout: Layout, input_name: str, output_name: str) -> Component:
    """The component; `input_name` and `output_name` are what this contract calls the latent and the velocity."""
    latent = (1, config.in_channels, layout.height, layout.width)

    def make() -> nn.Module:
        return WholeTransformer(config, layout)

    return Component(
        name="transformer",
        folder="transformer",
        inputs=(
            TensorSpec(input_name, "float32", latent),
            TensorSpec("encoder_hidden_states", "float32", (1, layout.context, config.joint_attention_dim)),
            TensorSpec("pooled_projections", "float32", (1, config.pooled_projection_dim)),
            TensorSpec("timestep", "float32", (1,)),
        ),
        outputs=(TensorSpec(output_name, "float32", latent),),
        make=make,
        sources=_sources(make, config, layout),
        ignored=unread(config),
    )


def _sources(make: Callable[[], nn.Module], config: TransformerConfig, layout: Layout) -> dict[str, Source]:
    """Every weight from the upstream name behind the first dot."""
    cropped = position_source(config, layout) if layout.crop_positions else {}
    with torch.device("meta"):
        weights = make().state_dict()
    upstream = {name: name.split(".", 1)[1] for name in weights}
    return {name: cropped.get(upstream[name], Source(upstream[name], tuple(value.shape))) for name, value in weights.items()}
