"""The stages in their order; each makes what it needs of the earlier ones, which return at once when they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, SD3Transformer2DModel

from distill import autoencoder, teacher, text
from distill.captions import describe, training_scenes
from distill.data import Data
from distill.evaluate import evaluate
from distill.evaluation import Evaluator
from distill.loop import Run
from distill.settings import Settings
from distill.student import matching, proxy, split, trajectory
from distill.student.matching import Matched, Variant
from distill.text import TextEncoders


def run_autoencoder(run: Run, settings: Settings, out: Path) -> None:
    autoencoder.fit(run, settings)


def run_text(run: Run, settings: Settings, out: Path) -> None:
    text.fit(run, settings)


def run_teacher(run: Run, settings: Settings, out: Path) -> None:
    vae = autoencoder.fit(run, settings)
    teacher.fit(run, settings, Data(run, settings, vae), text.fit(run, settings))


def run_student(run: Run, settings: Settings, out: Path) -> None:
    _students(run, settings)


def run_evaluate(run: Run, settings: Settings, out: Path) -> None:
    made = _students(run, settings)
    evaluate(run, settings, out, made.vae, made.text, made.teacher, made.student, made.ablations, made.description)


@dataclass(frozen=True)
class Students:
    vae: AutoencoderKL
    text: TextEncoders
    teacher: SD3Transformer2DModel
    student: SD3Transformer2DModel
    ablations: dict[str, SD3Transformer2DModel]
    description: str


def _students(run: Run, settings: Settings) -> Students:
    """Everything up to the finished student, and the ablations: trajectory guidance alone, and on equal budgets the full
    method and less of it."""
    vae, encoders = autoencoder.fit(run, settings), text.fit(run, settings)
    data = Data(run, settings, vae)
    judge = teacher.fit(run, settings, data, encoders)
    guided = trajectory.fit(run, settings, data, encoders, judge)
    if settings.matching_iterations == 0:
        return Students(vae, encoders, judge, guided, {}, "trajectory guidance only")

    # The ratio of the merge is chosen on captions of training combinations; the held-out ones are for the table alone.
    rng = np.random.default_rng(run.seed + 11)
    cases = [(scene, describe(scene, rng)) for scene in islice(training_scenes(rng), settings.selection_captions)]
    selection = Evaluator(encoders, vae, cases, run.accelerator.device, seed=1)

    begin = Matched(guided, proxy.fit(run, settings, data, encoders, judge, guided))

    def match(name: str, iterations: int, start: Matched, variant: Variant) -> Matched:
        return matching.fit(run, f"matching-{name}", settings, data, encoders, judge, start, iterations, variant)

    def split_up(name: str, iterations: int, start: Matched, variant: Variant) -> SD3Transformer2DModel:
        return split.fit(run, f"split-{name}", settings, data, encoders, judge, start, iterations, variant, selection)

    matched = match("full", settings.matching_iterations, begin, Variant())
    student = split_up("full", settings.split_iterations, matched, Variant())
    ablations = {"trajectory guidance only": guided}
    budget = settings.ablation_iterations
    if budget:
        for name, variant in {
            "full method": Variant(),
            "without timestep sharing": Variant(share_timesteps=False),
            "without discriminator": Variant(discriminate=False),
        }.items():
            key = "ablation-" + name.replace(" ", "-")
            # Two thirds of the budget before the split, a sixth for each copy.
            ablations[name] = split_up(key, budget // 6, match(key, 2 * budget // 3, begin, variant), variant)
        ablations["without split timesteps"] = match("ablation-without-split-timesteps", budget, begin, Variant()).student
    description = (
        f"trajectory guidance ({settings.trajectory_steps} steps), distribution matching with timestep sharing and a latent "
        f"discriminator ({settings.matching_iterations}), split-timestep fine-tuning ({settings.split_iterations} a copy)"
    )
    return Students(vae, encoders, judge, student, ablations, description)


STAGES: dict[str, Callable[[Run, Settings, Path], None]] = {
    "autoencoder": run_autoencoder,
    "text": run_text,
    "teacher": run_teacher,
    "student": run_student,
    "evaluate": run_evaluate,
}
