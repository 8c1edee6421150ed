"""Stage (a), trajectory guidance: the student follows the guided teacher's trajectory in few steps.

The teacher draws from noise to picture along a fine grid of sigmas that contains the student's. The student's velocity at
x(s_i) is regressed onto the chord (x(s_i+1) - x(s_i)) / (s_i+1 - s_i): one Euler step then lands where the teacher arrives.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.data import Data
from distill.loop import HalfCopy, Run, linear, set_rate, step_all, train
from distill.model import velocity
from distill.muon import Muon, split_parameters
from distill.settings import Settings
from distill.student.steps import SIGMAS
from distill.teacher import sample
from distill.text import TextEncoders

SHARD = 128
# The teacher's grid; both modes' levels are in it. The 2-step mode reads its first state, pure noise, as sigma 0.98.
GRID = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.68, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


def fit(run: Run, settings: Settings, data: Data, text: TextEncoders, teacher: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The student after trajectory guidance; trajectories are drawn once and kept in shards."""
    device = run.accelerator.device
    shards = _trajectories(run, settings, data, text, teacher)
    states = torch.cat([s for s, _ in shards])  # [trajectories, levels, 16, 16, 16]
    captions = [caption for _, batch in shards for caption in batch]
    student = copy.deepcopy(teacher).requires_grad_(True)
    half = HalfCopy(student, run.accelerator)
    matrices, rest = split_parameters(student, adam=("pos_embed", "proj_out", "norm1", "norm_out", "time_text_embed"))
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": Muon(matrices, settings.trajectory_rate),
        "adam": torch.optim.AdamW(rest, settings.trajectory_rate, betas=(0.9, 0.95), weight_decay=0.0),
    }

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizers, linear(step, settings.trajectory_steps, settings.trajectory_rate, warmup=50))
        chosen = torch.randint(len(captions), (settings.trajectory_batch,), generator=generator)
        now, at, after = _random_steps(settings.trajectory_batch, generator)
        before_state, after_state = (states[chosen, level].float().to(device) for level in (at, after))
        levels = torch.tensor(GRID)[after]
        chord = (after_state - before_state) / (levels - now).to(device)[:, None, None, None]
        with torch.no_grad():
            condition = text.embed([captions[i] for i in chosen.tolist()])
        with half.fresh() as forward:
            state, context, pooled = half.cast(before_state, *condition)
            out = velocity(forward, state, now.to(device), context, pooled)
            loss = (out - chord).pow(2).mean()
            run.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        step_all(optimizers)
        return {"chord": loss.item()}

    train(run, "trajectory", {"student": student}, optimizers, step_fn, settings.trajectory_steps)
    return student.eval().requires_grad_(False)


def _random_steps(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """For each sample a step of a mode: the sigma it starts at, and the indices in GRID of its two states."""
    steps = [
        (sigmas[i], 0 if i == 0 else GRID.index(sigmas[i]), GRID.index(sigmas[i + 1]))
        for sigmas in SIGMAS.values()
        for i in range(len(sigmas) - 1)
    ]
    table = torch.tensor(steps)[torch.randint(len(steps), (count,), generator=generator)]
    return table[:, 0], table[:, 1].long(), table[:, 2].long()


def _trajectories(
    run: Run, settings: Settings, data: Data, text: TextEncoders, teacher: SD3Transformer2DModel
) -> list[tuple[Tensor, list[str]]]:
    """Guided trajectories of the teacher, float16 [128, levels, 16, 16, 16] a shard, with their captions."""
    folder = run.folder / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(teacher).bfloat16()
    paths = [folder / f"{start:06d}.safetensors" for start in range(0, settings.trajectories, SHARD)]
    todo = [p for p in paths if not p.exists()]
    with torch.no_grad():
        empty = text.embed([""])
    for path in track(todo, "trajectories", disable=not todo):
        generator = run.generator("trajectories", int(path.stem))
        captions = data.sample(generator, min(SHARD, settings.trajectories)).captions
        noise = torch.randn((len(captions), 16, 16, 16), generator=generator).to(run.accelerator.device)
        with torch.no_grad():
            condition = text.embed(captions)
        states = torch.stack(sample(half, noise, GRID, condition, empty, settings.guidance), 1)
        save_file(
            {"states": states.half().cpu().contiguous()}, path.with_suffix(".part"), metadata={"captions": json.dumps(captions)}
        )
        path.with_suffix(".part").replace(path)
    return [_read(path) for path in paths]


def _read(path: Path) -> tuple[Tensor, list[str]]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("states"), json.loads(file.metadata()["captions"])
