"""What rounding a model's weights does to what it draws, from the same noise, against the original modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.recording import Piece, entries, run
from runtimes.conditioning import Arrays, Contract
from runtimes.harness.parity import psnr
from runtimes.sampler import noise, sample
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
        self._made: dict[str, list[Arrays]] = {}

    def advance(self, component: str, pieces: Sequence[Piece]) -> None:
        """Runs a component, given as its pieces, for every prompt. Components come in the order of use."""
        if component in ("text_encoder", "text_encoder_2"):
            tokenizer = self.tokenizers[component == "text_encoder_2"]
            self._made[component] = [run(pieces, {"input_ids": tokenizer(prompt)}) for prompt in self.prompts]
        elif component == "conditioner":
            self._made[component] = [run(pieces, self.contract.conditioner_inputs(*pair)) for pair in self._encoded()]
        elif component == "transformer":
            self.latents = np.concatenate([self._denoised(pieces, seed) for seed in range(len(self.prompts))])
        else:
            latents = np.split(self.latents, len(self.latents))
            images = [self.contract.pixels(run(pieces, self.contract.decoder_inputs(latent))) for latent in latents]
            self.images = np.stack(images)

    def _encoded(self) -> list[tuple[Arrays, Arrays]]:
        return list(zip(self._made["text_encoder"], self._made["text_encoder_2"], strict=True))

    def _denoised(self, pieces: Sequence[Piece], seed: int) -> np.ndarray:
        if "conditioner" in self._made:
            given = self._made["conditioner"][seed]
        else:
            given = self.contract.unhoisted(*self._encoded()[seed], entries(pieces[0][0].inputs))

        def velocity(latent: np.ndarray, step: int) -> np.ndarray:
            return run(pieces, self.contract.transformer_inputs(given, latent, step))[self.contract.names.velocity]

        return sample(velocity, noise(seed, self.contract.latent.shape), self.contract.sigmas)[-1]


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
    error = float(np.square(trial.latents - original.latents, dtype=np.float64).mean())
    return Loss(
        len(original.prompts),
        error / float(np.var(original.latents, dtype=np.float64)),
        psnr(trial.latents, original.latents),
        psnr(trial.images, original.images),
    )
