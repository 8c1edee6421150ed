"""Each exact rewrite, on and off, against the unmodified StableDiffusion3Pipeline, from prompt and noise to the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint, open_checkpoint
from export.families import read_family
from export.families.family import Family, GraphOptions
from export.families.sd3 import Sd3
from export.rewrites import NULL_TOKENS, Rewrites, rewrites_of
from tests.models import SD3, SD35, Reference, TinyModel, load_reference, write_checkpoint

PROMPT = "the red circle on and"
FOUR, TWO = (1.0, 0.9, 0.75, 0.5, 0.0), (1.0, 0.75, 0.0)


@dataclasses.dataclass(frozen=True)
class Tiny:
    checkpoint: Checkpoint
    family: Family
    reference: Reference


@pytest.fixture(scope="module", params=[SD35, SD3], ids=["sd3.5", "sd3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)
    checkpoint = open_checkpoint(str(folder))
    return Tiny(checkpoint, read_family(checkpoint), load_reference(folder))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def diffusers_draws(reference: Reference, options: GraphOptions, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Final latent and image in [0, 1] of the unmodified pipeline, without guidance."""
    pipeline = reference.pipeline()
    latent, image = (
        pipeline(
            PROMPT,
            width=options.width,
            height=options.height,
            num_inference_steps=len(options.sigmas) - 1,
            sigmas=list(options.sigmas[:-1]),
            guidance_scale=1.0,
            latents=noise.clone(),
            output_type=kind,
        ).images
        for kind in ("latent", "pt")
    )
    return latent, image


def components_draw(tiny: Tiny, options: GraphOptions, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The same through the mobile modules: what every runtime of a bundle does."""
    parts = {part.name: part.load(tiny.checkpoint) for part in tiny.family.components(options)}
    tokenizers = (tiny.reference.tokenizer, tiny.reference.tokenizer_2)
    length = tiny.family.tokens
    ids = [
        tokenizer(PROMPT, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        for tokenizer in tokenizers
    ]
    states, pooled = zip(parts["text_encoder"](ids[0].int()), parts["text_encoder_2"](ids[1].int()), strict=True)
    step = _hoisted if options.rewrites.hoist_conditioner else _unhoisted
    velocity = step(tiny, parts, options, states, pooled)
    latent = noise
    for i, (sigma, following) in enumerate(zip(options.sigmas, options.sigmas[1:], strict=False)):
        latent = latent + (following - sigma) * velocity(latent, i)
    if options.rewrites.latent_scale_in_decoder:
        return latent, parts["vae_decoder"](latent)[0]
    vae = tiny.reference.vae.config
    return latent, (parts["vae_decoder"](latent / vae.scaling_factor + vae.shift_factor)[0] / 2 + 0.5).clamp(0, 1)


def _hoisted(
    tiny: Tiny, parts: dict[str, nn.Module], options: GraphOptions, states: tuple[Tensor, ...], pooled: tuple[Tensor, ...]
) -> Callable[[Tensor, int], Tensor]:
    context, modulation = parts["conditioner"](*states, *pooled)
    return lambda latent, i: parts["transformer"](latent, context, modulation[i : i + 1])[0]


def _unhoisted(
    tiny: Tiny, parts: dict[str, nn.Module], options: GraphOptions, states: tuple[Tensor, ...], pooled: tuple[Tensor, ...]
) -> Callable[[Tensor, int], Tensor]:
    joined = torch.cat(states, dim=-1)
    width = tiny.reference.transformer.config.joint_attention_dim
    prompt = torch.zeros(1, tiny.family.tokens + options.rewrites.null_tokens, width)
    prompt[:, : joined.shape[1], : joined.shape[2]] = joined
    times = torch.tensor(options.sigmas) * 1000
    return lambda latent, i: parts["transformer"](latent, prompt, torch.cat(pooled, dim=-1), times[i : i + 1])[0]


EACH_OFF = [Rewrites(), *(Rewrites(**{field.name: False}) for field in dataclasses.fields(Rewrites))]
ALL_OFF = Rewrites(False, False, False, False)


@pytest.mark.parametrize(
    "rewrites", [*EACH_OFF, ALL_OFF], ids=["all on", "no fold", "no hoist", "no crop", "no scale", "all off"]
)
def test_every_switch_draws_the_picture_of_unmodified_diffusers(tiny: Tiny, rewrites: Rewrites) -> None:
    options = GraphOptions(128, 128, FOUR, rewrites=rewrites)
    noise = torch.randn(tiny.family.latent_shape(options), generator=torch.Generator().manual_seed(4))
    wanted_latent, wanted_image = diffusers_draws(tiny.reference, options, noise)
    latent, image = components_draw(tiny, options, noise)
    assert relative_error(latent, wanted_latent) < 2e-5
    assert relative_error(image, wanted_image) < 2e-5


@pytest.mark.parametrize(("width", "height", "sigmas"), [(192, 192, TWO), (96, 224, FOUR), (384, 16, TWO)])
def test_rewrites_hold_at_other_shapes_and_step_counts(tiny: Tiny, width: int, height: int, sigmas: tuple[float, ...]) -> None:
    options = GraphOptions(width, height, sigmas)
    noise = torch.randn(tiny.family.latent_shape(options), generator=torch.Generator().manual_seed(5))
    wanted_latent, wanted_image = diffusers_draws(tiny.reference, options, noise)
    latent, image = components_draw(tiny, options, noise)
    assert relative_error(latent, wanted_latent) < 2e-5
    assert relative_error(image, wanted_image) < 2e-5


def test_folded_null_tokens_equal_256_zero_tokens(tiny: Tiny) -> None:
    assert NULL_TOKENS == 256
    torch.manual_seed(6)
    latent, pooled = torch.randn(1, 4, 16, 16), torch.randn(1, tiny.reference.transformer.config.pooled_projection_dim)
    prompt = torch.randn(1, tiny.family.tokens, tiny.reference.transformer.config.joint_attention_dim)

    def velocity(null_tokens: int, fold: bool) -> Tensor:
        zeros = torch.zeros(1, null_tokens, prompt.shape[-1])
        rewrites = Rewrites(fold_null_tokens=fold, hoist_conditioner=False)
        parts = tiny.family.components(GraphOptions(128, 128, FOUR, rewrites=rewrites))
        module = next(part for part in parts if part.name == "transformer").load(tiny.checkpoint)
        return module(latent, torch.cat([prompt, zeros], dim=1), pooled, torch.tensor([750.0]))[0]

    zeros = torch.zeros(1, 256, prompt.shape[-1])
    wanted = tiny.reference.transformer(latent, torch.cat([prompt, zeros], dim=1), pooled, torch.tensor([750.0])).sample
    dropped = tiny.reference.transformer(latent, prompt, pooled, torch.tensor([750.0])).sample
    assert relative_error(velocity(1, fold=True), wanted) < 2e-5
    assert relative_error(velocity(256, fold=False), wanted) < 2e-5
    assert relative_error(dropped, wanted) > 1e-2  # the null tokens do matter


def test_conditioning_equals_the_pipeline_s(tiny: Tiny) -> None:
    """Prompt embedding and pooled embedding of encode_prompt, through diffusers' own linears, for every step."""
    reference = tiny.reference
    prompt, _, pooled, _ = reference.pipeline().encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    options = GraphOptions(128, 128, FOUR, rewrites=Rewrites(fold_null_tokens=False))
    parts = {part.name: part.load(tiny.checkpoint) for part in tiny.family.components(options)}
    ids = [
        tokenizer(PROMPT, padding="max_length", max_length=tiny.family.tokens, return_tensors="pt").input_ids.int()
        for tokenizer in (reference.tokenizer, reference.tokenizer_2)
    ]
    states, pooled_states = zip(parts["text_encoder"](ids[0]), parts["text_encoder_2"](ids[1]), strict=True)
    context, modulation = parts["conditioner"](*states, *pooled_states)
    original = reference.transformer
    assert relative_error(context, original.context_embedder(prompt)) < 2e-5
    embedding = original.time_text_embed(torch.tensor(FOUR[:-1]) * 1000, pooled.expand(4, -1))
    rows = []
    for block in original.transformer_blocks:
        rows += [block.norm1.linear(nn.functional.silu(embedding)), block.norm1_context.linear(nn.functional.silu(embedding))]
    rows.append(original.norm_out.linear(nn.functional.silu(embedding)))
    assert relative_error(modulation.flatten(1), torch.cat(rows, dim=1)) < 2e-5


@pytest.mark.parametrize(("width", "height"), [(384, 384), (128, 128), (112, 240), (16, 16)])
def test_cropped_positions_are_diffusers_own(tiny: Tiny, width: int, height: int) -> None:
    part = next(p for p in tiny.family.components(GraphOptions(width, height, TWO)) if p.name == "transformer")
    crop = part.load(tiny.checkpoint).get_buffer("pos_embed.pos_embed")
    assert torch.equal(crop, tiny.reference.transformer.pos_embed.cropped_pos_embed(height // 8, width // 8))


def test_contract_diffusers_keeps_only_the_crop() -> None:
    assert rewrites_of("flash") == Rewrites()
    assert rewrites_of("diffusers") == Rewrites(False, False, True, False)


def test_autoencoder_without_shift_and_with_post_quant_conv(tmp_path: Path) -> None:
    """The older form of AutoencoderKL: an extra 1 x 1 convolution, no shift."""
    from diffusers import AutoencoderKL

    folder = write_checkpoint(tmp_path, TinyModel(layers=2))
    torch.manual_seed(8)
    widths = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**widths, **blocks, scaling_factor=0.5, shift_factor=None).eval()
    vae.save_pretrained(folder / "vae")
    checkpoint = open_checkpoint(str(folder))
    family = read_family(checkpoint)
    assert isinstance(family, Sd3)
    part = family.components(GraphOptions(64, 64, TWO))[-1]
    checkpoint.check("vae", part.reads(), part.ignored)
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        wanted = (vae.decode(latent / 0.5).sample / 2 + 0.5).clamp(0, 1)
    assert relative_error(part.load(checkpoint)(latent)[0], wanted) < 2e-5
