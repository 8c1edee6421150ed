"""Symmetric block integers: what ONNX Runtime's MatMulNBits, its per-channel DequantizeLinear and XNNPACK's linears store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.compression.stored import INTEGER_BITS, IntegerWeight

# Largest magnitude / steps is not the best 4-bit scale: clipping the tail, or giving the largest weight the extra step that
# two's complement has on the negative side, often has a smaller error. These multiples of it are tried.
_SCALE_TRIALS = {4: tuple(np.linspace(0.7, 1.1, 17)), 8: (1.0,)}


def quantize(weight: NDArray[np.floating], bits: int, block: int | None = None, bfloat16_scales: bool = False) -> IntegerWeight:
    """Block integers of a weight [out, in...].

    block: inputs that share a scale; None for one scale an output channel. It must divide the inputs of a row.
    bfloat16_scales: round the scales to what a bfloat16 holds (XNNPACK stores the scales of 4-bit groups that way).
    Raises ValueError on a block that does not fit and on values that are not finite.
    """
    if bits not in INTEGER_BITS:
        raise ValueError(f"block integers have 4 or 8 bits, not {bits}")
    out = weight.shape[0]
    row = weight.size // out
    size = block or row
    if row % size:
        raise ValueError(f"blocks of {size} do not divide {row} inputs")
    blocks = weight.astype(np.float32).reshape(out, row // size, size)
    if not np.isfinite(blocks).all():
        raise ValueError("block integers cannot hold NaN or infinite values")
    scales = fit_scales(blocks, bits, bfloat16_scales)
    low, high = integer_range(bits)
    ints = np.clip(np.rint(blocks / scales[:, :, None]), low, high).astype(np.int8)
    return IntegerWeight(bits, ints.reshape(weight.shape), scales, 2 if bfloat16_scales else 4)


def integer_range(bits: int) -> tuple[int, int]:
    """Least and largest value of two's complement."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def fit_scales(
    blocks: NDArray[np.float32], bits: int, bfloat16: bool, importance: NDArray[np.floating] | None = None
) -> NDArray[np.float32]:
    """The scale [out, blocks] of every block of [out, blocks, size] with the least squared error of those tried.

    importance: [blocks, size], weights of the squared errors; all equal if None.
    """
    low, high = integer_range(bits)
    weights = np.ones(blocks.shape[1:], np.float32) if importance is None else importance.astype(np.float32)
    steps = np.abs(blocks).max(axis=2) / np.float32(high)
    unit = np.where(steps > 0, steps, np.float32(1))[:, :, None]  # squares of the smallest floats would all be 0
    best_error = np.full(steps.shape, np.inf, np.float32)
    scales = np.empty_like(steps)
    for trial in _SCALE_TRIALS[bits]:
        scale = storable_scales(steps * np.float32(trial), bfloat16)
        rounded = np.clip(np.rint(blocks / scale[:, :, None]), low, high)
        error = np.einsum("obi,bi->ob", np.square((blocks - rounded * scale[:, :, None]) / unit), weights)
        better = error < best_error
        best_error[better] = error[better]
        scales[better] = scale[better]
    return scales


def storable_scales(scales: NDArray[np.float32], bfloat16: bool) -> NDArray[np.float32]:
    """Positive normal scales (an all-zero block gets 1), rounded to the nearest bfloat16 where asked."""
    positive = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales).astype(np.float32)
    if not bfloat16:
        return positive
    pattern = positive.view(np.uint32)
    rounded = pattern + np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
