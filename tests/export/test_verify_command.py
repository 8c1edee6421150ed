"""`verify` per layer, by range, by step and against another bundle, as commands: what they print, and how they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import cli
from export.calibrating import CalibrationOptions
from export.errors import UserError
from export.verify_command import (
    run_verify_against,
    run_verify_command,
    run_verify_drift,
    run_verify_layers,
    run_verify_ranges,
    verify_layers,
)
from runtimes.bundle import BundleError, describe_files, load_manifest, write_manifest
from runtimes.golden import read_cases, read_drawings, write_golden
from tests.models import TinyModel, write_checkpoint

WIDE = TinyModel(heads=4, text_width=64, text_width_2=64, joint_width=160, layers=1, dual_layers=(0,), text_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", WIDE, dtype=torch.float16)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One component for Android, in ONNX, 8 bits, not calibrated."""
    out = tmp_path_factory.mktemp("bundles")
    options = ["--target", "android", "--format", "onnx", "--component", "text_encoder", "--steps", "2", "--bits", "8"]
    cli.main(["--model", str(checkpoint), "--out", str(out), *options, "--no-calibration"])
    return out / "android"


def layers(bundle: Path, checkpoint: Path, json_file: Path | None = None) -> None:
    run_verify_layers(
        bundle=bundle,
        model=str(checkpoint),
        runtimes=(),
        components=(),
        case=0,
        calibration=CalibrationOptions(),
        json_file=json_file,
    )


def test_a_faithful_bundle_parts_nowhere(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers(bundle, checkpoint, tmp_path / "layers.json")
    shown = capsys.readouterr().out
    assert "text_encoder" in shown and "nowhere" in shown and max(map(len, shown.splitlines())) <= 80
    report = json.loads((tmp_path / "layers.json").read_text())
    assert report["passed"] and len(report["artifacts"][0]["layers"]) > 40


def test_a_fault_in_a_bundle_ends_with_1_and_names_the_operation(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "android"
    shutil.copytree(bundle, broken)
    path = broken / "text_encoder" / "model.onnx"
    model = onnx.load(str(path))
    planted = "text_model.encoder.layers.1.mlp.fc1"
    (scales,) = (each for each in model.graph.initializer if each.name == f"{planted}.weight.scales")
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * np.float32(0.9), scales.name))
    (path.parent / "model.onnx.data").unlink()
    onnx.save(model, str(path))
    with pytest.raises(BundleError, match="is not as it was published"):
        layers(broken, checkpoint)

    manifest = load_manifest(broken)
    (entry,) = manifest.components
    artifact = entry.artifacts[0].model_copy(update={"files": describe_files(broken, ["text_encoder"])})
    entry = entry.model_copy(update={"artifacts": (artifact,)})
    write_manifest(broken, manifest.model_copy(update={"components": (entry,)}))
    with pytest.raises(SystemExit) as ended:
        layers(broken, checkpoint)
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "parts from the reference at MatMulNBits" in shown and f"of {planted}" in shown


def test_what_cannot_be_compared_is_one_line(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", TinyModel(**vars(WIDE) | {"seed": 1}), dtype=torch.float16)
    with pytest.raises(UserError, match="is not the checkpoint that"):
        verify_layers(bundle, str(other))
    with pytest.raises(UserError, match=r"--component vae_decoder is not in .*; choose from text_encoder"):
        verify_layers(bundle, str(checkpoint), components=("vae_decoder",))
    with pytest.raises(BundleError, match="runtime 'coreml' runs nothing of this bundle; choose from onnxruntime"):
        verify_layers(bundle, str(checkpoint), runtimes=("coreml",))


def test_weights_that_come_out_otherwise_are_one_line(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    """As after a calibration on other prompts: golden outputs that the stored weights do not give."""
    copy = tmp_path / "android"
    shutil.copytree(bundle, copy)
    manifest = load_manifest(copy)
    cases = {"text_encoder": list(read_cases(copy, manifest.golden, "text_encoder"))}
    for case in cases["text_encoder"]:
        case.compressed["onnx"]["pooled"][0, 0] += 0.1
    golden = write_golden(copy, cases, list(read_drawings(copy, manifest.golden)))
    write_manifest(copy, manifest.model_copy(update={"golden": golden}))
    with pytest.raises(UserError, match=r"text_encoder \(onnx\) do not come out as those of .* did: pooled differs"):
        verify_layers(copy, str(checkpoint))


def test_reports_exclude_each_other(bundle: Path) -> None:
    def run(**changed: object) -> None:
        calibration = ("calibration_prompts", "calibration_images", "calibration_device")
        none = dict.fromkeys(("against", "model", *calibration, "json_file"))
        off = dict.fromkeys(("per_layer", "ranges", "drift", "low_memory"), False)
        run_verify_command(**{"bundle": bundle, "runtimes": (), "components": (), "case": 0, **none, **off, **changed})

    with pytest.raises(UserError, match="--ranges and --against are reports of their own; give one of them"):
        run(ranges=True, against=bundle)
    with pytest.raises(UserError, match="belong to --per-layer; give it or leave them out"):
        run(drift=True, model="other")
    with pytest.raises(UserError, match="--drift follows one runtime; give one of onnxruntime, executorch"):
        run(drift=True, runtimes=("onnxruntime", "executorch"))


def test_the_other_reports_show_a_table_and_refuse_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_verify_against(bundle=bundle, against=bundle, low_memory=False, json_file=tmp_path / "against.json")
    shown = capsys.readouterr().out
    assert shown.count("identical") == 2  # hidden_states and pooled; a bundle of one component draws nothing
    assert json.loads((tmp_path / "against.json").read_text())["differences"][0]["psnr"] == "identical"
    with pytest.raises(BundleError, match="cannot draw"):
        run_verify_drift(bundle=bundle, runtime="auto", low_memory=False, json_file=None)
    with pytest.raises(BundleError, match="has no Core ML artifacts"):
        run_verify_ranges(bundle=bundle, json_file=None)
    with pytest.raises(UserError, match=r"--json .* cannot be written"):
        run_verify_against(bundle=bundle, against=bundle, low_memory=False, json_file=tmp_path)
