"""Correction after rounding: biases take out the mean of the output error that rounding leaves.

An error E = W - W' of a weight [out, in] takes E x from the outputs. With the bias b + E mean(x), E (x - mean(x)) is left: no
other bias has less mean squared error on the calibration inputs, and it is `objective` with `centre`d moments (feedback.py).
Scales need no correction of their own: error feedback fits them to the codes in closed form.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.compression.stored import StoredWeight
from export.errors import UserError


def bias_name(weight: str) -> str:
    """The name of the bias beside a weight: "x.weight" -> "x.bias"."""
    return weight.removesuffix("weight") + "bias"


def corrected_bias(
    name: str, weight: StoredWeight, original: NDArray[np.floating], bias: NDArray[np.floating], mean: NDArray[np.floating]
) -> NDArray[np.float32]:
    """New values [out] of the bias beside a weight `name` [out, in...] that is stored now.

    mean: [in], of the layer's inputs (a convolution's patches in the order of weight.reshape(out, -1)).
    Raises UserError naming the weight where the mean does not fit it.
    """
    error = (original.astype(np.float64) - weight.dequantize()).reshape(original.shape[0], -1)
    if mean.shape != error.shape[1:] or not np.isfinite(mean).all():
        raise UserError(f"{name} {list(original.shape)} has no finite mean input of {error.shape[1]} values; calibrate again")
    return (bias + error @ mean.astype(np.float64)).astype(np.float32)
