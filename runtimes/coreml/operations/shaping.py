"""Operations that change a tensor's shape or order, never its values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runtimes.coreml.operations.registry import Bools, Ints, Tensors, operation


@operation("reshape", stored=True)
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """A 0 takes over the dimension of x counted from the right (1 where x has none); one -1 takes what is left."""
    offset = x.dim() - len(shape)
    sizes = [size if size != 0 else (x.shape[place + offset] if place + offset >= 0 else 1) for place, size in enumerate(shape)]
    return x.reshape(sizes)


@operation("reshape_like", stored=True)
def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Ints, ends: Ints, end_masks: Bools) -> Tensor:
    sizes: list[int] = []
    for reference, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes.extend(reference.shape[begin:] if masked else reference.shape[begin:end])
    return x.reshape(sizes)


@operation("flatten2d", stored=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    split = axis if axis >= 0 else axis + x.dim()
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))


@operation("expand_dims", stored=True)
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operation("squeeze", stored=True)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Axes whose size is not 1 stay."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operation("transpose", stored=True)
def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(tuple(perm))


@operation("shape", stored=True)
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operation("concat", stored=True)
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Scalars become a vector. Interleaved, the slices of the tensors alternate along the axis."""
    if values[0].dim() == 0:
        return torch.stack(values)
    if not interleave:
        return torch.cat(values, axis)
    place = axis % values[0].dim()
    return torch.stack(values, place + 1).flatten(place, place + 1)


@operation("stack", stored=True)
def stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


@operation("split", stored=True)
def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> Tensors:
    if split_sizes is not None:
        return torch.split(x, list(split_sizes), axis)
    if num_splits is None:
        raise ValueError("split has neither num_splits nor split_sizes")
    return torch.split(x, x.shape[axis] // num_splits, axis)


@operation("tile", stored=True)
def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat(reps)


@operation("reverse", stored=True)
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(axes if axes is not None else tuple(range(x.dim())))


@operation("reverse_sequence", stored=True)
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Of each slice along `batch_axis`, the first `lengths` elements along `seq_axis` in reverse order."""
    moved = x.movedim((batch_axis, seq_axis), (0, 1))
    places = torch.arange(moved.shape[1]).expand(moved.shape[0], -1)
    ends = lengths.long().unsqueeze(1)
    order = torch.where(places < ends, ends - 1 - places, places)
    rows = torch.arange(moved.shape[0]).unsqueeze(1)
    return moved[rows, order].movedim((0, 1), (batch_axis, seq_axis))


@operation("sliding_windows", stored=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """The windows take the place of `axis`, their elements the axis behind it."""
    place = axis % x.dim()
    return x.unfold(place, size, stride).movedim(-1, place + 1)
