"""Tiny real SD3 checkpoints on disk, in diffusers' folder layout, for the tests of every package.

The classes are the real ones (random weights, fixed seed); only the sizes are small. `write_checkpoint(folder)` takes about a
second; `load_reference(folder)` gives the unmodified diffusers and transformers modules back, in float32.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = ["t h", "th e</w>", "r e", "re d</w>", "c i", "l e</w>", "ci r", "cir c", "circ le</w>", "a n", "an d</w>", "o n</w>"]
SIGMAS = {"4": [1.0, 0.9, 0.75, 0.5, 0.0], "2": [1.0, 0.75, 0.0]}


@dataclass(frozen=True)
class TinyModel:
    """Sizes of a tiny checkpoint. `dual_layers` and `qk_norm` tell SD3 ((), None) from SD3.5-Medium ((0, ...), "rms_norm")."""

    layers: int = 3
    dual_layers: tuple[int, ...] = (0, 1)
    qk_norm: str | None = "rms_norm"
    heads: int = 2
    head_size: int = 16
    sample_size: int = 16
    table_size: int = 24
    latent_channels: int = 4
    vae_channels: tuple[int, ...] = (8, 8, 16, 16)
    vae_groups: int = 4
    vae_scaling: float = 1.5305
    vae_shift: float = 0.0609
    tokens: int = 12
    text_width: int = 32
    text_width_2: int = 48
    text_heads: int = 2
    text_layers: int = 3
    joint_width: int = 96  # more than text_width + text_width_2, so that the padding is exercised
    sigmas: dict[str, list[float]] | None = field(default_factory=lambda: dict(SIGMAS))
    seed: int = 0

    @property
    def pooled_width(self) -> int:
        return self.text_width + self.text_width_2


SD35 = TinyModel()
SD3 = TinyModel(dual_layers=(), qk_norm=None)


@dataclass(frozen=True)
class Reference:
    """The unmodified modules of a checkpoint, float32, in evaluation mode."""

    transformer: SD3Transformer2DModel
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer

    def pipeline(self) -> StableDiffusion3Pipeline:
        """diffusers' own pipeline on these modules; the scheduler takes explicit sigmas as they are (shift 1)."""
        pipeline = StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def write_checkpoint(
    folder: Path,
    model: TinyModel = SD35,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "10GB",
    variant: str | None = None,
) -> Path:
    """Writes the checkpoint and returns its folder. `shard_size` such as "50KB" gives sharded weights with an index."""
    modules = build_modules(model)
    for name, module in modules.items():
        module.to(dtype)
        module.save_pretrained(folder / name, max_shard_size=shard_size, variant=variant)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", model.tokens, pad=EOS)
    write_tokenizer(folder / "tokenizer_2", model.tokens, pad="!")
    (folder / "model_index.json").write_text(json.dumps(_model_index(), indent=2))
    if model.sigmas is not None:
        (folder / "flash.json").write_text(json.dumps({"sigmas": model.sigmas}))
    (folder / "LICENSE.md").write_text("Tiny licence: do as you please.\n")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-licence\n---\n# A tiny model for tests\n")
    return folder


def load_reference(folder: Path) -> Reference:
    """The modules of a checkpoint that `write_checkpoint` wrote without a variant, through the original libraries."""
    parts = {
        "transformer": SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        "vae": AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
    }
    for module in parts.values():
        module.eval().requires_grad_(False)
    tokenizers = {name: CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")}
    return Reference(**parts, **tokenizers)


def build_modules(model: TinyModel) -> dict[str, PreTrainedModel | ModelMixin]:
    """The four modules by checkpoint folder, seeded; weights are scaled so that every part of the network matters."""
    torch.manual_seed(model.seed)
    vocabulary = tokenizer_vocabulary()
    modules: dict[str, PreTrainedModel | ModelMixin] = {
        "transformer": SD3Transformer2DModel(
            sample_size=model.sample_size,
            patch_size=2,
            in_channels=model.latent_channels,
            out_channels=model.latent_channels,
            num_layers=model.layers,
            attention_head_dim=model.head_size,
            num_attention_heads=model.heads,
            joint_attention_dim=model.joint_width,
            caption_projection_dim=model.heads * model.head_size,
            pooled_projection_dim=model.pooled_width,
            pos_embed_max_size=model.table_size,
            dual_attention_layers=model.dual_layers,
            qk_norm=model.qk_norm,
        ),
        # CLIP-L's activation, and today's end-of-text rule (the first eos_token_id).
        "text_encoder": _text_encoder(model, model.text_width, "quick_gelu", vocabulary[EOS]),
        # CLIP-G's activation, and the old rule (eos_token_id 2: the highest id of the prompt).
        "text_encoder_2": _text_encoder(model, model.text_width_2, "gelu", 2),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(model.vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(model.vae_channels),
            block_out_channels=model.vae_channels,
            layers_per_block=1,
            latent_channels=model.latent_channels,
            norm_num_groups=model.vae_groups,
            sample_size=model.sample_size * 8,
            scaling_factor=model.vae_scaling,
            shift_factor=model.vae_shift,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    }
    for module in modules.values():
        module.eval().requires_grad_(False)
        _vary(module)
    return modules


def tokenizer_vocabulary() -> dict[str, int]:
    """CLIP's layout in small: 256 bytes ("!" first, id 0), the same ending a word, the merges, start and end of text."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(visible)
    alphabet = [chr(code) for code in visible] + [chr(256 + i) for i in range(hidden)]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge.split()) for merge in MERGES), BOS, EOS]
    return {word: index for index, word in enumerate(words)}


def write_tokenizer(folder: Path, tokens: int, pad: str) -> None:
    """vocab.json, merges.txt, tokenizer.json and tokenizer_config.json of a CLIP tokenizer with a small vocabulary."""
    vocabulary = tokenizer_vocabulary()
    merges = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=tokens)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")


def random_ids(model: TinyModel, seed: int) -> Tensor:
    """A tokenized prompt of random letters: int32 [1, tokens], start, letters, end and end-of-text padding."""
    vocabulary = tokenizer_vocabulary()
    generator = torch.Generator().manual_seed(seed)
    letters = [vocabulary[f"{letter}</w>"] for letter in string.ascii_lowercase]
    length = int(torch.randint(1, model.tokens - 2, (), generator=generator))
    chosen = [letters[i] for i in torch.randint(len(letters), (length,), generator=generator).tolist()]
    ids = [vocabulary[BOS], *chosen] + [vocabulary[EOS]] * (model.tokens - 1 - length)
    return torch.tensor([ids], dtype=torch.int32)


def _text_encoder(model: TinyModel, width: int, activation: str, eos_token_id: int) -> CLIPTextModelWithProjection:
    vocabulary = tokenizer_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=model.text_layers,
        num_attention_heads=model.text_heads,
        max_position_embeddings=model.tokens,
        hidden_act=activation,
        bos_token_id=vocabulary[BOS],
        eos_token_id=eos_token_id,
        pad_token_id=vocabulary[EOS],
    )
    return CLIPTextModelWithProjection(config)


@torch.no_grad()
def _vary(module: nn.Module) -> None:
    """Initialisation leaves biases 0, norms 1 and embeddings near 0: random ones, so that leaving one out shows."""
    for name, parameter in module.named_parameters():
        if "embedding.weight" in name:
            parameter.normal_(std=1.0)
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def _model_index() -> dict[str, object]:
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.42.0",
        "_name_or_path": "tests/tiny-sd3",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
    }
