"""`vae_decoder`: the decoder of diffusers' AutoencoderKL in SD3's form.

With the rewrite `latent_scale_in_decoder`: latent [1, C, h, w] as the sampler leaves it -> image [1, 3, 8h, 8w] in [0, 1].
Without, and in contract "diffusers": latent_sample [1, C, h, w], already divided by scaling_factor and shifted -> sample in
[-1, 1].

Group norm is left whole for each format to lower. In fp16 it is where this network overflows: the squares that its
variance sums leave fp16's range once an activation passes 256, so a format must keep them in float32 or measure the range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.components.attention import Attend
from export.components.component import Component
from export.components.config import require
from runtimes.graph import TensorSpec

_EPSILON = 1e-6  # of every group norm in diffusers' decoder


@dataclass(frozen=True)
class VaeConfig:
    """diffusers' AutoencoderKL: the part of its configuration that the decoder needs, with its defaults."""

    block_out_channels: tuple[int, ...]
    latent_channels: int
    scaling_factor: float
    shift_factor: float | None = None
    out_channels: int = 3
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    up_block_types: tuple[str, ...] | None = None

    @property
    def factor(self) -> int:
        """Pixels a latent value stands for, each way."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check(self, where: str) -> None:
        """Raises `UserError` for an autoencoder that this file does not build."""
        require(self.act_fn == "silu", where, "act_fn", self.act_fn, "silu")
        plain = self.up_block_types is None or set(self.up_block_types) == {"UpDecoderBlock2D"}
        require(plain, where, "up_block_types", self.up_block_types, "UpDecoderBlock2D")
        require(self.out_channels == 3, where, "out_channels", self.out_channels, "3 (RGB)")


class VaeDecoder(nn.Module):
    """Weights named as in AutoencoderKL; latent_sample -> sample, one image."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()
        self.decoder = _Decoder(config)

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        return (self.decoder(self.post_quant_conv(latent_sample)),)


class ScaledVaeDecoder(VaeDecoder):
    """The same with latent scale and shift, and the range of the image, inside."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        self.scale = 1 / config.scaling_factor
        self.shift = config.shift_factor or 0.0

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        (sample,) = super().forward(latent * self.scale + self.shift)
        return (torch.clamp(sample * 0.5 + 0.5, 0.0, 1.0),)


class _Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _MidBlock(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [
                _UpBlock(channels[max(i - 1, 0)], channels[i], groups, config.layers_per_block + 1, i < len(channels) - 1)
                for i in range(len(channels))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPSILON)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        sample = self.mid_block(self.conv_in(sample))
        for block in self.up_blocks:
            sample = block(sample)
        return self.conv_out(F.silu(self.conv_norm_out(sample)))


class _MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Resnet(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([_Attention(channels, groups)] if add_attention else [])

    def forward(self, sample: Tensor) -> Tensor:
        sample = self.resnets[0](sample)
        for attention in self.attentions:
            sample = attention(sample)
        return self.resnets[1](sample)


class _UpBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int, layers: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Resnet(channels_out if i else channels_in, channels_out, groups) for i in range(layers)])
        self.upsamplers = nn.ModuleList([_Upsample(channels_out)] if upsample else [])

    def forward(self, sample: Tensor) -> Tensor:
        for resnet in self.resnets:
            sample = resnet(sample)
        for upsampler in self.upsamplers:
            sample = upsampler(sample)
        return sample


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(F.interpolate(sample, scale_factor=2.0, mode="nearest"))


class _Resnet(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=_EPSILON)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=_EPSILON)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, sample: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(sample)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return self.conv_shortcut(sample) + inner


class _Attention(nn.Module):
    """One head over all positions of the smallest image."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.attend = Attend()

    def forward(self, sample: Tensor) -> Tensor:
        _, channels, height, width = sample.shape
        states = self.group_norm(sample).reshape(1, channels, height * width).transpose(1, 2)
        # A head axis of one, which every fused attention asks for.
        query, key, value = (linear(states).unsqueeze(2) for linear in (self.to_q, self.to_k, self.to_v))
        states = self.to_out[0](self.attend(query, key, value))
        return sample + states.transpose(1, 2).reshape(1, channels, height, width)


# The encoder draws no picture.
_IGNORED = ("encoder.", "quant_conv.")


def vae_decoder(config: VaeConfig, height: int, width: int) -> Component:
    """latent -> image in [0, 1]; `height` and `width` are the latent's."""
    return _component(config, "latent", "image", height, width, lambda: ScaledVaeDecoder(config))


def vae_decoder_unscaled(config: VaeConfig, height: int, width: int) -> Component:
    """latent_sample -> sample in [-1, 1], as diffusers' decoder; `height` and `width` are the latent's."""
    return _component(config, "latent_sample", "sample", height, width, lambda: VaeDecoder(config))


def _component(
    config: VaeConfig, input_name: str, output_name: str, height: int, width: int, make: Callable[[], nn.Module]
) -> Component:
    factor = config.factor
    return Component(
        name="vae_decoder",
        folder="vae",
        inputs=(TensorSpec(input_name, "float32", (1, config.latent_channels, height, width)),),
        outputs=(TensorSpec(output_name, "float32", (1, config.out_channels, factor * height, factor * width)),),
        make=make,
        ignored=_IGNORED,
    )
