"""Random weights that look like trained ones to a compressor, and keep activations ordinary.

Every value is a draw of its own: 16 random bits choose one of 65,536 quantiles of Student's t with 4 degrees of freedom (finer
than float16 tells values of one tensor apart, and cut at 15 standard deviations). Nothing is rolled, permuted or used twice, so
that no two rows are alike, and a palette or a search for equal constants gains nothing from how these weights were made. Each
output channel has a scale of its own, and one in 64 is three times as large. Norms lie near 1, biases near 0.

Values depend on the seed, the tensor's name and the place in the tensor: not on threads, nor on other tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

BLOCK = 1 << 20  # values of a piece, rounded down to whole rows: 2 MB in float16
LARGE_CHANNEL, LARGE_SCALE = 1 / 64, 3.0
POSITION_TABLE = "pos_embed.pos_embed"

# Standard deviation by name: of weights it is divided by sqrt(inputs), so that 1 keeps the variance of normalized inputs. What
# is added to a residual stream is smaller, for 12 to 32 layers to add up to states of a few units.
_STD = (
    (r"embedding\.weight$", 0.3),
    (r"(out_proj|mlp\.fc2|to_out\.0|to_add_out|net\.2)\.weight$", 0.5),
    (r"conv_out\.weight$", 0.6),
    (r"\.weight$", 1.0),
    (r"\.bias$", 0.02),
)
_NORM_STD = 0.05


@dataclass(frozen=True)
class Piece:
    """Whole rows of a tensor, from value `start` to before `stop` of it, flattened."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


def pieces(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """The tensor in order, in pieces of about `BLOCK` values."""
    row, count = math.prod(shape[1:]), math.prod(shape)
    if name == POSITION_TABLE:
        row = shape[2]
    step = max(1, BLOCK // row) * row
    for start in range(0, count, step):
        yield Piece(name, shape, start, min(start + step, count))


def values(piece: Piece, seed: int, transformer: Mapping[str, Any]) -> np.ndarray:
    """float16, flat. `transformer` is the configuration that the position table follows from."""
    if piece.name == POSITION_TABLE:
        return _positions(piece, transformer)
    row, count = math.prod(piece.shape[1:]), piece.stop - piece.start
    drawn = _draw(count, f"{seed} {piece.name} {piece.start}")
    if _is_norm(piece):
        drawn = 1 + _NORM_STD * drawn
    elif len(piece.shape) == 1:
        drawn *= _std(piece.name)
    else:
        scales = _channel_scales(piece.shape[0], f"{seed} {piece.name} channels")[piece.start // row : piece.stop // row]
        inputs = 1 if "embedding.weight" in piece.name else row
        drawn = (drawn.reshape(-1, row) * (scales * _std(piece.name) / math.sqrt(inputs))[:, None]).reshape(-1)
    return drawn.astype(np.float16)


def _draw(count: int, key: str) -> np.ndarray:
    """float32: independent heavy-tailed values of variance 1."""
    bits = _bits(key).random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
    return _quantiles().take(bits, mode="wrap")


def _channel_scales(channels: int, key: str) -> np.ndarray:
    """float32: log-normal, some larger, of mean square 1. Few channels (pixels, latents) are not made unlike."""
    generator = np.random.Generator(_bits(key))
    scales = np.exp(0.25 * generator.standard_normal(channels))
    if channels >= 64:
        scales[generator.random(channels) < LARGE_CHANNEL] *= LARGE_SCALE
    return (scales / math.sqrt(np.mean(scales**2))).astype(np.float32)


def _bits(key: str) -> np.random.SFC64:
    return np.random.SFC64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))


@cache
def _quantiles() -> np.ndarray:
    """float32 [65536]: of Student's t with 4 degrees of freedom in closed form (Shaw 2006, J. Comput. Finance 9), scaled to
    variance 1."""
    middle = (np.arange(1 << 16) + 0.5) / (1 << 16)
    root = np.sqrt(4 * middle * (1 - middle))
    found = np.sign(middle - 0.5) * 2 * np.sqrt(np.cos(np.arccos(root) / 3) / root - 1)
    return (found / math.sqrt(np.mean(found**2))).astype(np.float32)


def _is_norm(piece: Piece) -> bool:
    return len(piece.shape) == 1 and piece.name.endswith(".weight")


def _std(name: str) -> float:
    return next(std for pattern, std in _STD if re.search(pattern, name))


def _positions(piece: Piece, transformer: Mapping[str, Any]) -> np.ndarray:
    """Rows of the [1, side * side, width] table: sines and cosines of the column in the first half, of the row in the second
    (Vaswani et al. 2017, along both axes), for positions in units of the patch that a picture of `sample_size` has."""
    side, width = transformer["pos_embed_max_size"], piece.shape[2]
    table = _axis(side, transformer["sample_size"] // transformer["patch_size"], width // 2)
    cells = np.arange(piece.start // width, piece.stop // width)
    return np.concatenate([table[cells % side], table[cells // side]], axis=1).reshape(-1)


@cache
def _axis(side: int, base: int, width: int) -> np.ndarray:
    """float16 [side, width]: sines, then cosines."""
    positions = np.arange(side) / (side / base)
    angles = np.outer(positions, 10_000.0 ** (-np.arange(width // 2) / (width // 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float16)
