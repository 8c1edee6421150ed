"""Which of its candidate schemes each weight gets under a budget of bits.

First form: start with the fewest bytes everywhere, then spend the rest where one byte removes most error. The seam for a better
choice is `allocate`: it sees only candidates with their bytes and losses.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from export.compression.compress import store
from export.compression.schemes import Plan, Recipe, Scheme, stored_bytes


@dataclass(frozen=True)
class Candidate:
    """One scheme of one weight: its bytes, and the loss that it causes (losses of different weights add up)."""

    scheme: Scheme
    nbytes: int
    loss: float


def recipe(plan: Plan, module: nn.Module) -> Recipe:
    """The plan's settled schemes, and the measured choice where there is one. Reads the weights only in the latter case."""
    open_names = [weight for weight in plan.weights if len(plan.candidates[weight.name]) > 1]
    if not open_names:
        return plan.settled
    spent = sum(stored_bytes(plan.settled[weight.name], weight.shape) for weight in plan.weights if weight.name in plan.settled)
    budget = int(plan.mean_bits * sum(weight.count for weight in plan.weights) / 8) - spent
    measured = {}
    for weight in open_names:
        values = module.get_parameter(weight.name).detach().float().numpy()
        measured[weight.name] = [
            Candidate(scheme, stored_bytes(scheme, weight.shape), relative_error(values, scheme) * weight.count)
            for scheme in plan.candidates[weight.name]
        ]
    chosen = allocate(measured, budget)
    return {weight.name: chosen.get(weight.name) or plan.settled[weight.name] for weight in plan.weights}


def relative_error(values: np.ndarray, scheme: Scheme) -> float:
    """Squared error of the stored weight over the weight's own square."""
    energy = float(np.square(values, dtype=np.float64).sum())
    error = float(np.square(values - store("", values, scheme).dequantize(), dtype=np.float64).sum())
    return error / energy if energy else 0.0


def allocate(candidates: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Scheme]:
    """A scheme for every name: at least the smallest, then upgrades by error removed a byte while `budget` bytes last."""
    ladders = {name: sorted(options, key=lambda option: option.nbytes) for name, options in candidates.items()}
    chosen = dict.fromkeys(ladders, 0)
    left = budget - sum(ladder[0].nbytes for ladder in ladders.values())
    upgrades: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        """Queues the best step up from the current choice, by error removed a byte."""
        ladder, here = ladders[name], ladders[name][chosen[name]]
        steps = [((here.loss - ladder[index].loss) / max(ladder[index].nbytes - here.nbytes, 1), index)
                 for index in range(chosen[name] + 1, len(ladder)) if ladder[index].loss < here.loss]
        if steps:
            gain, index = max(steps)
            heapq.heappush(upgrades, (-gain, name, index))

    for name in ladders:
        offer(name)
    while upgrades:
        _, name, index = heapq.heappop(upgrades)
        cost = ladders[name][index].nbytes - ladders[name][chosen[name]].nbytes
        if cost <= left:
            left -= cost
            chosen[name] = index
            offer(name)
    return {name: ladders[name][index].scheme for name, index in chosen.items()}
