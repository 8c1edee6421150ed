"""The whole command on a tiny real checkpoint: bundles that draw what diffusers draws, gates, and refusals in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from export import cli
from runtimes.bundle import load_manifest
from runtimes.harness.parity import psnr
from runtimes.pipeline import Pipeline
from tests.bundles import draw
from tests.models import SD3, TinyModel, load_reference, write_checkpoint

PROMPT, SEED = "the red circle and the red circle", 5
LARGER = TinyModel(heads=4, text_width=64, text_width_2=64, joint_width=160)  # wide enough for every kind of scheme


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LARGER, dtype=torch.float16)


def command(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what the terminal shows."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capfd.readouterr()
    return code, out + err


def export(capfd: pytest.CaptureFixture[str], model: Path, out: Path, *arguments: object) -> tuple[int, str]:
    return command(capfd, "--model", model, "--out", out, *arguments)


@pytest.mark.parametrize(("target", "formats"), [("ios", ("coreml",)), ("android", ("onnx", "executorch"))])
def test_sixteen_bit_bundles_draw_what_diffusers_draws(
    target: str, formats: Sequence[str], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown = export(capfd, checkpoint, tmp_path, "--target", target, "--bits", 16)
    assert code == 0, shown
    manifest = load_manifest(tmp_path / target)
    assert manifest.formats == tuple(formats)
    assert all(entry.passed for entry in manifest.parity)
    options = _graph_options(manifest)
    drawing = draw(load_reference(checkpoint), options, PROMPT, SEED)  # neither prompt nor seed is a golden one
    for runtime in {"coreml": ["coreml"], "onnx": ["onnxruntime", "executorch"]}[formats[0]]:
        drawn = Pipeline.open(tmp_path / target, runtime).generate(PROMPT, SEED)
        assert psnr(drawn.pixels, drawing.image) >= 40, runtime


@pytest.mark.parametrize(("target", "bits"), [("ios", 8), ("ios", 6), ("android", 8), ("android", 6)])
def test_compressed_bundles_pass_every_gate_and_are_smaller(
    target: str, bits: int, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown = export(capfd, checkpoint, tmp_path, "--target", target, "--bits", bits)
    assert code == 0, shown
    manifest = load_manifest(tmp_path / target)
    assert manifest.recipe.bits == bits
    transformers = [entry for entry in manifest.components if entry.name == "transformer"]
    assert transformers and all(entry.bits < 16 for entry in transformers)


def test_two_exports_each_with_its_own_calibration_have_the_same_bytes(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in this process, which has converted before; one in a fresh process that hashes strings to other numbers."""
    (tmp_path / "prompts.txt").write_text("the red circle\non and on and the red\n", encoding="utf-8")
    flags = ("--target", "all", "--resolution", "64x64", "--steps", 2, "--calibration-prompts", tmp_path / "prompts.txt")
    flags = (*flags, "--component", "text_encoder", "--component", "transformer")
    monkeypatch.setenv("EXPORT_FLASH_CACHE", str(tmp_path / "one"))
    code, shown = export(capfd, checkpoint, tmp_path / "first", *flags)
    assert code == 0, shown
    arguments = [str(argument) for argument in ("--model", checkpoint, "--out", tmp_path / "second", *flags)]
    environment = {**os.environ, "EXPORT_FLASH_CACHE": str(tmp_path / "other"), "PYTHONHASHSEED": "7"}
    program = "import sys; from export.cli import main; main(sys.argv[1:])"
    ended = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for target in ("ios", "android"):
        first, second = (_files(tmp_path / name / target) for name in ("first", "second"))
        assert first.keys() == second.keys()
        assert [name for name in first if first[name] != second[name]] == []


def test_a_chunked_transformer_and_another_shape_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "plain", SD3, dtype=torch.float16)
    code, shown = export(
        capfd, model, tmp_path, "--target", "android", "--format", "onnx", "--chunks", 2, "--resolution", "160x96", "--steps", 2
    )
    assert code == 0, shown
    (transformer,) = (entry for entry in load_manifest(tmp_path / "android").components if entry.name == "transformer")
    assert len(transformer.artifacts) == 2
    code, shown = command(capfd, "generate", tmp_path / "android", "the red", "--out", tmp_path / "red.png")
    assert code == 0, shown
    assert Image.open(tmp_path / "red.png").size == (160, 96)


def test_contract_diffusers_draws_the_same(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("--target", "android", "--format", "onnx", "--contract", "diffusers", "--bits", 16)
    code, shown = export(capfd, checkpoint, tmp_path, *arguments)
    assert code == 0, shown
    manifest = load_manifest(tmp_path / "android")
    assert [entry.name for entry in manifest.components] == ["text_encoder", "text_encoder_2", "transformer", "vae_decoder"]
    drawing = draw(load_reference(checkpoint), _graph_options(manifest), PROMPT, SEED)
    assert psnr(Pipeline.open(tmp_path / "android").generate(PROMPT, SEED).pixels, drawing.image) >= 60


def test_a_dry_run_writes_nothing_and_names_all_components(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown = export(capfd, checkpoint, tmp_path / "out", "--target", "all", "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()
    for name in ("text_encoder_2", "conditioner", "transformer", "vae_decoder", "coreml", "onnx", "executorch"):
        assert name in shown
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    # --activations is heard by the targets that have the choice.
    for activations in ("int8", "int16"):
        asked = ("--target", "all", "--activations", activations, "--dry-run")
        assert export(capfd, checkpoint, tmp_path / "out", *asked)[0] == 0


def test_inspect_shows_every_artifact_and_tensor_whole_at_80_columns(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--target", "android", "--format", "onnx", "--bits", 16, "--component", "conditioner")
    assert export(capfd, checkpoint, tmp_path, *arguments)[0] == 0
    code, shown = command(capfd, "inspect", tmp_path / "android")
    assert code == 0
    (entry,) = load_manifest(tmp_path / "android").components
    rows = [line.split() for line in shown.splitlines()]
    assert ["conditioner", "onnx", "CPU", f"{entry.bits:.2f}", f"{entry.bytes / 1e6:.2f}", "conditioner/model.onnx"] in rows
    for tensor in (*entry.inputs, *entry.outputs):
        assert f"{tensor.name} " in shown and f"{tensor.dtype} {list(tensor.shape)}" in shown
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown


def test_verify_names_a_file_altered_by_one_byte(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--target", "android", "--format", "onnx", "--bits", 16)
    assert export(capfd, checkpoint, tmp_path, *arguments)[0] == 0
    bundle = tmp_path / "android"
    code, _ = command(capfd, "verify", bundle, "--json", tmp_path / "report.json")
    assert code == 0 and json.loads((tmp_path / "report.json").read_text())["passed"] is True
    (tmp_path / "file").write_text("in the way")
    for arguments in (("verify", bundle, "--json"), ("generate", bundle, PROMPT, "--out")):
        code, shown = command(capfd, *arguments, tmp_path / "file" / "made.png")
        assert code == 2 and f"{tmp_path}/file/made.png cannot be written: " in shown.splitlines()[-1]
    data = bundle / "transformer" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, shown = command(capfd, "verify", bundle)
    assert code == 1
    assert len(shown.strip().splitlines()) == 1 and "transformer/model.onnx.data was altered" in shown

    data.unlink()
    code, shown = command(capfd, "verify", bundle)
    assert code == 1
    assert len(shown.strip().splitlines()) == 1 and "transformer/model.onnx.data is missing" in shown
    code, shown = command(capfd, "generate", bundle, PROMPT, "--out", tmp_path / "picture.png")
    assert code == 2
    assert len(shown.strip().splitlines()) == 1 and "transformer/model.onnx" in shown
    assert not (tmp_path / "picture.png").exists()


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(cli.command, ["--help"]).output
    assert all(name in shown for name in ("generate", "verify", "inspect", "--target"))


def _graph_options(manifest: object) -> object:
    from export.families.family import GraphOptions

    size = manifest.image_size  # type: ignore[attr-defined]
    return GraphOptions(size.width, size.height, manifest.sigmas)  # type: ignore[attr-defined]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pictures_of_the_bundle_lie_in_it(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("--target", "android", "--format", "onnx", "--bits", 16)
    assert export(capfd, checkpoint, tmp_path, *arguments)[0] == 0
    pictures = tmp_path / "android" / "pictures"
    original, made = (np.asarray(Image.open(pictures / f"prompt0-{kind}.png"), float) for kind in ("original", "onnx"))
    assert np.abs(original - made).max() <= 1
