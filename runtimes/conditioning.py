"""How a contract's graphs are fed: what each is called and what is computed between them, in numpy, as diffusers does it.

With a conditioner the text encoders' outputs go through it once a prompt, and the transformer takes its results and one row
of modulation a step. Without one the transformer takes diffusers' own conditioning: both hidden states joined on channels and
zero-padded to the joint width, zero tokens in the place of T5, the pooled vectors joined, and the timestep 1000 * sigma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.bundle import LatentLayout, Manifest, TensorEntry

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Names:
    """Where a contract's graphs take and give what the pipeline passes on."""

    hidden: str | None  # None: the last but one of the numbered hidden_states
    pooled: str
    latent: str
    velocity: str


NAMES = {
    "flash": Names("hidden_states", "pooled", "latent", "velocity"),
    "diffusers": Names(None, "text_embeds", "hidden_states", "out_hidden_states"),
}


@dataclass(frozen=True)
class Contract:
    """A bundle's graph contract. `scales_in_decoder`: the rewrite that puts latent scale and image range into vae_decoder."""

    names: Names
    scales_in_decoder: bool
    latent: LatentLayout
    sigmas: tuple[float, ...]

    def encoded(self, outputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """A text encoder's hidden states [1, T, C] before the last layer, and its projected pooled vector [1, P]."""
        return outputs[self.names.hidden or _last_but_one(outputs)], outputs[self.names.pooled]

    def conditioner_inputs(self, first: Arrays, second: Arrays) -> dict[str, np.ndarray]:
        (hidden, pooled), (hidden_2, pooled_2) = self.encoded(first), self.encoded(second)
        return {"hidden_states": hidden, "hidden_states_2": hidden_2, "pooled": pooled, "pooled_2": pooled_2}

    def unhoisted(self, first: Arrays, second: Arrays, transformer_inputs: Sequence[TensorEntry]) -> dict[str, np.ndarray]:
        """encoder_hidden_states [1, tokens, joint width] and pooled_projections [1, P1 + P2], without a conditioner."""
        (hidden, pooled), (hidden_2, pooled_2) = self.encoded(first), self.encoded(second)
        shape = next(tensor.shape for tensor in transformer_inputs if tensor.name == "encoder_hidden_states")
        joined = np.concatenate([hidden, hidden_2], axis=-1)
        context = np.zeros(shape, np.float32)
        context[:, : joined.shape[1], : joined.shape[2]] = joined
        return {"encoder_hidden_states": context, "pooled_projections": np.concatenate([pooled, pooled_2], axis=-1)}

    def transformer_inputs(self, conditioning: Arrays, latent: np.ndarray, step: int) -> dict[str, np.ndarray]:
        """One step's inputs; `conditioning` is what the conditioner or `unhoisted` gave."""
        if "modulation" in conditioning:
            return {self.names.latent: latent, **conditioning, "modulation": conditioning["modulation"][step : step + 1]}
        timestep = np.float32(self.sigmas[step]) * np.float32(1000)
        return {self.names.latent: latent, **conditioning, "timestep": np.array([timestep])}

    def decoder_inputs(self, latent: np.ndarray) -> dict[str, np.ndarray]:
        if self.scales_in_decoder:
            return {"latent": latent}
        return {"latent_sample": latent / np.float32(self.latent.scaling_factor) + np.float32(self.latent.shift_factor)}

    def pixels(self, outputs: Arrays) -> np.ndarray:
        """float32 [3, H, W] in [0, 1]."""
        if self.scales_in_decoder:
            return outputs["image"][0].astype(np.float32)
        return np.clip(outputs["sample"][0].astype(np.float32) / 2 + np.float32(0.5), 0, 1)


def contract_of(manifest: Manifest) -> Contract:
    return Contract(NAMES[manifest.contract], "latent_scale_in_decoder" in manifest.rewrites, manifest.latent, manifest.sigmas)


def _last_but_one(outputs: Arrays) -> str:
    last = max(int(name.removeprefix("hidden_states.")) for name in outputs if name.startswith("hidden_states."))
    return f"hidden_states.{last - 1}"
