"""Calibration of a checkpoint: its components as the pieces of a trajectory, and the statistics of a plan's weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from calibration.devices import choose_device
from calibration.errors import CalibrationError
from calibration.latents import read_latents
from calibration.passes import gather
from calibration.prompts import calibration_prompts, read_prompts
from calibration.statistics import LayerStatistics, Statistics, Subject
from calibration.store import default_cache
from calibration.trajectory import Piece, student_trajectory
from export.checkpoint import Checkpoint
from export.components.component import Component
from export.errors import UserError
from export.families.family import Family, GraphOptions
from export.progress import Progress
from export.rewrites import Rewrites
from runtimes.tokenizer import Tokenizer, TokenizerError


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user asks of calibration. None: the checkpoint's or the computer's own.

    prompts   a file, one prompt a line
    images    a safetensors file with clean latents [prompts, C, h, w] as `latents`; the prompts are then their captions
    device    cpu, cuda or mps
    cache     where statistics are kept
    chunks    pieces of the transformer, one in memory at a time; None: one a block
    count     how many of the checkpoint's own prompts are used where no file is given; None: all
    """

    prompts: Path | None = None
    images: Path | None = None
    device: str | None = None
    cache: Path | None = None
    chunks: int | None = None
    count: int | None = None


def calibrate(
    checkpoint: Checkpoint,
    family: Family,
    graph: GraphOptions,
    options: CalibrationOptions,
    progress: Progress,
    fingerprint: str | None = None,
) -> Statistics:
    """The statistics of a checkpoint's weights at the graph's resolution and sigmas, from the cache or computed.

    They are those of contract "flash", which serve the other as well: see `statistics_of`. `fingerprint` is the checkpoint's,
    where it is known already. Raises `UserError`.
    """
    device = device_of(options)
    try:
        prompts = read_prompts(options.prompts) if options.prompts else calibration_prompts(checkpoint.flash)[: options.count]
        shape = family.latent_shape(graph)[1:]
        images = read_latents(options.images, shape, len(prompts)) if options.images else None
        pieces = _pieces(checkpoint, family, graph, options.chunks or family.blocks)
        trajectory = student_trajectory(pieces, _token_ids(checkpoint, prompts), graph.sigmas, images)
        subject = Subject(fingerprint or checkpoint.fingerprint(), prompts, graph.sigmas, (graph.width, graph.height))
        return gather(trajectory, subject, options.cache or default_cache(), device, progress)
    except (CalibrationError, TokenizerError) as error:
        raise UserError(str(error)) from error


def device_of(options: CalibrationOptions) -> torch.device:
    """Where to calibrate. Raises `UserError` for a device that is not there."""
    try:
        return choose_device(options.device)
    except CalibrationError as error:
        raise UserError(str(error)) from error


def statistics_of(statistics: Statistics, component: str, weight: str, shape: tuple[int, ...]) -> LayerStatistics | None:
    """The statistics of an exported component's weight, in any contract; None for norms, biases and positions.

    A transformer that holds its conditioner has the weights of both, behind `conditioner.` and `transformer.`; its
    context_embedder has columns that only ever meet zeros.
    """
    owner, _, rest = weight.partition(".")
    if component == "transformer" and owner in ("conditioner", "transformer"):
        component, weight = owner, rest
    if weight not in statistics.places[component]:
        return None
    found = statistics.layer(component, weight)
    missing = int(np.prod(shape[1:])) - len(found.mean) if found.moments.ndim == 2 else 0
    if missing == 0:
        return found
    return replace(found, moments=np.pad(found.moments, (0, missing)), mean=np.pad(found.mean, (0, missing)))


def _pieces(checkpoint: Checkpoint, family: Family, graph: GraphOptions, chunks: int) -> dict[str, list[Piece]]:
    """By component, in order. Of the rewrites only the fold of null tokens shows in a layer's inputs."""
    rewrites = Rewrites(fold_null_tokens=graph.rewrites.fold_null_tokens)
    pieces: dict[str, list[Piece]] = {}
    for component in family.components(replace(graph, contract="flash", rewrites=rewrites, chunks=chunks)):
        owner = component.name.partition("_chunk")[0]
        pieces.setdefault(owner, []).append(_piece(checkpoint, component, owner))
    return pieces


def _piece(checkpoint: Checkpoint, component: Component, owner: str) -> Piece:
    return Piece(component.name, owner, component.inputs, component.outputs, partial(component.load, checkpoint))


def _token_ids(checkpoint: Checkpoint, prompts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """[prompts, 1, T] by text encoder."""
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    read = {encoder: Tokenizer.from_checkpoint(checkpoint.tokenizers[name]) for encoder, name in tokenizers.items()}
    return {encoder: np.stack([tokenizer(prompt) for prompt in prompts]) for encoder, tokenizer in read.items()}
