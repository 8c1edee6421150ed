"""Slices, gathers and scatters. A negative index counts from the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runtimes.coreml.operations.registry import Bools, Ints, operation


def _ranges(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> list[range]:
    """The indices that numpy's begin:end:stride takes of each dimension; a mask leaves that bound open."""
    ranges = []
    for dim, size in enumerate(x.shape):
        step = stride[dim] if stride else 1
        first = None if begin_mask and begin_mask[dim] else begin[dim]
        if squeeze_mask and squeeze_mask[dim]:
            place = (first or 0) % size
            ranges.append(range(place, place + 1))
        else:
            last = None if end_mask and end_mask[dim] else end[dim]
            ranges.append(range(*slice(first, last, step).indices(size)))
    return ranges


def _forward(indices: range) -> slice:
    """The same elements in ascending order, as torch's slices need a positive step."""
    if not indices:
        return slice(0, 0)
    ordered = indices if indices.step > 0 else indices[::-1]
    return slice(ordered.start, ordered.stop, ordered.step)


def _backward_dims(ranges: list[range]) -> list[int]:
    return [dim for dim, indices in enumerate(ranges) if indices.step < 0]


@operation("slice_by_index", stored=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    ranges = _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    part = x[tuple(_forward(indices) for indices in ranges)].flip(_backward_dims(ranges))
    squeezed = tuple(dim for dim in range(x.dim()) if squeeze_mask and squeeze_mask[dim])
    return part.squeeze(squeezed) if squeezed else part


@operation("slice_by_size", stored=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """A size of -1 takes everything from `begin` on."""
    for dim, (first, count) in enumerate(zip(begin, size, strict=True)):
        start = first % x.shape[dim] if first < 0 else first
        x = x.narrow(dim, start, x.shape[dim] - start if count == -1 else count)
    return x


@operation("slice_update", stored=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    ranges = _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    updated = x.clone(memory_format=torch.contiguous_format)
    part = update.reshape([len(indices) for indices in ranges])
    updated[tuple(_forward(indices) for indices in ranges)] = part.flip(_backward_dims(ranges))
    return updated


def _positive(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@operation("gather", stored=True)
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """x: [*batch, *before, n, *after]; indices: [*batch, *places] -> [*batch, *before, *places, *after].

    Indices out of range are an error, whether or not the program asks for it: on a device the result is undefined.
    """
    axis %= x.dim()
    if batch_dims:
        batch = x.shape[:batch_dims]
        rows = zip(x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1), strict=True)
        gathered = torch.stack([gather(row, places, axis - batch_dims) for row, places in rows])
        return gathered.reshape(*batch, *gathered.shape[1:])
    taken = x.index_select(axis, _positive(indices, x.shape[axis]).flatten())
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@operation("gather_along_axis", stored=True)
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return torch.take_along_dim(x, _positive(indices, x.shape[axis]), axis)


def _flat_places(indices: Tensor, sizes: torch.Size) -> Tensor:
    """[..., k] index tuples into dimensions of the given sizes -> [...] row numbers of those dimensions flattened."""
    places = torch.zeros(indices.shape[:-1], dtype=torch.long)
    for column, size in enumerate(sizes):
        places = places * size + _positive(indices[..., column], size)
    return places


@operation("gather_nd", stored=True)
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last axis of `indices` addresses the first dimensions of x (after the batch); the rest of x comes along."""
    if batch_dims:
        batch = x.shape[:batch_dims]
        rows = zip(x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1), strict=True)
        gathered = torch.stack([gather_nd(row, places) for row, places in rows])
        return gathered.reshape(*batch, *gathered.shape[1:])
    depth = indices.shape[-1]
    places = _flat_places(indices, x.shape[:depth])
    rest = x.shape[depth:]
    table = x.reshape(math.prod(x.shape[:depth]), math.prod(rest))
    return table.index_select(0, places.flatten()).reshape(*places.shape, *rest)


def _scatter_rows(rows: Tensor, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    """rows: [n, width]; updates: [m, width] go to the m `places`. With "update", one of several to a place wins."""
    rows = rows.clone(memory_format=torch.contiguous_format)
    if mode == "update":
        return rows.index_copy_(0, places, updates)
    if mode in ("add", "sub"):
        return rows.index_add_(0, places, updates, alpha=1 if mode == "add" else -1)
    spread = places.unsqueeze(1).expand_as(updates)
    if mode in ("max", "min"):
        return rows.scatter_reduce_(0, spread, updates, "a" + mode)
    if mode in ("mul", "div"):
        factor = torch.ones_like(rows).scatter_reduce_(0, spread, updates, "prod")
        return rows * factor if mode == "mul" else rows / factor
    raise ValueError(f"unknown scatter mode {mode!r}")


@operation("scatter")
def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """indices: [m]; updates: data's shape with m in place of the axis."""
    moved, changes = data.movedim(axis, 0), updates.movedim(axis, 0)
    places = _positive(indices, data.shape[axis])
    rows = _scatter_rows(moved.reshape(len(moved), -1), places, changes.reshape(len(places), -1), mode)
    return rows.reshape(moved.shape).movedim(0, axis)


@operation("scatter_along_axis")
def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """indices and updates: data's shape but along the axis; each update goes where its index says on that axis."""
    grid = torch.meshgrid([torch.arange(size) for size in indices.shape], indexing="ij")
    places = torch.zeros(indices.shape, dtype=torch.long)
    for dim, size in enumerate(data.shape):
        along = _positive(indices, size) if dim == axis % data.dim() else grid[dim]
        places = places * size + along
    rows = _scatter_rows(data.reshape(-1, 1), places.flatten(), updates.reshape(-1, 1), mode)
    return rows.reshape(data.shape)


@operation("scatter_nd")
def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False) -> Tensor:
    """The last axis of `indices` addresses the first dimensions of data; an update covers the rest of them."""
    depth = indices.shape[-1]
    places = _flat_places(indices, data.shape[:depth]).flatten()
    table = data.reshape(math.prod(data.shape[:depth]), -1)
    return _scatter_rows(table, places, updates.reshape(len(places), -1), mode).reshape(data.shape)
