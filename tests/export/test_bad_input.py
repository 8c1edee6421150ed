"""Every bad input of every command: one clear line, exit code 2, nothing on stdout, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from export import cli
from runtimes.bundle import write_manifest
from tests.models import TinyModel, write_checkpoint
from tests.runtimes.test_bundle import CONTENTS, manifest_of

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
Arguments = Sequence[object]
Case = tuple[Callable[[Path, Path], Arguments], tuple[str, ...]]
"""(checkpoint, empty folder) -> what is called; and what the line must say."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TinyModel(layers=1, dual_layers=(0,), text_layers=2, sample_size=8)
    return write_checkpoint(tmp_path_factory.mktemp("models") / "smallest", model, dtype=torch.float16)


def exporting(model: object, folder: Path, *options: object) -> Arguments:
    """Of two values given for an option, the last counts."""
    return ("--target", "ios", "--model", model, "--out", folder / "out", *options)


def option(*options: object) -> Callable[[Path, Path], Arguments]:
    return lambda checkpoint, folder: exporting(checkpoint, folder, *options)


def damaged(damage: Callable[[Path], object]) -> Callable[[Path, Path], Arguments]:
    """An export of a copy of the checkpoint to which `damage` was done."""

    def case(checkpoint: Path, folder: Path) -> Arguments:
        model = shutil.copytree(checkpoint, folder / "model")
        damage(model)
        return exporting(model, folder)

    return case


def file(name: str, content: bytes) -> Callable[[Path, Path], Arguments]:
    """An export of a single file."""

    def case(checkpoint: Path, folder: Path) -> Arguments:
        (folder / name).write_bytes(content)
        return exporting(folder / name, folder)

    return case


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rewrite_header(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(old, new)
    assert header != content[8 : 8 + length]
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def set_field(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def of_another_shape(model: Path) -> None:
    """The same bytes, said to be [1, all of them]."""
    path = model / VAE
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    entry = json.loads(path.read_bytes()[8 : 8 + length])["decoder.conv_in.bias"]
    old = json.dumps(entry["shape"], separators=(",", ":")).encode()
    name = b'"decoder.conv_in.bias":{"dtype":"F16","shape":'
    rewrite_header(path, name + old, name + b"[1," + old[1:])


def beneath_a_file(checkpoint: Path, folder: Path) -> Arguments:
    (folder / "file").write_text("in the way")
    return exporting(checkpoint, folder, "--out", folder / "file" / "out")


def on_a_log_that_is_a_folder(checkpoint: Path, folder: Path) -> Arguments:
    (folder / "out" / "export.log").mkdir(parents=True)
    return exporting(checkpoint, folder)


def over_something_else(checkpoint: Path, folder: Path) -> Arguments:
    (folder / "out" / "android").mkdir(parents=True)
    (folder / "out" / "android" / "holiday.jpg").write_text("a picture")
    return exporting(checkpoint, folder, "--target", "all")


OPTIONS: dict[str, Case] = {
    "no target": (lambda checkpoint, folder: ("--model", checkpoint), ("--target",)),
    "target": (option("--target", "windows"), ("windows", "ios", "android")),
    "resolution not divisible by 16": (option("--resolution", "100"), ("100", "multiples of 16", "96x96")),
    "resolution of no number": (option("--resolution", "large"), ("--resolution large", "write 512")),
    "palettes of 5 bits": (option("--no-calibration", "--bits", 5), ("--bits 5", "choose from --bits 16, --bits 8, --bits 6")),
    "integers of 2 bits": (option("--target", "android", "--bits", 2), ("--bits 2", "too small for onnx", "at least")),
    "rising sigmas": (option("--sigmas", "0.5 1 0"), ("--sigmas", "[0.5, 1, 0]", "below the one before")),
    "no final zero": (option("--sigmas", "1 0.5"), ("--sigmas", "[1, 0.5]", "must be 0")),
    "sigmas of no numbers": (option("--sigmas", "many"), ("--sigmas many", "write them as")),
    "steps not carried": (option("--steps", 3), ("--steps 3", "choose one of those")),
    "format of another target": (option("--format", "onnx"), ("--format onnx", "choose from coreml")),
    "component": (option("--component", "unet"), ("--component unet", "choose from text_encoder")),
    "int8 activations": (option("--activations", "int8"), ("--activations int8", "ExecuTorch", "--target ios makes coreml")),
    "int16 activations": (
        option("--target", "android", "--format", "onnx", "--activations", "int16"),
        ("--activations int16", "a choice of ExecuTorch", "--target android makes onnx"),
    ),
    "deployment target": (option("--deployment-target", "iOS3"), ("iOS3", "choose from iOS17, iOS18")),
    "rewrite": (option("--without", "magic"), ("--without magic", "choose from fold_null_tokens")),
    "chunks": (option("--chunks", 99), ("--chunks 99", "choose")),
    "tokenizer folder": (option("--tokenizer", "nowhere"), ("nowhere", "is missing")),
}
CHECKPOINTS: dict[str, Case] = {
    "no such folder": (option("--model", "nowhere"), ("nowhere", "--model takes")),
    "no such hub model": (option("--model", "no-one/nothing"), ("no-one/nothing", "give a folder")),
    "an empty folder": (lambda _, folder: exporting(folder, folder), ("no model_index.json",)),
    "another pipeline": (
        damaged(lambda model: set_field(model / "model_index.json", _class_name="FluxPipeline")),
        ("FluxPipeline", "takes StableDiffusion3Pipeline"),
    ),
    "another layout": (damaged(lambda model: shutil.rmtree(model / "transformer")), ("no transformer folder", "SD3")),
    "no configuration": (damaged(lambda model: (model / "vae/config.json").unlink()), ("vae/config.json is missing",)),
    "broken configuration": (damaged(lambda model: truncate(model / "vae/config.json", 9)), ("vae/config.json", "JSON")),
    "truncated": (damaged(lambda model: truncate(model / TRANSFORMER, -100)), (TRANSFORMER, "truncated", "download it again")),
    "truncated in its header": (damaged(lambda model: truncate(model / TRANSFORMER, 99)), (TRANSFORMER, "truncated")),
    "a tensor missing": (
        damaged(lambda model: rewrite_header(model / VAE, b'"decoder.conv_in.weight"', b'"decoder.conv_xx.weight"')),
        ("missing decoder.conv_in.weight", "unexpected decoder.conv_xx.weight"),
    ),
    "a tensor of another shape": (
        damaged(of_another_shape),
        ("of another shape: decoder.conv_in.bias is (1, 16) instead of (16,)",),
    ),
    "pickled weights": (
        damaged(lambda model: (model / TRANSFORMER).rename((model / TRANSFORMER).with_suffix(".bin"))),
        ("pytorch_model.bin is a pickle", "convert it to safetensors"),
    ),
    "a pickle file": (file("model.ckpt", b"\x80\x04."), ("model.ckpt is a pickle", "as safetensors")),
    "a truncated single file": (file("model.safetensors", b"\0" * 20), ("model.safetensors is truncated",)),
    "a file of another kind": (file("model.gguf", b"GGUF"), ("model.gguf is no .safetensors file",)),
    "no merges": (damaged(lambda model: (model / "tokenizer_2/merges.txt").unlink()), ("tokenizer_2/merges.txt is missing",)),
    "broken tokens": (damaged(lambda model: truncate(model / "tokenizer/vocab.json", 99)), ("tokenizer/vocab.json", "JSON")),
}
OUTPUTS: dict[str, Case] = {
    "beneath a file": (beneath_a_file, ("file/out cannot be written", "choose another folder")),
    "where nobody can write": (option("--out", "/proc/out"), ("/proc/out", "choose another")),
    "a log that is a folder": (on_a_log_that_is_a_folder, ("out cannot be written", "choose another folder")),
    "over something else": (over_something_else, ("out/android exists and is no bundle", "choose another --out")),
}


def bundle_in(folder: Path) -> Path:
    for name, data in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_manifest(folder, manifest_of(folder))
    return folder


def pointing_to(path: str) -> Callable[[Path], None]:
    return lambda bundle: set_field(bundle / "manifest.json", other_files=[{"path": path, "sha256": "0" * 64, "bytes": 1}])


def linked_out(bundle: Path) -> None:
    (bundle / "LICENSE.md").unlink()
    (bundle / "LICENSE.md").symlink_to("/etc/passwd")


BUNDLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("no such bundle folder",)),
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), ("is no bundle", "no manifest.json")),
    "no JSON": (lambda bundle: truncate(bundle / "manifest.json", 50), ("manifest.json is not valid JSON",)),
    "another version": (lambda bundle: set_field(bundle / "manifest.json", schema_version=9), ("schema_version",)),
    "a path upwards": (pointing_to("../secret"), ("points outside its folder", "'../secret'")),
    "an absolute path": (pointing_to("/etc/passwd"), ("points outside its folder", "'/etc/passwd'")),
    "a link out": (linked_out, ("points outside its folder", "'LICENSE.md' is a link to /etc/passwd")),
}


def on(command: Arguments, damage: Callable[[Path], object]) -> Callable[[Path, Path], Arguments]:
    def case(checkpoint: Path, folder: Path) -> Arguments:
        bundle = bundle_in(folder / "bundle")
        damage(bundle)
        return (command[0], bundle, *command[1:])

    return case


COMMANDS: dict[str, Arguments] = {"inspect": ("inspect",), "verify": ("verify",), "generate": ("generate", "a prompt")}
CASES: dict[str, Case] = {
    **{f"option: {name}": case for name, case in OPTIONS.items()},
    **{f"checkpoint: {name}": case for name, case in CHECKPOINTS.items()},
    **{f"output: {name}": case for name, case in OUTPUTS.items()},
    **{
        f"{name}: {fault}": (on(command, damage), told)
        for name, command in COMMANDS.items()
        for fault, (damage, told) in BUNDLES.items()
    },
    "generate: runtime": (on(("generate", "x", "--runtime", "vulkan"), lambda bundle: None), ("vulkan", "choose from auto")),
    "generate: picture": (on(("generate", "x", "--out", "x.gif"), lambda bundle: None), ("--out x.gif", ".png, .jpg or .webp")),
    "generate: threads": (on(("generate", "x", "--threads", 0), lambda bundle: None), ("0 threads", "1 or more")),
    "verify: runtime": (on(("verify", "--runtime", "vulkan"), lambda bundle: None), ("vulkan", "choose from auto")),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    name: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, told = CASES[name]
    arguments = make(checkpoint, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    shown, error = capfd.readouterr()
    assert (stopped.value.code, shown) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith("export-flash: ") and all(words in line for words in told), line
    assert sorted(tmp_path.rglob("*")) == before


def test_too_small_a_disk_is_said_before_anything_is_made(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.planning.SPARE_BYTES", 10**18)
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in exporting(checkpoint, tmp_path)])
    (line,) = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert f"the disk of {tmp_path}/out/ios is too full" in line and "free some space or choose another --out" in line
    assert not any(tmp_path.iterdir())
