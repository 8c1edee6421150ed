"""Matrix products, accumulated in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.registry import Tensors, operation


@operation("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [..., in]; weight: [out, in]; bias: [out]."""
    if x.is_floating_point():
        return F.linear(x, weight, bias)
    product = torch.matmul(x, weight.T)
    return product if bias is None else product + bias


@operation("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Batched product with numpy's broadcasting; a transposition of a vector has no effect."""
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.dim() > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


@operation("einsum")
def einsum(values: Tensors, equation: str) -> Tensor:
    return torch.einsum(equation, *values)
