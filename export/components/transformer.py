"""`transformer`: SD3's MMDiT (Esser et al. 2024; with SD3.5's dual attention) for one denoising step.

latent [1, C, h, w], encoder_hidden_states [1, T + n, W], modulation [1, M, W] (one step's row of what the conditioner gives)
    -> velocity [1, C, h, w], with n = 1 null token, or 256 without `fold_null_tokens`.

In chunks, the first takes `latent`, the others the `hidden_states` [1, h w / 4, W] and `encoder_hidden_states` of the chunk
before (there named `..._out`, for no graph may name an output as an input); each takes its own rows of `modulation`, in
order, as many as the second axis of that input says; the last gives `velocity`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from export.components.activation import TanhGelu
from export.components.attention import Attend, split_heads
from export.components.component import Component, Source
from export.components.mmdit import TransformerConfig
from runtimes.graph import TensorSpec

EPSILON = 1e-6  # of every norm in SD3's transformer


@dataclass(frozen=True)
class Layout:
    """The fixed shapes of a transformer graph, and what its context holds."""

    height: int  # of the latent
    width: int
    context: int  # context tokens, null tokens included
    copies: int  # null tokens that the last context token stands for; 1 where nothing is folded
    crop_positions: bool = True

    def image_tokens(self, patch: int) -> int:
        return (self.height // patch) * (self.width // patch)


class Transformer(nn.Module):
    """Blocks first to last - 1; weights named as in SD3Transformer2DModel."""

    def __init__(self, config: TransformerConfig, layout: Layout, first: int, last: int) -> None:
        super().__init__()
        patch_embed = PatchEmbed if layout.crop_positions else PatchEmbedWholeTable
        self.pos_embed = patch_embed(config, layout) if first == 0 else nn.Identity()
        # A dictionary keeps the blocks' own numbers in the weight names of every chunk.
        self.transformer_blocks = nn.ModuleDict({str(layer): _Block(config, layer) for layer in range(first, last)})
        self.rows = [config.image_rows(layer) + config.context_rows(layer) for layer in range(first, last)]
        self.finish = last == config.num_layers
        if self.finish:
            self.norm = AdaptiveNorm(config.width)
            self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.grid = (layout.height // config.patch_size, layout.width // config.patch_size)
        self.patch = config.patch_size
        self.register_buffer("null_bias", null_bias(layout, config.patch_size), persistent=False)

    def forward(self, latent: Tensor, encoder_hidden_states: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        image, context = self.pos_embed(latent), encoder_hidden_states
        used = 0
        for block, rows in zip(self.transformer_blocks.values(), self.rows, strict=True):
            # narrow, for indexing with a slice of everything becomes an `alias`, which coremltools does not know.
            image, context = block(image, context, modulation.narrow(1, used, rows), self.null_bias)
            used += rows
        if not self.finish:
            return image, context
        scale, shift = modulation[:, -2:-1], modulation[:, -1:]
        (normed,) = self.norm(image, (shift, scale))
        return (self.unpatch(self.proj_out(normed)),)

    def unpatch(self, patches: Tensor) -> Tensor:
        """[1, rows * columns, p * p * C] -> [1, C, rows * p, columns * p], with no tensor of more than four axes."""
        (rows, columns), p = self.grid, self.patch
        lines = patches.reshape(rows, columns, p, -1).transpose(1, 2)  # [rows, p, columns, p * C]
        return lines.reshape(1, rows * p, columns * p, -1).permute(0, 3, 1, 2)


def null_bias(layout: Layout, patch: int) -> Tensor | None:
    """What `fold_null_tokens` adds to the attention logits: log(copies) for the last key, [1, 1, 1, keys], or None."""
    if layout.copies == 1:
        return None
    bias = torch.zeros(1, 1, 1, layout.image_tokens(patch) + layout.context, device="cpu")
    bias[..., -1] = math.log(layout.copies)
    return bias


class AdaptiveNorm(nn.Module):
    """Layer norm of [1, tokens, W] with an affine part from outside: norm(x) (1 + scale) + shift for each (shift, scale), both
    [1, 1, W]. The norm itself is computed once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)

    def forward(self, states: Tensor, *affine: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        normed = self.norm(states)
        return tuple(normed * (1 + scale) + shift for shift, scale in affine)


def vectors(rows: Tensor) -> list[Tensor]:
    """[1, k, W] -> k tensors [1, 1, W]."""
    return [rows[:, i : i + 1] for i in range(rows.shape[1])]


class PatchEmbed(nn.Module):
    """Latent patches to tokens with their positions: [1, C, h, w] -> [1, tokens, W]. Holds the crop of the table."""

    def __init__(self, config: TransformerConfig, layout: Layout) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", torch.empty(1, self.stored(config, layout), config.width))

    def stored(self, config: TransformerConfig, layout: Layout) -> int:
        return layout.image_tokens(config.patch_size)

    def positions(self) -> Tensor:
        return self.pos_embed

    def forward(self, latent: Tensor) -> Tensor:
        return self.proj(latent).flatten(2).transpose(1, 2) + self.positions()


class PatchEmbedWholeTable(PatchEmbed):
    """The same with the whole table in the graph, cropped there."""

    def __init__(self, config: TransformerConfig, layout: Layout) -> None:
        super().__init__(config, layout)
        self.config, self.layout = config, layout

    def stored(self, config: TransformerConfig, layout: Layout) -> int:
        return config.pos_embed_max_size**2

    def positions(self) -> Tensor:
        return crop_positions(self.pos_embed, self.config, self.layout)


def crop_positions(table: Tensor, config: TransformerConfig, layout: Layout) -> Tensor:
    """The middle of the square table [1, side * side, W] that covers the grid: [1, tokens, W], as diffusers crops it."""
    side = config.pos_embed_max_size
    rows, columns = layout.height // config.patch_size, layout.width // config.patch_size
    top, left = (side - rows) // 2, (side - columns) // 2
    square = table.reshape(side, side, config.width)
    return square.narrow(0, top, rows).narrow(1, left, columns).reshape(1, rows * columns, config.width)


class _Block(nn.Module):
    """One MMDiT block. The last one gives no context back; see rewrites.py for its unread queries."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.image_rows = config.image_rows(layer)
        self.dual = config.is_dual(layer)
        self.last = config.is_last(layer)
        self.norm = AdaptiveNorm(config.width)
        self.attn = _LastJointAttention(config) if self.last else _JointAttention(config)
        self.ff = _FeedForward(config.width)
        if self.dual:
            self.attn2 = _SelfAttention(config)
        if not self.last:
            self.ff_context = _FeedForward(config.width)

    def forward(self, image: Tensor, context: Tensor, rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = vectors(rows[:, : self.image_rows])
        context_rows = vectors(rows[:, self.image_rows :])
        normed, *for_attn2 = self.norm(image, (shift, scale), *([(second[0], second[1])] if self.dual else []))
        # The last block's two rows stand the other way round: scale, shift (diffusers' AdaLayerNormContinuous).
        context_shift, context_scale = context_rows[1::-1] if self.last else context_rows[:2]
        (seen,) = self.norm(context, (context_shift, context_scale))
        from_image, from_context = self.attn(normed, seen, bias)
        image = image + gate * from_image
        if self.dual:
            image = image + second[2] * self.attn2(*for_attn2)
        (normed,) = self.norm(image, (shift_ff, scale_ff))
        image = image + gate_ff * self.ff(normed)
        if self.last:
            return image, context
        _, _, gate, shift_ff, scale_ff, gate_ff = context_rows
        context = context + gate * from_context
        (seen,) = self.norm(context, (shift_ff, scale_ff))
        context = context + gate_ff * self.ff_context(seen)
        return image, context


class _ImageProjections(nn.Module):
    """What self-attention and joint attention share: the image tokens' projections."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = _head_norm(config)
        self.norm_k = _head_norm(config)
        self.attend = Attend()

    def project(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [1, tokens, heads, d]."""
        query = self.norm_q(split_heads(self.to_q(image), self.heads))
        key = self.norm_k(split_heads(self.to_k(image), self.heads))
        return query, key, split_heads(self.to_v(image), self.heads)


class _SelfAttention(_ImageProjections):
    """Image tokens attend to image tokens: the second attention of dual blocks."""

    def forward(self, image: Tensor) -> Tensor:
        return self.to_out[0](self.attend(*self.project(image)))


class _LastJointAttention(_ImageProjections):
    """Image tokens attend to image and context tokens; nothing comes back for the context."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.add_k_proj = nn.Linear(config.width, config.width)
        self.add_v_proj = nn.Linear(config.width, config.width)
        self.norm_added_k = _head_norm(config)

    def project_joint(self, image: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the image; keys and values of image and context, in diffusers' order."""
        query, key, value = self.project(image)
        context_key = self.norm_added_k(split_heads(self.add_k_proj(context), self.heads))
        context_value = split_heads(self.add_v_proj(context), self.heads)
        return query, torch.cat([key, context_key], dim=1), torch.cat([value, context_value], dim=1)

    def forward(self, image: Tensor, context: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        states = self.attend(*self.project_joint(image, context), bias)
        return self.to_out[0](states), None


class _JointAttention(_LastJointAttention):
    """Image and context tokens attend to both."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.add_q_proj = nn.Linear(config.width, config.width)
        self.norm_added_q = _head_norm(config)
        self.to_add_out = nn.Linear(config.width, config.width)

    def forward(self, image: Tensor, context: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.project_joint(image, context)
        context_query = self.norm_added_q(split_heads(self.add_q_proj(context), self.heads))
        states = self.attend(torch.cat([query, context_query], dim=1), key, value, bias)
        tokens = image.shape[1]
        return self.to_out[0](states[:, :tokens]), self.to_add_out(states[:, tokens:])


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, states: Tensor) -> Tensor:
        mean = (states * states).mean(dim=-1, keepdim=True)
        return states * torch.rsqrt(mean + EPSILON) * self.weight


def _head_norm(config: TransformerConfig) -> nn.Module:
    return nn.Identity() if config.qk_norm is None else RmsNorm(config.attention_head_dim)


class _FeedForward(nn.Module):
    """Linear, GELU in its tanh form, linear; inner width 4 W. Named net.0.proj and net.2, as in diffusers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": _LinearGelu(width, 4 * width), "2": nn.Linear(4 * width, width)})

    def forward(self, states: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](states))


class _LinearGelu(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, width_out)
        self.activation = TanhGelu()

    def forward(self, states: Tensor) -> Tensor:
        return self.activation(self.proj(states))


def transformer(config: TransformerConfig, layout: Layout, chunks: int) -> tuple[Component, ...]:
    """The hoisted transformer as one component, or as `chunks` of about equal weight."""
    ranges = chunk_ranges(config, chunks)
    if chunks == 1:
        return (_chunk("transformer", config, layout, *ranges[0]),)
    return tuple(
        _chunk(f"transformer_chunk{i}of{chunks}", config, layout, first, last) for i, (first, last) in enumerate(ranges, 1)
    )


def _chunk(name: str, config: TransformerConfig, layout: Layout, first: int, last: int) -> Component:
    states = (1, layout.image_tokens(config.patch_size), config.width)
    context = (1, layout.context, config.width)
    latent = TensorSpec("latent", "float32", (1, config.in_channels, layout.height, layout.width))
    rows = config.modulation_rows(first, last)
    given = latent if first == 0 else TensorSpec("hidden_states", "float32", states)
    passed = (TensorSpec("hidden_states_out", "float32", states), TensorSpec("encoder_hidden_states_out", "float32", context))
    return Component(
        name=name,
        folder="transformer",
        inputs=(
            given,
            TensorSpec("encoder_hidden_states", "float32", context),
            TensorSpec("modulation", "float32", (1, rows.stop - rows.start, config.width)),
        ),
        outputs=(TensorSpec("velocity", "float32", latent.shape),) if last == config.num_layers else passed,
        make=lambda: Transformer(config, layout, first, last),
        sources=position_source(config, layout) if first == 0 and layout.crop_positions else {},
        ignored=unread(config),
    )


def position_source(config: TransformerConfig, layout: Layout) -> dict[str, Source]:
    """Where the crop of the positional table comes from."""
    shape = (1, config.pos_embed_max_size**2, config.width)
    return {"pos_embed.pos_embed": Source("pos_embed.pos_embed", shape, lambda table: crop_positions(table, config, layout))}


def unread(config: TransformerConfig) -> tuple[str, ...]:
    """The last block's context queries (see rewrites.py)."""
    attention = f"transformer_blocks.{config.num_layers - 1}.attn"
    return f"{attention}.add_q_proj.", f"{attention}.norm_added_q."


def chunk_ranges(config: TransformerConfig, chunks: int) -> list[tuple[int, int]]:
    """Blocks first to last - 1 of each chunk, cut where the weights before come nearest to an equal share."""
    with torch.device("meta"):
        blocks = [_Block(config, layer) for layer in range(config.num_layers)]
    before = [0, *accumulate(sum(weight.numel() for weight in block.parameters()) for block in blocks)]
    cuts = [0]
    for chunk in range(1, chunks):
        possible = range(cuts[-1] + 1, config.num_layers - chunks + chunk + 1)
        cuts.append(min(possible, key=lambda cut: abs(before[cut] - before[-1] * chunk / chunks)))
    return list(zip(cuts, [*cuts[1:], config.num_layers], strict=True))
