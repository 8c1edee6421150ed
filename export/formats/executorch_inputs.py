"""How XNNPACK rounds the inputs of integer linears, and linears that take the rounding error through the same integers again.

XNNPACK multiplies 8-bit integers alone. An input of 16 bits is the sum of two of 8: what rounding leaves is rounded once more,
with a scale of its own, and the same weights multiply both. That costs a second product and not a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Added to a float32 of at most 2^22 and subtracted again, it rounds to the nearest integer, ties to even: XNNPACK can add.
_ROUNDS = 1.5 * 2**23


def round_per_token(states: Tensor) -> Tensor:
    """Each row (last axis) rounded to 256 levels between its minimum and maximum, 0 among them: XNNPACK's dynamic int8.

    scale = (max - min) / 255 with min <= 0 <= max, zero = -128 - round(min / scale),
    x -> (clamp(round(x / scale) + zero, -128, 127) - zero) * scale
    """
    low, high = _range(states)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128.0 - torch.round(low / scale)).clamp(-128, 127)
    return ((torch.round(states / scale) + zero).clamp(-128, 127) - zero) * scale


def round_twice(states: Tensor) -> Tensor:
    """Rounded by `round_per_token`, and with what that leaves, rounded too: what `TwiceRounded` multiplies."""
    return round_per_token(states) + round_per_token(states - _nearest(states))


class TwiceRounded(nn.Module):
    """A linear [.., T, in] -> [.., T, out] over its inputs and, as T more tokens, over what rounding leaves of them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        if linear.bias is not None:  # which both halves of the sum add
            linear.bias = nn.Parameter(linear.bias / 2, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.shape[-2]
        both = self.linear(torch.cat((states, states - _nearest(states)), dim=-2))
        return both[..., :tokens, :] + both[..., tokens:, :]


def _nearest(states: Tensor) -> Tensor:
    """The multiples of each row's scale that are nearest to its values: in all but the ends of the row's range the values that
    `round_per_token` gives, in operations that XNNPACK has beside the minimum and maximum."""
    low, high = _range(states)
    step = ((high - low) * (1 / 255)).clamp(min=torch.finfo(torch.float32).eps)
    return (states / step + _ROUNDS - _ROUNDS) * step


def _range(states: Tensor) -> tuple[Tensor, Tensor]:
    return states.amin(dim=-1, keepdim=True).clamp(max=0.0), states.amax(dim=-1, keepdim=True).clamp(min=0.0)
