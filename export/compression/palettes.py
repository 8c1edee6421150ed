"""Palettes of a weight: optimal ones of single weights (`scalars.py`), good ones of vectors of two (`vectors.py`), either with
a scale per output channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.compression.parallel import in_order
from export.compression.scalars import Fit, Floats, fit_scalars
from export.compression.stored import PALETTE_BITS, VECTOR_BITS, PaletteWeight
from export.compression.vectors import fit_vectors, nearest_vectors

__all__ = ["Palette", "fit_palette", "nearest", "nearest_vectors", "palettize"]

_SIDE_BY_SIDE = 192  # groups whose palettes are searched in one go, so that the few that take longest are searched together
_SCALE_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Palette:
    """values float16 [2**bits], ascending; indices uint8 in the shape of the fitted tensor."""

    values: NDArray[np.float16]
    indices: NDArray[np.uint8]


def fit_palette(values: NDArray[np.float16], bits: int, weights: Floats | None = None) -> Palette:
    """The palette of 2**bits entries with the least (weighted) squared error, entries then rounded to float16.

    values: float16, any shape; weights: importance of each value, the same shape, not negative.
    Raises ValueError on values that are not finite and on bits that no palette has.
    """
    _check(values, bits, 1, weights)
    palettes, indices = fit_scalars([values], bits, None if weights is None else [weights])[0]
    return Palette(palettes[:, 0], indices)


def palettize(values: NDArray[np.float16], bits: int, group: int | None = None, weights: Floats | None = None,
              scaled: bool = False, vector: int = 1) -> PaletteWeight:
    """One palette for the tensor, or one for every `group` consecutive rows of axis 0.

    weights: importance of each value, the same shape, not negative
    scaled: a scale for every row before the palette, fitted together with it; never a larger error than without
    vector: rows that share an index. Palettes of single weights are optimal; those of vectors are a local optimum.
    Raises ValueError on values that are not finite, and on bits, groups and vectors that do not fit.
    """
    _check(values, bits, vector, weights)
    rows = values.shape[0] if values.ndim else 0
    size = group or rows
    if not size or rows % size:
        raise ValueError(f"groups of {size} rows do not divide {rows} rows")
    if size % vector:
        raise ValueError(f"vectors of {vector} rows do not divide groups of {size} rows")
    plain = _palettize(values, bits, size, weights, vector)
    return _with_scales(values, plain, size, weights) if scaled else plain


def nearest(palette: NDArray[np.float16], values: Floats) -> NDArray[np.uint8]:
    """Index of the nearest entry (the lower on a tie) of an ascending palette [entries], for values of any shape."""
    exact = palette.astype(np.float64)
    return np.searchsorted((exact[:-1] + exact[1:]) / 2, values, side="left").astype(np.uint8)


def _check(values: NDArray[np.float16], bits: int, vector: int, weights: Floats | None) -> None:
    if bits not in PALETTE_BITS:
        raise ValueError(f"palettes of {bits} bits do not exist; choose from {', '.join(map(str, PALETTE_BITS))}")
    if vector not in (1, 2):
        raise ValueError(f"an entry of a palette holds 1 or 2 weights, not {vector}")
    if vector == 2 and bits not in VECTOR_BITS:
        raise ValueError(f"palettes of pairs have {', '.join(map(str, VECTOR_BITS))} bits, not {bits}")
    if values.dtype != np.float16:
        raise ValueError(f"palettes are fitted to float16 values, not {values.dtype}")
    if values.size == 0:
        raise ValueError("a palette needs at least one value")
    if not np.isfinite(values).all():
        raise ValueError("palettes cannot hold NaN or infinite values")
    if weights is not None and (weights.shape != values.shape or not np.isfinite(weights).all() or weights.min() < 0):
        raise ValueError("palette weights are finite, not negative, and one a value")


# ---- one palette a group


def _palettize(values: NDArray[np.float16], bits: int, size: int, weights: Floats | None, vector: int,
               start: NDArray[np.float16] | None = None) -> PaletteWeight:
    """Palettes for every `size` rows, groups on all cores. start: where vector palettes [groups, entries, 2] set out from."""
    groups = range(len(values) // size)

    def some(numbers: Sequence[int]) -> list[Fit]:
        parts = [slice(number * size, (number + 1) * size) for number in numbers]
        weighed = None if weights is None else [weights[part] for part in parts]
        if vector == 1:
            return fit_scalars([values[part] for part in parts], bits, weighed)
        return [fit_vectors(values[part], bits, None if weights is None else weights[part],
                             None if start is None else start[number]) for part, number in zip(parts, numbers, strict=True)]

    together = _SIDE_BY_SIDE if vector == 1 else 1
    batches = [groups[first:first + together] for first in groups[::together]]
    fits = [fit for batch in in_order(some, batches) for fit in batch]
    return PaletteWeight(bits, np.stack([palette for palette, _ in fits]), np.concatenate([indices for _, indices in fits]))


# ---- a scale for every output channel


def _with_scales(values: NDArray[np.float16], plain: PaletteWeight, size: int, weights: Floats | None) -> PaletteWeight:
    """Scales and palettes by turns: palettes of the scaled rows, weighted so that the error is that of the rows themselves;
    then for each row the scale with the least error. The best of all rounds, of which the palettes alone are one."""
    rows = values.reshape(len(values), -1).astype(np.float32)
    importance = np.ones((1, 1), np.float32) if weights is None else weights.reshape(rows.shape).astype(np.float32)

    def error(weight: PaletteWeight) -> float:
        """Not finite where a product with a scale overflows float16."""
        with np.errstate(invalid="ignore"):
            return float((np.square(weight.dequantize().reshape(rows.shape) - rows) * importance).sum(dtype=np.float64))

    best = PaletteWeight(plain.bits, plain.palettes, plain.indices, np.ones(len(rows), np.float16))
    least = error(best)
    # Around 1, so that the palette keeps the magnitude of the weights: a scale of 1e-5 would be a subnormal float16.
    total = np.broadcast_to(importance, rows.shape).sum(axis=1)
    spread = np.sqrt((np.square(rows) * importance).sum(axis=1) / np.where(total > 0, total, 1))
    typical = float(np.sqrt(np.mean(np.square(spread, dtype=np.float64))))
    scales = _storable(spread / typical if typical else spread)
    start = plain.palettes if plain.vector > 1 else None
    for _ in range(_SCALE_ROUNDS):
        normal = np.clip(rows / scales[:, None].astype(np.float32), -65504, 65504).astype(np.float16).reshape(values.shape)
        squares = np.square(scales.astype(np.float32))[:, None] * importance
        fitted = _palettize(normal, plain.bits, size, np.broadcast_to(squares, rows.shape).reshape(values.shape), plain.vector,
                            start)
        start = fitted.palettes if plain.vector > 1 else None
        entries = fitted.dequantize().reshape(rows.shape)
        share = entries * importance
        energy = np.einsum("ij,ij->i", share, entries)
        refitted = np.einsum("ij,ij->i", share, rows) / np.where(energy > 0, energy, 1)
        scales = _storable(np.where(energy > 0, refitted, scales))
        candidate = PaletteWeight(plain.bits, fitted.palettes, fitted.indices, scales)
        if (found := error(candidate)) < least:
            best, least = candidate, found
    return best


def _storable(scales: Floats) -> NDArray[np.float16]:
    """float16 scales, positive and normal; what is not (a row of zeros) becomes 1."""
    half = scales.clip(0, 65504).astype(np.float16)
    return np.where(half < np.finfo(np.float16).tiny, np.float16(1), half)
