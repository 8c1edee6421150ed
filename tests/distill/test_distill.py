"""`python -m distill`: every stage runs, resumes exactly, and says in one line what it cannot do."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from distill.loop import Run, RunError, save_state, train
from distill.settings import SMOKE


def distill(*arguments: str, file_bytes: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """`file_bytes`: no file may grow beyond, as if the disk were full."""
    return subprocess.run(
        [sys.executable, "-m", "distill", *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    done = distill("all", "--smoke", "--run", str(folder / "run"), "--out", str(folder / "made"))
    assert done.returncode == 0, done.stderr
    return folder


def test_every_stage_runs_and_the_checkpoint_draws_in_unmodified_diffusers(smoke: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(smoke / "made", text_encoder_3=None, tokenizer_3=None)
    size = {"height": 128, "width": 128}
    image = pipeline("a red circle", guidance_scale=1, num_inference_steps=2, sigmas=[0.98, 0.6], **size).images[0]
    assert image.size == (128, 128)
    for name in ("README.md", "LICENSE", "flash.json", "model_index.json", "grid.png"):
        assert (smoke / "made" / name).is_file()


def test_scores_and_card_hold_adherence_by_kind_of_caption(smoke: Path) -> None:
    kinds = json.loads((smoke / "run" / "scores.json").read_text())["student, 2 steps"]["kinds"]
    assert sum(kind["captions"] for kind in kinds.values()) == SMOKE.evaluation_captions
    card = (smoke / "made" / "README.md").read_text()
    assert "| things | captions | teacher, 50 steps, guided | student, 4 steps | student, 2 steps |" in card
    for name, kind in kinds.items():
        assert f"| {name} | {kind['captions']} | " in card


def test_the_card_says_what_ablations_are_to_be_compared_with(smoke: Path) -> None:
    ablations = (smoke / "made" / "README.md").read_text().split("### Ablations")[1]
    assert f"the same\n{SMOKE.ablation_iterations} iterations in all" in ablations
    for row in ("trajectory guidance only", "full method", "without timestep sharing", "without discriminator",
                "without split timesteps"):
        assert f"\n| {row} | " in ablations


def test_a_finished_run_is_not_trained_again(smoke: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (smoke / "run").glob("*.safetensors")}
    assert distill("student", "--smoke", "--run", str(smoke / "run")).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_may_begin_at_a_finished_checkpoint(smoke: Path, tmp_path: Path) -> None:
    begun = ("--smoke", "--run", str(tmp_path / "run"), "--from", str(smoke / "made"))
    done = distill("all", *begun, "--out", str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    for part in ("vae", "text_encoder", "text_encoder_2"):
        first, second = (next((folder / "made" / part).glob("*.safetensors")) for folder in (smoke, tmp_path))
        assert first.read_bytes() == second.read_bytes()
    card = (tmp_path / "made" / "README.md").read_text()
    assert "This checkpoint goes on from an earlier one" in card
    assert "This checkpoint goes on" not in (smoke / "made" / "README.md").read_text()
    done = distill("teacher", "--smoke", "--run", str(tmp_path / "run"))
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode != 0 and f"was begun with --from {smoke / 'made'}" in line


def test_a_checkpoint_of_another_shape_is_one_clear_line_and_kept(smoke: Path) -> None:
    done = distill("autoencoder", "--run", str(smoke / "run"))  # the full sizes on the smoke run's state
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "is of another shape" in line and "start anew" in line
    assert (smoke / "run" / "autoencoder.safetensors").exists()


def test_an_unknown_stage_is_one_clear_line() -> None:
    done = distill("painter")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "painter" in done.stderr and "teacher" in done.stderr


def test_a_state_that_cannot_be_written_is_one_clear_line_and_keeps_the_last_one(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    path = tmp_path / "stage.safetensors"
    save_state(path, {"module": module}, {}, 7)
    kept = path.read_bytes()
    (tmp_path / "stage.part").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*the last saved state is kept"):
        save_state(path, {"module": module}, {}, 8)
    assert path.read_bytes() == kept


def test_a_run_whose_disk_is_full_says_so_in_one_line_and_keeps_the_last_state(smoke: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    state = tmp_path / "run" / "autoencoder.safetensors"
    with safe_open(smoke / "run" / "autoencoder.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        step = int(file.metadata()["step"])
    save_file(tensors, state, metadata={"step": str(step - 1)})
    kept = state.read_bytes()
    done = distill("autoencoder", "--smoke", "--run", str(state.parent), file_bytes=50_000)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode != 0
    assert f"cannot write {state}: File too large" in line and "the last saved state is kept" in line
    assert state.read_bytes() == kept and not state.with_suffix(".part").exists()

    log = state.with_name("autoencoder.log.jsonl")
    log.unlink()
    log.symlink_to("/dev/full")  # answers every write as a full disk does
    done = distill("autoencoder", "--smoke", "--run", str(state.parent))
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode != 0
    assert f"cannot write {log}: No space left on device" in line and state.read_bytes() == kept

    log.unlink()
    done = distill("autoencoder", "--smoke", "--run", str(state.parent))
    assert done.returncode == 0 and state.read_bytes() != kept


def test_a_resumed_run_takes_the_same_steps_as_an_undisturbed_one(tmp_path: Path) -> None:
    def fit(folder: Path, stops: list[int]) -> dict[str, torch.Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            module = nn.Linear(8, 8)
            optimizer = torch.optim.AdamW(module.parameters(), 1e-2)

            def step(number: int, generator: torch.Generator) -> dict[str, float]:
                loss = module(torch.randn(4, 8, generator=generator)).pow(2).mean()  # noqa: B023
                loss.backward()
                optimizer.step()  # noqa: B023
                optimizer.zero_grad()  # noqa: B023
                return {"loss": loss.item()}

            train(Run(folder, 0, Accelerator(cpu=True)), "stage", {"module": module}, {"adam": optimizer}, step, stop)
        return {name: value.clone() for name, value in module.state_dict().items()}

    undisturbed, resumed = fit(tmp_path / "a", [9]), fit(tmp_path / "b", [2, 5, 9])
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
