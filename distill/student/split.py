"""Stage (c), split-timestep fine-tuning: two copies, each for half of the noise levels, merged into one.

Each copy goes on with distribution matching on the steps that start in (0, 500] or (500, 1000], with an exponential moving
average at 0.99 (arXiv 2509.21318). The merged weights are ratio * high + (1 - ratio) * low; the ratio, from 3:7 to 7:3, is the
one whose pictures adhere best to captions of training combinations.
"""

from __future__ import annotations

import copy
import json

import torch
from diffusers import SD3Transformer2DModel

from distill.data import Data
from distill.evaluation import Evaluator
from distill.loop import Run
from distill.settings import Settings
from distill.student import matching
from distill.student.matching import Matched, Variant
from distill.text import TextEncoders

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7)


def fit(
    run: Run,
    stage: str,
    settings: Settings,
    data: Data,
    text: TextEncoders,
    teacher: SD3Transformer2DModel,
    start: Matched,
    iterations: int,
    variant: Variant,
    evaluator: Evaluator,
) -> SD3Transformer2DModel:
    """The merged student; the adherence of every ratio is kept in RUN/STAGE.json."""
    copies = {}
    for name, lowest, highest in (("high", 0.5, 1.0), ("low", 0.0, 0.5)):
        part = Variant(variant.share_timesteps, variant.discriminate, lowest, highest)
        copies[name] = matching.fit(run, f"{stage}-{name}", settings, data, text, teacher, start, iterations, part).student
    path = run.folder / f"{stage}.json"
    if not path.exists():
        scores = {}
        for ratio in RATIOS:
            merged = merge(copies["low"], copies["high"], ratio)
            scores[str(ratio)] = {str(steps): evaluator.student(merged, steps).adherence for steps in (4, 2)}
        path.write_text(json.dumps(scores, indent=1))
    scores = json.loads(path.read_text())
    return merge(copies["low"], copies["high"], float(max(scores, key=lambda ratio: sum(scores[ratio].values()))))


@torch.no_grad()
def merge(low: SD3Transformer2DModel, high: SD3Transformer2DModel, ratio: float) -> SD3Transformer2DModel:
    """ratio * high + (1 - ratio) * low, weight by weight."""
    merged = copy.deepcopy(low)
    for kept, other in zip(merged.parameters(), high.parameters(), strict=True):
        kept.lerp_(other, ratio)
    return merged
