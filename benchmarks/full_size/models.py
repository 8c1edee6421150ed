"""The configurations of SD3.5-Medium, and the names and shapes of their tensors as diffusers and transformers have them.

Shapes come from the libraries' own classes on the meta device: no name is written down twice, and no weight is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtimes.quiet import quiet

LAYERS, DUAL_LAYERS = 24, 13  # attn2 in the blocks 0 to 12
VOCABULARY, POSITIONS = 49_408, 77

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Configs:
    """What the config.json of each folder says."""

    transformer: Config
    text_encoder: Config
    text_encoder_2: Config
    vae: Config


def sd35_medium(layers: int = LAYERS) -> Configs:
    """The whole model, or the same with fewer transformer blocks; dual attention in the first 13 of them."""
    transformer = {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "dual_attention_layers": list(range(min(layers, DUAL_LAYERS))),
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": layers,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "sample_size": 128,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
    return Configs(
        transformer,
        _clip(hidden=768, layers=12, heads=12, activation="quick_gelu", pad=VOCABULARY - 1),
        _clip(hidden=1280, layers=32, heads=20, activation="gelu", pad=0),
        vae,
    )


def _clip(hidden: int, layers: int, heads: int, activation: str, pad: int) -> Config:
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": VOCABULARY - 2,
        # transformers' default is the stored type, diffusers' is float32: one pipeline needs the same of both.
        "dtype": "float32",
        "eos_token_id": 2,  # the old rule, as in SD3's files: pooled is the state at the prompt's highest id
        "hidden_act": activation,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": POSITIONS,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": pad,
        "projection_dim": hidden,
        "vocab_size": VOCABULARY,
    }


def shapes(configs: Configs) -> dict[str, Shapes]:
    """By folder: every tensor of its checkpoint, in the order of the modules."""
    with quiet():
        import torch
        from diffusers import AutoencoderKL, SD3Transformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        with torch.device("meta"):
            modules = {
                "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**configs.text_encoder)),
                "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**configs.text_encoder_2)),
                "transformer": SD3Transformer2DModel.from_config(dict(configs.transformer)),
                "vae": AutoencoderKL.from_config(dict(configs.vae)),
            }
    return {
        folder: {name: tuple(value.shape) for name, value in module.state_dict().items()} for folder, module in modules.items()
    }
