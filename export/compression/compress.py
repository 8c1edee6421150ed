"""One weight into a stored weight, and stored weights back into a module."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from export.compression.integers import quantize
from export.compression.palettes import palettize
from export.compression.schemes import FloatScheme, PaletteScheme, Scheme
from export.compression.stored import FloatWeight, StoredWeight
from export.errors import UserError

HALF_MAX = 65504.0


def store(name: str, values: np.ndarray, scheme: Scheme, importance: np.ndarray | None = None) -> StoredWeight:
    """One weight under one scheme. Raises UserError naming the weight where the scheme cannot hold it.

    importance: what a squared error of each value counts in a palette, of the values' shape; all equal if None.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
    try:
        if isinstance(scheme, FloatScheme):
            return FloatWeight(values.astype(np.float32) if scheme.bits == 32 else _half(name, values))
        if isinstance(scheme, PaletteScheme):
            return palettize(_half(name, values), scheme.bits, scheme.group, importance, scheme.scaled, scheme.vector)
        return quantize(values, scheme.bits, scheme.block, scheme.bfloat16_scales)
    except ValueError as error:
        raise UserError(f"{name} {list(values.shape)}: {error}") from None


def with_stored(module: nn.Module, stored: Mapping[str, StoredWeight]) -> nn.Module:
    """The compressed reference: a copy of the module with the decompressed weights; all other tensors are shared.

    What is replaced may lie on the meta device.
    """
    return with_tensors(module, {name: torch.from_numpy(weight.dequantize()) for name, weight in stored.items()})


def with_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the module with other tensors of the same shapes as the named parameters; all other tensors are shared."""
    # Tensors in the memo are not copied: the copy takes the new one, or the original where there is none.
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for name, tensor in tensors.items():
        original = parameter(module, name)
        if original.shape != tensor.shape:
            raise ValueError(f"{name} has shape {list(original.shape)}, its stored weight {list(tensor.shape)}")
        memo[id(original)] = nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(module, memo)


def mean_bits(stored: Mapping[str, StoredWeight]) -> float:
    """Stored bits a weight, palettes and scales included; 0 where nothing is stored."""
    count = sum(math.prod(weight.shape) for weight in stored.values())
    return 8 * sum(weight.nbytes for weight in stored.values()) / count if count else 0.0


def parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that a recipe names. Raises `UserError` where the module has none."""
    try:
        return module.get_parameter(name)
    except AttributeError:
        raise UserError(f"the recipe names {name}, which the model does not have") from None


def _half(name: str, values: np.ndarray) -> np.ndarray:
    """float16 values. Raises UserError where the magnitude exceeds what float16 holds."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest > HALF_MAX:
        raise UserError(f"{name} holds {largest:g}, more than float16 can ({HALF_MAX:g})")
    return values.astype(np.float16)
