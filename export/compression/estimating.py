"""What a scheme would do to a weight, nearly, in a hundredth of the time that the best palettes take to find.

The entries of a palette start at the density that is best for many of them, the cube root of that of the weighted values
(Panter & Dite 1951), and follow Lloyd's rounds; errors come out within a few percent of the optimal ones.
Block integers are rounded as they are stored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.compression.integers import quantize
from export.compression.palettes import nearest_vectors
from export.compression.schemes import FloatScheme, PaletteScheme, Scheme

Doubles = NDArray[np.float64]

ROUNDS = 60
PAIR_ROUNDS = 15
KNOTS = 4  # of equal mass for each entry, that the density of the values is read from
PAIRS = 1 << 15  # that a palette of pairs is fitted to and measured on


def squared_error(values: NDArray[np.floating], scheme: Scheme, importance: NDArray[np.floating] | None = None) -> float:
    """sum of importance * (values - stored)^2, about; importance of the values' shape, all 1 if None."""
    weights = np.ones(values.shape) if importance is None else importance.astype(np.float64)
    if isinstance(scheme, PaletteScheme):
        rows = values.reshape(len(values), -1).astype(np.float64)
        return _palettes(rows, weights.reshape(rows.shape), scheme)
    if isinstance(scheme, FloatScheme):
        stored = values.astype(np.float32 if scheme.bits == 32 else np.float16).astype(np.float32)
    else:
        stored = quantize(values, scheme.bits, scheme.block, scheme.bfloat16_scales).dequantize()
    return float((weights * np.square(values - stored, dtype=np.float64)).sum())


def _palettes(rows: Doubles, weights: Doubles, scheme: PaletteScheme) -> float:
    if scheme.scaled:
        scales = np.sqrt((weights * rows**2).sum(axis=1) / np.maximum(weights.sum(axis=1), np.finfo(float).tiny))
        scales = np.where(scales > 0, scales, 1.0)[:, None]
        rows, weights = rows / scales, weights * scales**2
    size = scheme.group or len(rows)
    fit = _of_pairs if scheme.vector == 2 else _of_values
    return sum(fit(rows[s : s + size], weights[s : s + size], 1 << scheme.bits) for s in range(0, len(rows), size))


def _of_values(rows: Doubles, weights: Doubles, entries: int) -> float:
    """The weighted squared error of a palette of `entries` for all values."""
    values, shares, mass = _ascending(rows, weights)
    first, second = (np.concatenate(([0.0], np.cumsum(shares * values**power))) for power in (1, 2))
    centres = _spread(values, mass, entries)
    for _ in range(ROUNDS):
        cuts = np.concatenate(([0], np.searchsorted(values, (centres[1:] + centres[:-1]) / 2), [len(values)]))
        inside, sums = np.diff(mass[cuts]), np.diff(first[cuts])
        centres = np.where(inside > 0, sums / np.where(inside > 0, inside, 1), centres)
        centres.sort()
    error = np.diff(second[cuts]) - np.divide(sums**2, inside, out=np.zeros_like(sums), where=inside > 0)
    return float(np.maximum(error, 0).sum())


def _far_apart(pairs: Doubles, weights: Doubles, entries: int) -> Doubles:
    """Pairs drawn one after another in proportion to their squared distance from those before (Arthur & Vassilvitskii 2007)."""
    generator = np.random.default_rng(0)
    centres = np.empty((entries, 2))
    distance = np.full(len(pairs), np.inf)
    picked = int(np.argmax(weights.sum(axis=1)))
    for place in range(entries):
        centres[place] = pairs[picked]
        distance = np.minimum(distance, (weights * np.square(pairs - pairs[picked])).sum(axis=1))
        reached = np.cumsum(distance)
        picked = min(int(np.searchsorted(reached, generator.random() * reached[-1], side="right")), len(pairs) - 1)
    return centres


def _ascending(values: Doubles, weights: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Values in ascending order, their weights, and the sums of the weights before each of them and of all."""
    order = np.argsort(values, axis=None)
    shares = weights.reshape(-1)[order]
    return values.reshape(-1)[order], shares, np.concatenate(([0.0], np.cumsum(shares)))


def _spread(values: Doubles, mass: Doubles, entries: int) -> Doubles:
    """Entries as dense as the cube root of the density f of ascending values: between knots of equal mass, a distance d apart,
    lie shares of the integral of f^(1/3), which is the sum of d^(2/3)."""
    places = np.searchsorted(mass[1:], np.linspace(0, mass[-1], KNOTS * entries + 1))
    knots = values[np.minimum(places, len(values) - 1)]
    knots[0], knots[-1] = values[0], values[-1]
    integral = np.concatenate(([0.0], np.cumsum(np.diff(knots) ** (2 / 3))))
    return np.interp((np.arange(entries) + 0.5) / entries * integral[-1], integral, knots)


def _of_pairs(rows: Doubles, weights: Doubles, entries: int) -> float:
    """The weighted squared error of a palette of `entries` for pairs of values in neighbouring rows."""
    pairs, counts = (a.reshape(len(a) // 2, 2, -1).transpose(0, 2, 1).reshape(-1, 2) for a in (rows, weights))
    kept = slice(None, None, max(1, len(pairs) // PAIRS))
    some, shares = pairs[kept], np.maximum(counts[kept], counts.mean() * 1e-6 + np.finfo(float).tiny)
    centres = _far_apart(some, shares, entries)
    for _ in range(PAIR_ROUNDS):
        found = nearest_vectors(centres, some, shares)
        total = np.stack([np.bincount(found, shares[:, axis], entries) for axis in range(2)], axis=1)
        first = np.stack([np.bincount(found, shares[:, axis] * some[:, axis], entries) for axis in range(2)], axis=1)
        centres = np.where(total > 0, first / np.where(total > 0, total, 1), centres)
    error = (shares * np.square(some - centres[nearest_vectors(centres, some, shares)])).sum()
    return float(error * (weights.sum() / shares.sum()))
