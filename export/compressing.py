"""Every component in the order of use, with the weights that each format stores of it.

Weights are read and rounded one at a time, and what is run is loaded a stretch at a time, so that memory holds the stored
weights of one component and one stretch, however large the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from calibration.statistics import Statistics
from export.calibrating import calibrate
from export.checkpoint import Checkpoint
from export.choosing import layers_of
from export.components.component import Component
from export.compression.recipe import FormatRecipe
from export.compression.rounding import round_weights
from export.compression.stored import FloatWeight, IntegerWeight, StoredWeight
from export.formats.format import Format
from export.measuring import Loss, Trial, loss
from export.planning import ExportPlan, Part
from export.progress import Progress
from export.recording import Stretch
from runtimes.conditioning import NAMES, Contract

Stored = Mapping[str, StoredWeight]


@dataclass(frozen=True)
class Compressed:
    """A component, and by format what is stored of its weights (nothing of a component that is not exported)."""

    part: Part
    checkpoint: Checkpoint
    stored: Mapping[str, Stored]

    @property
    def original(self) -> list[Stretch]:
        """The original modules."""
        return [Stretch(piece, partial(piece.load, self.checkpoint)) for piece in self.part.stretches]

    def references(self, format: Format) -> list[Stretch] | None:
        """The compressed references; None where the stored weights are the originals."""
        if self._is_exact(format):
            return None
        return [Stretch(piece, partial(self._reference, piece, format)) for piece in self.part.stretches]

    def stored_of(self, piece: Component, format: str) -> dict[str, StoredWeight]:
        """What a format stores of one piece."""
        stored = self.stored[format]
        return {name: stored[name] for name in piece.weights(self.checkpoint) if name in stored}

    def skeleton(self, piece: Component, format: str) -> nn.Module:
        """A piece whose stored weights are on the meta device: a format puts them there itself."""
        return piece.load(self.checkpoint, left_out=self.stored[format].keys())

    def _reference(self, piece: Component, format: Format) -> nn.Module:
        return format.reference(self.skeleton(piece, format.name), self.stored_of(piece, format.name))

    def _is_exact(self, format: Format) -> bool:
        """Whether the stored weights are the originals, so that the original is its own compressed reference."""
        stored = self.stored.get(format.name, {})
        if any(isinstance(weight, IntegerWeight) for weight in stored.values()):
            return False
        # Palettes first, which differ at once where they differ at all.
        pieces = [(p.weights(self.checkpoint), self.stored_of(p, format.name)) for p in self.part.pieces if stored]
        return all(
            np.array_equal(weight.dequantize(), weights[name].numpy())
            for floats in (False, True)
            for weights, found in pieces
            for name, weight in found.items()
            if isinstance(weight, FloatWeight) is floats
        )


class Trials:
    """What the originals draw, and what the compressed references of each format do."""

    def __init__(self, plan: ExportPlan, prompts: tuple[str, ...]) -> None:
        contract = contract_of(plan)
        tokenizers = [plan.tokenizers["tokenizer"], plan.tokenizers["tokenizer_2"]]
        self.prompts = prompts
        self.original = Trial(contract, tokenizers, prompts)
        self.formats = {format.name: Trial(contract, tokenizers, prompts) for format in plan.formats}

    def advance(self, component: Compressed, references: Mapping[str, list[Stretch] | None]) -> None:
        """Runs a component for every prompt. Components come in the order of use."""
        self.original.advance(component.part.name, component.original)
        for name, trial in self.formats.items():
            trial.advance(component.part.name, references.get(name) or component.original)

    def losses(self) -> dict[str, Loss]:
        """By format."""
        return {name: loss(trial, self.original) for name, trial in self.formats.items()}


def statistics_for(plan: ExportPlan, progress: Progress, fingerprint: str) -> Statistics | None:
    """The statistics that a plan's weights are rounded by; None where it has no use for them."""
    if plan.calibration is None:
        return None
    return calibrate(plan.checkpoint, plan.family, plan.graph, plan.calibration, progress, fingerprint)


def compressed(
    plan: ExportPlan, recipes: Mapping[str, FormatRecipe], statistics: Statistics | None, progress: Progress, stage: str
) -> Iterator[Compressed]:
    """Rounds the components of a plan, one after another. Each takes a step a format."""
    progress.stage(stage, len(plan.parts) * len(plan.formats))
    for part in plan.parts:
        yield compress(plan, part, recipes, statistics, progress)


def compress(
    plan: ExportPlan, part: Part, recipes: Mapping[str, FormatRecipe], statistics: Statistics | None, progress: Progress
) -> Compressed:
    """Rounds one component for every format."""
    layers = layers_of(statistics, part.name)
    stored: dict[str, Stored] = {}
    for format in plan.formats:
        progress.step(f"{part.name}: {format.name}")
        if part.name not in plan.exported:
            continue
        chosen, found = recipes[format.name].schemes(part.name), dict[str, StoredWeight]()
        for piece, piece_plan in zip(part.pieces, part.plans[format.name], strict=True):
            names = {info.name: chosen[info.name] for info in piece_plan.weights}
            found |= round_weights(piece.weights(plan.checkpoint), names, layers)
        stored[format.name] = found
    return Compressed(part, plan.checkpoint, stored)


def contract_of(plan: ExportPlan) -> Contract:
    """How the graphs of a plan are fed."""
    scaled = plan.graph.rewrites.latent_scale_in_decoder
    return Contract(NAMES[plan.graph.contract], scaled, plan.family.latent_layout(plan.graph), plan.graph.sigmas)
