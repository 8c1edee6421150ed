"""Layers of SD3.5-Medium's true width with random weights: unmodified diffusers' transformer, and ours made of its weights.

Width 1536 (24 heads of 64), dual attention, rms_norm on queries and keys, patch 2, 16 latent channels, a table of 384 x 384
positions; 512 px is a latent of 64 x 64. diffusers is given the 77 tokens of a prompt and the 256 null tokens behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.components.component import Component
from export.components.mmdit import TransformerConfig
from export.components.text_encoder import TextEncoderConfig
from export.components.vae_decoder import VaeConfig
from export.compression.rounding import round_weights
from export.compression.schemes import SMALL, FloatScheme, IntegerScheme, Scheme, WeightInfo, weight_infos
from export.compression.stored import StoredWeight
from export.families.family import GraphOptions
from export.families.sd3 import Sd3
from export.formats.format import EmitOptions, Format
from export.recording import run
from export.rewrites import NULL_TOKENS, Rewrites
from runtimes.quiet import quiet

with quiet():  # it looks for optional quantization libraries
    from diffusers import SD3Transformer2DModel

TOKENS, CONTEXT, POOLED, SIDE, SIGMA = 77, 4096, 2048, 512, 0.75
LAYERS, DUAL = 24, tuple(range(13))  # of the whole model
MEASURED = 4  # layers that are run, all dual
SEED = 0


def family(layers: int, dual: tuple[int, ...]) -> Sd3:
    """SD3.5-Medium with fewer layers, where so asked."""
    transformer = TransformerConfig(
        num_layers=layers,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=1536,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=384,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    clips = (TextEncoderConfig(hidden_size=768, projection_dim=768), TextEncoderConfig(hidden_size=1280, projection_dim=1280))
    return Sd3(transformer, *clips, VaeConfig((128, 256, 512, 512), 16, 1.5305, 0.0609, use_post_quant_conv=False), TOKENS)


def denoising(model: Sd3, rewrites: Rewrites) -> dict[str, Component]:
    """The conditioner, where there is one, and the transformer."""
    components = model.components(GraphOptions(SIDE, SIDE, (SIGMA, 0.0), rewrites=rewrites))
    return {component.name: component for component in components if component.folder == "transformer"}


def original() -> nn.Module:
    """diffusers' own class, `MEASURED` layers; the same weights in every process."""
    torch.manual_seed(SEED)
    model = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=MEASURED,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=1536,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(MEASURED)),
        qk_norm="rms_norm",
    )
    made: nn.Module = model.eval().requires_grad_(False)
    return made


@dataclass(frozen=True)
class OwnWeights:
    """A module as the checkpoint that components load from."""

    tensors: Mapping[str, Tensor]

    def tensor(self, folder: str, name: str) -> Tensor:
        return self.tensors[name]

    def check(self, folder: str, expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Every tensor was made for these components."""


@dataclass(frozen=True)
class Prompt:
    """What a prompt and a latent are: the encoders' states [1, 77, 768 + 1280], pooled [1, 2048], latent [1, 16, 64, 64]."""

    states: Tensor
    pooled: Tensor
    latent: Tensor

    @classmethod
    def random(cls) -> Prompt:
        generator = torch.Generator().manual_seed(SEED)
        shapes = ((1, TOKENS, 2048), (1, POOLED), (1, 16, SIDE // 8, SIDE // 8))
        return cls(*(torch.randn(shape, generator=generator) for shape in shapes))

    def of_diffusers(self) -> dict[str, Tensor]:
        """Arguments of SD3Transformer2DModel, as StableDiffusion3Pipeline makes them without T5."""
        context = nn.functional.pad(self.states, (0, CONTEXT - self.states.shape[2], 0, NULL_TOKENS))
        return {
            "hidden_states": self.latent,
            "encoder_hidden_states": context,
            "pooled_projections": self.pooled,
            "timestep": torch.tensor([1000 * SIGMA]),
        }

    def of_ours(self, components: Mapping[str, Component], weights: OwnWeights) -> dict[str, np.ndarray]:
        """Inputs of our transformer, the conditioner's outputs among them."""
        if "conditioner" not in components:
            context = self.of_diffusers()["encoder_hidden_states"]
            tokens = next(s for s in components["transformer"].inputs if s.name == "encoder_hidden_states").shape[1]
            given = self.of_diffusers() | {"encoder_hidden_states": context[:, :tokens], "latent": self.latent}
            return {spec.name: given[spec.name].numpy() for spec in components["transformer"].inputs}
        names = ("hidden_states", "hidden_states_2", "pooled", "pooled_2")
        parts = (*self.states.split((768, 1280), dim=2), *self.pooled.split((768, 1280), dim=1))
        asked = {name: part.numpy() for name, part in zip(names, parts, strict=True)}
        made = run([(components["conditioner"], components["conditioner"].load(weights))], asked)
        return {"latent": self.latent.numpy(), **made}


def scheme(info: WeightInfo, format: str, block: int) -> Scheme:
    """8 bits for every linear, in blocks where the format has them; the rest as the format stores floats."""
    if info.kind == "linear" and info.count >= SMALL:
        return IntegerScheme(8, block if format == "onnx" else None)
    return FloatScheme(16 if format == "onnx" and info.count >= SMALL else 32)


def emit(format: Format, component: Component, weights: OwnWeights, folder: Path, block: int = 256) -> Path:
    """The component's artifact in 8 bits."""
    module = component.load(weights)
    recipe = {info.name: scheme(info, format.name, block) for info in weight_infos(component.blank())}
    stored: dict[str, StoredWeight] = round_weights(dict(module.named_parameters()), recipe)
    folder.mkdir(parents=True)
    (artifact,) = format.emit(component, module, stored, folder, EmitOptions())
    return artifact.path
