"""What a test of one operation consists of, and the check that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.runtimes.coreml.mil import mb, run

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.2, 3.0, shape).astype(np.float32)


def ints(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


def bits(*shape: int) -> np.ndarray:
    return RNG.integers(0, 2, shape).astype(np.bool_)


@dataclass(frozen=True)
class Case:
    """`build` makes the operation from named inputs; `expected` computes it from the same arrays, floats as float64 tensors."""

    name: str
    inputs: dict[str, np.ndarray]
    build: Callable[..., Any]
    expected: Callable[..., Any]
    specification: int = 9


def unary(name: str, expected: Callable[[Tensor], Tensor], x: np.ndarray, **options: Any) -> Case:
    label = "-".join([name, *(str(value) for value in options.values() if not isinstance(value, np.ndarray))])
    return Case(label, {"x": x}, lambda x: getattr(mb, name)(x=x, **options), expected)


def binary(name: str, expected: Callable[[Tensor, Tensor], Tensor], x: np.ndarray, y: np.ndarray) -> Case:
    label = f"{name}-{x.dtype}-{x.shape}-{y.shape}"
    return Case(label, {"x": x, "y": y}, lambda x, y: getattr(mb, name)(x=x, y=y), expected)


def check(case: Case, folder: Path) -> None:
    """Shapes and values of every output; float32 results to 1e-5 of their largest magnitude, integers and booleans exactly."""
    arguments = {
        name: torch.from_numpy(array).double() if array.dtype == np.float32 else torch.from_numpy(array)
        for name, array in case.inputs.items()
    }
    wanted = case.expected(*arguments.values())
    results = run(folder / "model.mlpackage", case.build, case.inputs, case.specification)
    expected = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
    assert len(results) == len(expected)
    for result, want in zip(results, expected, strict=True):
        reference = want.numpy()
        if not np.issubdtype(reference.dtype, np.floating):
            reference = reference.astype(np.int32)
        assert result.shape == reference.shape
        if result.dtype == np.float32:
            np.testing.assert_allclose(
                result, reference, rtol=2e-5, atol=2e-6 * max(1.0, float(np.abs(reference).max(initial=0)))
            )
        else:
            np.testing.assert_array_equal(result, reference)
