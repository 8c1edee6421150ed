"""Elementwise arithmetic, comparison, logic and casts. Binary operations broadcast as numpy's do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtimes.coreml.datatypes import data_type_named
from runtimes.coreml.operations.registry import operation


def _unary(name: str, function: Callable[[Tensor], Tensor], *, stored: bool = False) -> None:
    @operation(name, stored=stored)
    def run(x: Tensor) -> Tensor:
        return function(x)


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor], *, stored: bool = False) -> None:
    @operation(name, stored=stored)
    def run(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)


_unary("identity", lambda x: x, stored=True)
_unary("abs", torch.abs, stored=True)
_unary("ceil", torch.ceil, stored=True)
_unary("floor", torch.floor, stored=True)
_unary("round", torch.round, stored=True)  # halves to even
_unary("sign", torch.sign, stored=True)
_unary("square", lambda x: x * x, stored=True)
_unary("exp", torch.exp, stored=True)
_unary("exp2", torch.exp2)
_unary("sqrt", torch.sqrt)
_unary("erf", torch.erf)
_unary("sin", torch.sin)
_unary("cos", torch.cos)
_unary("tan", torch.tan)
_unary("asin", torch.asin)
_unary("acos", torch.acos)
_unary("atan", torch.atan)
_unary("sinh", torch.sinh)
_unary("cosh", torch.cosh)
_unary("tanh", torch.tanh, stored=True)
_unary("atanh", torch.atanh)
_unary("logical_not", torch.logical_not, stored=True)

_binary("add", torch.add, stored=True)
_binary("sub", torch.sub, stored=True)
_binary("mul", torch.mul, stored=True)
_binary("real_div", torch.true_divide, stored=True)
_binary("maximum", torch.maximum, stored=True)
_binary("minimum", torch.minimum, stored=True)
_binary("floor_div", torch.floor_divide)
_binary("mod", torch.remainder)  # takes the sign of the divisor, as Python's % does
_binary("pow", torch.pow)
_binary("equal", torch.eq, stored=True)
_binary("not_equal", torch.ne, stored=True)
_binary("greater", torch.gt, stored=True)
_binary("greater_equal", torch.ge, stored=True)
_binary("less", torch.lt, stored=True)
_binary("less_equal", torch.le, stored=True)
_binary("logical_and", torch.logical_and, stored=True)
_binary("logical_or", torch.logical_or, stored=True)
_binary("logical_xor", torch.logical_xor, stored=True)


@operation("clip", stored=True)
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


@operation("threshold", stored=True)
def threshold(x: Tensor, alpha: float) -> Tensor:
    return torch.clamp(x, min=alpha)


@operation("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


@operation("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@operation("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@operation("cast", stored=True)
def cast(x: Tensor, dtype: str) -> Tensor:
    """Floating point to integer drops the fraction. Between floating types nothing is left to do here: the executor rounds
    every result to its declared type, and so sees the magnitudes before that."""
    storage = data_type_named(dtype).storage
    return x if storage.is_floating_point and x.is_floating_point() else x.to(storage)


@operation("select", stored=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)
