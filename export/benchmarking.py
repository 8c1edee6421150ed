"""A bundle beside the original that it was made of: run in turns, each in a process of its own, compared as ratios of pairs."""

from __future__ import annotations

import importlib.metadata

from export.checkpoint import open_checkpoint
from export.errors import UserError
from export.lora import Lora, as_options
from export.progress import Progress
from runtimes.harness.latency import WARM_UP, OpenBundle, interleave, start_worker
from runtimes.harness.results import IMAGE, Against, Comparison, Pairs
from runtimes.harness.worker import OriginalRequest, Request

WORKER = "export.benchmark_worker"
LIBRARIES: dict[Against, tuple[str, ...]] = {
    "diffusers": ("diffusers", "transformers", "torch"),
    "torch": ("torch",),
    "torch-compile": ("torch",),
}


def check_original(opened: OpenBundle, model: str, against: Against, loras: tuple[Lora, ...] = ()) -> None:
    """Raises `UserError`, one line, unless `model` is the checkpoint that the bundle was made of and can be compared with.

    A whole checkpoint is read for its fingerprint.
    """
    if against == "diffusers" and not opened.draws:
        raise UserError(f"--against diffusers: diffusers draws pictures, which {opened.folder} cannot: choose torch")
    found, made = open_checkpoint(model, loras=loras).fingerprint(), opened.manifest.model.fingerprint
    if found != made:
        prints = f"its fingerprint is {found[:12]}…, the bundle's {made[:12]}…"
        merged = as_options(opened.manifest.model.loras)
        made_with = f", which was with{merged}" if merged else ""
        raise UserError(f"--model {model} is not what {opened.folder} was made of{made_with}: {prints}")


def compare_with_original(
    opened: OpenBundle,
    model: str,
    against: Against,
    loras: tuple[Lora, ...] = (),
    *,
    threads: int | None,
    iterations: int,
    progress: Progress,
) -> Comparison:
    """The artifacts and the original in turns, after a warm-up: of each component (diffusers: none), and of the picture.

    `model` has passed `check_original`. Raises `GraphError` where a side cannot be loaded or run.
    """
    names = [] if against == "diffusers" else [entry.name for entry in opened.components]
    pairs = []
    for name in (*names, *([IMAGE] if opened.draws else [])):
        progress.stage(f"{name} in turns", 1 + WARM_UP + iterations)
        request = Request(bundle=opened.folder, component=name, runtime=opened.runtime.name, threads=threads)
        merged = tuple((lora.where, lora.scale) for lora in loras)
        other = OriginalRequest(**request.model_dump(), model=model, loras=merged, against=against)
        with start_worker(request) as artifact, start_worker(other, WORKER) as original:
            progress.step("load")
            artifact.load()
            original.load()
            pairs.append(Pairs.of(name, *interleave(artifact, original, iterations, progress)))
    return Comparison(
        against=against,
        versions={name: importlib.metadata.version(name) for name in LIBRARIES[against]},
        pairs=tuple(pairs),
    )
