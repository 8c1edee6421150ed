"""Normalization layers, computed in float32 and rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.activation import per_channel
from runtimes.coreml.operations.registry import Ints, operation


def _scale_and_shift(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is not None:
        x = x * gamma
    return x if beta is None else x + beta


@operation("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """x: [batch, channels, ...]; the rest: [channels]."""
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)


@operation("instance_norm")
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """x: [batch, channels, *size], normalized over *size; gamma, beta: [channels]."""
    variance, mean = torch.var_mean(x, dim=tuple(range(2, x.dim())), correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(variance + epsilon)
    gamma = None if gamma is None else per_channel(gamma, x.dim())
    return _scale_and_shift(normal, gamma, None if beta is None else per_channel(beta, x.dim()))


@operation("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalized over `axes` (all by default); gamma, beta: the sizes of those axes."""
    rank = x.dim()
    dims = sorted(axis % rank for axis in axes) if axes is not None else list(range(rank))
    if dims == list(range(rank - len(dims), rank)):
        return F.layer_norm(x, [x.shape[dim] for dim in dims], gamma, beta, epsilon)
    variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    sizes = [x.shape[dim] if dim in dims else 1 for dim in range(rank)]
    gamma = None if gamma is None else gamma.reshape(sizes)
    normal = (x - mean) * torch.rsqrt(variance + epsilon)
    return _scale_and_shift(normal, gamma, None if beta is None else beta.reshape(sizes))


@operation("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x / sqrt(sum of squares over the last three dimensions + epsilon)."""
    return x * torch.rsqrt((x * x).sum(dim=(-3, -2, -1), keepdim=True) + epsilon)


@operation("local_response_norm")
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """x / (k + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    return F.local_response_norm(x, size, alpha, beta, k)
