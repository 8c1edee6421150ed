"""From calibration to a recipe: what every candidate scheme of every weight would do to the pictures, and the choice.

The loss of a candidate is the damage that its rounding does to the final latents (in the VAE decoder, to the picture) once
error feedback has made up for what it can (`rounding.importance`); where a backend rounds a layer's inputs as well, that is
part of it, unless it rounds them to 16 bits, which takes a second product. Losses add up, and one integer programme a format
chooses under the budgets of bytes and second products. Without statistics the loss is the error's share of the weight's energy,
whatever the weight is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from calibration.statistics import InputRounding, LayerStatistics, Statistics
from export.calibrating import statistics_of
from export.compression.allocation import Candidate, allocate
from export.compression.estimating import squared_error
from export.compression.ladders import Activations, rounds_inputs
from export.compression.parallel import in_order
from export.compression.recipe import Evidence, FormatRecipe, RecipeFile, WeightChoice, scheme_entry
from export.compression.rounding import Layers, importance, known, nothing_known
from export.compression.schemes import IntegerScheme, Plan, Scheme, WeightInfo, stored_bytes
from export.measuring import Loss
from export.planning import ExportPlan
from export.progress import Progress

SECOND_PRODUCTS: Mapping[Activations, float] = {"float": 0.25, "int8": 0.0, "int16": 1.0}
"""Of the multiply-accumulates of linears whose inputs are rounded, the share that may be done again, for inputs of 16 bits."""

# Weights of a tensor that candidates are tried on, in whole groups of rows; a larger one is sampled evenly.
SAMPLE = 1 << 15
ROWS = 16  # that stay together: a group of palettes

Key = tuple[str, str]  # component, weight


@dataclass(frozen=True)
class _Weight:
    """A weight with a choice, or rows of it, and what a squared error of each value costs (None: nothing is known)."""

    key: Key
    values: np.ndarray
    importance: np.ndarray | None
    share: float  # of the whole weight's loss that the rows stand for


def settle(plan: ExportPlan, statistics: Statistics | None, progress: Progress) -> dict[str, FormatRecipe]:
    """The recipe of every format. Reads weights only where there is a choice to make."""
    if plan.recipe is not None:
        return {format.name: plan.recipe.formats[format.name] for format in plan.formats}
    weighed: dict[str, dict[Key, list[Candidate]]] = {format.name: {} for format in plan.formats}
    parts = [part for part in plan.parts if part.name in plan.exported]
    undecided = [part for part in parts if any(p.is_open for plans in part.plans.values() for p in plans)]
    if undecided:
        progress.stage("analysis", sum(len(part.pieces) for part in undecided) * len(plan.formats))
    for part in undecided:
        layers = layers_of(statistics, part.name)
        for index, piece in enumerate(part.pieces):
            weights = piece.weights(plan.checkpoint)
            for format in plan.formats:
                progress.step(f"{piece.name}: {format.name}")
                weighed[format.name] |= weigh(part.name, weights, part.plans[format.name][index], format.rounding, layers)
    return {format.name: _choose(plan, format.name, weighed[format.name], statistics) for format in plan.formats}


def layers_of(statistics: Statistics | None, component: str) -> Layers:
    """The statistics of a component's weights."""
    if statistics is None:
        return nothing_known
    return lambda name, shape: statistics_of(statistics, component, name, shape)


def weigh(
    component: str,
    weights: Mapping[str, Tensor],
    plan: Plan,
    rounding: InputRounding | None,
    layers: Layers = nothing_known,
) -> dict[Key, list[Candidate]]:
    """The candidates, with their losses, of a component's weights that have a choice. rounding: of the format, see `Format`."""

    def candidates(info: WeightInfo) -> list[Candidate]:
        values = weights[info.name].detach().numpy()
        layer = known(info.name, info.shape, weights, layers)
        weight = _sample((component, info.name), values, layer)
        inputs = layer.input_rounding(values, rounding) if layer is not None and rounding is not None else 0.0
        again = values.size * layer.samples if layer is not None else 0
        return [
            Candidate(
                s,
                stored_bytes(s, info.shape),
                _loss(weight, s) + inputs * rounds_inputs(info, s),
                again * (isinstance(s, IntegerScheme) and s.input_bits == 16),
            )
            for s in plan.candidates[info.name]
        ]

    names = [(component, info.name) for info in plan.undecided]
    return dict(zip(names, in_order(candidates, plan.undecided), strict=True))


def affordable_work(weighed: Mapping[Key, Sequence[Candidate]], activations: Activations) -> int:
    """The multiply-accumulates of second products that the chosen candidates may take together."""
    whole = sum(max(candidate.work for candidate in candidates) for candidates in weighed.values())
    return int(SECOND_PRODUCTS[activations] * whole)


def _sample(key: Key, values: np.ndarray, layer: LayerStatistics | None) -> _Weight:
    cost = None if layer is None else importance(values.shape, layer)
    groups, row = values.shape[0] // ROWS, values[0].size
    wanted = max(1, SAMPLE // (ROWS * row))
    if groups <= wanted:
        return _Weight(key, values, cost, 1.0)
    picked = (np.arange(wanted) * groups // wanted)[:, None] * ROWS + np.arange(ROWS)
    rows = picked.reshape(-1)
    if cost is None:
        return _Weight(key, values[rows], None, len(rows) / len(values))
    total = cost.sum()
    return _Weight(key, values[rows], cost[rows], cost[rows].sum() / total if total else 1.0)


def _loss(weight: _Weight, scheme: Scheme) -> float:
    error = squared_error(weight.values, scheme, weight.importance) / weight.share
    if weight.importance is not None:
        return error
    energy = float(np.square(weight.values, dtype=np.float64).sum())
    return error * weight.values.size / energy if energy else 0.0


def _choose(
    plan: ExportPlan, format: str, weighed: Mapping[Key, Sequence[Candidate]], statistics: Statistics | None
) -> FormatRecipe:
    pieces = [(part.name, piece) for part in plan.parts if part.name in plan.exported for piece in part.plans[format]]
    shapes = {(component, info.name): info.shape for component, piece in pieces for info in piece.weights}
    settled = {(component, name): scheme for component, piece in pieces for name, scheme in piece.settled.items()}
    chosen = allocate(weighed, plan.budgets[format], affordable_work(weighed, plan.activations)) if weighed else {}
    components: dict[str, dict[str, WeightChoice]] = {}
    for key, shape in shapes.items():
        scheme = chosen[key].scheme if key in chosen else settled[key]
        evidence = tuple(Evidence(scheme=scheme_entry(c.scheme), bytes=c.nbytes, loss=c.loss) for c in weighed.get(key, ()))
        choice = WeightChoice(shape=shape, scheme=scheme_entry(scheme), weighed=evidence)
        components.setdefault(key[0], {})[key[1]] = choice
    nbytes = sum(stored_bytes(choice.scheme.scheme(), choice.shape) for all in components.values() for choice in all.values())
    losses = [candidate.loss for (component, _), candidate in chosen.items() if component != "vae_decoder"]
    return FormatRecipe(
        components=components,
        bytes=nbytes,
        mean_bits=8 * nbytes / sum(math.prod(shape) for shape in shapes.values()),
        predicted_loss=None if statistics is None else sum(losses),
    )


def with_measured(recipes: Mapping[str, FormatRecipe], losses: Mapping[str, Loss]) -> dict[str, FormatRecipe]:
    """The recipes with what they were seen to cost."""
    return {
        name: recipe.model_copy(update={"measured_loss": losses[name].latents}) if name in losses else recipe
        for name, recipe in recipes.items()
    }


def recipe_file(plan: ExportPlan, fingerprint: str, formats: Mapping[str, FormatRecipe], prompts: int | None) -> RecipeFile:
    """What is written of an analysis. prompts: of the calibration, None without one."""
    return RecipeFile(
        model=plan.checkpoint.name,
        fingerprint=fingerprint,
        sigmas=plan.graph.sigmas,
        resolution=(plan.graph.width, plan.graph.height),
        prompts=prompts,
        formats=formats,
    )
