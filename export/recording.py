"""Golden cases: each component's real inputs, what the original makes of them, and what its compressed references make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from export.components.component import Component
from runtimes.bundle import Feed, TensorEntry, chunk_feeds
from runtimes.conditioning import Arrays, Contract
from runtimes.golden import Case, Drawing
from runtimes.graph import TensorSpec
from runtimes.tokenizer import Tokenizer

Piece = tuple[Component, nn.Module]


@dataclass(frozen=True)
class Stretch:
    """A piece of a component to run: `load` gives its module, which is released when the next stretch runs."""

    component: Component
    load: Callable[[], nn.Module]


def loaded(pieces: Sequence[Piece]) -> list[Stretch]:
    """Modules that are in memory already."""
    return [Stretch(component, lambda module=module: module) for component, module in pieces]  # type: ignore[misc]


@dataclass
class Recorder:
    """Goes through the components in the order of use; what one gives, the next ones take.

    Inputs are the float32 originals', along the latents that unmodified diffusers drew, so that an error of one component is
    never another's.
    """

    contract: Contract
    tokenizers: Sequence[Tokenizer]
    drawings: Sequence[Drawing]
    transformer_inputs: tuple[TensorEntry, ...]
    steps: tuple[int, ...] | None = None  # of the transformer's that are recorded; None: all
    _outputs: dict[str, list[Arrays]] = field(default_factory=dict)

    def inputs(self, component: str) -> Iterator[tuple[int, int | None, dict[str, np.ndarray]]]:
        """(prompt, step, inputs) of every case of a component."""
        for p, drawing in enumerate(self.drawings):
            if component in ("text_encoder", "text_encoder_2"):
                ids = self.tokenizers[component == "text_encoder_2"](drawing.prompt)
                yield p, None, {"input_ids": ids}
            elif component == "conditioner":
                yield p, None, self.contract.conditioner_inputs(*self._encoded(p))
            elif component == "vae_decoder":
                yield p, None, self.contract.decoder_inputs(drawing.latents[-1:])
            else:
                conditioning = self._conditioning(p)
                for step in range(len(drawing.latents) - 1) if self.steps is None else self.steps:
                    yield p, step, self.contract.transformer_inputs(conditioning, drawing.latents[step : step + 1], step)

    def record(self, component: str, original: Sequence[Stretch], compressed: Mapping[str, Sequence[Stretch]]) -> list[Case]:
        """The cases of a component given as its stretches in order, and by format with compressed weights."""
        asked = list(self.inputs(component))
        given = [inputs for _, _, inputs in asked]
        references = run_all(original, given)
        made = {format: run_all(stretches, given) for format, stretches in compressed.items()}
        cases = [
            Case(prompt, step, inputs, references[k], {format: outputs[k] for format, outputs in made.items()})
            for k, (prompt, step, inputs) in enumerate(asked)
        ]
        self.recall(component, cases)
        return cases

    def recall(self, component: str, cases: Sequence[Case]) -> None:
        """Takes what a component gave from cases recorded before."""
        self._outputs[component] = [case.reference for case in cases]

    def _encoded(self, prompt: int) -> tuple[Arrays, Arrays]:
        return self._outputs["text_encoder"][prompt], self._outputs["text_encoder_2"][prompt]

    def _conditioning(self, prompt: int) -> Arrays:
        if "conditioner" in self._outputs:
            return self._outputs["conditioner"][prompt]
        return self.contract.unhoisted(*self._encoded(prompt), self.transformer_inputs)


def run(pieces: Sequence[Piece], given: Arrays) -> dict[str, np.ndarray]:
    """The outputs of pieces run one after another, each taking of the inputs and of what came before what it declares."""
    return run_all(loaded(pieces), [given])[0]


def run_all(stretches: Sequence[Stretch], given: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """The outputs for each of several inputs. All of them pass one stretch before the next one is loaded."""
    declared = [(entries(stretch.component.inputs), entries(stretch.component.outputs)) for stretch in stretches]
    values = [dict(inputs) for inputs in given]
    for stretch, feeds in zip(stretches, chunk_feeds(declared) if len(stretches) > 1 else [()], strict=True):
        module = stretch.load()
        for known in values:
            known |= _outputs(stretch.component, module, known, {feed.input: feed for feed in feeds})
        del module
    return [{spec.name: known[spec.name] for spec in stretches[-1].component.outputs} for known in values]


def _outputs(piece: Component, module: nn.Module, values: Arrays, feeds: Mapping[str, Feed]) -> dict[str, np.ndarray]:
    arrays = []
    for spec in piece.inputs:
        feed = feeds.get(spec.name)
        array = values[feed.tensor if feed else spec.name]
        arrays.append(array[:, slice(*feed.rows)] if feed and feed.rows else array)
    tensors = [torch.from_numpy(np.ascontiguousarray(a, s.dtype)) for a, s in zip(arrays, piece.inputs, strict=True)]
    with torch.no_grad():
        outputs = module(*tensors)
    return {spec.name: output.numpy() for spec, output in zip(piece.outputs, outputs, strict=True)}


def entries(specs: Sequence[TensorSpec]) -> tuple[TensorEntry, ...]:
    """A graph's inputs or outputs as the manifest has them."""
    return tuple(TensorEntry.model_validate(vars(spec)) for spec in specs)
