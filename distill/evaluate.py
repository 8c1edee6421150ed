"""The tables and the picture grid of a run on the held-out captions, and the checkpoint with its model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jinja2
import numpy as np
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from rich.console import Console
from rich.table import Table

from distill import checkpoint
from distill.autoencoder import reconstruction_psnr
from distill.captions import LONE_FORMS, PAIR_FORMS, held_out
from distill.evaluation import Evaluator, Score
from distill.loop import Run
from distill.scenes import BACKGROUNDS, COLOURS, SHAPES, render
from distill.settings import Settings
from distill.student.steps import SIGMAS
from distill.text import TextEncoders

TEACHER_SHIFT = 3.0
GRID_COLUMNS = 12
TEACHER, FOUR_STEPS, TWO_STEPS = "teacher, 50 steps, guided", "student, 4 steps", "student, 2 steps"
ABLATION = "ablation: "

Cells = list[list[str]]  # a table, the first row its header


def evaluate(
    run: Run,
    settings: Settings,
    out: Path,
    vae: AutoencoderKL,
    text: TextEncoders,
    teacher: SD3Transformer2DModel,
    student: SD3Transformer2DModel,
    ablations: dict[str, SD3Transformer2DModel],
    description: str,
) -> dict[str, Score]:
    """Scores every row (kept in RUN/scores.json), prints the tables, draws the grid, writes the checkpoint."""
    cases = held_out()[: settings.evaluation_captions]
    evaluator = Evaluator(text, vae, cases, run.accelerator.device)
    rows: dict[str, Callable[[], np.ndarray]] = {
        TEACHER: lambda: evaluator.teacher_pictures(teacher, 50, settings.guidance, TEACHER_SHIFT),
        "teacher, 4 steps, unguided": lambda: evaluator.teacher_pictures(teacher, 4, 1.0, TEACHER_SHIFT),
        FOUR_STEPS: lambda: evaluator.student_pictures(student, 4),
        TWO_STEPS: lambda: evaluator.student_pictures(student, 2),
    }
    for name, model in ablations.items():
        rows[f"{ABLATION}{name}, 4 steps"] = lambda model=model: evaluator.student_pictures(model, 4)  # type: ignore[misc]
    scores, strips = {}, [np.concatenate([render(scene) for scene, _ in cases[:GRID_COLUMNS]], 1)]
    for name, draw in rows.items():
        pictures = draw()
        scores[name] = evaluator.score(pictures)
        strips.append(np.concatenate(list(pictures[:GRID_COLUMNS]), 1))
    (run.folder / "scores.json").write_text(json.dumps({name: asdict(score) for name, score in scores.items()}, indent=1))
    Image.fromarray(np.concatenate(strips, 0)).save(run.folder / "grid.png")
    _print(f"{len(cases)} held-out captions", _overall(scores))
    _print("adherence by kind of caption", _by_kind(scores))
    card = write_card(settings, vae, student, scores, description, continued=run.start is not None)
    checkpoint.write(out, student, vae, text, card)
    Image.fromarray(np.concatenate(strips, 0)).save(out / "grid.png", optimize=True)
    return scores


def _overall(scores: dict[str, Score]) -> Cells:
    rows = [[name, f"{s.adherence:.1%}", f"{s.facts:.1%}", f"{s.frechet:.4f}"] for name, s in scores.items()]
    return [["model", "adherence", "facts", "Frechet distance"], *rows]


def _by_kind(scores: dict[str, Score]) -> Cells:
    """A row for each kind of caption: how many there are, and the adherence of the teacher and of both modes of the student."""
    models = (TEACHER, FOUR_STEPS, TWO_STEPS)
    rows = [
        [kind, str(found.captions), *(f"{scores[name].kinds[kind].adherence:.1%}" for name in models)]
        for kind, found in scores[TEACHER].kinds.items()
    ]
    return [["things", "captions", *models], *rows]


def _print(title: str, cells: Cells) -> None:
    table = Table(*cells[0], title=title)
    for row in cells[1:]:
        table.add_row(*row)
    Console().print(table)


def _markdown(cells: Cells) -> str:
    header, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([header, "|" + "---|" * len(cells[0]), *rows])


def write_card(
    settings: Settings,
    vae: AutoencoderKL,
    student: SD3Transformer2DModel,
    scores: dict[str, Score],
    description: str,
    continued: bool,
) -> str:
    """The model card. continued: the teacher began at an earlier checkpoint."""
    ablations = {
        name.removeprefix(ABLATION).removesuffix(", 4 steps"): score
        for name, score in scores.items()
        if name.startswith(ABLATION)
    }
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string((checkpoint.TEMPLATES / "card.md").read_text())
    return template.render(
        transformer=f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f}",
        sigmas={n: list(s) for n, s in SIGMAS.items()},
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS),
        forms=len(LONE_FORMS) + len(PAIR_FORMS),
        held_out=settings.evaluation_captions,
        psnr=f"{reconstruction_psnr(vae, [render(scene) for scene, _ in held_out()[:128]]):.1f}",
        settings=settings,
        continued=continued,
        student=description,
        overall=_markdown(_overall({name: score for name, score in scores.items() if not name.startswith(ABLATION)})),
        by_kind=_markdown(_by_kind(scores)),
        ablations=_markdown(_overall(ablations)) if ablations else "",
        notes=_notes(scores),
    )


def _notes(scores: dict[str, Score]) -> str:
    """What the figures miss of what was asked of them, in words."""
    teacher, four, two = (scores[name].adherence for name in (TEACHER, FOUR_STEPS, TWO_STEPS))
    missed = []
    if teacher < 0.90:
        missed.append(f"the teacher reaches {teacher:.1%} where 90 % was wanted; it was trained as long as the budget allowed")
    if four < 0.97 * teacher:
        missed.append(
            f"the 4-step student reaches {four / max(teacher, 1e-9):.1%} of the teacher's score where 97 % was wanted"
        )
    if two < 0.90 * teacher:
        missed.append(f"the 2-step student reaches {two / max(teacher, 1e-9):.1%} of the teacher's score where 90 % was wanted")
    return "Where it falls short: " + "; ".join(missed) + ".\n" if missed else ""
