"""Stability's single-file checkpoints (sd3_medium_incl_clips.safetensors and its like), read under diffusers' names.

One file holds the MMDiT under `model.diffusion_model.`, the autoencoder under `first_stage_model.` and the text encoders under
`text_encoders.clip_l.` and `text_encoders.clip_g.`. Tensors are renamed one by one as they are asked for; queries, keys
and values lie in one tensor and are read as its thirds. There are no configurations: they are inferred from names and shapes,
and what shapes do not tell is the same in every SD3 model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from export.errors import UserError
from export.tensors import SafetensorsReader

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_TRANSFORMER, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP_L, _CLIP_G, _T5 = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", "text_encoders.t5xxl."


@dataclass(frozen=True)
class SingleFile:
    """Configurations and readers by folder, as a diffusers checkpoint has them."""

    configs: Mapping[str, Mapping[str, Any]]
    readers: Mapping[str, Renamed]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """How a tensor is made from one of the file's: rows of it, and a step after reading."""

    name: str
    shape: Shape
    rows: tuple[int, int] | None = None
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


_NONE: Mapping[str, Tensor] = MappingProxyType({})


class Renamed:
    """A folder's tensors under diffusers' names. `extra` are those that the file implies without holding them."""

    def __init__(self, reader: SafetensorsReader, origins: Mapping[str, Origin], extra: Mapping[str, Tensor] = _NONE) -> None:
        self._reader = reader
        self._origins = origins
        self._extra = extra
        held = {name: origin.shape for name, origin in origins.items()}
        self.shapes: Shapes = {**held, **{name: tuple(value.shape) for name, value in self._extra.items()}}

    def kind(self, name: str) -> str:
        return "F32" if name in self._extra else self._reader.kind(self._origins[name].name)

    def tensor(self, name: str) -> Tensor:
        if name in self._extra:
            return self._extra[name]
        origin = self._origins[name]
        if origin.rows is None:
            return origin.convert(self._reader.tensor(origin.name))
        return origin.convert(self._reader.rows(origin.name, *origin.rows))


def read_single_file(path: Path) -> SingleFile:
    """Opens the file and sorts its tensors; `UserError` for one that lacks a part."""
    reader = SafetensorsReader([path])
    parts = {prefix: _part(reader.shapes, prefix) for prefix in (_TRANSFORMER, _VAE, _CLIP_L, _CLIP_G)}
    if not any("joint_blocks." in name for name in parts[_TRANSFORMER]):
        raise UserError(f"{path} is no SD3 checkpoint: it has no {_TRANSFORMER}joint_blocks tensors")
    for prefix in (_CLIP_L, _CLIP_G):
        if not parts[prefix]:
            raise UserError(f"{path} has no {prefix}* tensors: take the file that includes the clips, or the diffusers folder")
    if not any(name.startswith("decoder.") for name in parts[_VAE]):
        raise UserError(f"{path} has no {_VAE}decoder tensors: take a file that includes the autoencoder")
    transformer, vae = transformer_origins(parts[_TRANSFORMER]), vae_origins(parts[_VAE])
    clip_l, clip_g = _text_origins(parts[_CLIP_L], _CLIP_L), _text_origins(parts[_CLIP_G], _CLIP_G)
    # SD3 takes CLIP-L's pooled state without a projection (diffusers' single-file loader: an identity for its weight).
    clip_l.pop("text_projection.weight", None)
    identity = {"text_projection.weight": torch.eye(clip_l["text_model.final_layer_norm.weight"].shape[0])}
    notes = ["text_encoders.t5xxl is left out: prompts reach the transformer through the two CLIP encoders alone"]
    readers = {
        "transformer": Renamed(reader, transformer),
        "vae": Renamed(reader, vae),
        "text_encoder": Renamed(reader, clip_l, identity),
        "text_encoder_2": Renamed(reader, clip_g),
    }
    configs = {
        "transformer": transformer_config(readers["transformer"].shapes),
        "vae": vae_config(readers["vae"].shapes),
        "text_encoder": text_config(readers["text_encoder"].shapes, "quick_gelu"),
        "text_encoder_2": text_config(readers["text_encoder_2"].shapes, "gelu"),
        "scheduler": {"shift": 3.0, "num_train_timesteps": 1000},
    }
    return SingleFile(configs, readers, tuple(notes if _part(reader.shapes, _T5) else []))


def _part(shapes: Shapes, prefix: str) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


# What a name of the MMDiT becomes, by the part before ".weight" or ".bias". {i} is the block.
_TRANSFORMER_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCK_NAMES = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_JOINED_NAMES = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def transformer_origins(shapes: Shapes) -> dict[str, Origin]:
    """diffusers' names of the MMDiT's tensors. A name without a rule keeps its own, to be named as unexpected."""
    last = _count(shapes, r"joint_blocks\.(\d+)\.") - 1
    # diffusers keeps (scale, shift) where a norm has no gate; Stability's order is (shift, scale).
    swapped = ("final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1")
    origins: dict[str, Origin] = {}
    for name, shape in shapes.items():
        source = _TRANSFORMER + name
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", stem)
        if name == "pos_embed":
            origins["pos_embed.pos_embed"] = Origin(source, shape)
        elif block and block[2] in _JOINED_NAMES:
            third = shape[0] // 3
            for i, part in enumerate(_JOINED_NAMES[block[2]]):
                target = f"transformer_blocks.{block[1]}.{part}.{kind}"
                origins[target] = Origin(source, (third, *shape[1:]), rows=(i * third, (i + 1) * third))
        else:
            renamed = _TRANSFORMER_NAMES.get(stem, stem)
            if block:
                renamed = f"transformer_blocks.{block[1]}.{_BLOCK_NAMES.get(block[2], block[2])}"
            origins[f"{renamed}.{kind}"] = Origin(source, shape, convert=_swap_halves if stem in swapped else _same)
    return origins


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


_VAE_NAMES = (
    (r"norm_out", "conv_norm_out"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.([qkv])", r"mid_block.attentions.0.to_\1"),
    (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
    (r"nin_shortcut", "conv_shortcut"),
)


def vae_origins(shapes: Shapes) -> dict[str, Origin]:
    """diffusers' names of the decoder's tensors (its encoder keeps its own names: nobody reads it)."""
    levels = _count(shapes, r"decoder\.up\.(\d+)\.")
    origins = {}
    for name, shape in shapes.items():
        renamed = name
        if name.startswith("decoder."):
            for pattern, replacement in _VAE_NAMES:
                renamed = re.sub(pattern, replacement, renamed)
            renamed = re.sub(r"mid\.block_(\d)", lambda found: f"mid_block.resnets.{int(found[1]) - 1}", renamed)
            # Stability counts the levels from the finest, diffusers in the order of use.
            renamed = re.sub(r"up\.(\d+)\.", lambda found: f"up_blocks.{levels - 1 - int(found[1])}.", renamed)
            renamed = renamed.replace(".block.", ".resnets.").replace(".upsample.", ".upsamplers.0.")
        # Stability's attention projects with 1 x 1 convolutions, diffusers' with linears.
        linear = "mid.attn_1" in name and len(shape) == 4
        convert = (lambda tensor: tensor.flatten(1)) if linear else _same
        origins[renamed] = Origin(_VAE + name, shape[:2] if linear else shape, convert=convert)
    return origins


def _text_origins(shapes: Shapes, prefix: str) -> dict[str, Origin]:
    """The text encoders stand under transformers' own names."""
    return {name: Origin(prefix + name, shape) for name, shape in shapes.items()}


def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """SD3Transformer2DModel's configuration from its tensors' shapes (diffusers' names)."""
    width, channels, patch, _ = _shape(shapes, "pos_embed.proj.weight")
    head_norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    # SD3 without head norms has heads of 64 as well.
    size = 64 if head_norm is None else head_norm[0]
    dual = {int(found[1]) for name in shapes if (found := re.match(r"transformer_blocks\.(\d+)\.attn2\.", name))}
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": _shape(shapes, "proj_out.weight")[0] // patch**2,
        "num_layers": _count(shapes, r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": size,
        "num_attention_heads": width // size,
        "joint_attention_dim": _shape(shapes, "context_embedder.weight")[1],
        "caption_projection_dim": _shape(shapes, "context_embedder.weight")[0],
        "pooled_projection_dim": _shape(shapes, "time_text_embed.text_embedder.linear_1.weight")[1],
        "pos_embed_max_size": math.isqrt(_shape(shapes, "pos_embed.pos_embed")[1]),
        "dual_attention_layers": sorted(dual),
        "qk_norm": None if head_norm is None else "rms_norm",
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """AutoencoderKL's configuration; scale and shift are those of SD3's autoencoder (Stability's sd3-ref)."""
    levels = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    widths = [_shape(shapes, f"decoder.up_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    return {
        "block_out_channels": widths[::-1],
        "layers_per_block": _count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "latent_channels": _shape(shapes, "decoder.conv_in.weight")[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight")[0],
        "norm_num_groups": 32,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any("mid_block.attentions" in name for name in shapes),
    }


def text_config(shapes: Shapes, activation: str) -> dict[str, Any]:
    """CLIPTextModelWithProjection's configuration; heads are of 64 and the end-of-text rule is the old one, as in SD3's."""
    vocabulary, width = _shape(shapes, "text_model.embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "projection_dim": _shape(shapes, "text_projection.weight")[0],
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": _shape(shapes, "text_model.embeddings.position_embedding.weight")[0],
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
    }


def _shape(shapes: Shapes, name: str) -> Shape:
    if name not in shapes:
        raise UserError(f"the file lacks the tensor that diffusers calls {name}: it is incomplete or no SD3 checkpoint")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that the pattern finds."""
    return 1 + max((int(found[1]) for name in shapes if (found := re.match(pattern, name))), default=-1)
