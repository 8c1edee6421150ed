"""Pooling over one, two or three spatial dimensions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.convolution import pad_spatial, spatial_pads
from runtimes.coreml.operations.registry import Ints, operation

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _windows(
    x: Tensor, kernel: Ints, strides: Ints, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The declared padding, and how far beyond it the last windows of ceil mode reach, as (0, extra) pairs.

    In ceil mode a window counts unless it starts in the padding behind, which is PyTorch's rule.
    """
    size = tuple(x.shape[2:])
    pads = spatial_pads(pad_type, pad, size, kernel, strides)
    if not ceil_mode:
        return pads, [(0, 0)] * len(pads)
    extras = []
    for n, k, s, (before, after) in zip(size, kernel, strides, pads, strict=True):
        count = math.ceil((n + before + after - k) / s) + 1
        if (count - 1) * s >= n + before:
            count -= 1
        extras.append((0, max(0, (count - 1) * s + k - (n + before + after))))
    return pads, extras


@operation("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or (1,) * len(kernel_sizes)
    pads, extras = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    lowest = -math.inf
    padded = pad_spatial(pad_spatial(x, pads, lowest), extras, lowest)
    return _MAX_POOL[x.dim() - 2](padded, kernel_sizes, strides)


@operation("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """Declared padding counts as zeros unless excluded; what ceil mode adds beyond it never counts."""
    rank = x.dim() - 2
    strides = strides or (1,) * len(kernel_sizes)
    pads, extras = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    pool = _AVG_POOL[rank]
    average = pool(pad_spatial(pad_spatial(x, pads), extras), kernel_sizes, strides)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    counted = pad_spatial(pad_spatial(counted, pads, 0.0 if exclude_padding_from_average else 1.0), extras)
    return average / pool(counted, kernel_sizes, strides)


@operation("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The square root of the sum of squares in each window."""
    strides = strides or (1,) * len(kernel_sizes)
    pads, extras = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    mean = _AVG_POOL[x.dim() - 2](pad_spatial(pad_spatial(x * x, pads), extras), kernel_sizes, strides)
    return torch.sqrt(mean * math.prod(kernel_sizes))
