"""Noise against torch's generator, the Euler step against diffusers' scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.sampler import euler_step, mt19937, noise, sample


def torch_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


SHAPES = [(1, 16, 64, 64), (1, 4, 12, 8), (1, 16, 48, 80), (3, 5, 7), (16,), (17,), (31,), (15,), (1,), (0,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32 + 7, 2**63, -1])
def test_noise_equals_torchs(seed: int, shape: tuple[int, ...]) -> None:
    made = noise(seed, shape)
    assert made.dtype == np.float32 and made.shape == shape
    np.testing.assert_allclose(made, torch_noise(seed, shape), rtol=0, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), count=st.integers(0, 3000))
def test_noise_equals_torchs_for_any_seed_and_size(seed: int, count: int) -> None:
    np.testing.assert_allclose(noise(seed, (count,)), torch_noise(seed, (count,)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 623, 624, 625, 5000])
def test_mersenne_twister_equals_numpys(count: int) -> None:
    generator = np.random.MT19937()
    generator._legacy_seeding(5489)
    np.testing.assert_array_equal(mt19937(5489, count), generator.random_raw(count).astype(np.uint32))


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 8), seed=st.integers(0, 1000))
def test_euler_steps_equal_diffusers_bit_for_bit(steps: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    sigmas = [*sorted((float(s) for s in generator.uniform(0.001, 1, steps)), reverse=True), 0.0]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=sigmas[:-1])
    latent = generator.standard_normal((1, 4, 6, 5)).astype(np.float32)
    theirs = torch.from_numpy(latent)
    for step in range(steps):
        velocity = generator.standard_normal(latent.shape).astype(np.float32)
        latent = euler_step(latent, velocity, sigmas[step], sigmas[step + 1])
        theirs = scheduler.step(torch.from_numpy(velocity), scheduler.timesteps[step], theirs, return_dict=False)[0]
        assert latent.dtype == np.float32
        np.testing.assert_array_equal(latent, theirs.numpy())


def test_sampling_reaches_the_data_in_one_straight_line() -> None:
    """With the exact velocity noise - data the path is straight, and any sigmas end at the data."""
    start, data = noise(1, (1, 4, 4, 4)), noise(2, (1, 4, 4, 4))
    seen: list[int] = []
    latents = sample(lambda latent, step: start - data, start, [1.0, 0.9, 0.3, 0.0], lambda step, latent: seen.append(step))
    np.testing.assert_allclose(latents[-1], data, atol=1e-6)
    assert len(latents) == 4 and seen == [0, 1, 2]
    np.testing.assert_array_equal(latents[0], start)
