"""How near values come to float16's range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class ValueRange:
    """`largest` is the largest finite magnitude before rounding; `share` its share of float16's largest number, above 1
    where the value overflows. `non_finite` counts the elements that are infinite or NaN as stored."""

    operation: str
    name: str
    largest: float
    share: float
    non_finite: int
    elements: int


def measure(operation: str, name: str, exact: Tensor, stored: Tensor) -> ValueRange:
    """The range of one value, from its form before and after rounding to its declared type."""
    magnitudes = exact.float().abs()
    finite = torch.isfinite(magnitudes)
    largest = float(magnitudes[finite].max()) if bool(finite.any()) else 0.0
    non_finite = int((~torch.isfinite(stored)).sum())
    return ValueRange(operation, name, largest, largest / FLOAT16_MAX, non_finite, stored.numel())
