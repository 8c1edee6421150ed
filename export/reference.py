"""The original: unmodified diffusers and transformers modules in float32, built from any checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from export.checkpoint import Checkpoint
from export.families.family import GraphOptions
from runtimes.golden import Drawing
from runtimes.quiet import quiet

with quiet():  # it looks for optional quantization libraries
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer


def reference_pipeline(checkpoint: Checkpoint) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline. Its scheduler shifts nothing, so that explicit sigmas are taken as they are."""
    with quiet():
        tokenizers = [CLIPTokenizer.from_pretrained(str(checkpoint.tokenizers[name])) for name in ("tokenizer", "tokenizer_2")]
        pipeline = StableDiffusion3Pipeline(
            transformer=_load(checkpoint, "transformer", lambda config: SD3Transformer2DModel.from_config(config)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=_load(checkpoint, "vae", lambda config: AutoencoderKL.from_config(config)),
            text_encoder=_load(checkpoint, "text_encoder", _text_encoder),
            tokenizer=tokenizers[0],
            text_encoder_2=_load(checkpoint, "text_encoder_2", _text_encoder),
            tokenizer_2=tokenizers[1],
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusion3Pipeline, options: GraphOptions, prompt: str, seed: int) -> Drawing:
    """The picture of a prompt at the options' size and sigmas, with the latent after every step."""
    transformer, vae = pipeline.transformer, pipeline.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (1, transformer.config.in_channels, options.height // factor, options.width // factor)
    latents = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))[0].numpy()]

    def keep(_: object, step: int, timestep: object, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"][0].numpy().copy())
        return values

    image = pipeline(
        prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=len(options.sigmas) - 1,
        sigmas=list(options.sigmas[:-1]),
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        callback_on_step_end=keep,
    ).images[0]
    return Drawing(prompt, seed, np.stack(latents), np.ascontiguousarray(image.transpose(2, 0, 1)))


def _text_encoder(config: dict[str, object]) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def _load(checkpoint: Checkpoint, folder: str, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """A module of the original class with the checkpoint's weights; every weight that it has must be there."""
    module = make(dict(checkpoint.config(folder))).float()  # a configuration may ask for another element type
    known = checkpoint.shapes(folder)
    weights = {name: checkpoint.tensor(folder, name).float() for name in module.state_dict() if name in known}
    left_out = [name for name in module.load_state_dict(weights, strict=False).missing_keys if not name.startswith("encoder.")]
    assert not left_out, f"{folder} lacks {left_out}"  # the components were checked against the checkpoint before
    return module.eval().requires_grad_(False)
