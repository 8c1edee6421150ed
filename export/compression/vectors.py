"""Good palettes of pairs of weights: Lloyd's method, and the nearest entry of every pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.compression.intervals import parts
from export.compression.scalars import Fit, Floats, fit_scalars, histogram, ranks

Singles = NDArray[np.float32]

_TRACE = 1e-6  # least share of the mean weight that a pair of no weight counts
_LLOYD_ROUNDS, _LLOYD_ENOUGH = 60, 1e-4  # at most so many, and only as long as one takes away this share of the error
_CELLS = 1 << 16  # pairs of weights that a vector palette is fitted to; more of them are merged on a grid
_CHUNK = 1 << 14


def nearest_vectors(palette: Floats, values: Floats, weights: Floats | None = None) -> NDArray[np.uint8]:
    """Index of the nearest entry of a palette [entries, vector], for values [..., vector].

    weights: of the values' shape, weigh the squared differences. Computed in float32: of entries that are nearly as near,
    either may be chosen.
    """
    entries = palette.astype(np.float32)
    squares = np.square(entries)
    # sum w (x - c)^2 = ... - 2 sum (w x) c + sum w c^2: a product of matrices, of which the greatest negative counts.
    factors = np.ascontiguousarray((entries if weights is None else np.concatenate((entries, -squares / 2), axis=1)).T)
    constant = -squares.sum(axis=1) / 2
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, palette.shape[1])
    metric = None if weights is None else np.ascontiguousarray(weights, np.float32).reshape(flat.shape)
    indices = np.empty(len(flat), np.uint8)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start:start + _CHUNK]
        if metric is None:
            closeness = part @ factors
            closeness += constant
        else:
            weight = metric[start:start + _CHUNK]
            closeness = np.concatenate((part * weight, weight), axis=1) @ factors
        indices[start:start + _CHUNK] = closeness.argmax(axis=1)
    return indices.reshape(values.shape[:-1])


def fit_vectors(values: NDArray[np.float16], bits: int, weights: Floats | None, start: NDArray[np.float16] | None
                 ) -> Fit:
    """Lloyd's method on pairs of rows, from `start` or from points far apart; no worse than two scalar palettes of half the
    bits."""
    pairs = _pairs(values.astype(np.float32))
    metric = None
    if weights is not None and weights.any():
        # A trace of weight where there is none, so that these too get an entry near them.
        metric = _pairs(np.maximum(weights / weights.mean(), _TRACE).astype(np.float32))
    points, mass = pairs, np.ones_like(pairs) if metric is None else metric
    if len(pairs) > _CELLS:
        points, mass = _merged(values, pairs, mass)

    entries, error = _lloyd(points, mass, _far_apart(points, mass, 1 << bits) if start is None else start.astype(np.float32))
    if start is None:
        halves = [palette[:, 0] for palette, _ in fit_scalars([values[0::2], values[1::2]], bits // 2, (
            None if weights is None else [weights[0::2], weights[1::2]]))]
        grid = np.stack(np.meshgrid(*halves, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)
        if _error(points, mass, grid, nearest_vectors(grid, points, mass)).sum(dtype=np.float64) < error:
            entries, _ = _lloyd(points, mass, grid)
    palette = entries.astype(np.float16)
    return palette, nearest_vectors(palette, pairs, metric).reshape(len(values) // 2, *values.shape[1:])


def _pairs(rows: Singles) -> Singles:
    """[2 n, ...] -> [pairs, 2], the two of a pair from consecutive rows."""
    return np.ascontiguousarray(rows.reshape(len(rows) // 2, 2, -1).transpose(0, 2, 1)).reshape(-1, 2)


def _merged(values: NDArray[np.float16], pairs: Singles, mass: Singles) -> tuple[Singles, Singles]:
    """Weighted means and weights [cells, 2] of the pairs in each cell of a grid of 256 x 256, finer where there are more."""
    levels, counts = histogram(ranks(values), None, _CELLS)
    rungs = parts(levels, counts, 256) if len(levels) > 256 else np.arange(len(levels))
    table = np.zeros(_CELLS, np.uint16)
    table[ranks(levels.astype(np.float16))] = rungs
    places = table[ranks(pairs.astype(np.float16))]
    cells = places[:, 0] << np.uint16(8) | places[:, 1]
    sums = np.stack([np.bincount(cells, mass[:, place], _CELLS) for place in range(2)], axis=1)
    moments = np.stack([np.bincount(cells, mass[:, place] * pairs[:, place], _CELLS) for place in range(2)], axis=1)
    held = sums.any(axis=1)
    return (moments[held] / sums[held]).astype(np.float32), sums[held].astype(np.float32)


def _far_apart(points: Singles, mass: Singles, entries: int) -> Singles:
    """Entries drawn from the points, each with odds of its error by those already drawn (k-means++), by a fixed seed."""
    generator = np.random.default_rng(0)
    chosen = np.empty((entries, 2), np.float32)
    chosen[0] = points[int(mass.sum(axis=1).argmax())]
    error = np.square(points - chosen[0]) * mass
    far = error.sum(axis=1)
    for place in range(1, entries):
        odds = np.cumsum(far, dtype=np.float64)
        drawn = int(np.searchsorted(odds, generator.random() * odds[-1], side="right"))
        chosen[place] = points[min(drawn, len(points) - 1)]
        np.minimum(far, (np.square(points - chosen[place]) * mass).sum(axis=1), out=far)
    return chosen


def _lloyd(points: Singles, mass: Singles, entries: Singles) -> tuple[Singles, float]:
    """Entries after rounds of nearest points and weighted means, and their error. Unused ones move to bad points."""
    count = len(entries)
    least, best = np.inf, entries
    for _ in range(_LLOYD_ROUNDS):
        nearest_entry = nearest_vectors(entries, points, mass)
        error = _error(points, mass, entries, nearest_entry)
        total = float(error.sum(dtype=np.float64))
        gained = least - total
        if gained > 0:
            least, best = total, entries
        if gained <= _LLOYD_ENOUGH * total:
            break
        sums = np.stack([np.bincount(nearest_entry, mass[:, place], count) for place in range(2)], axis=1)
        moments = np.stack([np.bincount(nearest_entry, mass[:, place] * points[:, place], count) for place in range(2)], axis=1)
        entries = np.where(sums > 0, moments / np.where(sums > 0, sums, 1), entries).astype(np.float32)
        unused = np.flatnonzero(sums.sum(axis=1) == 0)
        worst = np.argsort(-error, kind="stable")[:len(unused)]
        entries[unused[:len(worst)]] = points[worst]
    return best, least


def _error(points: Singles, mass: Singles, entries: Singles, indices: NDArray[np.uint8]) -> Singles:
    """Squared error of each point [points]."""
    return (np.square(points - entries[indices]) * mass).sum(axis=1)
