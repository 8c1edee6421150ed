"""`text_encoder` and `text_encoder_2`: CLIP's text transformer with its projection (transformers' CLIPTextModelWithProjection).

Contract "flash": input_ids int32 [1, T] -> hidden_states [1, T, C], the last but one (what SD3 conditions on), and pooled
[1, P], the projection of the end-of-text token's last state.
Contract "diffusers": input_ids int64 [1, T] -> text_embeds [1, P], last_hidden_state (after the final norm) and
hidden_states.0 to hidden_states.N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.components.attention import Attend, split_heads
from export.components.component import Component
from export.components.config import require
from runtimes.graph import TensorSpec

MASKED = -1e4
"""Finite stand-in for minus infinity in the causal mask. exp(x) is 0 in float32 below -104 and in fp16 below -18, so the masked
terms vanish as long as a row's logits differ by less than 9,800 (CLIP's by tens); -inf would break fp16 and palettes."""

OLD_EOS_TOKEN_ID = 2
"""Checkpoints with this eos_token_id (a mistake of their time) pool at the highest id; so does transformers."""


def quick_gelu(states: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
    return states * torch.sigmoid(1.702 * states)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": nn.functional.gelu}


@dataclass(frozen=True)
class TextEncoderConfig:
    """transformers' CLIPTextConfig: its names, and its defaults, which its config.json may leave out."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def check(self, where: str) -> None:
        """Raises `UserError` for a text encoder that this file does not build."""
        require(self.hidden_act in ACTIVATIONS, where, "hidden_act", self.hidden_act, " and ".join(ACTIVATIONS))
        fits = self.hidden_size % self.num_attention_heads == 0
        require(fits, where, "hidden_size", self.hidden_size, f"multiples of num_attention_heads {self.num_attention_heads}")
        require(self.num_hidden_layers >= 2, where, "num_hidden_layers", self.num_hidden_layers, "2 layers or more")


class TextEncoder(nn.Module):
    """CLIP text transformer, weights named as in CLIPTextModelWithProjection; forward as in contract "flash"."""

    def __init__(self, config: TextEncoderConfig, tokens: int) -> None:
        super().__init__()
        self.text_model = _TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.eos_token_id = config.eos_token_id
        self.causal_mask: Tensor
        self.earlier: Tensor
        mask = torch.full((tokens, tokens), MASKED, device="cpu").triu(diagonal=1)
        self.register_buffer("causal_mask", mask, persistent=False)
        # [T, T]: ones above the diagonal, so that flags @ earlier counts the flags before each position.
        self.register_buffer("earlier", torch.ones(tokens, tokens, device="cpu").triu(diagonal=1), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        states = self.hidden_states(input_ids)
        return states[-2], self.pool(input_ids, self.text_model.final_layer_norm(states[-1]))

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """The embeddings and the output of every layer, each [1, T, C]."""
        states = [self.text_model.embeddings(input_ids)]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1], self.causal_mask))
        return states

    def pool(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """The projected state of the first end-of-text token: [1, P].

        That token is picked by a product with a one-hot row rather than by argmax and gather: backends differ in which of
        equal values argmax gives, and padding repeats the token.
        """
        if self.eos_token_id == OLD_EOS_TOKEN_ID:
            flags = (input_ids == input_ids.amax(dim=-1, keepdim=True)).to(states.dtype)
        else:
            flags = (input_ids == self.eos_token_id).to(states.dtype)
        # Both bounds: for a missing one coremltools writes float32's lowest number, which float16 rounds to -inf.
        first = flags * (1.0 - torch.clamp(torch.matmul(flags, self.earlier), 0.0, 1.0))  # [1, T], one 1
        return self.text_projection(torch.matmul(first, states[0]))


class TextEncoderAllStates(TextEncoder):
    """The same with the outputs of contract "diffusers"."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        states = self.hidden_states(input_ids)
        last = self.text_model.final_layer_norm(states[-1])
        return self.pool(input_ids, last), last, *states


class _TextModel(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class _Encoder(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])


class _Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight.narrow(0, 0, input_ids.shape[-1])


class _Layer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = states + self.self_attn(self.layer_norm1(states), mask)
        return states + self.mlp(self.layer_norm2(states))


class _SelfAttention(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.attend = Attend()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        query = split_heads(self.q_proj(states), self.heads)
        key = split_heads(self.k_proj(states), self.heads)
        value = split_heads(self.v_proj(states), self.heads)
        return self.out_proj(self.attend(query, key, value, mask))


class _Mlp(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states)))


# Old files carry the positions 0, 1, 2, ... as a tensor.
_IGNORED = ("text_model.embeddings.position_ids",)


def text_encoder(name: str, config: TextEncoderConfig, tokens: int) -> Component:
    """The component `name` (text_encoder or text_encoder_2) in contract "flash"."""
    return Component(
        name=name,
        folder=name,
        inputs=(TensorSpec("input_ids", "int32", (1, tokens)),),
        outputs=(
            TensorSpec("hidden_states", "float32", (1, tokens, config.hidden_size)),
            TensorSpec("pooled", "float32", (1, config.projection_dim)),
        ),
        make=lambda: TextEncoder(config, tokens),
        ignored=_IGNORED,
    )


def text_encoder_all_states(name: str, config: TextEncoderConfig, tokens: int) -> Component:
    """The component `name` in contract "diffusers"."""
    shape = (1, tokens, config.hidden_size)
    states = tuple(TensorSpec(f"hidden_states.{i}", "float32", shape) for i in range(config.num_hidden_layers + 1))
    return Component(
        name=name,
        folder=name,
        inputs=(TensorSpec("input_ids", "int64", (1, tokens)),),
        outputs=(
            TensorSpec("text_embeds", "float32", (1, config.projection_dim)),
            TensorSpec("last_hidden_state", "float32", shape),
            *states,
        ),
        make=lambda: TextEncoderAllStates(config, tokens),
        ignored=_IGNORED,
    )
