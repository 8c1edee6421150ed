"""Small real components with seeded weights, wide enough that every kind of scheme has something to store."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.choosing import weigh
from export.components.component import Component
from export.components.conditioner import conditioner as make_conditioner
from export.components.mmdit import TransformerConfig
from export.components.text_encoder import TextEncoderConfig, text_encoder, text_encoder_all_states
from export.components.transformer import Layout, transformer
from export.components.vae_decoder import VaeConfig, vae_decoder
from export.compression import schemes
from export.compression.allocation import allocate
from export.compression.rounding import round_weights
from export.compression.stored import StoredWeight

EOS = 299
TEXT = TextEncoderConfig(vocab_size=300, hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=12, eos_token_id=EOS)
VAE = VaeConfig(block_out_channels=(32, 32), latent_channels=4, scaling_factor=1.5, shift_factor=0.1, norm_num_groups=8,
                use_post_quant_conv=False)


TRANSFORMER = TransformerConfig(num_layers=2, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=160,
                                caption_projection_dim=64, pooled_projection_dim=128, pos_embed_max_size=16, in_channels=4,
                                out_channels=4, dual_attention_layers=(0,), qk_norm="rms_norm")


def denoiser() -> Component:
    (component,) = transformer(TRANSFORMER, Layout(height=4, width=6, context=13, copies=256), chunks=1)
    return component


def conditioner() -> Component:
    return make_conditioner(TRANSFORMER, (TEXT, TEXT), 12, 1, (1.0, 0.75, 0.0))


def encoder() -> Component:
    return text_encoder("text_encoder", TEXT, 12)


def encoder_with_all_states() -> Component:
    return text_encoder_all_states("text_encoder", TEXT, 12)


def decoder() -> Component:
    return vae_decoder(VAE, 4, 6)


def seeded(component: Component) -> nn.Module:
    """The component's module with random weights whose every part matters to the output."""
    torch.manual_seed(0)
    module = component.make().eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "embedding" in name:
            parameter.normal_()
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for name, buffer in module.named_buffers():
        if name.endswith("pos_embed"):
            buffer.normal_()
    return module


def stored_by_plan(component: Component, module: nn.Module, backend: str, bits: int) -> dict[str, StoredWeight]:
    return stored_by(schemes.plan(schemes.weight_infos(component.blank()), backend, bits), module, backend)


def stored_by(plan: schemes.Plan, module: nn.Module, backend: str) -> dict[str, StoredWeight]:
    """A plan carried out within its mean bits."""
    weighed = weigh("component", dict(module.named_parameters()), plan, None)
    chosen = allocate(weighed, plan.expected_bytes() - plan.settled_bytes) if weighed else {}
    recipe = {**plan.settled, **{name: candidate.scheme for (_, name), candidate in chosen.items()}}
    return round_weights(dict(module.named_parameters()), recipe)


def real_inputs(component: Component) -> dict[str, NDArray]:
    """Token ids with an end and padding, or a normal latent."""
    generator = np.random.default_rng(1)
    feeds = {}
    for spec in component.inputs:
        if spec.dtype.startswith("int"):
            ids = generator.integers(0, EOS, spec.shape)
            ids[:, 7:] = EOS
            feeds[spec.name] = ids.astype(spec.dtype)
        else:
            feeds[spec.name] = generator.standard_normal(spec.shape).astype(spec.dtype)
    return feeds


def run(component: Component, module: nn.Module, inputs: dict[str, NDArray]) -> dict[str, NDArray]:
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(inputs[spec.name]) for spec in component.inputs))
    return {spec.name: output.numpy() for spec, output in zip(component.outputs, outputs, strict=True)}


def psnr(reference: NDArray, other: NDArray) -> float:
    """dB in float64, the range being that of the reference."""
    difference = reference.astype(np.float64) - other.astype(np.float64)
    return float(10 * np.log10(np.ptp(reference.astype(np.float64)) ** 2 / max(np.mean(difference**2), 1e-300)))


def worst_psnr(reference: dict[str, NDArray], other: dict[str, NDArray]) -> float:
    assert list(reference) == list(other)
    return min(psnr(reference[name], other[name]) for name in reference)
