"""Pictures of captions by any model of the run, judged by the scorer's rules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

from distill.autoencoder import decode
from distill.captions import Caption
from distill.scenes import RELATIONS, Scene, render
from distill.scorer import Verdict, features, frechet_distance, judge
from distill.student.steps import Condition, draw
from distill.teacher import sample, schedule
from distill.text import TextEncoders

BATCH = 32
ALONE = "alone"
KINDS = (ALONE, *RELATIONS)


@dataclass(frozen=True)
class Kind:
    """Adherence, in [0, 1], on the captions of one kind, and how many there are."""

    captions: int
    adherence: float


@dataclass(frozen=True)
class Score:
    """Adherence: share of pictures in which every stated fact holds. Facts: share of facts that hold. Both in [0, 1].

    kinds: adherence by kind of caption, in the order of KINDS; a kind that no caption is of has no entry.
    """

    adherence: float
    facts: float
    frechet: float
    kinds: dict[str, Kind]


def adherence_by_kind(captions: Iterable[Caption], verdicts: Iterable[Verdict]) -> dict[str, Kind]:
    """Adherence on one thing alone, and on two by the relation of the first to the second. Verdicts are one a caption."""
    adhering: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for caption, verdict in zip(captions, verdicts, strict=True):
        adhering[caption.facts.relation or ALONE].append(verdict.adheres)
    return {kind: Kind(len(found), float(np.mean(found))) for kind, found in adhering.items() if found}


class Evaluator:
    """A fixed set of captions with noise of a fixed seed, so that models differ in nothing but themselves."""

    def __init__(
        self,
        text: TextEncoders,
        vae: AutoencoderKL,
        cases: Sequence[tuple[Scene, Caption]],
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.vae, self.text, self.cases, self.device = vae, text, list(cases), device
        self.noise = torch.randn((len(self.cases), 16, 16, 16), generator=torch.Generator().manual_seed(seed)).to(device)
        self.true = features([render(scene) for scene, _ in self.cases])

    def student(self, transformer: SD3Transformer2DModel, steps: int) -> Score:
        return self.score(self.student_pictures(transformer, steps))

    def student_pictures(self, transformer: SD3Transformer2DModel, steps: int) -> np.ndarray:
        """uint8 [cases, 128, 128, 3], the few-step mode without guidance."""
        half = copy.deepcopy(transformer).bfloat16()
        return self._pictures(lambda noise, condition: draw(half, noise, steps, condition))

    def teacher_pictures(self, transformer: SD3Transformer2DModel, steps: int, guidance: float, shift: float) -> np.ndarray:
        """The teacher's pictures by `steps` Euler steps."""
        half = copy.deepcopy(transformer).bfloat16()
        with torch.no_grad():
            empty = self.text.embed([""])
        sigmas = schedule(steps, shift)
        return self._pictures(lambda noise, condition: sample(half, noise, sigmas, condition, empty, guidance)[-1])

    def score(self, pictures: np.ndarray) -> Score:
        verdicts = [judge(picture, caption.facts) for picture, (_, caption) in zip(pictures, self.cases, strict=True)]
        return Score(
            float(np.mean([v.adheres for v in verdicts])),
            float(np.mean([v.share for v in verdicts])),
            frechet_distance(features(list(pictures)), self.true),
            adherence_by_kind((caption for _, caption in self.cases), verdicts),
        )

    def _pictures(self, model: Callable[[Tensor, Condition], Tensor]) -> np.ndarray:
        made = []
        for start in range(0, len(self.cases), BATCH):
            with torch.no_grad():
                condition = self.text.embed([caption.text for _, caption in self.cases[start : start + BATCH]])
            made.append(decode(self.vae, model(self.noise[start : start + BATCH], condition)))
        return np.concatenate(made)
