"""The student's own trajectory: its sigmas in both modes, and its Euler steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.model import velocity

# One set of weights serves both modes. The modes share no noise level, so the timestep tells them apart: the 2-step mode
# takes pure noise for sigma 0.98 and goes on from 0.6; the 4-step sigmas are linspace(1, 1/4, 4) at shift 3.
SIGMAS: dict[int, tuple[float, ...]] = {4: (1.0, 0.9, 0.75, 0.5, 0.0), 2: (0.98, 0.6, 0.0)}

Condition = tuple[Tensor, Tensor]  # context [batch, tokens, width], pooled [batch, width]


def euler(student: nn.Module, latents: Tensor, now: float, after: float, condition: Condition) -> tuple[Tensor, Tensor]:
    """One step from sigma `now` to `after`: the next state and the clean latents that the step aims at (x - sigma v)."""
    dtype = next(student.parameters()).dtype
    levels = torch.full((len(latents),), now, device=latents.device)
    v = velocity(student, latents.to(dtype), levels, *(c.to(dtype) for c in condition))
    return latents + (after - now) * v, latents - now * v


@torch.no_grad()
def draw(
    student: nn.Module, noise: Tensor, steps: int, condition: Condition, start: int = 0, stop: int | None = None
) -> Tensor:
    """The state after the steps from `start` on, up to `stop` (all of them by default), of the `steps`-step mode.

    `noise` is the state before the step `start`.
    """
    sigmas = SIGMAS[steps]
    latents = noise
    for index in range(start, steps if stop is None else stop):
        latents, _ = euler(student, latents, sigmas[index], sigmas[index + 1], condition)
    return latents
