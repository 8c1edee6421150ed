"""Palettes are optimal: compared with every possible partition on small cases, with plain dynamic programming on larger ones.
Scaled palettes and palettes of pairs: compared with brute force and with plain palettes."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.compression.intervals import optimal_intervals
from export.compression.palettes import fit_palette, nearest, nearest_vectors, palettize
from export.compression.stored import VECTOR_BITS

# A grid on which float16 centroids are exact enough not to disturb the comparison of sums of squares.
VALUES = hnp.arrays(np.float16, st.integers(1, 11), elements=st.integers(-64, 64).map(lambda step: step / 8))
FINITE = st.floats(-60000, 60000, width=16)


def interval_errors(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[start, stop] -> weighted squared error of values start..stop-1 around their mean."""
    count = len(values)
    errors = np.zeros((count + 1, count + 1))
    for start, stop in itertools.combinations(range(count + 1), 2):
        part, weight = values[start:stop], weights[start:stop]
        mean = np.average(part, weights=weight) if weight.sum() else 0.0
        errors[start, stop] = np.sum(weight * (part - mean) ** 2)
    return errors


def partition_error(values: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """Least weighted squared error around means over every partition of the sorted values into intervals."""
    order, count = np.argsort(values, kind="stable"), len(values)
    errors = interval_errors(values[order].astype(np.float64), weights[order])
    cuts = itertools.combinations(range(1, count), min(clusters, count) - 1)
    return min(float(sum(errors[a, b] for a, b in itertools.pairwise((0, *cut, count)))) for cut in cuts)


def palette_error(values: np.ndarray, weights: np.ndarray, entries: np.ndarray) -> float:
    """Error of the partition that the palette makes, around the means of its clusters (before their rounding to float16)."""
    total = 0.0
    nearest = np.abs(values.astype(np.float64)[:, None] - entries.astype(np.float64)).argmin(axis=1)
    for entry in np.unique(nearest):
        part, weight = values[nearest == entry].astype(np.float64), weights[nearest == entry]
        mean = np.average(part, weights=weight) if weight.sum() else 0.0
        total += float(np.sum(weight * (part - mean) ** 2))
    return total


def squared_error(values: np.ndarray, decompressed: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    return float(np.sum(weights * (values.astype(np.float64) - decompressed.astype(np.float64)) ** 2))


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


@st.composite
def histograms(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced levels of equal mass (all ties), or float16 levels over many magnitudes with masses over ten."""
    count = draw(st.integers(2, 40))
    if draw(st.booleans()):
        return np.arange(count, dtype=np.float64), np.ones(count)
    levels = draw(st.lists(FINITE, min_size=count, max_size=count, unique=True).map(sorted))
    exponents = draw(hnp.arrays(np.float64, count, elements=st.integers(-20, 12).map(float)))
    return np.array(levels), 2.0**exponents


@settings(deadline=None, max_examples=150)
@given(st.lists(histograms(), min_size=1, max_size=3), st.integers(2, 20))
def test_intervals_side_by_side_are_those_of_plain_dynamic_programming(cases: list[tuple[np.ndarray, np.ndarray]],
                                                                      clusters: int) -> None:
    for (levels, mass), starts in zip(cases, optimal_intervals(cases, clusters), strict=True):
        errors, count = interval_errors(levels, mass), len(levels)
        best = errors[0]
        for _ in range(min(clusters, count) - 1):
            best = np.array([min(best[start] + errors[start, stop] for start in range(stop)) if stop else 0.0
                             for stop in range(count + 1)])
        found = sum(errors[a, b] for a, b in itertools.pairwise((*starts, count)))
        assert len(starts) <= clusters
        assert found <= best[count] * (1 + 1e-9) + 1e-12 * errors[0, count]


def test_groups_fitted_side_by_side_are_those_fitted_alone() -> None:
    """More groups than are searched in one go, of different spreads, so that some searches end before others."""
    generator = np.random.default_rng(0)
    spreads = np.exp(generator.uniform(-6, 3, (70, 1)))
    values = (generator.standard_t(3, (70, 400)) * spreads).astype(np.float16)
    weight = palettize(values, 4, group=1)
    for row in (0, 17, 63, 64, 69):
        alone = fit_palette(values[row], 4)
        np.testing.assert_array_equal(weight.palettes[row, :, 0], alone.values)
        np.testing.assert_array_equal(weight.indices[row], alone.indices)


@settings(deadline=None, max_examples=100)
@given(hnp.arrays(np.float16, st.integers(1, 60), elements=FINITE), st.sampled_from([1, 3, 4, 8]))
def test_every_value_gets_its_nearest_entry(values: np.ndarray, bits: int) -> None:
    palette = fit_palette(values, bits)
    exact = palette.values.astype(np.float64)
    chosen = np.abs(exact[palette.indices] - values)
    np.testing.assert_array_equal(chosen, np.abs(exact[:, None] - values).min(axis=0))
    assert (np.diff(exact) >= 0).all()
    np.testing.assert_array_equal(nearest(palette.values, values.astype(np.float32)), palette.indices)


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float16, (4, 5), elements=FINITE))
def test_as_many_entries_as_values_lose_nothing(values: np.ndarray) -> None:
    for weights in (None, np.eye(4, 5), np.zeros((4, 5))):
        np.testing.assert_array_equal(palettize(values, 6, weights=weights).dense(), values)


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float16, (6, 5), elements=st.integers(-64, 64).map(lambda step: step / 8)))
def test_as_many_entries_as_pairs_lose_nothing(values: np.ndarray) -> None:
    for weights in (None, 1 + np.eye(6, 5), np.zeros((6, 5))):
        np.testing.assert_array_equal(palettize(values, 4, weights=weights, vector=2).dense(), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_palettes_beat_lloyds_method_on_many_heavy_tailed_values(bits: int) -> None:
    values = np.random.default_rng(bits).standard_t(3, 20000).astype(np.float16)
    exact = values.astype(np.float64)
    entries = np.quantile(exact, (np.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(60):
        near = np.searchsorted((entries[:-1] + entries[1:]) / 2, exact)
        sums, counts = np.bincount(near, exact, 1 << bits), np.bincount(near, minlength=1 << bits)
        entries = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), entries))
    lloyd = np.mean((entries[np.searchsorted((entries[:-1] + entries[1:]) / 2, exact)] - exact) ** 2)
    palette = fit_palette(values, bits)
    assert np.mean((palette.values.astype(np.float64)[palette.indices] - exact) ** 2) <= lloyd * 1.001


def test_a_few_huge_values_do_not_spoil_the_palette_of_the_many_small_ones() -> None:
    """Sums of squares over both would lose the small ones in rounding."""
    small = (np.random.default_rng(0).standard_normal(4000) * 1e-3).astype(np.float16)
    palette = fit_palette(np.concatenate((small, np.array([-60000, 50000], np.float16))), 4)
    alone = fit_palette(small, 4)
    found = squared_error(small, palette.values[palette.indices[:-2]])
    assert found <= squared_error(small, fit_palette(small, 3).values[fit_palette(small, 3).indices])
    assert found >= squared_error(small, alone.values[alone.indices])
    np.testing.assert_array_equal(palette.values[[0, -1]], np.array([-60000, 50000], np.float16))


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


@pytest.mark.parametrize("vector", [1, 2])
def test_scales_take_over_what_differs_between_rows(vector: int) -> None:
    """Rows of magnitudes e-fold apart: a 4-bit palette of normalised rows loses as little as if all rows were alike."""
    generator = np.random.default_rng(0)
    alike = generator.standard_normal((64, 256))
    values = (alike * np.exp(generator.standard_normal((64, 1)))).astype(np.float16)
    plain = palettize(values, 4, vector=vector)
    scaled = palettize(values, 4, scaled=True, vector=vector)
    assert scaled.scales is not None and scaled.scales.shape == (64,)
    energy = np.square(values.astype(np.float64)).sum()
    ideal = squared_error(alike, palettize(alike.astype(np.float16), 4, vector=vector).dequantize()) / np.square(alike).sum()
    assert squared_error(values, scaled.dequantize()) / energy <= 1.1 * ideal
    assert squared_error(values, scaled.dequantize()) <= 0.7 * squared_error(values, plain.dequantize())


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float16, (4, 12), elements=st.one_of(FINITE, st.floats(-0.125, 0.125, width=16))),
       hnp.arrays(np.float64, (4, 12), elements=st.integers(0, 9).map(float)),
       st.sampled_from([None, 2]), st.sampled_from([1, 2]))
def test_scales_never_make_it_worse(values: np.ndarray, weights: np.ndarray, group: int | None, vector: int) -> None:
    bits = 4 if vector == 2 else 2
    plain = palettize(values, bits, group, weights, vector=vector)
    scaled = palettize(values, bits, group, weights, scaled=True, vector=vector)
    least = squared_error(values, plain.dequantize(), weights)
    assert squared_error(values, scaled.dequantize(), weights) <= least * (1 + 1e-5)  # compared in float32


@pytest.mark.parametrize("source", ["normal", "student", "laplace"])
@pytest.mark.parametrize("bits", VECTOR_BITS)
def test_palettes_of_pairs_beat_single_weights_at_the_same_bits(bits: int, source: str) -> None:
    """At the 4 bits a weight of 8-bit pairs by half a decibel and more; Gaussian theory allows 1.3 dB."""
    generator = np.random.default_rng(0)
    draw = {"normal": generator.standard_normal, "laplace": lambda shape: generator.laplace(size=shape),
            "student": lambda shape: generator.standard_t(5, shape)}[source]
    values = (draw((200, 400)) * 0.02).astype(np.float16)
    pairs, single = palettize(values, bits, vector=2), palettize(values, bits // 2)
    assert pairs.indices.shape == (100, 400)
    assert abs(pairs.nbytes - single.nbytes) <= 1024
    ratio = squared_error(values, pairs.dequantize()) / squared_error(values, single.dequantize())
    assert ratio <= {4: 1.0, 6: 0.95, 8: 0.89}[bits]


def test_many_pairs_merged_on_a_grid_lose_hardly_more_than_few() -> None:
    generator = np.random.default_rng(0)
    many = generator.standard_normal((512, 512)).astype(np.float16)  # 131,072 pairs
    errors = [squared_error(part, palettize(part, 8, vector=2).dequantize()) / part.size for part in (many, many[:256])]
    assert errors[0] <= 1.03 * errors[1]


@pytest.mark.parametrize(("scaled", "vector", "group"), [(False, 1, 8), (True, 1, None), (False, 2, None), (True, 2, 8)])
def test_every_form_spends_its_entries_where_the_importance_is(scaled: bool, vector: int, group: int | None) -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((32, 200)).astype(np.float16)
    values[:, :20] *= np.float16(0.1)
    importance = np.where(np.arange(200) < 20, 1000.0, 1.0) * np.ones((32, 1))
    plain = palettize(values, 4, group, None, scaled, vector).dequantize()
    weighed = palettize(values, 4, group, importance, scaled, vector).dequantize()
    assert squared_error(values, weighed, importance) <= 0.5 * squared_error(values, plain, importance)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_nearest_vectors_are_those_of_brute_force(count: int, weighted: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    palette = generator.standard_normal((16, 2)).astype(np.float16)
    values = generator.standard_normal((3, count, 2)).astype(np.float32)
    weights = generator.random((3, count, 2)) if weighted else None
    indices = nearest_vectors(palette, values, weights)
    metric = np.ones(values.shape) if weights is None else weights
    distances = (metric[..., None, :] * (values[..., None, :].astype(np.float64) - palette) ** 2).sum(axis=-1)
    chosen = np.take_along_axis(distances, indices[..., None].astype(np.intp), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(axis=-1), atol=1e-5)


@pytest.mark.parametrize(("scaled", "vector"), [(False, 1), (True, 1), (False, 2)])
def test_the_number_of_workers_does_not_change_a_bit(scaled: bool, vector: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((132, 40)).astype(np.float16)
    results = []
    for cores in (1, 2, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        weight = palettize(values, 4, group=2, scaled=scaled, vector=vector)
        results.append((weight.palettes.tobytes(), weight.indices.tobytes(), scaled and weight.scales.tobytes()))  # type: ignore[union-attr]
    assert results[0] == results[1] == results[2]


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
    with pytest.raises(ValueError, match="at least one value"):
        fit_palette(np.ones(0, np.float16), 4)
    for weights in (np.ones(3), np.array([1, -1.0]), np.array([1, np.nan])):
        with pytest.raises(ValueError, match="finite, not negative, and one a value"):
            fit_palette(np.ones(2, np.float16), 4, weights)
    with pytest.raises(ValueError, match="palettes of pairs have 4, 6, 8 bits, not 3"):
        palettize(np.ones((6, 2), np.float16), 3, vector=2)
    with pytest.raises(ValueError, match="an entry of a palette holds 1 or 2 weights, not 3"):
        palettize(np.ones((6, 2), np.float16), 4, vector=3)
    with pytest.raises(ValueError, match="vectors of 2 rows do not divide groups of 3 rows"):
        palettize(np.ones((6, 2), np.float16), 4, group=3, vector=2)
