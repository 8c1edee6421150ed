"""The measuring process of `benchmarks.host`; it speaks as runtimes/harness/worker.py does.

    step        an artifact of the wide transformer through its runtime, on the inputs in a file
    diffusers   unmodified SD3Transformer2DModel, eager or under torch.compile
    pipeline    diffusers' own pipeline of flash-mini with the transformer, both encoders and the decoder under torch.compile
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel

from benchmarks.host.wide import Prompt, original
from export.benchmark_worker import DiffusersSubject, graph_options
from export.checkpoint import open_checkpoint
from runtimes.bundle import load_manifest
from runtimes.harness.worker import Answer, Subject, private_stdout, say, serve


class Asked(BaseModel):
    """component: what an error calls it. artifact, inputs: of a step. compiled: of diffusers. bundle, model: of a pipeline."""

    component: str
    kind: Literal["step", "diffusers", "pipeline"]
    threads: int
    artifact: Path | None = None
    inputs: Path | None = None
    compiled: bool = False
    bundle: Path | None = None
    model: str = ""


class StepSubject:
    """One step of a graph: `make` loads it, and what it gives is called again and again."""

    def __init__(self, make: Callable[[], Callable[[], Any]], paths: tuple[Path, ...]) -> None:
        self.paths = paths
        self._make = make
        self._step: Callable[[], Any] | None = None

    def load(self) -> float:
        self._step = None
        gc.collect()
        start = time.perf_counter()
        self._step = self._make()
        return time.perf_counter() - start

    def run(self) -> float:
        assert self._step is not None
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start


class CompiledPipeline(DiffusersSubject):
    """diffusers' own pipeline, its modules compiled; the compiling itself is part of the warm-up."""

    def load(self) -> float:
        seconds = super().load()
        pipeline: Any = self._pipeline
        for module in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae.decoder):
            module.compile()
        return seconds


def subject(asked: Asked) -> Subject:
    torch.set_num_threads(asked.threads)
    if asked.kind == "pipeline":
        assert asked.bundle is not None
        manifest = load_manifest(asked.bundle)
        options = graph_options(manifest, manifest.formats[0])
        return CompiledPipeline(open_checkpoint(asked.model), manifest, options, asked.threads)
    if asked.kind == "diffusers":
        return StepSubject(lambda: _diffusers(asked.compiled), ())
    assert asked.artifact is not None and asked.inputs is not None
    return StepSubject(lambda: _artifact(asked), (asked.artifact,))


def _diffusers(compiled: bool) -> Callable[[], Any]:
    model, given = original(), Prompt.random().of_diffusers()
    if compiled:
        model.compile()

    def step() -> Any:
        with torch.no_grad():
            return model(**given)

    return step


def _artifact(asked: Asked) -> Callable[[], Any]:
    assert asked.artifact is not None and asked.inputs is not None
    given = dict(np.load(asked.inputs))
    if asked.artifact.suffix == ".pte":
        from runtimes import executorch

        graph: Any = executorch.load(asked.artifact, asked.threads)
    else:
        from runtimes import onnx

        graph = onnx.load(asked.artifact, asked.threads)
    return lambda: graph(given)


def main() -> None:
    answers = private_stdout()
    try:
        made = subject(Asked.model_validate(json.loads(sys.argv[1])))
    except Exception as error:
        say(answers, Answer(error=str(error)))
        raise
    serve(made, sys.stdin, answers)


if __name__ == "__main__":
    main()
