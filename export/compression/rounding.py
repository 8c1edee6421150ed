"""Rounds weights with what calibration knows of them: error feedback first, then the biases that it leaves wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from calibration.statistics import LayerStatistics
from export.compression.compress import store
from export.compression.correction import bias_name, corrected_bias
from export.compression.feedback import centre, column_costs, store_with_feedback
from export.compression.parallel import in_order
from export.compression.schemes import FloatScheme, IntegerScheme, Recipe, Scheme
from export.compression.stored import IntegerWeight, StoredWeight
from export.errors import UserError

Layers = Callable[[str, tuple[int, ...]], LayerStatistics | None]  # by weight name and shape; None: nothing is known of it


def nothing_known(name: str, shape: tuple[int, ...]) -> None:
    """`Layers` without calibration."""


def round_weights(weights: Mapping[str, Tensor], recipe: Recipe, layers: Layers = nothing_known) -> dict[str, StoredWeight]:
    """Stores every weight that the recipe names, on all cores. Each is taken from `weights` when its turn comes.

    The biases of layers whose inputs are known take out the mean of what rounding did to their outputs.
    """

    def values_of(name: str) -> np.ndarray:
        if name not in weights:
            raise UserError(f"the recipe names {name}, which the model does not have")
        return weights[name].detach().float().numpy()

    def round_one(name: str) -> dict[str, StoredWeight]:
        values, scheme = values_of(name), recipe[name]
        layer = None if isinstance(scheme, FloatScheme) else known(name, values.shape, recipe, layers)
        weight = round_weight(name, values, scheme, layer)
        bias = bias_name(name)
        if layer is None or layer.is_lookup or bias not in recipe:
            return {name: weight}
        corrected = corrected_bias(name, weight, values, values_of(bias), layer.mean)
        return {name: weight, bias: store(bias, corrected, recipe[bias])}

    done = list(in_order(round_one, recipe))
    stored = {name: made[name] for name, made in zip(recipe, done, strict=True)}
    for name, made in zip(recipe, done, strict=True):
        stored |= {other: weight for other, weight in made.items() if other != name}
    return stored


def round_weight(name: str, values: np.ndarray, scheme: Scheme, layer: LayerStatistics | None) -> StoredWeight:
    """One weight: with error feedback where its inputs' second moments are known, plainly where not."""
    if layer is None or isinstance(scheme, FloatScheme):
        weight = store(name, values, scheme)
    elif layer.is_lookup:
        weight = store(name, values, scheme, importance(values.shape, layer))
    else:
        weight = store_with_feedback(name, values, scheme, layer.moments, layer.sensitivity, layer.samples)
    if isinstance(weight, IntegerWeight) and isinstance(scheme, IntegerScheme):
        return replace(weight, input_bits=scheme.input_bits)
    return weight


def known(name: str, shape: tuple[int, ...], parameters: Collection[str], layers: Layers) -> LayerStatistics | None:
    """A weight's statistics; second moments about the mean where a bias is going to take the mean error out."""
    layer = layers(name, shape)
    if layer is None or layer.is_lookup or bias_name(name) not in parameters:
        return layer
    return replace(layer, moments=centre(layer.moments, layer.mean).astype(np.float32))


def importance(shape: tuple[int, ...], layer: LayerStatistics) -> np.ndarray:
    """float64 of the weight's shape: what a squared rounding error of each value adds to the damage (`column_costs`).

    An embedding's row that the calibration prompts never looked up counts as if it were half as frequent as the mean row: other
    prompts will.
    """
    if layer.is_lookup:
        shares = layer.moments.astype(np.float64) + 0.5 / len(layer.moments)
        return shares[:, None] * layer.sensitivity
    return (layer.sensitivity[:, None] * column_costs(layer.moments, layer.samples)).reshape(shape)
