"""Recipes, budgets and calibration as the command offers them, on a tiny real checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from export import cli
from export.budgets import parse_size
from export.compression.recipe import RecipeFile, WeightChoice, read_recipe
from export.errors import UserError
from export.exporter import RECIPE
from runtimes.bundle import Manifest, load_manifest
from tests.models import TinyModel, write_checkpoint

MODEL = TinyModel(heads=4, text_width=64, text_width_2=64, joint_width=160)  # wide enough for every kind of scheme


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", MODEL, dtype=torch.float16)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("the red circle\nthe circle\n\nred red the\ncircle and the red\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def recipe(checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all components in all formats, at five mean bits and a half."""
    place = tmp_path_factory.mktemp("recipes") / "recipe.json"
    cli.main(["analyze", *_flags(checkpoint, prompts), "--bits", "5.5", "--out", str(place)])
    return place


def _flags(checkpoint: Path, prompts: Path) -> list[str]:
    return ["--model", str(checkpoint), "--calibration-prompts", str(prompts)]


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capfd.readouterr()
    return code, out + err


def exported(capfd: pytest.CaptureFixture[str], out: Path, *arguments: object) -> Manifest:
    code, shown = run(capfd, "--target", "ios", "--component", "text_encoder", "--out", out, *arguments)
    assert code == 0, shown
    return load_manifest(out / "ios")


def bytes_of(file: RecipeFile, format: str) -> int:
    return file.formats[format].bytes


def test_an_analysis_keeps_to_its_budget_and_has_evidence_for_every_choice(recipe: Path) -> None:
    found = read_recipe(recipe)
    assert set(found.formats) == {"coreml", "onnx", "executorch"}
    assert found.prompts == 4
    for format in found.formats.values():
        choices = [choice for weights in format.components.values() for choice in weights.values()]
        weighed = [choice for choice in choices if choice.weighed]
        count = sum(math.prod(choice.shape) for choice in weighed)
        spent = [next(e.bytes for e in choice.weighed if e.scheme == choice.scheme) for choice in weighed]
        assert 8 * sum(spent) <= 5.5 * count
        assert {"text_encoder", "text_encoder_2", "conditioner", "transformer", "vae_decoder"} == set(format.components)
        assert len({str(choice.scheme) for choice in weighed}) > 1


def test_what_an_analysis_predicts_is_about_what_it_measures(recipe: Path) -> None:
    for name, format in read_recipe(recipe).formats.items():
        assert format.predicted_loss is not None and format.measured_loss is not None
        assert 0.1 < format.predicted_loss / format.measured_loss < 10, name


def test_activations_say_how_many_linears_of_executorch_take_inputs_of_16_bits(
    checkpoint: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shares, losses = dict[str, float](), dict[str, float]()
    for activations in ("int8", "float", "int16"):
        asked = ("analyze", *_flags(checkpoint, prompts), "--target", "android", "--bits", "8", "--activations", activations)
        assert run(capfd, *asked, "--out", tmp_path / "recipe.json")[0] == 0
        formats = read_recipe(tmp_path / "recipe.json").formats
        assert not _twice(choice for part in formats["onnx"].components.values() for choice in part.values())
        choices = [choice for part in formats["executorch"].components.values() for choice in part.values()]
        linears = [choice for choice in choices if len(choice.weighed) > 2]
        shares[activations] = _twice(linears) / sum(math.prod(choice.shape) for choice in linears)
        losses[activations] = formats["executorch"].predicted_loss or math.nan
    assert shares["int8"] == 0 < shares["float"] < shares["int16"]
    assert losses["int16"] < losses["float"] < losses["int8"]


def _twice(choices: Iterable[WeightChoice]) -> int:
    """How many weights multiply inputs of 16 bits."""
    return sum(math.prod(choice.shape) for choice in choices if getattr(choice.scheme, "input_bits", 8) == 16)


def test_int16_is_refused_beside_a_recipe_which_has_chosen(
    recipe: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("--target", "android", "--format", "executorch", "--model", checkpoint, "--recipe", recipe, "--out", tmp_path)
    code, shown = run(capfd, *asked, "--activations", "int16")
    assert code == 2 and "--recipe has made the choice that --activations int16 asks for" in shown
    assert not list(tmp_path.iterdir())


def test_without_calibration_int16_is_for_every_integer_linear(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("--target", "android", "--format", "executorch", "--component", "text_encoder", "--model", checkpoint)
    how = ("--no-calibration", "--bits", 6, "--activations", "int16")
    assert run(capfd, *asked, *how, "--out", tmp_path)[0] == 0
    parts = read_recipe(tmp_path / "android" / RECIPE).formats["executorch"].components
    inputs = {name: getattr(c.scheme, "input_bits", None) for name, c in parts["text_encoder"].items()}
    assert inputs["text_model.encoder.layers.0.mlp.fc1.weight"] == 16
    assert inputs["text_model.embeddings.token_embedding.weight"] == 8


def test_an_export_by_a_recipe_stores_what_the_recipe_says(
    recipe: Path, checkpoint: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = exported(capfd, tmp_path, *_flags(checkpoint, prompts), "--recipe", recipe)
    chosen = read_recipe(recipe).formats["coreml"].components["text_encoder"]
    stored = read_recipe(tmp_path / "ios" / "recipe.json").formats["coreml"].components["text_encoder"]
    assert {name: choice.scheme for name, choice in stored.items()} == {name: choice.scheme for name, choice in chosen.items()}
    (component,) = manifest.components
    assert component.stored_bytes == sum(
        next((e.bytes for e in choice.weighed if e.scheme == choice.scheme), 2 * math.prod(choice.shape))
        for choice in chosen.values()
    )
    assert manifest.recipe.calibrated


def test_calibration_loses_less_at_no_more_bytes(
    checkpoint: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = exported(capfd, tmp_path / "plain", "--model", checkpoint, "--no-calibration", "--bits", 6)
    size = plain.components[0].stored_bytes
    flags = _flags(checkpoint, prompts)
    calibrated = exported(capfd, tmp_path / "calibrated", *flags, "--size-budget", f"{size}B")
    assert calibrated.components[0].stored_bytes <= size
    (before,), (after,) = plain.recipe.losses, calibrated.recipe.losses
    assert before.predicted is None and not plain.recipe.calibrated
    assert after.measured < before.measured / 2


def test_a_recipe_of_another_model_is_refused_by_tensor_and_shape(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_checkpoint(tmp_path / "other", TinyModel(heads=4, text_width=96, text_width_2=64, joint_width=160))
    capfd.readouterr()  # writing it had its say
    code, shown = run(capfd, "--target", "ios", "--model", other, "--recipe", recipe, "--out", tmp_path / "out")
    assert code == 2 and len(shown.splitlines()) == 1
    assert "text_encoder text_model.embeddings.position_embedding.weight is of shape" in shown
    assert "64] in the recipe and of shape" in shown and "96] in the model" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content | {"version": 2}, "version"),
        (lambda content: content | {"colour": "red"}, "colour"),
        (lambda content: {}, "version"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_line(
    change: object, words: str, recipe: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    content = change(json.loads(recipe.read_text()))
    (tmp_path / "wrong.json").write_text(json.dumps(content) if content else "no JSON")
    code, shown = run(capfd, "--target", "ios", "--model", checkpoint, "--recipe", tmp_path / "wrong.json", "--out", tmp_path)
    assert code == 2 and len(shown.splitlines()) == 1
    assert "wrong.json" in shown and (words in shown or "JSON" in shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", 6, "--size-budget", "1MB"], "--bits and --size-budget say the same thing in two ways"),
        (["--preset", "huge"], "--preset huge is not known; choose from best, balanced, small"),
        (["--bits", 0.5], "--bits 0.5 are no mean bits of a weight; give a number from 1 to 16"),
        (["--bits", 2], "--bits 2 is too small for coreml, whose weights take at least 3."),
        (["--size-budget", "10KB"], "--size-budget 10,000 bytes is too small for coreml, whose weights take at least"),
        (["--size-budget", "much"], "--size-budget much is no size; write it as 1.2GB, 900MB or 512MiB"),
        (["--no-calibration", "--bits", 5], "--bits 5 takes calibration to choose by; leave out --no-calibration"),
        (["--no-calibration", "--calibration-device", "cpu"], "leave out one or the other"),
        (["--calibration-prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--calibration-device", "tpu"], "tpu"),
    ],
)
def test_budgets_that_cannot_be_are_one_clear_line(
    arguments: list[object], words: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown = run(capfd, "--target", "ios", "--model", checkpoint, "--out", tmp_path / "out", *arguments)
    assert code == 2, shown
    assert len([line for line in shown.splitlines() if line.startswith("export-flash:")]) == 1
    assert words in shown
    assert not (tmp_path / "out" / "ios").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.2GB", 1_200_000_000), ("900 MB", 900_000_000), ("512MiB", 512 << 20), ("77", 77), ("1kb", 1000), ("0.5 gib", 1 << 29)],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "1TB", "1.2.3MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size; write it as"):
        parse_size(text)


def test_ios17_gets_palettes_that_it_knows(
    checkpoint: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = exported(capfd, tmp_path, *_flags(checkpoint, prompts), "--deployment-target", "iOS17", "--bits", 5)
    assert {use.scheme for use in manifest.recipe.schemes} <= {"float16", *(f"palette {bits} bit" for bits in (4, 6, 8))}
    assert len(manifest.recipe.schemes) > 2


def test_presets_are_mean_bits(checkpoint: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = [
        exported(capfd, tmp_path / preset, *_flags(checkpoint, prompts), "--preset", preset).components[0].stored_bytes
        for preset in ("small", "balanced", "best")
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
