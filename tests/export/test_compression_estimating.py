"""Estimated rounding errors against those of the weights as they are stored."""

from __future__ import annotations

import numpy as np
import pytest

from export.compression.compress import store
from export.compression.estimating import squared_error
from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, Scheme

PALETTES = (
    *(PaletteScheme(bits) for bits in (3, 4, 6, 8)),
    *(PaletteScheme(bits, 16) for bits in (3, 4, 6)),
    *(PaletteScheme(bits, scaled=True) for bits in (3, 4, 6)),
    PaletteScheme(8, vector=2),
)
EXACT = (FloatScheme(16), FloatScheme(32), IntegerScheme(8), IntegerScheme(4, 32), IntegerScheme(4, 16, bfloat16_scales=True))


def weights(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-tailed values [32, 512] and how much each counts, as different as rows and columns of a real layer."""
    generator = np.random.default_rng(seed)
    values = (generator.standard_t(5, (32, 512)) * 0.03).astype(np.float32)
    return values, generator.lognormal(0, 0.7, (32, 1)) * generator.lognormal(0, 0.7, (1, 512))


def stored_error(values: np.ndarray, scheme: Scheme, importance: np.ndarray | None) -> float:
    error = np.square(values - store("w", values, scheme, importance).dequantize(), dtype=np.float64)
    return float((error if importance is None else importance * error).sum())


@pytest.mark.parametrize("scheme", PALETTES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_of_a_palette_is_about_that_of_the_best_one(scheme: Scheme, weighted: bool) -> None:
    values, importance = weights(1)
    given = importance if weighted else None
    assert 0.7 < squared_error(values, scheme, given) / stored_error(values, scheme, given) < 1.6


@pytest.mark.parametrize("scheme", EXACT, ids=str)
def test_the_error_of_floats_and_integers_is_theirs(scheme: Scheme) -> None:
    values, importance = weights(2)
    stored = np.square(values - store("w", values, scheme).dequantize(), dtype=np.float64)
    assert squared_error(values, scheme, importance) == pytest.approx(float((importance * stored).sum()), rel=1e-9)


@pytest.mark.parametrize("scheme", PALETTES, ids=str)
def test_constants_and_weights_of_no_importance_have_no_error(scheme: Scheme) -> None:
    assert squared_error(np.full((32, 16), 0.25, np.float32), scheme) == pytest.approx(0, abs=1e-12)
    values, importance = weights(3)
    assert squared_error(values, scheme, 0 * importance) == 0
