"""The student's run from prompt and noise to picture, written down as calls of pieces with named tensors between them.

Text encoders, conditioner, then for every step the transformer's pieces and one Euler step along the deployed sigmas, then
the decoder: in contract "flash", whose graphs these are (see runtimes/conditioning.py). Nothing runs here; passes.py goes
through the calls forward and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from runtimes.bundle import Feed, TensorEntry, chunk_feeds
from runtimes.graph import TensorSpec
from runtimes.sampler import noise

IMAGE = "image"


@dataclass(frozen=True)
class Piece:
    """A stretch of a component that is loaded, run and released as a whole. `component` is None for what has no weights.

    `load()` gives a float32 module on the CPU that takes `inputs` in order and returns a tuple in the order of `outputs`.
    """

    name: str
    component: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    load: Callable[[], nn.Module]


@dataclass(frozen=True)
class Read:
    """A tensor that a call takes, or the part of it."""

    tensor: str
    part: tuple[slice, ...] = ()


@dataclass(frozen=True)
class Call:
    """One run of a piece. What is written inside a stage and read nowhere else may be computed anew on the way back."""

    piece: Piece
    stage: str
    reads: tuple[Read, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The calls in order, and what they start from: arrays [prompts, *shape] by tensor.

    `objectives` are the tensors whose errors count. A probe starts at each; no gradient passes from behind one to before it.
    """

    calls: tuple[Call, ...]
    given: Mapping[str, np.ndarray]
    objectives: tuple[str, ...]
    specs: Mapping[str, TensorSpec] = field(init=False)

    def __post_init__(self) -> None:
        specs = {name: spec for call in self.calls for name, spec in zip(call.writes, call.piece.outputs, strict=True)}
        object.__setattr__(self, "specs", specs)

    @property
    def prompts(self) -> int:
        return len(next(iter(self.given.values())))


class EulerStep(nn.Module):
    """latent + (next sigma - sigma) * velocity, rounded as `runtimes.sampler.euler_step` rounds."""

    def __init__(self, sigma: float, sigma_next: float) -> None:
        super().__init__()
        self.step = float(np.float32(sigma_next) - np.float32(sigma))

    def forward(self, latent: Tensor, velocity: Tensor) -> tuple[Tensor, ...]:
        return (latent + self.step * velocity,)


def student_trajectory(
    pieces: Mapping[str, Sequence[Piece]], ids: Mapping[str, np.ndarray], sigmas: Sequence[float], images: np.ndarray | None
) -> Trajectory:
    """The trajectory of all prompts; `pieces` by component, `ids` [prompts, 1, T] by text encoder.

    Prompt p starts from the noise of seed p. Without `images` the transformer sees the student's own latents. With clean
    latents `images` [prompts, C, h, w] it sees (1 - sigma) image + sigma noise at every sigma, and an error of one step's
    velocity reaches the final latents through the Euler steps alone.
    """
    velocity = pieces["transformer"][-1].outputs[0]
    prompts = len(next(iter(ids.values())))
    noises = np.stack([noise(seed, velocity.shape) for seed in range(prompts)])
    given = {f"{encoder}.input_ids": array for encoder, array in ids.items()} | {_latent(0): noises}
    seen = [_latent(step) for step in range(len(sigmas) - 1)]
    if images is not None:
        seen = [f"noised.{step}" for step in range(len(sigmas) - 1)]
        for name, sigma in zip(seen, sigmas[:-1], strict=True):
            given[name] = np.float32(1 - sigma) * images[:, None] + np.float32(sigma) * noises
        given[_latent(0)] = given[seen[0]]
    calls = [*_encoder_calls(pieces), _conditioner_call(pieces)]
    for step, latent in enumerate(seen):
        calls += _transformer_calls(pieces["transformer"], step, latent)
        calls.append(_euler_call(velocity, step, sigmas[step], sigmas[step + 1]))
    final = _latent(len(seen))
    (decoder,) = pieces["vae_decoder"]
    calls.append(Call(decoder, "vae_decoder", (Read(final),), (IMAGE,)))
    return Trajectory(tuple(calls), given, (final, IMAGE))


def _latent(step: int) -> str:
    """Before the step."""
    return f"latent.{step}"


def _encoder_calls(pieces: Mapping[str, Sequence[Piece]]) -> list[Call]:
    calls = []
    for name in ("text_encoder", "text_encoder_2"):
        (piece,) = pieces[name]
        calls.append(Call(piece, name, (Read(f"{name}.input_ids"),), tuple(f"{name}.{spec.name}" for spec in piece.outputs)))
    return calls


def _conditioner_call(pieces: Mapping[str, Sequence[Piece]]) -> Call:
    (piece,) = pieces["conditioner"]
    sources = {
        "hidden_states": "text_encoder.hidden_states",
        "hidden_states_2": "text_encoder_2.hidden_states",
        "pooled": "text_encoder.pooled",
        "pooled_2": "text_encoder_2.pooled",
    }
    reads = tuple(Read(sources[spec.name]) for spec in piece.inputs)
    return Call(piece, "conditioner", reads, tuple(f"conditioner.{spec.name}" for spec in piece.outputs))


def _transformer_calls(pieces: Sequence[Piece], step: int, latent: str) -> list[Call]:
    sources = {"latent": latent, "encoder_hidden_states": "conditioner.encoder_hidden_states"}
    calls = []
    for piece, feeds in zip(pieces, chunk_feeds([(_entries(p.inputs), _entries(p.outputs)) for p in pieces]), strict=True):
        named = {feed.input: feed for feed in feeds}
        reads = tuple(_transformer_read(spec, named.get(spec.name), step, sources) for spec in piece.inputs)
        if piece is pieces[-1]:
            writes = {"velocity": _velocity(step)}
        else:
            writes = {spec.name: f"step{step}.{piece.name}.{spec.name}" for spec in piece.outputs}
        sources |= writes
        calls.append(Call(piece, f"step {step}", reads, tuple(writes.values())))
    return calls


def _transformer_read(spec: TensorSpec, feed: Feed | None, step: int, sources: Mapping[str, str]) -> Read:
    if feed is None:
        return Read(sources[spec.name])
    if feed.rows is None:
        return Read(sources[feed.tensor])
    # modulation [S, M, W]: this step's row, and of it the piece's own vectors.
    return Read(f"conditioner.{feed.tensor}", (slice(step, step + 1), slice(*feed.rows)))


def _euler_call(latent: TensorSpec, step: int, sigma: float, sigma_next: float) -> Call:
    inputs = (TensorSpec("latent", "float32", latent.shape), TensorSpec("velocity", "float32", latent.shape))
    piece = Piece(f"euler{step}", None, inputs, inputs[:1], lambda: EulerStep(sigma, sigma_next))
    return Call(piece, piece.name, (Read(_latent(step)), Read(_velocity(step))), (_latent(step + 1),))


def _velocity(step: int) -> str:
    return f"step{step}.velocity"


def _entries(specs: Sequence[TensorSpec]) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry.model_validate(vars(spec)) for spec in specs)
