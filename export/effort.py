"""How much an export has to compute, from shapes alone: multiply-accumulates of the graphs, and what they take here.

A large model is compared over fewer steps and calibrated on fewer prompts by default, so that an export stays a matter of
minutes; what is going to be done is said before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from export.components.component import Component

LARGE = 10**12
"""Multiply-accumulates of a picture from which on an export compares one step instead of whole pictures."""

# Calibration runs a prompt forward, forward again stage by stage, and back (twice a forward), and gathers second moments.
CALIBRATION_PASSES = 5
CALIBRATION_BUDGET = 10**14
"""Multiply-accumulates that calibration may take by default: some twenty minutes of two processor cores."""
FEWEST_PROMPTS = 2


def macs(components: Iterable[Component]) -> int:
    """Multiply-accumulates of one run of each component: matrix products, convolutions and attention."""
    count = 0
    for component in components:
        module = component.blank().to("meta")
        inputs = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in component.inputs]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        count += counter.get_total_flops() // 2
    return count


def affordable_prompts(picture_macs: int) -> int:
    """The most prompts that are calibrated on by default."""
    return max(FEWEST_PROMPTS, CALIBRATION_BUDGET // max(1, CALIBRATION_PASSES * picture_macs))


def macs_per_second() -> float:
    """What this computer's float32 matrix products reach, by multiplying two for a moment."""
    a, b = torch.ones(1024, 1536), torch.ones(1536, 6144)
    a @ b
    runs, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < 0.3:
        a @ b
        runs += 1
    return runs * 1024 * 1536 * 6144 / passed


def duration(seconds: float) -> str:
    """"12 s", "7 min" or "1.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
