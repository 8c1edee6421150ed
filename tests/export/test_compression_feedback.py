"""Error feedback: what it saves on correlated inputs, where it saves nothing, and that it never costs anything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.compression import feedback
from export.compression.feedback import centre, objective, store_with_feedback
from export.compression.integers import quantize
from export.compression.palettes import palettize
from export.compression.schemes import IntegerScheme, PaletteScheme, Scheme
from export.compression.stored import IntegerWeight, PaletteWeight, StoredWeight
from export.errors import UserError

PALETTES = (
    PaletteScheme(1),
    PaletteScheme(4),
    PaletteScheme(6),
    PaletteScheme(3, group=16),
    PaletteScheme(3, scaled=True),
    PaletteScheme(2, group=16, scaled=True),
    PaletteScheme(8, vector=2),
    PaletteScheme(4, group=16, vector=2),
    PaletteScheme(6, scaled=True, vector=2),
)
INTEGERS = (
    IntegerScheme(4, 32, bfloat16_scales=True),
    IntegerScheme(4, 16),
    IntegerScheme(4),
    IntegerScheme(8, 32),
    IntegerScheme(8),
)


def plain(values: np.ndarray, scheme: Scheme) -> StoredWeight:
    if isinstance(scheme, PaletteScheme):
        return palettize(values.astype(np.float16), scheme.bits, scheme.group, None, scheme.scaled, scheme.vector)
    assert isinstance(scheme, IntegerScheme)
    return quantize(values, scheme.bits, scheme.block, scheme.bfloat16_scales)


def inputs_of(seed: int, count: int, row: int, factors: int = 8) -> np.ndarray:
    """float64 [count, row]: a few factors that all inputs share, and a tenth of their power of each input's own."""
    shape = np.random.default_rng(99)
    generator = np.random.default_rng(seed)
    mixing, own = shape.standard_normal((factors, row)), np.exp(shape.standard_normal(row) / 2)
    return (generator.standard_normal((count, factors)) @ mixing + 0.9 * generator.standard_normal((count, row))) * own


def moments_of(inputs: np.ndarray) -> np.ndarray:
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def weight_of(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, shape) * 0.02).astype(np.float32)


def decibels(before: float, after: float) -> float:
    return float(10 * np.log10(before / after))


@pytest.mark.parametrize("scheme", [*PALETTES, *INTEGERS], ids=str)
def test_correlated_inputs_save_decibels_on_inputs_not_calibrated_on(scheme: Scheme) -> None:
    weight, fresh = weight_of(0, 64, 96), inputs_of(2, 2000, 96)
    stored = store_with_feedback("x", weight, scheme, moments_of(inputs_of(1, 4000, 96)))
    missing = [fresh @ (weight - kind.dequantize()).T.astype(np.float64) for kind in (plain(weight, scheme), stored)]
    assert decibels(*(np.square(outputs).mean() for outputs in missing)) > 5
    assert stored.nbytes == plain(weight, scheme).nbytes


@pytest.mark.parametrize("scheme", [*PALETTES[1:], *INTEGERS], ids=str)
def test_large_weights_are_swept_once_and_keep_most_of_what_that_saves(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments = weight_of(0, 64, 96), moments_of(inputs_of(1, 4000, 96))
    turned = store_with_feedback("x", weight, scheme, moments)
    monkeypatch.setattr(feedback, "LARGE", weight.size)
    once = store_with_feedback("x", weight, scheme, moments)
    losses = [objective(weight - kind.dequantize(), moments) for kind in (plain(weight, scheme), once, turned)]
    assert decibels(*losses[:2]) > 5
    assert decibels(*losses[1:]) < 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_objective_is_never_larger_than_that_of_plain_rounding(data: st.DataObject) -> None:
    scheme = data.draw(st.sampled_from([*PALETTES, *INTEGERS]))
    seed, samples = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 80))
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((samples, 32)) * np.exp(3 * generator.standard_normal(32)) * (generator.random(32) > 0.2)
    sensitivity = np.where(generator.random(32) > 0.2, np.exp(2 * generator.standard_normal(32)), 0).astype(np.float32)
    weight, moments = weight_of(seed, 32, 32), moments_of(inputs)
    stored = store_with_feedback("x", weight, scheme, moments, sensitivity, data.draw(st.sampled_from([None, samples])))
    before, after = (objective(weight - kind.dequantize(), moments, sensitivity) for kind in (plain(weight, scheme), stored))
    assert after <= before


def best_of_all(weight: np.ndarray, moments: np.ndarray) -> float:
    """Least objective of one row with one bit: every assignment, with the two entries that solve its least squares."""
    root, best = np.linalg.cholesky(moments.astype(np.float64)).T, np.inf
    for codes in itertools.product((0.0, 1.0), repeat=weight.size):
        choice = np.stack([1 - np.array(codes), np.array(codes)], axis=1)
        entries = np.linalg.lstsq(root @ choice, root @ weight[0], rcond=None)[0]
        best = min(best, objective(weight - (choice @ entries)[None], moments))
    return best


def test_six_inputs_and_one_bit_come_close_to_the_best_of_all_assignments() -> None:
    ratios = []
    for seed in range(40):
        weight, moments = weight_of(seed, 1, 6), moments_of(inputs_of(seed, 200, 6, factors=2))
        kinds = plain(weight, PaletteScheme(1)), store_with_feedback("x", weight, PaletteScheme(1), moments)
        best = best_of_all(weight, moments)
        ratios.append([objective(weight - kind.dequantize(), moments) / best for kind in kinds])
    without, found = np.array(ratios).T
    assert found.min() > 0.999
    assert np.median(found) < 1.01 and found.mean() < 1.1
    assert without.mean() > 1.4


@pytest.mark.parametrize("scheme", [scheme for scheme in (*PALETTES, *INTEGERS) if getattr(scheme, "vector", 1) == 1], ids=str)
def test_inputs_without_correlation_get_the_nearest_values(scheme: Scheme) -> None:
    weight = weight_of(3, 32, 64)
    moments = np.diag(np.exp(np.random.default_rng(3).standard_normal(64))).astype(np.float32)
    stored = store_with_feedback("x", weight, scheme, moments)
    if isinstance(stored, PaletteWeight):
        scales = np.ones(32) if stored.scales is None else stored.scales.astype(np.float64)
        entries = stored.palettes[np.arange(32) * stored.groups // 32, :, 0] * scales[:, None]
    else:
        assert isinstance(stored, IntegerWeight)
        steps = np.arange(-(1 << (stored.bits - 1)), 1 << (stored.bits - 1))
        entries = np.repeat(stored.scales, stored.block, axis=1)[:, :, None] * steps
    entries = np.broadcast_to(entries[:, None] if entries.ndim == 2 else entries, (32, 64, entries.shape[-1]))
    least = np.abs(entries - weight[:, :, None]).min(axis=2)
    np.testing.assert_allclose(np.abs(stored.dequantize() - weight), least, atol=2e-4 * np.abs(weight).max())


def test_equal_uncorrelated_inputs_leave_nothing_to_save_on_an_optimal_palette() -> None:
    weight = weight_of(4, 32, 64)
    losses = [objective(weight - kind.dequantize(), np.eye(64))
              for kind in (plain(weight, PaletteScheme(4)), store_with_feedback("x", weight, PaletteScheme(4), np.eye(64)))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_convolutions_are_stored_as_the_matrix_of_their_patches() -> None:
    weight, moments = weight_of(5, 16, 4, 3, 3), moments_of(inputs_of(5, 500, 36))
    for scheme in (PaletteScheme(4), PaletteScheme(4, group=16), IntegerScheme(8)):
        stored = store_with_feedback("x", weight, scheme, moments)
        flat = store_with_feedback("x", weight.reshape(16, 36), scheme, moments)
        assert stored.shape == weight.shape
        np.testing.assert_array_equal(stored.dequantize().reshape(16, 36), flat.dequantize())


@pytest.mark.parametrize("scheme", [*PALETTES, *INTEGERS], ids=str)
def test_two_runs_give_the_same_bytes_and_the_schemes_own_form(scheme: Scheme) -> None:
    weight, moments = weight_of(6, 32, 64), moments_of(inputs_of(6, 500, 64))
    first, second = (store_with_feedback("x", weight, scheme, moments) for _ in range(2))
    if isinstance(first, PaletteWeight) and isinstance(second, PaletteWeight) and isinstance(scheme, PaletteScheme):
        assert (first.bits, first.groups, first.vector) == (scheme.bits, 32 // (scheme.group or 32), scheme.vector)
        assert (first.scales is not None) == scheme.scaled
        assert first.palettes.tobytes() == second.palettes.tobytes() and first.indices.tobytes() == second.indices.tobytes()
    else:
        assert isinstance(first, IntegerWeight) and isinstance(second, IntegerWeight) and isinstance(scheme, IntegerScheme)
        assert (first.bits, first.block) == (scheme.bits, scheme.block or 64)
        assert (first.scales.view(np.uint32) & 0xFFFF).any() != scheme.bfloat16_scales
        assert first.ints.tobytes() == second.ints.tobytes() and first.scales.tobytes() == second.scales.tobytes()


def test_sensitive_outputs_have_less_error_than_when_all_count_alike() -> None:
    weight = weight_of(7, 64, 64) * np.linspace(0.5, 2, 64, dtype=np.float32)[:, None]
    moments = moments_of(inputs_of(7, 500, 64))
    sensitivity = np.where(np.arange(64) < 8, 1000, 1).astype(np.float32)
    stored = [store_with_feedback("x", weight, PaletteScheme(3), moments, given) for given in (None, sensitivity)]
    assert decibels(*(objective((weight - kind.dequantize())[:8], moments) for kind in stored)) > 3


def test_told_how_few_samples_there_were_it_relies_on_them_less() -> None:
    weight, few, fresh = weight_of(8, 64, 96), moments_of(inputs_of(8, 6, 96)), moments_of(inputs_of(9, 4000, 96))
    stored = [store_with_feedback("x", weight, PaletteScheme(4), few, None, samples) for samples in (None, 6)]
    endless, told = (objective(weight - kind.dequantize(), fresh) for kind in stored)
    assert told < endless


def test_inputs_that_were_always_zero_and_layers_that_saw_nothing_are_rounded_plainly() -> None:
    weight, inputs = weight_of(10, 16, 32), inputs_of(10, 500, 32)
    inputs[:, 5] = 0
    stored = store_with_feedback("x", weight, PaletteScheme(4), moments_of(inputs))
    assert isinstance(stored, PaletteWeight)
    entries = stored.palettes[0, :, 0].astype(np.float64)
    np.testing.assert_array_equal(np.abs(stored.dequantize()[:, 5] - weight[:, 5]),
                                  np.abs(entries[:, None] - weight[:, 5]).min(axis=0).astype(np.float32))
    silent = store_with_feedback("x", weight, IntegerScheme(4, 16), np.zeros((32, 32)))
    np.testing.assert_array_equal(silent.dequantize(), quantize(weight, 4, 16).dequantize())


def test_the_objective_is_the_mean_weighted_squared_output_error() -> None:
    inputs, error = inputs_of(11, 300, 20), weight_of(11, 6, 5, 2, 2)
    sensitivity = np.arange(1, 7).astype(np.float32)
    outputs = inputs @ error.reshape(6, 20).T.astype(np.float64)
    moments = inputs.T @ inputs / len(inputs)
    assert objective(error, moments, sensitivity) == pytest.approx((np.square(outputs) @ sensitivity).mean(), rel=1e-9)
    assert objective(error, moments) == pytest.approx(np.square(outputs).sum(axis=1).mean(), rel=1e-9)


def test_centred_moments_are_the_covariance() -> None:
    inputs = inputs_of(12, 300, 10) + 3
    centred = centre(inputs.T @ inputs / len(inputs), inputs.mean(axis=0))
    np.testing.assert_allclose(centred, np.cov(inputs.T, bias=True), atol=1e-9)


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    weight, moments = weight_of(13, 4, 48), np.eye(48)
    with pytest.raises(UserError, match=r"blocks\.0\.weight holds NaN or infinite values"):
        store_with_feedback("blocks.0.weight", np.where(weight > 0, weight, np.nan), PaletteScheme(4), moments)
    with pytest.raises(UserError, match=r"statistics of x .*calibrate again"):
        store_with_feedback("x", weight, PaletteScheme(4), moments * np.nan)
    with pytest.raises(UserError, match=r"statistics of x .*calibrate again"):
        store_with_feedback("x", weight, PaletteScheme(4), moments, -np.ones(4))
    with pytest.raises(UserError, match=r"x \[4, 48\]: .*not positive definite"):
        store_with_feedback("x", weight, PaletteScheme(4), -moments)
    with pytest.raises(UserError, match=r"x \[4, 48\] do not fit: moments \[32, 32\]"):
        store_with_feedback("x", weight, PaletteScheme(4), np.eye(32))
    with pytest.raises(UserError, match=r"x \[4, 48\]: blocks of 32 do not divide 48 inputs"):
        store_with_feedback("x", weight, IntegerScheme(4, 32), moments)
    with pytest.raises(UserError, match=r"x \[4, 48\]: groups of 3 rows do not divide 4 rows"):
        store_with_feedback("x", weight, PaletteScheme(4, group=3), moments)
    with pytest.raises(UserError, match=r"x \[4, 48\]: .* is more than float16 can hold"):
        store_with_feedback("x", weight * 1e8, PaletteScheme(4), moments)
