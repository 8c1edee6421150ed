"""Every size and budget of flash-mini in one place: the full run and the smoke run (a few steps of each stage)."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    vae_channels: tuple[int, int, int, int] = (16, 32, 64, 96)
    vae_steps: int = 3400
    vae_whole_steps: int = 600  # the last ones, on whole pictures
    vae_batch: int = 8  # whole pictures; twice as many crops of 64 px in the first steps
    vae_rate: float = 1.5e-3
    vae_kl: float = 1e-4
    vae_thing_weight: float = 4.0
    measure_batches: int = 64
    text_widths: tuple[int, int] = (128, 192)
    text_layers: int = 3
    text_positions: int = 32
    text_steps: int = 800
    text_batch: int = 128
    text_rate: float = 1e-3
    vocabulary_captions: int = 20000
    joint_dim: int = 384  # wider than both encoders together, so that the padding on channels is real
    scenes: int = 32 * 1024
    layers: int = 6
    heads: int = 3  # of width 64
    dual_layers: int = 3  # the first ones, as in SD3.5-Medium
    layout_block: int = 2
    layout_weight: float = 0.1
    logit_mean: float = 0.3
    teacher_steps: int = 16000
    teacher_batch: int = 64
    teacher_rate: float = 1.5e-3
    guidance: float = 3.0
    trajectories: int = 24 * 128
    trajectory_steps: int = 1000
    trajectory_batch: int = 64
    trajectory_rate: float = 5e-4
    matching_iterations: int = 400
    matching_batch: int = 32
    matching_rate: float = 3e-5
    matching_guidance: float = 2.0  # the whole of the teacher's leaves noise in plain backgrounds
    proxy_warmup: int = 200
    proxy_rate: float = 3e-4
    proxy_steps: int = 2  # updates of the proxy for each of the student
    adversarial_weight: float = 0.02
    split_iterations: int = 120
    ablation_iterations: int = 120
    selection_captions: int = 128
    evaluation_captions: int = 512


FULL = Settings()
# Of a run that begins at an earlier checkpoint: its transformer knows the captions already.
CONTINUED = replace(FULL, teacher_steps=1800, trajectory_steps=600, matching_iterations=300)
SMOKE = Settings(
    vae_channels=(8, 8, 16, 16),
    vae_steps=3,
    vae_whole_steps=1,
    vae_batch=2,
    measure_batches=1,
    text_layers=2,
    text_steps=2,
    text_batch=4,
    vocabulary_captions=500,
    scenes=32,
    layers=2,
    heads=1,
    dual_layers=1,
    layout_block=0,
    teacher_steps=3,
    teacher_batch=4,
    trajectories=8,
    trajectory_steps=2,
    trajectory_batch=4,
    proxy_warmup=2,
    matching_iterations=2,
    matching_batch=2,
    split_iterations=2,
    ablation_iterations=6,
    selection_captions=4,
    evaluation_captions=14,
)
