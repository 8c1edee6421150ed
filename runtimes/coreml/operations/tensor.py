"""Operations that make tensors, pad them, or order their elements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.coreml.datatypes import data_type_named
from runtimes.coreml.operations.registry import Ints, Tensors, operation


@operation("fill", stored=True)
def fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.expand(shape).contiguous()


@operation("fill_like", stored=True)
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return torch.zeros(ref_tensor.shape) if value is None else value.expand(ref_tensor.shape).contiguous()


@operation("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """start, start + step, ... before end."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@operation("one_hot", stored=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """A new axis of the given size; an index outside it, and a negative one, leaves its vector off."""
    rank = indices.dim() + 1
    places = torch.arange(one_hot_vector_size).reshape([-1 if dim == axis % rank else 1 for dim in range(rank)])
    hit = indices.long().unsqueeze(axis) == places
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.tensor(0, dtype=on.dtype) if off_value is None else off_value
    return torch.where(hit, on, off)


def _mirrored(size: int, before: int, after: int, mode: str) -> Tensor:
    """Which element stands at each place of a padded dimension."""
    places = torch.arange(-before, size + after)
    if mode == "replicate":
        return places.clamp(0, size - 1)
    places = places.abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)


@operation("pad", stored=True)
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """pad: (before, after) of each of the last dimensions, in their order."""
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    if mode == "constant":
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"unknown pad mode {mode!r}")
    first = x.dim() - len(pairs)
    for dim, (before, after) in enumerate(pairs, first):
        if before or after:
            x = x.index_select(dim, _mirrored(x.shape[dim], before, after, mode))
    return x


@operation("band_part", stored=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zeros outside the band of the innermost matrices; a negative width keeps that whole triangle."""
    below = torch.arange(x.shape[-2]).unsqueeze(1) - torch.arange(x.shape[-1])
    keep = torch.ones_like(below, dtype=torch.bool)
    if lower >= 0:
        keep &= below <= lower
    if upper >= 0:
        keep &= -below <= upper
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


@operation("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    if reverse:
        x = x.flip(axis)
    total = torch.cumsum(x, axis)
    if exclusive:
        total = total.roll(1, axis)
        total.select(axis, 0).zero_()
    return total.flip(axis) if reverse else total


@operation("non_zero", stored=True)
def non_zero(x: Tensor) -> Tensor:
    """[count, rank] indices in row-major order."""
    return torch.nonzero(x)


@operation("topk", stored=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensors:
    """The k largest (smallest if ascending), the earlier of equals first; k = -1 takes all. Sorted in any case."""
    count = x.shape[axis] if k == -1 else k
    values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    values = values.narrow(axis, 0, count)
    if not return_indices:
        return (values,)
    return values, indices.narrow(axis, 0, count).to(data_type_named(output_indices_dtype).storage)


@operation("argsort", stored=True)
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True)
