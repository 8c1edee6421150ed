"""Optimal palettes: exact one-dimensional k-means on the counted values of a float16 tensor.

float16 has at most 65,536 values, so a tensor of any size is a histogram. On sorted values the optimal clusters are
intervals, found by dynamic programming over `entries` layers: best(j, i) = min over s of best(j - 1, s) + cost(s, i), where
cost(s, i) is the squared error of values s..i-1 around their mean. The cost obeys the quadrangle inequality, so the best s
grows with i and with j (X. Wu, Optimal quantization by matrix searching, J. Algorithms 12, 1991). Both bounds narrow the
search: a layer solves widely spaced positions first, between the bounds of the layer before, then halves the spacing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.compression.stored import PALETTE_BITS, PaletteWeight

_ALL_CODES = np.arange(1 << 16, dtype=np.uint16)


@dataclass(frozen=True, eq=False)
class Palette:
    """values float16 [2**bits], ascending; indices uint8 in the shape of the fitted tensor."""

    values: NDArray[np.float16]
    indices: NDArray[np.uint8]


def fit_palette(values: NDArray[np.float16], bits: int, weights: NDArray[np.floating] | None = None) -> Palette:
    """The palette of 2**bits entries with the least (weighted) squared error, entries then rounded to float16.

    values: float16, any shape; weights: importance of each value, the same shape, not negative.
    Raises ValueError on values that are not finite and on bits that no palette has.
    """
    if bits not in PALETTE_BITS:
        raise ValueError(f"palettes of {bits} bits do not exist; choose from {', '.join(map(str, PALETTE_BITS))}")
    if values.dtype != np.float16:
        raise ValueError(f"palettes are fitted to float16 values, not {values.dtype}")
    codes = np.ascontiguousarray(values).reshape(-1).view(np.uint16)
    levels, counts, importance = _histogram(codes, weights)
    entries = _optimal_entries(levels, counts if importance is None else importance, 1 << bits)
    table = _nearest(entries, levels)
    return Palette(entries, table[codes].reshape(values.shape))


def palettize(values: NDArray[np.float16], bits: int, group: int | None = None,
              weights: NDArray[np.floating] | None = None) -> PaletteWeight:
    """One palette for the tensor, or one for every `group` consecutive rows of axis 0."""
    rows = values.shape[0]
    size = group or rows
    if rows % size:
        raise ValueError(f"groups of {size} rows do not divide {rows} rows")
    parts = [fit_palette(values[start:start + size], bits, None if weights is None else weights[start:start + size])
             for start in range(0, rows, size)]
    palettes = np.stack([part.values for part in parts])[:, :, None]
    return PaletteWeight(bits, palettes, np.concatenate([part.indices for part in parts]))


def _histogram(codes: NDArray[np.uint16], weights: NDArray[np.floating] | None
               ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """Distinct values ascending (-0 and 0 are one), how often each occurs, and its summed weight."""
    if codes.size == 0:
        raise ValueError("a palette needs at least one value")
    counts = np.bincount(codes, minlength=1 << 16).astype(np.float64)
    numbers = _ALL_CODES.view(np.float16).astype(np.float64)
    if not np.isfinite(numbers[counts > 0]).all():
        raise ValueError("palettes cannot hold NaN or infinite values")
    sums = None
    if weights is not None:
        flat = np.asarray(weights, np.float64).reshape(-1)
        if flat.size != codes.size or not np.isfinite(flat).all() or flat.min() < 0:
            raise ValueError("palette weights are finite, not negative, and one a value")
        sums = np.bincount(codes, weights=flat, minlength=1 << 16).astype(np.float64)
        if not sums.any():
            sums = None
    # Code 0x8000 is -0; its occurrences belong to the level 0.
    counts[0] += counts[0x8000]
    counts[0x8000] = 0
    if sums is not None:
        sums[0] += sums[0x8000]
        sums[0x8000] = 0
    present = np.flatnonzero(counts)
    order = present[np.argsort(numbers[present])]
    return numbers[order], counts[order], None if sums is None else sums[order]


def _optimal_entries(levels: NDArray[np.float64], importance: NDArray[np.float64], entries: int) -> NDArray[np.float16]:
    """Cluster means, float16 ascending; with fewer levels than entries the levels themselves, the last one repeated."""
    if levels.size <= entries:
        return np.pad(levels, (0, entries - levels.size), mode="edge").astype(np.float16)
    kept = importance > 0
    levels, importance = levels[kept], importance[kept]
    if levels.size <= entries:
        return np.pad(levels, (0, entries - levels.size), mode="edge").astype(np.float16)
    starts = _optimal_intervals(levels, importance, entries)
    mass = np.add.reduceat(importance, starts)
    means = np.add.reduceat(importance * levels, starts) / mass
    return np.pad(means, (0, entries - means.size), mode="edge").astype(np.float16)


def _nearest(entries: NDArray[np.float16], levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Look-up table [65536] from float16 code to the index of the nearest entry (the lower one on a tie)."""
    exact = entries.astype(np.float64)
    index = np.searchsorted((exact[:-1] + exact[1:]) / 2, levels, side="left").astype(np.uint8)
    table = np.zeros(1 << 16, np.uint8)
    table[levels.astype(np.float16).view(np.uint16)] = index
    table[0x8000] = table[0]
    return table


def _optimal_intervals(levels: NDArray[np.float64], importance: NDArray[np.float64], clusters: int) -> NDArray[np.intp]:
    """First level of each of the at most `clusters` intervals with the least squared error. More levels than clusters."""
    count = levels.size
    # Centred and normalised, so that the differences of prefix sums below lose as few digits as they can.
    share = importance / importance.sum()
    centred = levels - np.dot(share, levels)
    mass = np.concatenate(([0.0], np.cumsum(share)))
    first = np.concatenate(([0.0], np.cumsum(share * centred)))

    # Up to a term that depends on i alone, cost(s, i) is -(first[i] - first[s])^2 / (mass[i] - mass[s]), and so is every sum of
    # such costs: the second moments cancel. `gain` holds that sum for the best clustering of levels 0..i-1.
    gain = np.zeros(count + 1)
    gain[1:] = -(first[1:] ** 2) / mass[1:]
    split = np.zeros(count + 1, np.int32)
    splits = [split]
    for layer in range(1, clusters):
        next_gain, next_split = gain.copy(), split.copy()
        last = layer == clusters - 1  # of which only the whole is asked
        spacing = count if last else _spacing(split)
        _solve(np.append(np.arange(spacing, count, spacing), count), 0, gain, split, next_gain, next_split, mass, first)
        while spacing > 1 and not last:
            half = spacing // 2
            _solve(np.arange(half, count, spacing), half, gain, split, next_gain, next_split, mass, first)
            spacing = half
        gain, split = next_gain, next_split
        splits.append(split)

    starts = []
    end = count
    for split in reversed(splits):
        start = int(split[end])
        starts.append(start)
        if start == 0:
            break
        end = start
    return np.array(starts[::-1], np.intp)


def _spacing(split: NDArray[np.int32]) -> int:
    """A power of 2 so wide that a layer's first round, knowing only `split`, tries about two candidates a position."""
    candidates = float(np.mean(np.arange(split.size) - split))
    return 1 << max(0, int(np.ceil(np.log2(max(candidates, 1.0) / 2))))


def _solve(solve: NDArray[np.intp], half: int, gain: NDArray[np.float64], split: NDArray[np.int32],
           next_gain: NDArray[np.float64], next_split: NDArray[np.int32],
           mass: NDArray[np.float64], first: NDArray[np.float64]) -> None:
    """Fills next_gain and next_split at `solve`. With `half` > 0 the positions that far to both sides are already solved."""
    low, high = split[solve].astype(np.intp), solve - 1
    if half:
        low = np.maximum(low, next_split[solve - half])
        # Rounding can make the bounds of a nearly tied position cross by a step.
        high = np.maximum(low, np.minimum(high, next_split[np.minimum(solve + half, gain.size - 1)]))
    lengths = high - low + 1
    offsets = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    candidates = np.arange(int(lengths.sum())) + np.repeat(low - offsets, lengths)
    moment = np.repeat(first[solve], lengths) - first[candidates]
    moment *= moment
    moment /= np.repeat(mass[solve], lengths) - mass[candidates]
    total = gain[candidates] - moment
    best = np.minimum.reduceat(total, offsets)
    hits = np.flatnonzero(total == np.repeat(best, lengths))
    next_gain[solve] = best
    next_split[solve] = candidates[hits[np.searchsorted(hits, offsets)]]
