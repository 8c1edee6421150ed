"""Which of its candidate schemes each weight gets under a budget of bytes: one integer programme.

Minimise the sum of the chosen candidates' losses, one candidate a weight, bytes within the budget: a multiple-choice knapsack
(Kellerer, Pferschy & Pisinger 2004, chapter 11), solved by HiGHS through scipy. Losses of different weights add up, so the
programme is as good as that assumption.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from export.compression.schemes import Scheme
from export.errors import UserError

# How far, relatively, the solution may lie above the bound that proves it best.
GAP = 1e-5

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Candidate:
    """One scheme of one weight: its bytes, and the loss that it causes."""

    scheme: Scheme
    nbytes: int
    loss: float


def allocate(candidates: Mapping[Name, Sequence[Candidate]], budget: int) -> dict[Name, Candidate]:
    """The candidate of every name with the least summed loss in `budget` bytes; `UserError` where not even the least fit."""
    ladders = {name: efficient(options) for name, options in candidates.items()}
    least = sum(ladder[0].nbytes for ladder in ladders.values())
    if least > budget:
        raise UserError(f"a budget of {budget:,} bytes is too small: the least these weights take is {least:,}; give it more")
    limit = budget
    while True:
        chosen = dict(zip(ladders, _solve(list(ladders.values()), limit), strict=True))
        over = sum(option.nbytes for option in chosen.values()) - budget
        if over <= 0:
            return chosen
        limit -= over  # the solver keeps a constraint to its tolerance, a budget is kept to the byte


def _solve(ladders: Sequence[Sequence[Candidate]], limit: int) -> list[Candidate]:
    sizes = [len(ladder) for ladder in ladders]
    options = [option for ladder in ladders for option in ladder]
    loss = np.array([option.loss for option in options])
    nbytes = np.array([option.nbytes for option in options], np.float64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    scale = max(limit, 1)
    result = milp(
        loss / max(loss.max(), np.finfo(float).tiny),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(nbytes[None] / scale, -np.inf, limit / scale)],
        options={"mip_rel_gap": GAP},
    )
    assert result.x is not None, f"the integer programme of {len(sizes)} weights has no solution: {result.message}"
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    picks = [int(np.argmax(result.x[start : start + size])) for start, size in zip(starts, sizes, strict=True)]
    return [ladder[pick] for ladder, pick in zip(ladders, picks, strict=True)]


def efficient(options: Sequence[Candidate]) -> list[Candidate]:
    """The options that no other beats in both bytes and loss: ascending in bytes, descending in loss."""
    kept: list[Candidate] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
