"""Self-test vectors: one golden drawing in plain files, for an app in Swift or Kotlin that has neither Python nor safetensors.

selftest/selftest.json describes raw little-endian files beside it, row-major, without headers: the token ids of both
tokenizers, the noise of the seed, and for each format the latent after each step and the picture. An app runs its own
tokenizers, noise, artifacts and sampler on the same prompt and seed, and compares each result with the file of that name.

The expected latents and picture are what the bundle's own artifacts gave on the computer that made the bundle, not what the
original model draws. An app then sees what its own code and device change, whatever the weights' compression costs: that has
been measured before (`quality` in the manifest's parity), and would force a tolerance too wide to show a wrong sampler step.

Tolerances are PSNR in dB, as in DESIGN: 10 log10((max b - min b)^2 / mean((a - b)^2)), b being the file. They say how far two
correct implementations of the same artifact may lie apart:
- token ids: no difference at all ("identical");
- noise: 100 dB, a few units in the last place of a float32;
- latents and picture: 60 dB where the weights are not compressed and arithmetic is float32; 40 dB where 8-bit rounding of
  activations may fall to the other side; 35 dB where a device computes in float16 with sums of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtimes.bundle import (
    BundleError,
    Decibels,
    GoldenPrompt,
    Manifest,
    RelativePath,
    SelfTestEntry,
    Sha256,
    describe_files,
    sha256,
)
from runtimes.pipeline import Drawn
from runtimes.tokenizer import Tokenizer

FOLDER = "selftest"
DESCRIPTION = f"{FOLDER}/selftest.json"
NOISE_FLOOR = 100.0  # dB
FLOAT32_FLOOR, ROUNDED_FLOOR, FLOAT16_FLOOR = 60.0, 40.0, 35.0  # dB, of latents and pictures, see above
_DTYPES = {"float32": np.dtype("<f4"), "int32": np.dtype("<i4")}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Vector(_Model):
    """One raw file: little-endian, row-major, no header."""

    name: str = Field(min_length=1, description='"tokenizer", "tokenizer_2", "noise", "latent1" ... "latent<steps>" or "image"')
    file: RelativePath = Field(description="relative to the bundle")
    dtype: Literal["float32", "int32"]
    shape: tuple[int, ...]
    bytes: int = Field(ge=0)
    sha256: Sha256
    tolerance: Decibels = Field(description='least PSNR in dB of an app\'s result against this file; "identical": every value')


class ExpectedVectors(_Model):
    """What the artifacts of one format give."""

    format: str
    runtime: str = Field(description="what ran them")
    vectors: tuple[Vector, ...] = Field(min_length=2, description="the latent after each step, then the image in [0, 1]")


class SelfTest(_Model):
    """selftest.json. `inputs` an app makes itself and compares too; `expected` holds one entry a format."""

    version: Literal[1] = 1
    prompt: str
    seed: int
    sigmas: tuple[float, ...]
    inputs: tuple[Vector, ...]
    expected: tuple[ExpectedVectors, ...] = Field(min_length=1)


@dataclass(frozen=True, eq=False)
class SelfTestArrays:
    """A self-test that was read and checked: the description, and its arrays by file."""

    description: SelfTest
    arrays: Mapping[str, np.ndarray]


def write_selftest(
    folder: Path, manifest: Manifest, golden: GoldenPrompt, drawn: Mapping[str, tuple[str, Drawn]]
) -> SelfTestEntry:
    """Writes selftest/ inside the bundle folder, from what the bundle's own pipelines drew of one golden prompt.

    drawn: by format, the runtime's name and what it drew of the prompt and seed of `golden`. Returns what the manifest says
    about it.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    inputs = []
    for entry in manifest.tokenizers:
        tokenizer = Tokenizer.from_files(folder / entry.vocabulary, folder / entry.merges, entry.rules)
        inputs.append(_write(folder, entry.name, f"{entry.name}.i32", tokenizer(golden.prompt), math.inf))
    first = next(iter(drawn.values()))[1]
    inputs.append(_write(folder, "noise", "noise.f32", first.latents[0], NOISE_FLOOR))
    expected = []
    for format, (runtime, result) in drawn.items():
        floor = _floor(manifest, format)
        vectors = [
            _write(folder, f"latent{step}", f"{format}.latent{step}.f32", latent, floor)
            for step, latent in enumerate(result.latents[1:], 1)
        ]
        vectors.append(_write(folder, "image", f"{format}.image.f32", result.pixels, floor))
        expected.append(ExpectedVectors(format=format, runtime=runtime, vectors=tuple(vectors)))
    selftest = SelfTest(
        prompt=golden.prompt, seed=golden.seed, sigmas=manifest.sigmas, inputs=tuple(inputs), expected=tuple(expected)
    )
    text = json.dumps(selftest.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    return SelfTestEntry(path=DESCRIPTION, files=describe_files(folder, [FOLDER]))


def read_selftest(folder: Path, manifest: Manifest) -> SelfTestArrays:
    """Reads and checks the self-test of a bundle.

    Raises `BundleError`, one line: the bundle has none, the description does not fit, it differs from the manifest in sigmas,
    steps or tokenizers, or a file is missing or has other bytes than the description says.
    """
    if manifest.selftest is None:
        raise BundleError(f"{folder} has no self-test; export it anew with all of its components")
    path = folder / manifest.selftest.path
    try:
        selftest = SelfTest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    _check_names(path, manifest, selftest)
    listed = {file.path for file in manifest.selftest.files}
    vectors = [*selftest.inputs, *(vector for expected in selftest.expected for vector in expected.vectors)]
    if outside := [vector.file for vector in vectors if vector.file not in listed]:
        raise BundleError(f"{path}: {outside[0]} is not among the files that the manifest lists")
    return SelfTestArrays(description=selftest, arrays={vector.file: _read(folder, vector) for vector in vectors})


def _check_names(path: Path, manifest: Manifest, selftest: SelfTest) -> None:
    wanted = [entry.name for entry in manifest.tokenizers] + ["noise"]
    steps = [f"latent{step}" for step in range(1, manifest.steps + 1)] + ["image"]
    if selftest.sigmas != manifest.sigmas:
        raise BundleError(f"{path}: its sigmas are not the manifest's")
    if (found := [vector.name for vector in selftest.inputs]) != wanted:
        raise BundleError(f"{path}: inputs {found}; expected {wanted}")
    for expected in selftest.expected:
        if expected.format not in manifest.formats:
            raise BundleError(f"{path}: the bundle has no artifacts for {expected.format}")
        if (found := [vector.name for vector in expected.vectors]) != steps:
            raise BundleError(f"{path}: vectors {found} of {expected.format}; expected {steps}")


def _floor(manifest: Manifest, format: str) -> float:
    entries = [entry for entry in manifest.components if entry.format == format]
    if any(entry.precision == "float16" for entry in entries):
        return FLOAT16_FLOOR
    return ROUNDED_FLOOR if any(entry.compressed for entry in entries) else FLOAT32_FLOOR


def _write(folder: Path, name: str, file: str, array: np.ndarray, tolerance: float) -> Vector:
    dtype: Literal["float32", "int32"] = "int32" if np.issubdtype(array.dtype, np.integer) else "float32"
    path = f"{FOLDER}/{file}"
    (folder / path).write_bytes(np.ascontiguousarray(array, _DTYPES[dtype]).tobytes())
    size = (folder / path).stat().st_size
    return Vector(
        name=name,
        file=path,
        dtype=dtype,
        shape=array.shape,
        bytes=size,
        sha256=sha256(folder / path),
        tolerance=tolerance,
    )


def _read(folder: Path, vector: Vector) -> np.ndarray:
    path, dtype = folder / vector.file, _DTYPES[vector.dtype]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    wanted = math.prod(vector.shape) * dtype.itemsize
    if len(content) != wanted or vector.bytes != wanted:
        raise BundleError(f"{path} has {len(content)} bytes; {vector.dtype} {list(vector.shape)} takes {wanted}")
    if hashlib.sha256(content).hexdigest() != vector.sha256:
        raise BundleError(f"{path} was altered")
    return np.frombuffer(content, dtype).astype(vector.dtype).reshape(vector.shape)


def schema() -> str:
    """The JSON Schema of selftest.json, for whoever writes a reader."""
    return json.dumps(SelfTest.model_json_schema(mode="serialization"), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
