"""Stable Diffusion 3 and 3.5 (and few-step students of them): two CLIPs, the MMDiT, a 16-channel autoencoder; T5 left out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from export.checkpoint import Checkpoint
from export.components.component import Component
from export.components.conditioner import TRAIN_TIMESTEPS, conditioner
from export.components.config import read_config, require
from export.components.mmdit import TransformerConfig
from export.components.text_encoder import TextEncoderConfig, text_encoder, text_encoder_all_states
from export.components.transformer import Layout, transformer
from export.components.vae_decoder import VaeConfig, vae_decoder, vae_decoder_unscaled
from export.components.whole_transformer import whole_transformer
from export.errors import UserError
from export.families.family import GraphOptions
from export.rewrites import NULL_TOKENS, rewrites_of
from runtimes.bundle import LatentLayout


@dataclass(frozen=True)
class Sd3:
    """The model's configurations, and how they become components."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    text_encoder_2: TextEncoderConfig
    vae: VaeConfig
    tokens: int
    name: str = "sd3"

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Sd3:
        """The model of a checkpoint; `UserError` names what it has that this family does not build."""

        def config(kind: Any, folder: str) -> Any:
            where = f"{checkpoint.name}/{folder}/config.json"
            found = read_config(kind, checkpoint.config(folder), where)
            found.check(where)
            return found

        model = cls(
            transformer=config(TransformerConfig, "transformer"),
            text_encoder=config(TextEncoderConfig, "text_encoder"),
            text_encoder_2=config(TextEncoderConfig, "text_encoder_2"),
            vae=config(VaeConfig, "vae"),
            tokens=checkpoint.tokens,
        )
        model._check_fit(checkpoint)
        return model

    @property
    def default_resolution(self) -> tuple[int, int]:
        side = self.transformer.sample_size * self.vae.factor
        return side, side

    @property
    def blocks(self) -> int:
        return self.transformer.num_layers

    def latent_shape(self, options: GraphOptions) -> tuple[int, int, int, int]:
        return 1, self.transformer.in_channels, options.height // self.vae.factor, options.width // self.vae.factor

    def latent_layout(self, options: GraphOptions) -> LatentLayout:
        _, channels, height, width = self.latent_shape(options)
        return LatentLayout(
            channels=channels,
            height=height,
            width=width,
            vae_factor=self.vae.factor,
            scaling_factor=self.vae.scaling_factor,
            shift_factor=self.vae.shift_factor or 0.0,
        )

    def components(self, options: GraphOptions) -> tuple[Component, ...]:
        self._check_options(options)
        encoders = (self.text_encoder, self.text_encoder_2)
        build = text_encoder_all_states if options.contract == "diffusers" else text_encoder
        texts = tuple(build(name, encoder, self.tokens) for name, encoder in zip(ENCODER_FOLDERS, encoders, strict=True))
        return *texts, *self._denoiser(options), self._decoder(options)

    def _denoiser(self, options: GraphOptions) -> tuple[Component, ...]:
        """Conditioner and transformer, or the transformer with both inside."""
        rewrites = options.rewrites
        _, _, height, width = self.latent_shape(options)
        context = self.tokens + rewrites.null_tokens
        copies = NULL_TOKENS // rewrites.null_tokens
        layout = Layout(height, width, context, copies, rewrites.crop_positions)
        if rewrites.hoist_conditioner:
            encoders = (self.text_encoder, self.text_encoder_2)
            first = conditioner(self.transformer, encoders, self.tokens, rewrites.null_tokens, options.sigmas)
            return first, *transformer(self.transformer, layout, options.chunks)
        names = ("hidden_states", "out_hidden_states") if options.contract == "diffusers" else ("latent", "velocity")
        return (whole_transformer(self.transformer, layout, *names),)

    def _decoder(self, options: GraphOptions) -> Component:
        build = vae_decoder if options.rewrites.latent_scale_in_decoder else vae_decoder_unscaled
        return build(self.vae, *self.latent_shape(options)[2:])

    def _check_fit(self, checkpoint: Checkpoint) -> None:
        """The parts must fit each other."""
        config, encoders = self.transformer, (self.text_encoder, self.text_encoder_2)
        where = f"{checkpoint.name}/transformer/config.json"
        pooled = sum(encoder.projection_dim for encoder in encoders)
        given = config.pooled_projection_dim
        require(given == pooled, where, "pooled_projection_dim", given, f"the text encoders' projections joined, {pooled}")
        width = sum(encoder.hidden_size for encoder in encoders)
        given = config.joint_attention_dim
        require(given >= width, where, "joint_attention_dim", given, f"the text encoders' states joined, {width}, or more")
        channels = self.vae.latent_channels
        require(config.in_channels == channels, where, "in_channels", config.in_channels, f"the autoencoder's {channels}")
        positions = min(encoder.max_position_embeddings for encoder in encoders)
        tokenizer = f"{checkpoint.name}/tokenizer/tokenizer_config.json"
        require(self.tokens <= positions, tokenizer, "model_max_length", self.tokens, f"at most the text encoders' {positions}")
        scheduler = checkpoint.config("scheduler").get("num_train_timesteps", TRAIN_TIMESTEPS)
        where = f"{checkpoint.name}/scheduler/scheduler_config.json"
        require(scheduler == TRAIN_TIMESTEPS, where, "num_train_timesteps", scheduler, f"{TRAIN_TIMESTEPS}")

    def _check_options(self, options: GraphOptions) -> None:
        step = self.vae.factor * self.transformer.patch_size
        resolution = f"--resolution {options.width}x{options.height}"
        if any(side < step or side % step for side in (options.width, options.height)):
            raise UserError(f"{resolution}: both must be multiples of {step}; try {_nearest(options, step)}")
        side = self.transformer.pos_embed_max_size * step
        if max(options.width, options.height) > side:
            raise UserError(f"{resolution}: this model's positional table holds at most {side} pixels each way")
        layers = self.transformer.num_layers
        if not 1 <= options.chunks <= layers:
            raise UserError(f"--chunks {options.chunks}: this transformer has {layers} blocks; choose 1 to {layers}")
        if options.chunks > 1 and not options.rewrites.hoist_conditioner:
            raise UserError(f"--chunks {options.chunks}: only a transformer without its conditioner comes in chunks; choose 1")
        kept = dataclasses.replace(options.rewrites, crop_positions=True)
        if options.contract == "diffusers" and kept != rewrites_of("diffusers"):
            raise UserError(
                "--contract diffusers keeps diffusers' inputs and outputs: no rewrite but crop_positions goes with it"
            )


ENCODER_FOLDERS = ("text_encoder", "text_encoder_2")


def _nearest(options: GraphOptions, step: int) -> str:
    width, height = (max(step, round(side / step) * step) for side in (options.width, options.height))
    return f"{width}x{height}"
