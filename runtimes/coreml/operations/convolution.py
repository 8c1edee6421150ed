"""Convolutions over one, two or three spatial dimensions, accumulated in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.registry import Ints, operation

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def spatial_pads(pad_type: str, pad: Ints | None, size: Ints, kernel: Ints, strides: Ints) -> list[tuple[int, int]]:
    """Padding before and after each spatial dimension. `kernel` is the dilated one.

    "same" pads so that the output has ceil(size / stride) elements, an odd one behind; "same_lower" puts it in front.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(size)
    if pad_type == "custom":
        pads = pad if pad is not None else (0,) * (2 * len(size))
        return [(pads[2 * i], pads[2 * i + 1]) for i in range(len(size))]
    totals = [max(0, (-(-n // s) - 1) * s + k - n) for n, k, s in zip(size, kernel, strides, strict=True)]
    if pad_type == "same":
        return [(total // 2, total - total // 2) for total in totals]
    if pad_type == "same_lower":
        return [(total - total // 2, total // 2) for total in totals]
    raise ValueError(f"unknown pad_type {pad_type!r}")


def pad_spatial(x: Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pads the last `len(pads)` dimensions; negative padding crops."""
    if not any(before or after for before, after in pads):
        return x
    return F.pad(x, [amount for pair in reversed(pads) for amount in pair], value=value)


def _dilated(kernel: Ints, dilations: Ints) -> Ints:
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))


@operation("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """x: [batch, in, *size]; weight: [out, in / groups, *kernel]; bias: [out]."""
    rank = x.dim() - 2
    strides = strides or (1,) * rank
    dilations = dilations or (1,) * rank
    pads = spatial_pads(pad_type, pad, tuple(x.shape[2:]), _dilated(tuple(weight.shape[2:]), dilations), strides)
    if all(before == after for before, after in pads):
        return _CONV[rank](x, weight, bias, strides, tuple(before for before, _ in pads), dilations, groups)
    return _CONV[rank](pad_spatial(x, pads), weight, bias, strides, 0, dilations, groups)


@operation("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """x: [batch, in, *size]; weight: [in, out / groups, *kernel]; bias: [out].

    Padding crops the full output. `output_shape`, or size * stride for "same", fixes its size; where that reaches beyond
    the full output, nothing but the bias arrives.
    """
    rank = x.dim() - 2
    strides = strides or (1,) * rank
    dilations = dilations or (1,) * rank
    full = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, groups, dilations)
    extents = tuple(full.shape[2:])
    if pad_type in ("same", "same_lower"):
        sizes = output_shape[2:] if output_shape else tuple(n * s for n, s in zip(x.shape[2:], strides, strict=True))
        totals = [max(0, extent - size) for extent, size in zip(extents, sizes, strict=True)]
        starts = [total // 2 if pad_type == "same" else total - total // 2 for total in totals]
    else:
        pads = spatial_pads(pad_type, pad, extents, extents, strides)
        starts = [before for before, _ in pads]
        cropped = tuple(extent - before - after for extent, (before, after) in zip(extents, pads, strict=True))
        sizes = output_shape[2:] if output_shape else cropped
    crops = [(-start, start + size - extent) for start, size, extent in zip(starts, sizes, extents, strict=True)]
    result = pad_spatial(full, crops)
    return result if bias is None else result + bias.reshape(1, -1, *[1] * rank)
