"""The table of operations: MIL type -> the function that computes it.

An operation is a plain function whose parameters carry MIL's own input names and defaults:

    @operation("softmax")
    def softmax(x: Tensor, axis: int = -1) -> Tensor: ...

The annotations say how an input arrives: `Tensor` as a tensor, `int`, `float`, `bool`, `str` and tuples of them as Python
values. A program whose operation lacks a required input, or has one that the function does not name, is refused.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor, ...]
Ints = tuple[int, ...]
Bools = tuple[bool, ...]

_KINDS: dict[Any, str] = {
    Tensor: "tensor",
    Tensors: "tensors",
    int: "number",
    float: "number",
    bool: "number",
    str: "number",
    Ints: "numbers",
    Bools: "numbers",
}


@dataclass(frozen=True)
class Parameter:
    """How an input arrives: "tensor", "tensors" (a tuple), "number" (one Python value) or "numbers" (a tuple of them)."""

    kind: str
    required: bool


@dataclass(frozen=True)
class Implementation:
    """A function and its inputs. If `stored`, float16 tensors arrive as they are stored; otherwise widened to float32."""

    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    stored: bool


OPERATIONS: dict[str, Implementation] = {}


def operation(name: str, *, stored: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the function as the MIL operation `name`.

    `stored` is for operations that only move values, and for those whose float16 kernel in torch gives exactly the
    float32 result rounded once.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in OPERATIONS:
            raise ValueError(f"operation {name!r} is registered twice")
        OPERATIONS[name] = Implementation(function, parameters_of(function), stored)
        return function

    return register


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The inputs that a function declares."""
    hints = typing.get_type_hints(function)
    return {
        name: Parameter(_kind(hints[name]), parameter.default is inspect.Parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
    }


def _kind(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        (annotation,) = (each for each in typing.get_args(annotation) if each is not types.NoneType)
    return _KINDS[annotation]
