"""Palettes are optimal: compared with every possible partition on small cases, with Lloyd's method on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.compression.palettes import fit_palette, palettize

# A grid on which float16 centroids are exact enough not to disturb the comparison of sums of squares.
VALUES = hnp.arrays(np.float16, st.integers(1, 11), elements=st.integers(-64, 64).map(lambda step: step / 8))


def partition_error(values: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """Least weighted squared error around means over every partition of the sorted values into intervals."""
    order = np.argsort(values, kind="stable")
    sorted_values, sorted_weights = values[order].astype(np.float64), weights[order]

    def error(start: int, stop: int) -> float:
        part, weight = sorted_values[start:stop], sorted_weights[start:stop]
        mean = np.average(part, weights=weight) if weight.sum() else 0.0
        return float(np.sum(weight * (part - mean) ** 2))

    count = len(values)
    cuts = itertools.combinations(range(1, count), min(clusters, count) - 1)
    return min(sum(error(a, b) for a, b in itertools.pairwise((0, *cut, count))) for cut in cuts)


def palette_error(values: np.ndarray, weights: np.ndarray, entries: np.ndarray) -> float:
    """Error of the partition that the palette makes, around the means of its clusters (before their rounding to float16)."""
    total = 0.0
    nearest = np.abs(values.astype(np.float64)[:, None] - entries.astype(np.float64)).argmin(axis=1)
    for entry in np.unique(nearest):
        part, weight = values[nearest == entry].astype(np.float64), weights[nearest == entry]
        mean = np.average(part, weights=weight) if weight.sum() else 0.0
        total += float(np.sum(weight * (part - mean) ** 2))
    return total


@settings(deadline=None, max_examples=150)
@given(VALUES, st.sampled_from([1, 2]))
def test_palettes_are_as_good_as_the_best_of_all_partitions(values: np.ndarray, bits: int) -> None:
    ones = np.ones(len(values))
    palette = fit_palette(values, bits)
    best = partition_error(values, ones, 1 << bits)
    assert palette_error(values, ones, palette.values) <= best + 1e-9 + 2e-3 * best


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_weighted_palettes_are_as_good_as_the_best_of_all_partitions(data: st.DataObject) -> None:
    values = data.draw(VALUES)
    weights = data.draw(hnp.arrays(np.float64, len(values), elements=st.integers(1, 20).map(float)))
    palette = fit_palette(values, 2, weights)
    best = partition_error(values, weights, 4)
    assert palette_error(values, weights, palette.values) <= best + 1e-9 + 2e-3 * best


@settings(deadline=None, max_examples=100)
@given(hnp.arrays(np.float16, st.integers(1, 60), elements=st.floats(-60000, 60000, width=16)), st.sampled_from([1, 3, 4, 8]))
def test_every_value_gets_its_nearest_entry(values: np.ndarray, bits: int) -> None:
    palette = fit_palette(values, bits)
    exact = palette.values.astype(np.float64)
    chosen = np.abs(exact[palette.indices] - values)
    np.testing.assert_array_equal(chosen, np.abs(exact[:, None] - values).min(axis=0))
    assert (np.diff(exact) >= 0).all()


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float16, (4, 5), elements=st.floats(-60000, 60000, width=16)))
def test_as_many_entries_as_values_lose_nothing(values: np.ndarray) -> None:
    palette = fit_palette(values, 6)
    np.testing.assert_array_equal(palette.values[palette.indices], values)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_palettes_beat_lloyds_method_on_many_heavy_tailed_values(bits: int) -> None:
    values = np.random.default_rng(bits).standard_t(3, 20000).astype(np.float16)
    exact = values.astype(np.float64)
    entries = np.quantile(exact, (np.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(60):
        nearest = np.searchsorted((entries[:-1] + entries[1:]) / 2, exact)
        sums, counts = np.bincount(nearest, exact, 1 << bits), np.bincount(nearest, minlength=1 << bits)
        entries = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), entries))
    lloyd = np.mean((entries[np.searchsorted((entries[:-1] + entries[1:]) / 2, exact)] - exact) ** 2)
    palette = fit_palette(values, bits)
    assert np.mean((palette.values.astype(np.float64)[palette.indices] - exact) ** 2) <= lloyd * 1.001


def test_constants_zeros_of_both_signs_and_subnormals_are_held_exactly() -> None:
    for numbers in ([0.3] * 7, [0.0, -0.0, 0.0], [6e-8, 1.2e-7, -6e-8]):
        values = np.array(numbers, np.float16)
        palette = fit_palette(values, 2)
        np.testing.assert_array_equal(palette.values[palette.indices], values)


def test_values_without_weight_do_not_move_the_palette() -> None:
    values = np.array([0, 1, 2, 3, 1000], np.float16)
    palette = fit_palette(values, 2, np.array([1.0, 1, 1, 1, 0]))
    np.testing.assert_array_equal(palette.values, [0, 1, 2, 3])
    assert palette.indices[-1] == 3


def test_groups_have_palettes_of_their_own() -> None:
    values = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float16)
    weight = palettize(values, 2, group=2)
    assert weight.palettes.shape == (3, 4, 1)
    for group in range(3):
        own = fit_palette(values[2 * group : 2 * group + 2], 2)
        np.testing.assert_array_equal(weight.palettes[group, :, 0], own.values)
        np.testing.assert_array_equal(weight.indices[2 * group : 2 * group + 2], own.indices)


def test_nan_infinity_and_impossible_sizes_are_refused() -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            fit_palette(np.array([1, value], np.float16), 4)
    with pytest.raises(ValueError, match="5 bits"):
        fit_palette(np.ones(4, np.float16), 5)
    with pytest.raises(ValueError, match="groups of 4 rows do not divide 6 rows"):
        palettize(np.ones((6, 2), np.float16), 4, group=4)
    with pytest.raises(ValueError, match="float64"):
        fit_palette(np.ones(4), 4)
