"""Stage (b), distribution matching with timestep sharing.

The student takes one step of its own trajectory; teacher and proxy (which tracks the student's distribution) say how the
result differs from what the teacher would draw. The gradient of the divergence on the clean latents (Yin et al. 2024, DMD2,
eq. 3, written for velocities) is level (v_teacher - v_proxy), normalised by the mean distance to the teacher's aim.

Timestep sharing (arXiv 2509.21318): the divergence is taken at the state that the student's step arrives at, on its own
trajectory, not at a re-noised end point. The last step arrives at sigma 0, where velocities say nothing; its aim is mixed with
noise up to one of the student's own levels. The proxy learns from finished pictures at those levels: along a rectified flow
the states on the way are distributed as the pictures mixed with noise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from distill.data import Data
from distill.loop import HalfCopy, Run, cosine, set_rate, step_all, train, update_average
from distill.settings import Settings
from distill.student.discriminator import Heads, features
from distill.student.steps import SIGMAS, draw, euler
from distill.teacher import guided_velocity
from distill.text import TextEncoders


@dataclass(frozen=True)
class Variant:
    """What an ablation leaves out, and which of the student's steps are trained (by the sigma they start at)."""

    share_timesteps: bool = True
    discriminate: bool = True
    lowest: float = 0.0  # exclusive
    highest: float = 1.0  # inclusive

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(mode, index) of every step in the range."""
        return [(m, i) for m, s in SIGMAS.items() for i in range(m) if self.lowest < s[i] <= self.highest]


@dataclass(frozen=True)
class Matched:
    """A student and the proxy that knows what it draws."""

    student: SD3Transformer2DModel
    proxy: SD3Transformer2DModel


def fit(
    run: Run,
    stage: str,
    settings: Settings,
    data: Data,
    text: TextEncoders,
    teacher: SD3Transformer2DModel,
    start: Matched,
    iterations: int,
    variant: Variant = Variant(),
) -> Matched:
    """`iterations` from `start`; the student that comes out is the exponential moving average (0.99)."""
    torch.manual_seed(run.seed + 3)
    device = run.accelerator.device
    student = copy.deepcopy(start.student).requires_grad_(True)
    average = copy.deepcopy(start.student)
    proxy = copy.deepcopy(start.proxy).requires_grad_(True)
    judge = copy.deepcopy(teacher).bfloat16()
    heads = Heads(settings.layers, 64 * settings.heads).to(device)
    student_half, proxy_half = HalfCopy(student, run.accelerator), HalfCopy(proxy, run.accelerator)
    optimizers = {
        name: torch.optim.AdamW(module.parameters(), rate, betas=(0.0, 0.95), weight_decay=0.0)
        for name, module, rate in (
            ("student", student, settings.matching_rate),
            ("proxy", proxy, 2 * settings.matching_rate),
            ("heads", heads, 10 * settings.matching_rate),
        )
    }
    with torch.no_grad():
        empty = text.embed([""])

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        for name, factor in (("student", 1), ("proxy", 2), ("heads", 10)):
            rate = cosine(step, iterations, settings.matching_rate * factor, warmup=20, floor=0.2)
            set_rate({name: optimizers[name]}, rate)
        mode, index = variant.steps[int(torch.randint(len(variant.steps), (), generator=generator))]
        now, after = SIGMAS[mode][index : index + 2]
        shared = [s for s in SIGMAS[mode][1:] if s > 0]
        batch = data.sample(generator, settings.matching_batch)
        real = batch.latents.to(device)
        with torch.no_grad():
            condition = text.embed(batch.captions)

        def noise() -> Tensor:
            return torch.randn(real.shape, generator=generator).to(device)

        def random_level() -> float:
            if variant.share_timesteps:
                return shared[int(torch.randint(len(shared), (), generator=generator))]
            return 0.02 + 0.96 * float(torch.rand((), generator=generator))

        teach = step % settings.proxy_steps == 0
        figures: dict[str, float] = {}
        with student_half.fresh() as forward:
            before = draw(forward, noise(), mode, condition, stop=index)
            with torch.set_grad_enabled(teach):
                arrived, aim = euler(forward, before, now, after, condition)
                if variant.share_timesteps and after > 0:
                    state, level = arrived, after
                else:
                    level = random_level()
                    state = torch.lerp(aim, noise(), level)
            levels = torch.full((len(state),), level, device=device)
            if teach:
                proxy_now = proxy_half.copy
                with torch.no_grad():
                    right = guided_velocity(judge, state, levels, condition, empty, settings.matching_guidance)
                proxy_now.requires_grad_(False)
                with torch.set_grad_enabled(variant.discriminate):
                    drawn, seen = features(proxy_now, state, levels, condition)
                with torch.no_grad():
                    away = level * (right - drawn)
                    scale = (aim - (state - level * right)).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-3)
                    target = aim - away / scale
                loss = 0.5 * (aim - target).pow(2).mean()
                figures["divergence"] = away.pow(2).mean().item()
                if variant.discriminate:
                    fooled = -heads(seen).mean()
                    loss = loss + settings.adversarial_weight * fooled
                run.accelerator.backward(loss)
                proxy_now.requires_grad_(True)
                heads.zero_grad()
        if teach:
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            step_all({"student": optimizers["student"]})
            update_average(average, student, 0.99)
        student.zero_grad()

        state = state.detach()
        drawn_through = draw(student_half.copy, arrived.detach(), mode, condition, start=index + 1)
        with proxy_half.fresh() as tracker:
            proxy_noise, proxy_level = noise(), random_level()
            mixed = torch.lerp(drawn_through, proxy_noise, proxy_level)
            out, _ = features(tracker, mixed, torch.full((len(state),), proxy_level, device=device), condition)
            tracked = (out - (proxy_noise - drawn_through)).pow(2).mean()
            figures["proxy"] = tracked.item()
            run.accelerator.backward(tracked)
            if variant.discriminate:
                with torch.no_grad():
                    _, fake = features(tracker, state, levels, condition)
                    _, true = features(tracker, torch.lerp(real, noise(), level), levels, condition)
                hinge = (1 + heads(fake)).relu().mean() + (1 - heads(true)).relu().mean()
                figures["hinge"] = hinge.item()
                # AdamW makes the heads indifferent to the factor; the proxy stays a tracker first (DMD2 weighs it likewise).
                run.accelerator.backward(settings.adversarial_weight * hinge)
        nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
        step_all({"proxy": optimizers["proxy"], "heads": optimizers["heads"]})
        heads.refresh(generator)
        return figures

    modules = {"student": student, "average": average, "proxy": proxy, "heads": heads}
    train(run, stage, modules, optimizers, step_fn, iterations)
    return Matched(average.eval().requires_grad_(False), proxy.eval().requires_grad_(False))
