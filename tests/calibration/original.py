"""The original: unmodified diffusers and transformers modules, run from prompt to picture with gradients, all in one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from export.families.family import GraphOptions
from export.rewrites import NULL_TOKENS
from tests.models import Reference

FOLDERS = {"conditioner": "transformer", "vae_decoder": "vae"}


@dataclass(frozen=True)
class Original:
    """A checkpoint's modules at a size and along sigmas; prompt p starts from torch's noise of seed p."""

    reference: Reference
    graph: GraphOptions

    def weight(self, component: str, name: str) -> nn.Parameter:
        return getattr(self.reference, FOLDERS.get(component, component)).get_parameter(name)

    def noise(self, seed: int) -> Tensor:
        factor = 2 ** (len(self.reference.vae.config.block_out_channels) - 1)
        shape = (1, self.reference.transformer.config.in_channels, self.graph.height // factor, self.graph.width // factor)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def latent(self, prompt: str, seed: int, image: np.ndarray | None = None) -> Tensor:
        """The final latent; with `image`, a clean latent, every step sees that under its own share of noise."""
        prompt_embeds, pooled = self._conditioning(prompt)
        noise, sigmas = self.noise(seed), self.graph.sigmas
        latent = noise
        if image is not None:
            clean = torch.from_numpy(image)[None]
            seen = [(1 - sigma) * clean + sigma * noise for sigma in sigmas[:-1]]
            latent = seen[0]
        for step, sigma in enumerate(sigmas[:-1]):
            velocity = self.reference.transformer(
                hidden_states=latent if image is None else seen[step],
                encoder_hidden_states=prompt_embeds,
                pooled_projections=pooled,
                timestep=torch.tensor([1000 * sigma]),
            ).sample
            latent = latent + (sigmas[step + 1] - sigma) * velocity
        return latent

    def picture(self, latent: Tensor) -> Tensor:
        """In [0, 1]."""
        config = self.reference.vae.config
        return (self.reference.vae.decode(latent / config.scaling_factor + config.shift_factor).sample / 2 + 0.5).clamp(0, 1)

    def latents(self, prompts: Sequence[str]) -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([self.latent(prompt, seed).numpy() for seed, prompt in enumerate(prompts)])

    def pictures(self, prompts: Sequence[str]) -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([self.picture(self.latent(prompt, seed)).numpy() for seed, prompt in enumerate(prompts)])

    def _conditioning(self, prompt: str) -> tuple[Tensor, Tensor]:
        reference = self.reference
        first = _encode(reference.text_encoder, reference.tokenizer, prompt)
        second = _encode(reference.text_encoder_2, reference.tokenizer_2, prompt)
        joined = torch.cat([first[0], second[0]], dim=-1)
        width = reference.transformer.config.joint_attention_dim
        return F.pad(joined, (0, width - joined.shape[-1], 0, NULL_TOKENS)), torch.cat([first[1], second[1]], dim=-1)


def _encode(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, prompt: str) -> tuple[Tensor, Tensor]:
    ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds
