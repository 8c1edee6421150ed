"""The exact graph rewrites: each computes the same function as the original graph, in less time or memory.

Below, f is the original and g the rewritten graph. "Equal" means equal in exact arithmetic; tests/export/test_rewrites.py
shows each, switched on and off, to agree with unmodified diffusers to float32 rounding.

fold_null_tokens: without T5, diffusers appends n = 256 all-zero tokens to the prompt. Proof that one is enough: context
    tokens carry no position and see each other only through attention, which treats equal tokens equally; so tokens that are
    equal before a block are equal after it, and by induction all n are one token t in every block. Each query's softmax then
    has n equal terms: sum = rest + n exp(q.k_t) = rest + exp(q.k_t + log n), and likewise n exp(q.k_t) v_t in the numerator.
    Hence one token t whose attention logit is raised by log n.

hoist_conditioner: everything that depends on the prompt and the sigmas alone (context_embedder, time and text embedding,
    every block's and the last norm's modulation linear) is computed once a prompt by `conditioner`, in the order in which
    the transformer uses it. The composition of the two graphs is f. context_embedder meets the join of both encoders padded
    with zeros to joint_attention_dim, so that only its first columns matter: the others are not read.

crop_positions: the positional table is a constant, and so is the crop of it that the fixed grid uses.

latent_scale_in_decoder: `vae_decoder` takes the sampler's latent z, divides by scaling_factor and adds shift_factor, and
    gives clamp(image / 2 + 1/2, 0, 1): the pipeline's own two lines around the decoder, moved inside.

One more is always on, for it changes no contract: the last block's context queries feed nothing (its context output is
dropped), so they are neither computed nor read.
"""

from __future__ import annotations

from dataclasses import dataclass

NULL_TOKENS = 256
"""Zero tokens that diffusers puts in T5's place: `max_sequence_length` of `StableDiffusion3Pipeline.encode_prompt`."""


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites are on. Each changes the contract of the graphs it touches, as the component's file says."""

    fold_null_tokens: bool = True
    hoist_conditioner: bool = True
    crop_positions: bool = True
    latent_scale_in_decoder: bool = True

    @property
    def null_tokens(self) -> int:
        """Null tokens that stand in the graphs: 1 or 256."""
        return 1 if self.fold_null_tokens else NULL_TOKENS


def rewrites_of(contract: str) -> Rewrites:
    """A contract's own: all for "flash"; for "diffusers" those that leave diffusers' inputs and outputs as they are."""
    if contract == "diffusers":
        return Rewrites(fold_null_tokens=False, hoist_conditioner=False, latent_scale_in_decoder=False)
    return Rewrites()
