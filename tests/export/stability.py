"""A small checkpoint in the layout of Stability's single files, tensor names written out as they stand in those."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.models import tokenizer_vocabulary

WIDTH, LATENT, LAYERS, TABLE, JOINT, CLIP_L, CLIP_G, TOKENS = 128, 16, 3, 20, 224, 64, 128, 12
VAE_WIDTHS = (32, 32, 64, 64)


def single_file(dual_layers: tuple[int, ...], head_norms: bool, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of the file, the encoder of the autoencoder and T5 hinted at by one each."""
    torch.manual_seed(seed)
    tensors = {f"model.diffusion_model.{name}": value for name, value in mmdit(dual_layers, head_norms).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in autoencoder().items()}
    tensors |= {f"text_encoders.clip_l.transformer.{name}": value for name, value in _clip(CLIP_L, "quick_gelu").items()}
    tensors |= {f"text_encoders.clip_g.transformer.{name}": value for name, value in _clip(CLIP_G, "gelu").items()}
    tensors["text_encoders.t5xxl.transformer.shared.weight"] = torch.zeros(4, 4)
    return tensors


def mmdit(dual_layers: tuple[int, ...], head_norms: bool) -> dict[str, Tensor]:
    found = {"pos_embed": torch.randn(1, TABLE**2, WIDTH)}
    found |= _affine("x_embedder.proj", WIDTH, LATENT, 2, 2)
    found |= _affine("context_embedder", WIDTH, JOINT)
    for name, width in (("t_embedder", 256), ("y_embedder", CLIP_L + CLIP_G)):
        found |= _affine(f"{name}.mlp.0", WIDTH, width) | _affine(f"{name}.mlp.2", WIDTH, WIDTH)
    for i in range(LAYERS):
        found |= _stream(f"joint_blocks.{i}.x_block", 9 if i in dual_layers else 6, head_norms, output=True)
        if i in dual_layers:
            found |= _attention(f"joint_blocks.{i}.x_block.attn2", head_norms, output=True)
        last = i == LAYERS - 1
        found |= _stream(f"joint_blocks.{i}.context_block", 2 if last else 6, head_norms, output=not last)
    return (
        found | _affine("final_layer.linear", 4 * LATENT, WIDTH) | _affine("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    )


def autoencoder() -> dict[str, Tensor]:
    top = VAE_WIDTHS[-1]
    found = _affine("decoder.conv_in", top, LATENT, 3, 3) | _affine("decoder.conv_out", 3, VAE_WIDTHS[0], 3, 3)
    found |= _norm("decoder.norm_out", VAE_WIDTHS[0]) | _norm("decoder.mid.attn_1.norm", top)
    for name in ("q", "k", "v", "proj_out"):
        found |= _affine(f"decoder.mid.attn_1.{name}", top, top, 1, 1)
    for block in (1, 2):
        found |= _resnet(f"decoder.mid.block_{block}", top, top)
    for level, width in enumerate(VAE_WIDTHS):
        before = VAE_WIDTHS[min(level + 1, len(VAE_WIDTHS) - 1)]
        for block in range(3):
            found |= _resnet(f"decoder.up.{level}.block.{block}", before if block == 0 else width, width)
        if level:
            found |= _affine(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return found | _affine("encoder.conv_in", VAE_WIDTHS[0], 3, 3, 3)


def _stream(name: str, rows: int, head_norms: bool, output: bool) -> dict[str, Tensor]:
    found = _attention(f"{name}.attn", head_norms, output) | _affine(f"{name}.adaLN_modulation.1", rows * WIDTH, WIDTH)
    if output:
        found |= _affine(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH) | _affine(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)
    return found


def _attention(name: str, head_norms: bool, output: bool) -> dict[str, Tensor]:
    found = _affine(f"{name}.qkv", 3 * WIDTH, WIDTH)
    if output:
        found |= _affine(f"{name}.proj", WIDTH, WIDTH)
    if head_norms:
        found |= {f"{name}.ln_{which}.weight": 1 + 0.2 * torch.randn(64) for which in "qk"}
    return found


def _resnet(name: str, width_in: int, width_out: int) -> dict[str, Tensor]:
    found = _norm(f"{name}.norm1", width_in) | _norm(f"{name}.norm2", width_out)
    found |= _affine(f"{name}.conv1", width_out, width_in, 3, 3) | _affine(f"{name}.conv2", width_out, width_out, 3, 3)
    return found if width_in == width_out else found | _affine(f"{name}.nin_shortcut", width_out, width_in, 1, 1)


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": 0.2 * torch.randn(width)}


def _affine(name: str, *shape: int) -> dict[str, Tensor]:
    weight = torch.randn(shape)
    return {f"{name}.weight": weight / weight[0].numel() ** 0.5, f"{name}.bias": 0.2 * torch.randn(shape[0])}


def _clip(width: int, activation: str) -> dict[str, Tensor]:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_attention_heads": width // 64}
    config = CLIPTextConfig(
        **sizes,
        vocab_size=len(tokenizer_vocabulary()),
        num_hidden_layers=2,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config).state_dict()
