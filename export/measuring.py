"""What rounding a model's weights does to what it draws, from the same noise, against the original modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from export.recording import Stretch, entries, run_all
from runtimes.conditioning import Arrays, Contract
from runtimes.harness.parity import psnr
from runtimes.sampler import euler_step, noise
from runtimes.tokenizer import Tokenizer


class Trial:
    """Draws prompt p from the noise of seed p, whole: what one component gives, the next one takes.

    latents: float32 [prompts, C, h, w], the final ones; images: float32 [prompts, 3, H, W].
    """

    def __init__(self, contract: Contract, tokenizers: Sequence[Tokenizer], prompts: Sequence[str]) -> None:
        self.contract = contract
        self.tokenizers = tokenizers
        self.prompts = prompts
        self.latents = np.empty(0, np.float32)
        self.images = np.empty(0, np.float32)
        self._made: dict[str, Sequence[Arrays]] = {}

    def advance(self, component: str, stretches: Sequence[Stretch]) -> None:
        """Runs a component, given as its stretches, for every prompt. Components come in the order of use."""
        if component in ("text_encoder", "text_encoder_2"):
            tokenizer = self.tokenizers[component == "text_encoder_2"]
            self._made[component] = run_all(stretches, [{"input_ids": tokenizer(prompt)} for prompt in self.prompts])
        elif component == "conditioner":
            self._made[component] = run_all(stretches, [self.contract.conditioner_inputs(*pair) for pair in self._encoded()])
        elif component == "transformer":
            self.latents = np.concatenate(self._denoised(stretches))
        else:
            latents = np.split(self.latents, len(self.latents))
            made = run_all(stretches, [self.contract.decoder_inputs(latent) for latent in latents])
            self.images = np.stack([self.contract.pixels(outputs) for outputs in made])

    def _encoded(self) -> list[tuple[Arrays, Arrays]]:
        return list(zip(self._made["text_encoder"], self._made["text_encoder_2"], strict=True))

    def _denoised(self, stretches: Sequence[Stretch]) -> list[np.ndarray]:
        """The final latents; all prompts take a step before the next one, so that each stretch is loaded once a step."""
        contract = self.contract
        if "conditioner" in self._made:
            given = self._made["conditioner"]
        else:
            inputs = entries(stretches[0].component.inputs)
            given = [contract.unhoisted(*pair, inputs) for pair in self._encoded()]
        latents = [noise(seed, contract.latent.shape) for seed in range(len(self.prompts))]
        for step, (sigma, sigma_next) in enumerate(pairwise(contract.sigmas)):
            asked = [contract.transformer_inputs(*pair, step) for pair in zip(given, latents, strict=True)]
            velocities = [outputs[contract.names.velocity] for outputs in run_all(stretches, asked)]
            latents = [euler_step(x, v, sigma, sigma_next) for x, v in zip(latents, velocities, strict=True)]
        return latents


@dataclass(frozen=True)
class Loss:
    """prompts: how many were drawn; latents: mean squared error of the final latents over the variance of the original's, which
    is what recipes predict;
    latents_psnr and image_psnr: PSNR of the final latents and of the images in dB, over all prompts."""

    prompts: int
    latents: float
    latents_psnr: float
    image_psnr: float


def loss(trial: Trial, original: Trial) -> Loss:
    """What a trial lost against that of the original modules."""
    return loss_of(
        list(zip(trial.latents, trial.images, strict=True)), list(zip(original.latents, original.images, strict=True))
    )


def loss_of(drawn: Sequence[tuple[np.ndarray, np.ndarray]], original: Sequence[tuple[np.ndarray, np.ndarray]]) -> Loss:
    """What pictures lost against the original's: pairs of final latents and image, prompt by prompt."""
    latents, images = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    true_latents, true_images = (np.stack(arrays) for arrays in zip(*original, strict=True))
    error = float(np.square(latents - true_latents, dtype=np.float64).mean())
    return Loss(
        len(original),
        error / float(np.var(true_latents, dtype=np.float64)),
        psnr(latents, true_latents),
        psnr(images, true_images),
    )
