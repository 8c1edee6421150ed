"""GELU in its tanh form, as the transformer's feed-forward uses it, in the form that the backend computes best."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TanhGelu(nn.Module):
    """x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016).

    `spelled` computes the same as x sigmoid(2 z), since (1 + tanh(z)) / 2 = sigmoid(2 z): XNNPACK's own GELU in tanh form is
    off by 6e-5 (ExecuTorch 1.4.1), which its sigmoid is not. Core ML has an accurate operation of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spelled = False

    def forward(self, states: Tensor) -> Tensor:
        if self.spelled:
            return states * torch.sigmoid(math.sqrt(8 / math.pi) * (states + 0.044715 * states * states * states))
        return F.gelu(states, approximate="tanh")


def use_spelled_gelu(module: nn.Module, spelled: bool) -> nn.Module:
    """Switches every tanh GELU of a module to elementary operations or to the backend's own; returns the module."""
    for part in module.modules():
        if isinstance(part, TanhGelu):
            part.spelled = spelled
    return module
