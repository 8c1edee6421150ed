"""Activation functions. Each is computed in float32 and rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.operations.registry import operation


def per_channel(vector: Tensor, rank: int) -> Tensor:
    """[channels] -> [1, channels, 1, ...] of the given rank; a scalar stays one."""
    return vector if vector.dim() == 0 else vector.reshape(1, -1, *[1] * (rank - 2))


@operation("relu", stored=True)
def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@operation("relu6", stored=True)
def relu6(x: Tensor) -> Tensor:
    return torch.clamp(x, 0.0, 6.0)


@operation("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(F.leaky_relu(x, alpha), max=beta)


@operation("thresholded_relu", stored=True)
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


@operation("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return F.leaky_relu(x, alpha)


@operation("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """x: [batch, channels, ...]; alpha: [channels]."""
    return torch.where(x > 0, x, x * per_channel(alpha, x.dim()))


@operation("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


@operation("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"unknown gelu mode {mode!r}")


@operation("silu", stored=True)
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@operation("sigmoid", stored=True)
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@operation("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operation("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@operation("softplus")
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@operation("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """x: [batch, channels, ...]; alpha, beta: [channels]."""
    scaled = x * per_channel(beta, x.dim())
    return per_channel(alpha, x.dim()) * torch.logaddexp(scaled, torch.zeros_like(scaled))


@operation("softsign")
def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


@operation("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@operation("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)
