"""Noise equal to torch's for a seed, and the flow-matching Euler loop on explicit sigmas; numpy only, easy to port.

How a phone draws the same noise as `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`:

1. MT19937 (Matsumoto and Nishimura 1998), seeded with the low 32 bits of the seed, gives 32-bit words.
2. A float32 uniform in [0, 1) is the low 24 bits of a word times 2^-24.
3. One uniform is drawn per value. Then each block of 16 values becomes normal by Box-Muller: with u the first 8 uniforms and
   v the last 8, radius = sqrt(-2 log(1 - u)) and theta = float32(2 pi) * v, the first 8 normals are radius * cos(theta),
   the last 8 radius * sin(theta), all in float32.
4. If the count is no multiple of 16, the last 16 values are drawn anew from 16 further uniforms, overwriting the tail.
5. Fewer than 16 values take another path, in float64: see `_short_normals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

WORDS, SHIFT = 624, 397  # the size of MT19937's state, and the distance of its recurrence
BLOCK = 16


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise of `shape`, equal to torch's CPU generator for `seed` to float32 rounding (about 1e-6)."""
    count = math.prod(shape)
    values = _short_normals(seed, count) if count < BLOCK else _normals(seed, count)
    return values.reshape(shape)


def euler_step(latent: np.ndarray, velocity: np.ndarray, sigma: float, sigma_next: float) -> np.ndarray:
    """latent + (sigma_next - sigma) * velocity, every operation in float32 as in diffusers' FlowMatchEulerDiscreteScheduler."""
    step = np.float32(sigma_next) - np.float32(sigma)
    return latent.astype(np.float32) + step * velocity.astype(np.float32)


def sample(
    velocity: Callable[[np.ndarray, int], np.ndarray],
    latent: np.ndarray,
    sigmas: Sequence[float],
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> list[np.ndarray]:
    """Walks from noise to image along `sigmas` (steps + 1 of them, ending in 0).

    `velocity(latent, step)` is the model's prediction at `sigmas[step]`. Returns the latent before the first step and after
    each one, steps + 1 in all; `on_step(step, latent)` sees each new latent as it is made.
    """
    latents = [latent.astype(np.float32)]
    for step in range(len(sigmas) - 1):
        latents.append(euler_step(latents[-1], velocity(latents[-1], step), sigmas[step], sigmas[step + 1]))
        if on_step is not None:
            on_step(step, latents[-1])
    return latents


def _normals(seed: int, count: int) -> np.ndarray:
    """`count` >= 16 normals by the blockwise path, float32."""
    words = mt19937(seed, count + (BLOCK if count % BLOCK else 0))
    uniforms = (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)
    whole = count - count % BLOCK
    values = np.empty(count, np.float32)
    values[:whole] = _box_muller(uniforms[:whole])
    if count % BLOCK:
        values[-BLOCK:] = _box_muller(uniforms[count:])
    return values


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Blocks of 16 uniforms to blocks of 16 normals. Logarithm and sines in float64, so that every platform agrees."""
    blocks = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(1 - blocks[:, 0], dtype=np.float64).astype(np.float32))
    theta = (np.float32(2 * np.pi) * blocks[:, 1]).astype(np.float64)
    pairs = np.stack([radius * np.cos(theta).astype(np.float32), radius * np.sin(theta).astype(np.float32)], axis=1)
    return pairs.reshape(-1)


def _short_normals(seed: int, count: int) -> np.ndarray:
    """`count` < 16 normals, float32, computed in float64: each pair of 53-bit uniforms u, v (two words each, the first word on
    top) gives sqrt(-2 log(1 - v)) times cos(2 pi u), then sin(2 pi u)."""
    pairs = (count + 1) // 2
    words = mt19937(seed, 4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
    uniforms = ((words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
    radius, theta = np.sqrt(-2 * np.log1p(-uniforms[:, 1])), 2 * np.pi * uniforms[:, 0]
    normals = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return normals.reshape(-1)[:count].astype(np.float32)


def mt19937(seed: int, count: int) -> np.ndarray:
    """The first `count` outputs, uint32, of the Mersenne Twister seeded with the low 32 bits of `seed`."""
    state = np.array(_seeded(seed & 0xFFFFFFFF), dtype=np.uint32)
    rounds = [_advance(state) for _ in range(-(-count // WORDS))]
    words = np.concatenate([*rounds, np.empty(0, np.uint32)])[:count]
    words ^= words >> np.uint32(11)
    words ^= (words << np.uint32(7)) & np.uint32(0x9D2C5680)
    words ^= (words << np.uint32(15)) & np.uint32(0xEFC60000)
    words ^= words >> np.uint32(18)
    return words


def _seeded(seed: int) -> list[int]:
    state = [seed]
    for index in range(1, WORDS):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + index) & 0xFFFFFFFF)
    return state


def _advance(state: np.ndarray) -> np.ndarray:
    """Replaces all 624 words of the state; a copy of them is returned.

    Word i needs the old words i and i + 1 and word i + 397, which is a new one once i >= 227: hence three stretches within
    which nothing depends on what the same stretch writes, and the last word by itself, which needs the new word 0.
    """
    for start, stop in pairwise((0, WORDS - SHIFT, 2 * (WORDS - SHIFT), WORDS - 1, WORDS)):
        here = np.arange(start, stop)
        mixed = (state[here] & np.uint32(0x80000000)) | (state[(here + 1) % WORDS] & np.uint32(0x7FFFFFFF))
        odd = np.where(mixed & np.uint32(1), np.uint32(0x9908B0DF), np.uint32(0))
        state[here] = state[(here + SHIFT) % WORDS] ^ (mixed >> np.uint32(1)) ^ odd
    return state.copy()
