"""Block integers: their error, their ranges, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.compression.integers import quantize

WEIGHTS = hnp.arrays(np.float32, (3, 8), elements=st.floats(-100, 100, width=32))


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from([None, 2, 4]))
def test_eight_bits_are_off_by_at_most_half_a_step(weight: np.ndarray, block: int | None) -> None:
    stored = quantize(weight, 8, block)
    steps = np.repeat(stored.scales, stored.block, axis=1)
    assert (np.abs(stored.dequantize() - weight) <= steps * 0.5001 + 1e-7).all()
    assert stored.block == (block or 8)


@settings(deadline=None)
@given(WEIGHTS, st.booleans())
def test_four_bits_have_no_more_error_than_the_largest_weight_as_scale(weight: np.ndarray, bfloat16: bool) -> None:
    stored = quantize(weight, 4, 4, bfloat16)
    blocks = weight.reshape(3, 2, 4).astype(np.float64)
    steps = np.abs(blocks).max(axis=2, keepdims=True) / 7
    plain = np.where(steps > 0, np.rint(blocks / np.where(steps > 0, steps, 1)) * steps, 0)
    rounding = 2**-8 if bfloat16 else 1e-6
    error = np.linalg.norm(stored.dequantize().astype(np.float64) - weight)
    assert error <= np.linalg.norm(plain - blocks) * 1.001 + rounding * np.linalg.norm(weight.astype(np.float64)) + 1e-36
    assert stored.ints.min() >= -8 and stored.ints.max() <= 7


def test_bfloat16_scales_are_exact_in_bfloat16_and_count_two_bytes() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    stored = quantize(weight, 4, 32, bfloat16_scales=True)
    scales = torch.from_numpy(stored.scales)
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
    assert stored.nbytes == 16 * 64 // 2 + 16 * 2 * 2


def test_zero_blocks_stay_zero() -> None:
    stored = quantize(np.zeros((2, 32), np.float32), 4, 32)
    assert not stored.dequantize().any()
    assert np.isfinite(stored.scales).all() and (stored.scales > 0).all()


def test_convolutions_have_one_scale_an_output_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    stored = quantize(weight, 8)
    assert stored.scales.shape == (4, 1) and stored.shape == weight.shape


def test_blocks_that_do_not_fit_bits_that_do_not_exist_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 32 do not divide 48 inputs"):
        quantize(np.ones((2, 48), np.float32), 4, 32)
    with pytest.raises(ValueError, match="4 or 8 bits, not 6"):
        quantize(np.ones((2, 32), np.float32), 6, 32)
    with pytest.raises(ValueError, match="NaN"):
        quantize(np.full((2, 32), np.nan, np.float32), 8)
