"""Quantization of activations. Compressed weights are constants: see `runtimes/coreml/compressed.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from runtimes.coreml.datatypes import data_type_named
from runtimes.coreml.operations.registry import operation


def _along(vector: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """[n] -> [1, ..., n, ..., 1] with n on the axis; a scalar stays one."""
    if axis is None or vector.dim() == 0:
        return vector
    return vector.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])


@operation("quantize")
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """clip(round(input / scale) + zero_point), halves rounded to even."""
    dtype = data_type_named(output_dtype)
    levels = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        levels = levels + _along(zero_point, input, axis)
    bounds = torch.iinfo(dtype.storage)
    return torch.clamp(levels, bounds.min, bounds.max).to(dtype.storage)


@operation("dequantize")
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """scale * (input - zero_point)."""
    levels = input.float()
    if zero_point is not None:
        levels = levels - _along(zero_point, input, axis)
    return levels * _along(scale, input, axis)
