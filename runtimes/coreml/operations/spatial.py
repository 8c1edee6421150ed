"""Rearrangements between channels, batch and the two spatial dimensions of [batch, channels, height, width]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.registry import Ints, operation


@operation("depth_to_space", stored=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """The block's place is the slow part of the channel index, as in TensorFlow."""
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@operation("space_to_depth", stored=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@operation("pixel_shuffle", stored=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """The block's place is the fast part of the channel index, as in PyTorch."""
    return F.pixel_shuffle(x, upscale_factor)


@operation("pixel_unshuffle", stored=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@operation("space_to_batch", stored=True)
def space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints) -> Tensor:
    """paddings: [[top, bottom], [left, right]], which arrives flat."""
    top, bottom, left, right = paddings
    x = F.pad(x, (left, right, top, bottom))
    n, c, h, w = x.shape
    bh, bw = block_shape
    blocks = x.reshape(n, c, h // bh, bh, w // bw, bw).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(bh * bw * n, c, h // bh, w // bw)


@operation("batch_to_space", stored=True)
def batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    """crops: [[top, bottom], [left, right]], which arrives flat."""
    top, bottom, left, right = crops
    n, c, h, w = x.shape
    bh, bw = block_shape
    blocks = x.reshape(bh, bw, n // (bh * bw), c, h, w).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(n // (bh * bw), c, h * bh, w * bw)
    return whole[:, :, top : h * bh - bottom, left : w * bw - right]


@operation("crop", stored=True)
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    height, width = x.shape[-2:]
    return x[..., crop_height[0] : height - crop_height[1], crop_width[0] : width - crop_width[1]]
