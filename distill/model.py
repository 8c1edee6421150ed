"""The transformer of teacher, student and proxy: diffusers' `SD3Transformer2DModel` with what makes it an SD3.5-Medium.

With T5 absent diffusers appends 256 zero tokens to the context. They carry no positions, so they stay equal through
every block; training keeps one of them and adds log(256) to its attention logit, which is the same function.
"""

from __future__ import annotations

import math

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from distill.settings import Settings

NULL_TOKENS = 256


class FoldedAttention:
    """diffusers' joint attention where the last context token stands for `NULL_TOKENS` equal ones."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens = hidden_states.shape[1]

        def heads(values: Tensor, norm: nn.Module | None) -> Tensor:
            values = values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [batch, heads, tokens, head width]
            return values if norm is None else norm(values)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states), None)
        bias = None
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], 2)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], 2)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states), None)], 2)
            bias = torch.zeros(key.shape[2], device=key.device, dtype=query.dtype)
            bias[-1] = math.log(NULL_TOKENS)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        out = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        image = attn.to_out[0](out[:, :tokens])
        if encoder_hidden_states is None:
            return image
        text = out[:, tokens:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def build(settings: Settings) -> SD3Transformer2DModel:
    """A fresh transformer: latents [batch, 16, 16, 16] to velocities of the same shape."""
    width = 64 * settings.heads
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=settings.layers,
        attention_head_dim=64,
        num_attention_heads=settings.heads,
        joint_attention_dim=settings.joint_dim,
        caption_projection_dim=width,
        pooled_projection_dim=sum(settings.text_widths),
        pos_embed_max_size=24,
        dual_attention_layers=tuple(range(settings.dual_layers)),
        qk_norm="rms_norm",
    )
    transformer.set_attn_processor(FoldedAttention())
    # As DiT does (Peebles & Xie 2022, section 3.2): every block starts as the identity, the output as zero.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm1" in name or name.startswith("norm_out") or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def velocity(transformer: nn.Module, latents: Tensor, sigmas: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """d latent / d sigma at `sigmas` [batch], float32 of the latents' shape; context as `TextEncoders.embed` gives it."""
    (out,) = transformer(
        hidden_states=latents,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=1000 * sigmas,
        return_dict=False,
    )
    return out.float()


def unfold(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The same weights with diffusers' own attention, for the 256 separate null tokens of its pipeline."""
    transformer.set_attn_processor(JointAttnProcessor2_0())
    return transformer
