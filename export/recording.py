"""Golden cases: each component's real inputs, what the original makes of them, and what its compressed references make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from export.components.component import Component
from runtimes.bundle import TensorEntry, chunk_feeds
from runtimes.conditioning import Arrays, Contract
from runtimes.golden import Case, Drawing
from runtimes.graph import TensorSpec
from runtimes.tokenizer import Tokenizer

Piece = tuple[Component, nn.Module]


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
                for step in range(len(drawing.latents) - 1):
                    yield p, step, self.contract.transformer_inputs(conditioning, drawing.latents[step : step + 1], step)

    def record(self, component: str, original: Sequence[Piece], compressed: Mapping[str, Sequence[Piece]]) -> list[Case]:
        """The cases of a component given as its pieces (one, or the chunks in order), and by format with compressed weights."""
        cases = []
        for prompt, step, given in self.inputs(component):
            reference = run(original, given)
            made = {format: run(pieces, given) for format, pieces in compressed.items()}
            cases.append(Case(prompt, step, given, reference, made))
        self._outputs[component] = [case.reference for case in cases]
        return cases

    def _encoded(self, prompt: int) -> tuple[Arrays, Arrays]:
        return self._outputs["text_encoder"][prompt], self._outputs["text_encoder_2"][prompt]

    def _conditioning(self, prompt: int) -> Arrays:
        if "conditioner" in self._outputs:
            return self._outputs["conditioner"][prompt]
        return self.contract.unhoisted(*self._encoded(prompt), self.transformer_inputs)


def run(pieces: Sequence[Piece], given: Arrays) -> dict[str, np.ndarray]:
    """The outputs of pieces run one after another, each taking of the inputs and of what came before what it declares."""
    declared = [(entries(piece.inputs), entries(piece.outputs)) for piece, _ in pieces]
    values = dict(given)
    for (piece, module), feeds in zip(pieces, chunk_feeds(declared) if len(pieces) > 1 else [()], strict=True):
        named = {feed.input: feed for feed in feeds}
        arrays = []
        for spec in piece.inputs:
            feed = named.get(spec.name)
            array = values[feed.tensor if feed else spec.name]
            arrays.append(array[:, slice(*feed.rows)] if feed and feed.rows else array)
        tensors = [torch.from_numpy(np.ascontiguousarray(a, s.dtype)) for a, s in zip(arrays, piece.inputs, strict=True)]
        with torch.no_grad():
            outputs = module(*tensors)
        values |= {spec.name: output.numpy() for spec, output in zip(piece.outputs, outputs, strict=True)}
    return {spec.name: values[spec.name] for spec in pieces[-1][0].outputs}


def entries(specs: Sequence[TensorSpec]) -> tuple[TensorEntry, ...]:
    """A graph's inputs or outputs as the manifest has them."""
    return tuple(TensorEntry.model_validate(vars(spec)) for spec in specs)
