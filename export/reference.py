"""The original: unmodified diffusers and transformers modules in float32, built from any checkpoint, tensor by tensor.

By default a layer's weights are read from the checkpoint when the layer runs, and released after it (accelerate's offloading),
so that memory holds the largest layer, however large the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from export.checkpoint import Checkpoint
from export.families.family import GraphOptions
from runtimes.golden import Drawing
from runtimes.quiet import quiet

with quiet():  # it looks for optional quantization libraries
    from accelerate import cpu_offload, init_empty_weights
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer


def reference_pipeline(checkpoint: Checkpoint, resident: bool = False) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline. Its scheduler shifts nothing, so that explicit sigmas are taken as they are.

    resident: all weights are kept in memory, as whoever measures its speed wants them.
    """

    def load(folder: str, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
        return (_load if resident else _load_on_use)(checkpoint, folder, make)

    with quiet():
        tokenizers = [CLIPTokenizer.from_pretrained(str(checkpoint.tokenizers[name])) for name in ("tokenizer", "tokenizer_2")]
        pipeline = StableDiffusion3Pipeline(
            transformer=load("transformer", lambda config: SD3Transformer2DModel.from_config(config)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=load("vae", lambda config: AutoencoderKL.from_config(config)),
            text_encoder=load("text_encoder", _text_encoder),
            tokenizer=tokenizers[0],
            text_encoder_2=load("text_encoder_2", _text_encoder),
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
    _check(folder, module.load_state_dict(weights, strict=False).missing_keys)
    return module.eval().requires_grad_(False)


def _load_on_use(checkpoint: Checkpoint, folder: str, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """The same, its weights on the meta device until the layer that owns them runs.

    So are the buffers of a module that stores them (the table of positions is as large as a layer); others compute theirs.
    """
    config = dict(checkpoint.config(folder))
    with torch.device("meta"):
        module = make(config).float()
    stores_buffers = not module.state_dict().keys().isdisjoint(name for name, _ in module.named_buffers())
    if not stores_buffers:
        with init_empty_weights(include_buffers=False):
            module = make(config).float()
    module.eval().requires_grad_(False)
    known = checkpoint.shapes(folder)
    _check(folder, [name for name in module.state_dict() if name not in known])
    return cpu_offload(module, torch.device("cpu"), offload_buffers=stores_buffers, state_dict=_Tensors(checkpoint, folder))


def _check(folder: str, left_out: list[str]) -> None:
    """The components were checked against the checkpoint before; an autoencoder may come without its encoder."""
    left_out = [name for name in left_out if not name.startswith("encoder.")]
    assert not left_out, f"{folder} lacks {left_out}"


class _Tensors(Mapping[str, torch.Tensor]):
    """A folder's tensors in float32, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, folder: str) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._names = checkpoint.shapes(folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._checkpoint.tensor(self._folder, name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
