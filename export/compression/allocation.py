"""Which of its candidate schemes each weight gets under a budget of bytes, and one of work: one integer programme.

Minimise the sum of the chosen candidates' losses, one candidate a weight, bytes and work within the budgets: a multiple-choice
knapsack (Kellerer, Pferschy & Pisinger 2004, chapter 11), solved by HiGHS through scipy. Losses of different weights add up, so
the programme is as good as that assumption.
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
    """One scheme of one weight: its bytes, the loss that it causes, and what it has computed twice (multiply-accumulates)."""

    scheme: Scheme
    nbytes: int
    loss: float
    work: int = 0


def allocate(candidates: Mapping[Name, Sequence[Candidate]], budget: int, work: int = 0) -> dict[Name, Candidate]:
    """The candidate of every name with the least summed loss in `budget` bytes and at most `work`. Each has one of no work.

    Raises `UserError` where not even the least fit.
    """
    ladders = {name: efficient([o for o in options if o.work <= work]) for name, options in candidates.items()}
    least = sum(ladder[0].nbytes for ladder in ladders.values())
    if least > budget:
        raise UserError(f"a budget of {budget:,} bytes is too small: the least these weights take is {least:,}; give it more")
    nbytes, again = budget, work
    while True:
        chosen = dict(zip(ladders, _solve(list(ladders.values()), nbytes, again), strict=True))
        over = sum(option.nbytes for option in chosen.values()) - budget
        more = sum(option.work for option in chosen.values()) - work
        if over <= 0 and more <= 0:
            return chosen
        nbytes -= max(over, 0)  # the solver keeps a constraint to its tolerance, a budget is kept to the byte
        again -= max(more, 0)


def _solve(ladders: Sequence[Sequence[Candidate]], limit: int, work: int) -> list[Candidate]:
    sizes = [len(ladder) for ladder in ladders]
    options = [option for ladder in ladders for option in ladder]
    loss = np.array([option.loss for option in options])
    # Both budgets as shares of themselves, so that the solver's tolerance means the same for either.
    spent = np.array([[option.nbytes / max(limit, 1), option.work / max(work, 1)] for option in options])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    result = milp(
        loss / max(loss.max(), np.finfo(float).tiny),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent.T, -np.inf, [limit > 0, work > 0])],
        options={"mip_rel_gap": GAP},
    )
    assert result.x is not None, f"the integer programme of {len(sizes)} weights has no solution: {result.message}"
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    picks = [int(np.argmax(result.x[start : start + size])) for start, size in zip(starts, sizes, strict=True)]
    return [ladder[pick] for ladder, pick in zip(ladders, picks, strict=True)]


def efficient(options: Sequence[Candidate]) -> list[Candidate]:
    """The options that no other is as good as in bytes, loss and work alike, ascending in bytes."""
    kept: list[Candidate] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss, option.work)):
        if not any(other.loss <= option.loss and other.work <= option.work for other in kept):
            kept.append(option)
    return kept
