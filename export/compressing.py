"""Every component in the order of use, one in memory at a time, with the weights that each format stores of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from calibration.statistics import Statistics
from export.calibrating import calibrate
from export.choosing import layers_of
from export.compression.recipe import FormatRecipe
from export.compression.rounding import round_module
from export.compression.stored import IntegerWeight, StoredWeight
from export.formats.format import Format
from export.measuring import Loss, Trial, loss
from export.planning import ExportPlan, Part
from export.progress import Progress
from export.recording import Piece
from runtimes.conditioning import NAMES, Contract

Stored = Mapping[str, StoredWeight]


@dataclass(frozen=True)
class Compressed:
    """A component: the modules of its pieces, and by format what is stored of each (nothing of a component not exported)."""

    part: Part
    modules: tuple[nn.Module, ...]
    stored: Mapping[str, tuple[Stored, ...]]

    @property
    def original(self) -> list[Piece]:
        return list(zip(self.part.pieces, self.modules, strict=True))

    def references(self, format: Format) -> list[Piece] | None:
        """The compressed references of the pieces; None where the stored weights are the originals."""
        stored = self.stored.get(format.name, ())
        if all(_is_exact(module, weights) for module, weights in zip(self.modules, stored)):  # noqa: B905 (none are stored)
            return None
        references = [format.reference(module, weights) for module, weights in zip(self.modules, stored, strict=True)]
        return list(zip(self.part.pieces, references, strict=True))


class Trials:
    """What the originals draw, and what the compressed references of each format do."""

    def __init__(self, plan: ExportPlan, prompts: tuple[str, ...]) -> None:
        contract = contract_of(plan)
        tokenizers = [plan.tokenizers["tokenizer"], plan.tokenizers["tokenizer_2"]]
        self.prompts = prompts
        self.original = Trial(contract, tokenizers, prompts)
        self.formats = {format.name: Trial(contract, tokenizers, prompts) for format in plan.formats}

    def advance(self, component: Compressed, references: Mapping[str, list[Piece] | None]) -> None:
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
    """Loads and rounds the components of a plan. Each takes a step to load and one a format."""
    progress.stage(stage, len(plan.parts) * (1 + len(plan.formats)))
    for part in plan.parts:
        progress.step(f"{part.name}: weights")
        modules = tuple(piece.load(plan.checkpoint) for piece in part.pieces)
        layers = layers_of(statistics, part.name)
        stored = {}
        for format in plan.formats:
            progress.step(f"{part.name}: {format.name}")
            if part.name in plan.exported:
                chosen = recipes[format.name].schemes(part.name)
                plans = [{info.name: chosen[info.name] for info in piece.weights} for piece in part.plans[format.name]]
                stored[format.name] = tuple(round_module(m, p, layers) for m, p in zip(modules, plans, strict=True))
        yield Compressed(part, modules, stored)


def contract_of(plan: ExportPlan) -> Contract:
    """How the graphs of a plan are fed."""
    scaled = plan.graph.rewrites.latent_scale_in_decoder
    return Contract(NAMES[plan.graph.contract], scaled, plan.family.latent_layout(plan.graph), plan.graph.sigmas)


def _is_exact(module: nn.Module, stored: Stored) -> bool:
    """Whether the stored weights are the originals, so that the original is its own compressed reference."""
    return all(
        not isinstance(weight, IntegerWeight) and np.array_equal(weight.dequantize(), module.get_parameter(name).numpy())
        for name, weight in stored.items()
    )
