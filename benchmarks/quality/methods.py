"""Ways to store a model's weights: each gives, component by component, modules to draw with and the bytes that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import nn

from calibration.statistics import LayerStatistics, Statistics
from export.choosing import affordable_work, layers_of
from export.compression.allocation import Candidate, allocate
from export.compression.compress import parameter, store
from export.compression.feedback import store_with_feedback
from export.compression.ladders import Activations
from export.compression.parallel import in_order
from export.compression.rounding import Layers, importance, round_weights
from export.compression.schemes import FloatScheme, PaletteScheme, Recipe, Scheme, WeightInfo, stored_bytes
from export.compression.stored import StoredWeight
from export.formats.format import Format
from export.planning import Part
from export.recording import Piece

Key = tuple[str, str]  # component, weight


COREMLTOOLS_THRESHOLD = 2048  # elements above which `palettize_weights` takes a constant


@dataclass(frozen=True)
class Made:
    """A component as a method stores it: what to draw with, and bytes of its weights."""

    pieces: list[Piece]
    nbytes: int


class Method(Protocol):
    """One curve or row of the table."""

    @property
    def name(self) -> str: ...

    def make(self, part: Part, modules: list[nn.Module]) -> Made: ...


Settled = tuple[Scheme, tuple[int, ...]]  # a weight's only scheme, and its shape
Recipes = Callable[[str, tuple[WeightInfo, ...]], Recipe]  # of a component's weights
Rounder = Callable[[str, np.ndarray, Scheme, LayerStatistics | None], StoredWeight]


def plain(name: str, values: np.ndarray, scheme: Scheme, layer: LayerStatistics | None) -> StoredWeight:
    """Every value counts the same."""
    return store(name, values, scheme)


def by_sensitivity(name: str, values: np.ndarray, scheme: Scheme, layer: LayerStatistics | None) -> StoredWeight:
    """Values count by the energy of their input and the sensitivity of their output."""
    if layer is None or isinstance(scheme, FloatScheme):
        return store(name, values, scheme)
    if layer.is_lookup:
        return store(name, values, scheme, importance(values.shape, layer))
    energy = np.diagonal(layer.moments).astype(np.float64)
    return store(name, values, scheme, (layer.sensitivity[:, None] * energy).reshape(values.shape))


def with_feedback(name: str, values: np.ndarray, scheme: Scheme, layer: LayerStatistics | None) -> StoredWeight:
    """Each column's error is fed into those not yet rounded."""
    if layer is None or layer.is_lookup or isinstance(scheme, FloatScheme):
        return by_sensitivity(name, values, scheme, layer)
    return store_with_feedback(name, values, scheme, layer.moments, layer.sensitivity, layer.samples)


@dataclass(frozen=True)
class Rounded:
    """Our stored weights. rounder None: as an export rounds them, biases corrected."""

    name: str
    recipe: Recipes
    format: Format
    layers: Callable[[str], Layers]  # of a component
    rounder: Rounder | None

    def make(self, part: Part, modules: list[nn.Module]) -> Made:
        pieces, nbytes = list[Piece](), 0
        for piece, module, plan in zip(part.pieces, modules, part.plans[self.format.name], strict=True):
            stored = self._stored(part.name, module, self.recipe(part.name, plan.weights))
            pieces.append((piece, self.format.reference(module, stored)))
            nbytes += sum(weight.nbytes for weight in stored.values())
        return Made(pieces, nbytes)

    def _stored(self, component: str, module: nn.Module, recipe: Recipe) -> dict[str, StoredWeight]:
        layers = self.layers(component)
        if self.rounder is None:
            return round_weights(dict(module.named_parameters()), recipe, layers)
        rounder = self.rounder

        def stored(name: str) -> StoredWeight:
            values = parameter(module, name).numpy()
            return rounder(name, values, recipe[name], layers(name, values.shape))

        return dict(zip(recipe, in_order(stored, recipe), strict=True))


def uniform(palette: PaletteScheme) -> Recipes:
    """One palette scheme for all that coremltools would palettize too; without groups where they do not divide the weight."""

    def scheme(info: WeightInfo) -> Scheme:
        if info.kind == "other" or info.count < COREMLTOOLS_THRESHOLD:
            return FloatScheme(16)
        fits = palette.group is None or (info.shape[0] % palette.group == 0 and info.shape[0] > palette.group)
        return palette if fits else PaletteScheme(palette.bits)

    return lambda _, infos: {info.name: scheme(info) for info in infos}


def mixed(
    candidates: Mapping[Key, list[Candidate]], settled: Mapping[Key, Settled], budget: int, activations: Activations = "float"
) -> Recipes:
    """The integer programme's choice in `budget` bytes. settled: the weights that have no choice."""
    fixed = sum(stored_bytes(scheme, shape) for scheme, shape in settled.values())
    chosen = allocate(candidates, budget - fixed, affordable_work(candidates, activations))

    def recipe(component: str, infos: tuple[WeightInfo, ...]) -> Recipe:
        keys = [(component, info.name) for info in infos]
        return {key[1]: chosen[key].scheme if key in chosen else settled[key][0] for key in keys}

    return recipe


def statistics_layers(statistics: Statistics) -> Callable[[str], Layers]:
    return lambda component: layers_of(statistics, component)
