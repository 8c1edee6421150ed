"""Optimal palettes of single weights. float16 has at most 65,536 values, so a tensor of any size is a histogram, and its
indices are looked up in a table of all values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.compression.intervals import Histogram, optimal_intervals

Floats = NDArray[np.floating]
Fit = tuple[NDArray[np.float16], NDArray[np.uint8]]  # palette [entries, vector], indices [rows / vector, ...]

_ALL_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
_PLUS_ZERO, _MINUS_ZERO = 0x0000, 0x8000
# Codes of the finite values from least to greatest, -0 left out.
_ASCENDING = np.flatnonzero(np.isfinite(_ALL_VALUES) & (np.arange(1 << 16) != _MINUS_ZERO))
_ASCENDING = _ASCENDING[np.argsort(_ALL_VALUES[_ASCENDING])]
_FINITE = _ALL_VALUES[_ASCENDING]
_RANKS = np.zeros(1 << 16, np.uint16)
_RANKS[_ASCENDING] = np.arange(len(_ASCENDING))
_RANKS[_MINUS_ZERO] = _RANKS[_PLUS_ZERO]
_NEGLIGIBLE = 2.0**-50  # a share of the importance that prefix sums cannot hold


def fit_scalars(parts: Sequence[NDArray[np.float16]], bits: int, weights: Sequence[Floats] | None) -> list[Fit]:
    """The optimal palette of each part."""
    places = [ranks(part) for part in parts]
    histograms = [histogram(place, None if weights is None else weights[number], 1 << bits)
                  for number, place in enumerate(places)]
    palettes = _optimal_entries(histograms, 1 << bits)
    return [(palette[:, None], _table(palette).take(place)) for place, palette in zip(places, palettes, strict=True)]


def ranks(values: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Where each value stands among all finite ones in ascending order; -0 and 0 are one."""
    return _RANKS.take(values.view(np.uint16))


def histogram(places: NDArray[np.uint16], weights: Floats | None, entries: int) -> Histogram:
    """Distinct values ascending, of values given by their ranks, and how often each occurs or its summed weight.

    Values without weight are left out, unless there are entries for all, or none has any weight.
    """
    counted = places.reshape(-1).astype(np.intp)
    counts = np.bincount(counted, minlength=len(_FINITE))
    present = np.flatnonzero(counts)
    if weights is not None and len(present) > entries:
        sums = np.bincount(counted, np.asarray(weights).reshape(-1), len(_FINITE))[present]
        if sums.any():
            held = sums > _NEGLIGIBLE * sums.sum()
            return _FINITE[present[held]], sums[held]
    return _FINITE[present], counts[present].astype(np.float64)


def _optimal_entries(histograms: Sequence[Histogram], entries: int) -> list[NDArray[np.float16]]:
    """Cluster means of each histogram, ascending; of fewer levels than entries the levels, the last one repeated."""
    palettes = []
    for (levels, mass), starts in zip(histograms, optimal_intervals(histograms, entries), strict=True):
        means = np.add.reduceat(mass * levels, starts) / np.add.reduceat(mass, starts)
        palettes.append(np.pad(means, (0, entries - means.size), mode="edge").astype(np.float16))
    return palettes


def _table(palette: NDArray[np.float16]) -> NDArray[np.uint8]:
    """What `nearest` says of every finite float16, by its rank."""
    exact = palette.astype(np.float64)
    ends = np.searchsorted(_FINITE, (exact[:-1] + exact[1:]) / 2, side="right")
    return np.repeat(np.arange(len(palette), dtype=np.uint8), np.diff(ends, prepend=0, append=len(_FINITE)))
