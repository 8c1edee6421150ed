"""The manifest: what is written is read again, and what does not fit is refused in one line that names it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import runtimes.bundle
from runtimes.bundle import (
    ArtifactEntry,
    BundleError,
    ComponentEntry,
    Feed,
    GoldenEntry,
    GoldenPrompt,
    ImageSize,
    LatentLayout,
    LicenceEntry,
    Manifest,
    ModelEntry,
    ParityEntry,
    RecipeEntry,
    TensorEntry,
    TokenizerEntry,
    check_files,
    chunk_feeds,
    describe_files,
    load_manifest,
    render,
    resource_hints,
    schema,
    write_manifest,
)
from runtimes.tokenizer import SpecialToken, TokenizerRules

CONTENTS = {
    "transformer.mlpackage/Manifest.json": b"{}",
    "transformer.mlpackage/Data/weights.bin": bytes(range(256)) * 8,
    "transformer/model.onnx": b"graph",
    "transformer/model.onnx.data": b"weights" * 50,
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": "#version: 0.2\né é\n".encode(),
    "golden/images.safetensors": b"images",
    "LICENSE.md": b"licence",
    "report.html": b"<html>",
}
LATENT = TensorEntry(name="latent", dtype="float32", shape=(1, 4, 8, 12))
VELOCITY = TensorEntry(name="velocity", dtype="float32", shape=(1, 4, 8, 12))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle with one component in two formats."""
    for name, data in CONTENTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write_manifest(tmp_path, manifest_of(tmp_path))
    return tmp_path


def manifest_of(folder: Path) -> Manifest:
    def component(format: str, path: str, files: list[str]) -> ComponentEntry:
        artifact = ArtifactEntry(path=path, files=describe_files(folder, files), inputs=(LATENT,), outputs=(VELOCITY,))
        return ComponentEntry(
            name="transformer",
            format=format,
            inputs=(LATENT,),
            outputs=(VELOCITY,),
            artifacts=(artifact,),
            precision="float16",
            bits=6.02,
            weights=1000,
            stored_bytes=760,
        )

    components = (
        component("coreml", "transformer.mlpackage", ["transformer.mlpackage"]),
        component("onnx", "transformer/model.onnx", ["transformer/model.onnx", "transformer/model.onnx.data"]),
    )
    special = SpecialToken(text="!", id=0, normalized=False)
    return Manifest(
        model=ModelEntry(name="tiny", family="sd3", fingerprint="a" * 64),
        target="all",
        contract="flash",
        rewrites=("fold_null_tokens", "latent_scale_in_decoder"),
        formats=("coreml", "onnx"),
        components=components,
        sigmas=(1.0, 0.9, 0.5, 0.0),
        image_size=ImageSize(height=64, width=96),
        latent=LatentLayout(channels=4, height=8, width=12, vae_factor=8, scaling_factor=1.5, shift_factor=0.06),
        tokenizers=(
            TokenizerEntry(
                name="tokenizer",
                vocabulary="tokenizer/vocab.json",
                merges="tokenizer/merges.txt",
                rules=TokenizerRules(max_length=77, bos=1, eos=2, pad=2, unknown=2, special=(special,)),
                files=describe_files(folder, ["tokenizer"]),
            ),
        ),
        recipe=RecipeEntry(name="palettes", bits=6, calibrated=False, schemes=()),
        parity=(
            ParityEntry(
                component="transformer",
                format="onnx",
                output="velocity",
                lowering=float("inf"),
                quality=41.5,
                floor=40,
                passed=True,
            ),
            ParityEntry(component="image", format="onnx", output="image", lowering=None, quality=33, floor=None, passed=True),
        ),
        golden=GoldenEntry(
            prompts=(GoldenPrompt(prompt="ein rötlicher Kreis", seed=3),),
            components=(),
            images="golden/images.safetensors",
            files=describe_files(folder, ["golden"]),
        ),
        licence=LicenceEntry(name="tiny-licence", attribution="Nobody", files=describe_files(folder, ["LICENSE.md"])),
        other_files=describe_files(folder, ["report.html"]),
        resources=resource_hints(components),
        tools={"torch": "2.13.0", "coremltools": "9.0"},
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / "manifest.json").read_text())
    change(fields)
    (folder / "manifest.json").write_text(json.dumps(fields))


def test_written_manifest_is_read_again_and_its_files_are_whole(folder: Path) -> None:
    written, read = manifest_of(folder), load_manifest(folder)
    assert read == written.model_copy(update={"digest": read.digest}) and len(read.digest) == 64
    assert read.parity[0].lowering == float("inf") and '"identical"' in (folder / "manifest.json").read_text()
    assert list(read.tools) == ["coremltools", "torch"] and read.steps == 3
    check_files(folder, read)
    assert render(read) == render(written) == (folder / "manifest.json").read_bytes()


def test_resources_are_counted_for_each_format(folder: Path) -> None:
    coreml, onnx = load_manifest(folder).resources
    assert (coreml.format, coreml.all_components, coreml.largest_artifact) == ("coreml", 2050, 2050)
    assert (onnx.format, onnx.denoising, onnx.largest_component) == ("onnx", 355, 355)


def test_json_schema_in_the_repository_is_up_to_date() -> None:
    path = Path(runtimes.bundle.__file__).with_name("manifest.schema.json")
    assert path.read_text() == schema(), "run: python -m runtimes.bundle > runtimes/manifest.schema.json"


@pytest.mark.parametrize("name", [*CONTENTS, "manifest.json"])
def test_one_altered_byte_anywhere_names_the_file(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for position in random.Random(0).sample(range(len(whole)), min(len(whole), 20)):
        altered = bytearray(whole)
        altered[position] ^= 1
        (folder / name).write_bytes(altered)
        with pytest.raises(BundleError, match=name):
            check_files(folder, load_manifest(folder))


def test_missing_and_unlisted_files_are_named(folder: Path) -> None:
    (folder / "tokenizer" / "merges.txt").unlink()
    (folder / "notes.txt").write_text("mine")
    (folder / "golden" / "link").symlink_to("/dev/null")
    with pytest.raises(BundleError) as error:
        check_files(folder, load_manifest(folder))
    for line in ("tokenizer/merges.txt is missing", "notes.txt is not in the manifest", "golden/link is not in the manifest"):
        assert line in str(error.value)


@pytest.mark.parametrize(
    "path", ["../vocab.json", "/etc/passwd", "a/../../b", "a\\b", "C:x", "", ".", "a//b", "./a", "a/", "a\0b"]
)
def test_path_that_leaves_the_folder_is_refused(folder: Path, path: str) -> None:
    places: list[Callable[[dict[str, Any]], object]] = [
        lambda fields: fields["components"][0]["artifacts"][0].update(path=path),
        lambda fields: fields["components"][0]["artifacts"][0]["files"][0].update(path=path),
        lambda fields: fields["tokenizers"][0].update(vocabulary=path),
        lambda fields: fields["golden"].update(images=path),
        lambda fields: fields["other_files"][0].update(path=path),
    ]
    text = (folder / "manifest.json").read_text()
    for place in places:
        (folder / "manifest.json").write_text(text)
        edit(folder, place)
        with pytest.raises(BundleError, match="manifest points outside its folder") as error:
            load_manifest(folder)
        assert "\n" not in str(error.value)


def test_link_that_leaves_the_folder_is_refused_and_one_that_stays_is_not(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "vocab.json").write_text("{}")
    (outside / "merges.txt").write_text("")
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "vocab.json").symlink_to(folder / "LICENSE.md")
    load_manifest(folder)
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "vocab.json").symlink_to(outside / "vocab.json")
    with pytest.raises(BundleError, match=r"manifest points outside its folder: 'tokenizer/vocab\.json' is a link to"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda fields: fields.pop("sigmas"), "sigmas: Field required"),
        (lambda fields: fields.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda fields: fields.update(schema_version=2), "schema_version: Input should be 1"),
        (lambda fields: fields.update(sigmas=[1, 0.5, 0.6, 0]), "must be below the one before"),
        (lambda fields: fields.update(sigmas=[1, 0.5, 0.1]), "the last must be 0"),
        (lambda fields: fields.update(sigmas=[1.5, 0.5, 0]), "at most 1"),
        (lambda fields: fields["components"][0]["artifacts"][0]["files"][0].update(sha256="x"), "String should match pattern"),
        (lambda fields: fields["components"].append(fields["components"][0]), "transformer is listed twice in format coreml"),
        (lambda fields: fields.update(formats=["onnx"]), r"formats \['coreml'\] do not agree"),
        (lambda fields: fields["image_size"].update(width=64), "an image of 64x64 does not fit latents of 12x8"),
        (lambda fields: fields["tokenizers"][0].update(vocabulary="x.json"), "x.json is not among the listed files"),
        (lambda fields: fields["components"][0]["outputs"][0].update(name="noise"), "gives its output 'noise'"),
        (
            lambda fields: fields["components"][0]["inputs"][0].update(shape=[1]),
            "takes 'latent', which nothing before it gives",
        ),
    ],
)
def test_manifest_that_does_not_fit_is_one_clear_line(
    folder: Path, change: Callable[[dict[str, Any]], object], line: str
) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=line) as error:
        load_manifest(folder)
    assert "\n" not in str(error.value) and "manifest.json" in str(error.value)


def test_folder_without_a_readable_manifest_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        load_manifest(folder / "golden")
    for text in (b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"sigmas": NaN}'):
        (folder / "manifest.json").write_bytes(text)
        with pytest.raises(BundleError, match=r"manifest\.json") as error:
            load_manifest(folder)
        assert "\n" not in str(error.value)


def test_feeds_carry_hidden_states_and_rows_of_modulation_from_chunk_to_chunk() -> None:
    def tensor(name: str, rows: int) -> TensorEntry:
        return TensorEntry(name=name, dtype="float32", shape=(1, rows, 8))

    chunks = [
        (
            (tensor("latent", 1), tensor("context", 5), tensor("modulation", 9)),
            (tensor("hidden_out", 6), tensor("context_out", 5)),
        ),
        ((tensor("hidden", 6), tensor("context", 5), tensor("modulation", 4)), (tensor("velocity", 1),)),
    ]
    first, second = chunk_feeds(chunks)
    assert first == (Feed(input="modulation", tensor="modulation", rows=(0, 9)),)
    assert second == (
        Feed(input="hidden", tensor="hidden_out"),
        Feed(input="context", tensor="context_out"),
        Feed(input="modulation", tensor="modulation", rows=(9, 13)),
    )
    with pytest.raises(ValidationError, match="takes 'modulation', which nothing before it gives"):
        component_of(chunks, [first, second], modulation_rows=12)
    component_of(chunks, [first, second], modulation_rows=13)


def component_of(chunks: list, feeds: list, modulation_rows: int) -> ComponentEntry:
    """A chunked component whose whole modulation has the given rows."""
    latent, context, _ = chunks[0][0]
    artifacts = tuple(
        ArtifactEntry(
            path=f"{i}.pte", files=[{"path": f"{i}.pte", "sha256": "0" * 64, "bytes": 1}], inputs=i_, outputs=o, feeds=f
        )
        for i, ((i_, o), f) in enumerate(zip(chunks, feeds, strict=True))
    )
    modulation = TensorEntry(name="modulation", dtype="float32", shape=(1, modulation_rows, 8))
    return ComponentEntry(
        name="transformer",
        format="executorch",
        inputs=(latent, context, modulation),
        outputs=chunks[-1][1],
        artifacts=artifacts,
        precision="float32",
        bits=8,
        weights=1,
        stored_bytes=1,
    )
