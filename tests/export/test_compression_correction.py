"""Corrected biases: what they leave of the output error, on data and through torch's own layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from export.compression.correction import bias_name, corrected_bias
from export.compression.feedback import centre, objective
from export.compression.integers import quantize
from export.compression.palettes import palettize
from export.compression.stored import FloatWeight
from export.errors import UserError


def layer(seed: int, out: int = 8, row: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weight [out, row], bias [out] and inputs [64, row] whose mean is as large as their spread."""
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((64, row)) + generator.standard_normal(row)
    weight, bias = generator.standard_normal((out, row)), generator.standard_normal(out)
    return weight.astype(np.float32), bias.astype(np.float32), inputs.astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(-0.1, 0.1))
def test_no_other_bias_has_a_smaller_error_on_the_calibration_inputs(seed: int, change: float) -> None:
    weight, bias, inputs = layer(seed)
    stored = quantize(weight, 4)
    corrected = corrected_bias("x.weight", stored, weight, bias, inputs.mean(axis=0))
    exact = inputs.astype(np.float64)
    missing = exact @ (weight - stored.dequantize()).T.astype(np.float64)

    def error(other: np.ndarray) -> float:
        return float(np.square(missing + bias - other).sum(axis=1).mean())

    assert error(corrected) <= error(bias) * (1 + 1e-6)
    assert error(corrected) <= error(corrected + np.float32(change)) * (1 + 1e-6)
    centred = centre(exact.T @ exact / len(exact), exact.mean(axis=0))
    assert error(corrected) == pytest.approx(objective(weight - stored.dequantize(), centred), rel=1e-4)


def test_outputs_of_a_convolution_keep_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(6, generator=generator)
    pictures = torch.randn(2, 4, 10, 10, generator=generator) + 1
    stored = palettize(weight.numpy().astype(np.float16), 2)
    patches = F.unfold(pictures, 3, padding=1)  # [pictures, in, positions], in the order of weight.reshape(out, -1)
    mean = patches.mean(dim=(0, 2)).numpy()
    found = corrected_bias("c.weight", stored, weight.numpy(), bias.numpy(), mean)
    rounded = torch.from_numpy(stored.dequantize())
    expected = F.conv2d(pictures, weight, bias, padding=1).mean(dim=(0, 2, 3))
    before = F.conv2d(pictures, rounded, bias, padding=1).mean(dim=(0, 2, 3))
    after = F.conv2d(pictures, rounded, torch.from_numpy(found), padding=1).mean(dim=(0, 2, 3))
    assert (before - expected).abs().max() > 0.1
    assert (after - expected).abs().max() < 1e-4
    assert found.dtype == np.float32


def test_the_bias_of_a_weight() -> None:
    assert bias_name("blocks.0.weight.weight") == "blocks.0.weight.bias"


def test_a_weight_without_error_keeps_its_bias() -> None:
    weight, bias, inputs = layer(0)
    np.testing.assert_array_equal(corrected_bias("x.weight", FloatWeight(weight), weight, bias, inputs.mean(axis=0)), bias)


def test_a_mean_of_another_layer_and_nan_are_refused_by_name() -> None:
    weight, bias, inputs = layer(0)
    for mean in (inputs.mean(axis=0)[:5], np.full(12, np.nan)):
        with pytest.raises(UserError, match=r"x\.weight \[8, 12\] has no finite mean input of 12 values"):
            corrected_bias("x.weight", quantize(weight, 4), weight, bias, mean)
