"""Self-test vectors, read the way an app reads them: JSON, raw bytes, and nothing of this project."""

from __future__ import annotations

import array
import hashlib
import json
import math
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from runtimes.bundle import BundleError, Manifest, check_files, load_manifest, write_manifest
from runtimes.pipeline import Drawn, Pipeline
from runtimes.registry import RUNTIMES
from runtimes.selftest import DESCRIPTION, read_selftest, write_selftest
from tests.bundles import TORCH


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Drawn]:
    """A bundle with a self-test of its first golden prompt, and what was drawn for it."""
    folder = tmp_path_factory.mktemp("selftest") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    manifest = load_manifest(folder)
    golden = manifest.golden.prompts[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNTIMES, "torch", TORCH)
        drawn = Pipeline.open(folder, "torch").generate(golden.prompt, golden.seed)
    entry = write_selftest(folder, manifest, golden, {"torch": ("torch", drawn)})
    write_manifest(folder, manifest.model_copy(update={"selftest": entry}))
    check_files(folder, load_manifest(folder))
    return folder, drawn


def app_reads(folder: Path) -> tuple[dict, dict[str, list[float]]]:
    """What an app does: selftest.json, then each file's bytes, checked and turned into numbers."""
    description = json.loads((folder / "selftest" / "selftest.json").read_text(encoding="utf-8"))
    vectors = description["inputs"] + [vector for each in description["expected"] for vector in each["vectors"]]
    numbers = {}
    for vector in vectors:
        content = (folder / vector["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == vector["sha256"] and len(content) == vector["bytes"]
        values = array.array({"float32": "f", "int32": "i"}[vector["dtype"]], content)
        if sys.byteorder == "big":
            values.byteswap()
        assert len(values) == math.prod(vector["shape"])
        numbers[vector["file"]] = values.tolist()
    first = vectors[0]["file"]
    assert numbers[first][0] == struct.unpack_from("<i", (folder / first).read_bytes())[0]
    return description, numbers


def app_compares(mine: list[float], file: list[float]) -> float:
    """PSNR in dB in plain floating point, as the description defines it."""
    error = sum((a - b) ** 2 for a, b in zip(mine, file, strict=True)) / len(file)
    return math.inf if error == 0 else 10 * math.log10((max(file) - min(file)) ** 2 / error)


def test_an_app_without_python_libraries_can_test_itself(bundle: tuple[Path, Drawn], tiny_bundle: Path) -> None:
    folder, drawn = bundle
    description, numbers = app_reads(folder)
    assert (description["prompt"], description["seed"], description["sigmas"]) == ("the red circle", 0, [1.0, 0.75, 0.0])
    files = {vector["name"]: vector for vector in description["inputs"]}
    assert list(files) == ["tokenizer", "tokenizer_2", "noise"]
    for name in ("tokenizer", "tokenizer_2"):
        vocabulary, merges = (str(folder / name / file) for file in ("vocab.json", "merges.txt"))
        pad = "<|endoftext|>" if name == "tokenizer" else "!"
        theirs = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=12)
        ids = theirs("the red circle", padding="max_length").input_ids
        assert numbers[files[name]["file"]] == ids and files[name]["tolerance"] == "identical"
    noise = torch.randn(files["noise"]["shape"], generator=torch.Generator("cpu").manual_seed(0)).flatten().tolist()
    assert app_compares(noise, numbers[files["noise"]["file"]]) >= files["noise"]["tolerance"] == 100
    (expected,) = description["expected"]
    assert expected["format"] == "torch"
    assert [vector["name"] for vector in expected["vectors"]] == ["latent1", "latent2", "image"]
    results = [*drawn.latents[1:], drawn.pixels]
    for vector, result in zip(expected["vectors"], results, strict=True):
        assert vector["shape"] == list(result.shape) and vector["tolerance"] == 60
        file = numbers[vector["file"]]
        assert app_compares(result.ravel().tolist(), file) == math.inf
        assert app_compares([value + 0.02 for value in result.ravel().tolist()], file) < vector["tolerance"]


def test_the_reader_gives_the_same_arrays(bundle: tuple[Path, Drawn]) -> None:
    folder, drawn = bundle
    selftest = read_selftest(folder, load_manifest(folder))
    _, numbers = app_reads(folder)
    assert selftest.arrays.keys() == numbers.keys()
    for file, values in numbers.items():
        np.testing.assert_array_equal(selftest.arrays[file].ravel(), np.array(values, selftest.arrays[file].dtype))
    np.testing.assert_array_equal(selftest.arrays["selftest/torch.image.f32"], drawn.pixels)


def test_two_writings_have_the_same_bytes(bundle: tuple[Path, Drawn]) -> None:
    folder, drawn = bundle
    manifest = load_manifest(folder)
    assert write_selftest(folder, manifest, manifest.golden.prompts[0], {"torch": ("torch", drawn)}) == manifest.selftest


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("noise.f32", b"\0" * 1536, "noise.f32 was altered"),
        ("noise.f32", b"\0" * 12, r"noise.f32 has 12 bytes; float32 \[1, 4, 12, 8\] takes 1536"),
        ("noise.f32", None, "noise.f32 cannot be read: No such file"),
        ("selftest.json", b"{", "selftest.json is not valid JSON"),
        ("selftest.json", b"{}", "selftest.json: prompt: Field required"),
        ("selftest.json", None, "selftest.json cannot be read"),
    ],
)
def test_damaged_vectors_are_one_line(
    file: str, content: bytes | None, message: str, bundle: tuple[Path, Drawn], tmp_path: Path
) -> None:
    shutil.copytree(bundle[0], tmp_path / "bundle")
    path = tmp_path / "bundle" / "selftest" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        read_selftest(tmp_path / "bundle", load_manifest(tmp_path / "bundle"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"sigmas": [1.0, 0.5, 0.0]}, "its sigmas are not the manifest's"),
        (lambda d: d | {"inputs": d["inputs"][1:]}, r"inputs \['tokenizer_2', 'noise'\]; expected"),
        (lambda d: d | {"expected": [d["expected"][0] | {"format": "coreml"}]}, "has no artifacts for coreml"),
        (lambda d: d | {"expected": [d["expected"][0] | {"vectors": d["expected"][0]["vectors"][1:]}]}, "of torch; expected"),
        (lambda d: d | {"inputs": [*d["inputs"][:2], d["inputs"][2] | {"file": "LICENSE"}]}, "LICENSE is not among the files"),
    ],
)
def test_a_description_of_another_bundle_is_one_line(
    change: object, message: str, bundle: tuple[Path, Drawn], tmp_path: Path
) -> None:
    shutil.copytree(bundle[0], tmp_path / "bundle")
    path = tmp_path / "bundle" / DESCRIPTION
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(BundleError, match=message):
        read_selftest(tmp_path / "bundle", load_manifest(tmp_path / "bundle"))


def test_a_bundle_without_vectors_says_so(tiny_bundle: Path) -> None:
    manifest: Manifest = load_manifest(tiny_bundle)
    assert manifest.selftest is None
    with pytest.raises(BundleError, match="has no self-test; export it anew with all of its components"):
        read_selftest(tiny_bundle, manifest)
