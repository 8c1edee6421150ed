"""Reductions, accumulated in float32. No axes given means all of them; an empty list means none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtimes.coreml.datatypes import data_type_named
from runtimes.coreml.operations.registry import Ints, operation

_Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _real(x: Tensor) -> Tensor:
    """Integers as float64, which holds every int32 exactly."""
    return x if x.is_floating_point() else x.double()


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keepdim=keep)
    return x


_REDUCTIONS: dict[str, _Reduce] = {
    "reduce_sum": lambda x, dims, keep: torch.sum(x, dims, keep),
    "reduce_mean": lambda x, dims, keep: torch.mean(_real(x), dims, keep),
    "reduce_max": lambda x, dims, keep: torch.amax(x, dims, keep),
    "reduce_min": lambda x, dims, keep: torch.amin(x, dims, keep),
    "reduce_prod": _product,
    "reduce_l1_norm": lambda x, dims, keep: torch.sum(torch.abs(x), dims, keep),
    "reduce_l2_norm": lambda x, dims, keep: torch.sqrt(torch.sum(_real(x) * x, dims, keep)),
    "reduce_sum_square": lambda x, dims, keep: torch.sum(x * x, dims, keep),
    "reduce_log_sum": lambda x, dims, keep: torch.log(torch.sum(_real(x), dims, keep)),
    "reduce_log_sum_exp": lambda x, dims, keep: torch.logsumexp(_real(x), dims, keep),
}


def _register(name: str, reduce: _Reduce) -> None:
    @operation(name)
    def run(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        if axes == ():  # torch takes an empty list for all axes, so reduce one of size 1
            return reduce(x.unsqueeze(0), [0], False)
        dims = [axis % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
        return reduce(x, dims, keep_dims)


for _name, _reduce in _REDUCTIONS.items():
    _register(_name, _reduce)


@operation("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return torch.argmax(x, axis, keep_dims).to(data_type_named(output_dtype).storage)


@operation("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return torch.argmin(x, axis, keep_dims).to(data_type_named(output_dtype).storage)
