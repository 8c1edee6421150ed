"""The measuring process of what an artifact is compared with: the original, in torch or in unmodified diffusers.

It speaks as runtimes/harness/worker.py does: that one holds the artifact, this one the other side.

    diffusers       StableDiffusion3Pipeline, float32, eager: pictures only
    torch           the float32 modules that the artifacts were traced from, eager
    torch-compile   the same modules under torch.compile, which compiles at the first run of a module
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.checkpoint import Checkpoint, open_checkpoint
from export.components.component import Component
from export.errors import UserError
from export.families import read_family
from export.families.family import GraphOptions
from export.lora import Lora
from export.rewrites import Rewrites
from runtimes.bundle import ArtifactEntry, BundleError, ComponentEntry, Manifest, load_manifest
from runtimes.graph import GraphError, TensorSpec, check_inputs
from runtimes.harness.worker import Answer, OriginalRequest, Subject, make_subject, private_stdout, say, serve
from runtimes.registry import RUNTIMES, Runtime, specs
from runtimes.tokenizer import TokenizerError


@dataclass(frozen=True)
class TorchGraph:
    """The module that an artifact was traced from, as it is or compiled, called with what the artifact takes."""

    piece: Component
    module: Callable[..., Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = check_inputs(self.inputs, inputs)
        tensors = [torch.from_numpy(np.ascontiguousarray(arrays[s.name], s.dtype)) for s in self.piece.inputs]
        try:
            with torch.no_grad():
                outputs = self.module(*tensors)
        except RuntimeError as error:  # torch.compile's own errors, such as no C++ compiler, among them
            raise GraphError(f"torch cannot run {self.piece.name}: {str(error).strip().splitlines()[0]}") from error
        return {spec.name: output.numpy() for spec, output in zip(self.piece.outputs, outputs, strict=True)}


class DiffusersSubject:
    """Prompt to picture in diffusers' own pipeline, with the golden prompts and seeds."""

    paths: tuple[Path, ...] = ()  # it loads no artifact

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, options: GraphOptions, threads: int | None) -> None:
        from export import reference  # imports diffusers

        self._reference, self._checkpoint, self._options = reference, checkpoint, options
        self._prompts = cycle([(golden.prompt, golden.seed) for golden in manifest.golden.prompts])
        self._pipeline: object = None
        _use(threads)

    def load(self) -> float:
        self._pipeline = None
        start = time.perf_counter()
        self._pipeline = self._reference.reference_pipeline(self._checkpoint, resident=True)
        return time.perf_counter() - start

    def run(self) -> float:
        prompt, seed = next(self._prompts)
        start = time.perf_counter()
        self._reference.draw(self._pipeline, self._options, prompt, seed)
        return time.perf_counter() - start


def original_subject(request: OriginalRequest, manifest: Manifest) -> Subject:
    """The subject of a request."""
    loras = [Lora(where, scale) for where, scale in request.loras]
    checkpoint, artifacts = open_checkpoint(request.model, loras=loras), RUNTIMES[request.runtime]
    options = graph_options(manifest, artifacts.format)
    if request.against == "diffusers":
        return DiffusersSubject(checkpoint, manifest, options, request.threads)
    compiled = request.against == "torch-compile"
    return make_subject(request, manifest, torch_runtime(checkpoint, options, artifacts.format, compiled))


def torch_runtime(checkpoint: Checkpoint, options: GraphOptions, format: str, compiled: bool) -> Runtime:
    """A runtime that takes for each artifact of a format the module that it was traced from."""
    pieces: dict[str, list[Component]] = {}
    for piece in read_family(checkpoint).components(options):
        pieces.setdefault(piece.name.partition("_chunk")[0], []).append(piece)

    def load(path: Path, entry: ComponentEntry, threads: int | None) -> TorchGraph:
        _use(threads)
        number, artifact = _artifact(path, entry)
        piece = pieces[entry.name][number]
        module: Callable[..., Any] = piece.load(checkpoint)
        if compiled:
            module = torch.compile(module)
        return TorchGraph(piece, module, specs(artifact.inputs), specs(artifact.outputs))

    return Runtime("torch", format, "torch", load)


def graph_options(manifest: Manifest, format: str) -> GraphOptions:
    """What the graphs of a bundle's format were built with."""
    transformer = manifest.component("transformer", format)
    return GraphOptions(
        manifest.image_size.width,
        manifest.image_size.height,
        manifest.sigmas,
        manifest.contract,
        Rewrites(**{name: name in manifest.rewrites for name in vars(Rewrites())}),
        len(transformer.artifacts) if transformer else 1,
    )


def _artifact(path: Path, entry: ComponentEntry) -> tuple[int, ArtifactEntry]:
    return next((n, artifact) for n, artifact in enumerate(entry.artifacts) if path.match(artifact.path))


def _use(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)  # of the process


def main() -> None:
    answers = private_stdout()
    try:
        request = OriginalRequest.model_validate(json.loads(sys.argv[1]))
        serve(original_subject(request, load_manifest(request.bundle)), sys.stdin, answers)
    except (UserError, BundleError, GraphError, TokenizerError) as error:
        say(answers, Answer(error=str(error)))


if __name__ == "__main__":
    main()
