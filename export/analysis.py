"""The steps of an analysis, in their order: calibration, the recipe of every format, and what it costs the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.prompts import golden_prompts
from export.choosing import recipe_file, settle, with_measured
from export.compressing import Trials, compressed, statistics_for
from export.compression.recipe import FormatRecipe, RecipeFile
from export.planning import ExportPlan
from export.progress import Progress


def analyze(plans: Sequence[ExportPlan], progress: Progress) -> RecipeFile:
    """The recipes of one checkpoint for one or several targets."""
    progress.stage("checkpoint", 1)
    progress.step("fingerprint")
    fingerprint = plans[0].checkpoint.fingerprint()
    found: dict[str, FormatRecipe] = {}
    prompts: int | None = None
    for plan in plans:
        statistics = statistics_for(plan, progress, fingerprint)
        recipes = settle(plan, statistics, progress)
        trials = Trials(plan, golden_prompts(plan.checkpoint.flash, plan.measured_prompts))
        for component in compressed(plan, recipes, statistics, progress, "measuring"):
            trials.advance(component, {format.name: component.references(format) for format in plan.formats})
        found |= with_measured(recipes, trials.losses())
        if statistics is not None:
            prompts = len(statistics.subject.prompts)
    return recipe_file(plans[0], fingerprint, found, prompts)
