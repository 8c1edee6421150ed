"""The manifest: the contract between the exporter, every runtime and both apps.

A bundle is a folder with manifest.json and exactly the files that it lists. `load_manifest` reads and checks the manifest;
`check_files` proves that no byte of the folder differs from what was published. `python -m runtimes.bundle` prints the JSON
Schema of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from runtimes.tokenizer import TokenizerRules

MANIFEST = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1
ContractName = Literal["flash", "diffusers"]


class BundleError(Exception):
    """A bundle that cannot be used; the message is the one line that the user sees."""


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if path != str(pure) or path == "." or pure.is_absolute() or ".." in pure.parts or any(c in path for c in "\\:\0"):
        raise ValueError(f"manifest points outside its folder: {path!r}; expected a relative path such as 'golden/images'")
    return path


def _sorted(entries: dict[str, str]) -> dict[str, str]:
    return dict(sorted(entries.items()))


def _read_decibels(value: object) -> object:
    return math.inf if value == "identical" else value


def _write_decibels(value: float) -> float | str:
    return "identical" if value == math.inf else value


RelativePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Decibels = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(_read_decibels),
    PlainSerializer(_write_decibels),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "identical"}], "title": "dB, or identical"}),
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Model):
    path: RelativePath
    sha256: Sha256
    bytes: int = Field(ge=0)


class TensorEntry(_Model):
    """One input or output of a graph; shapes are fixed."""

    name: str = Field(min_length=1)
    dtype: Literal["float32", "float16", "int32", "int64"]
    shape: tuple[int, ...]


class Feed(_Model):
    """What a chunk's input is given, where that is not the whole tensor of the same name."""

    input: str
    tensor: str = Field(description="an input of the component, or an output of an artifact before")
    rows: tuple[int, int] | None = Field(default=None, description="[start, stop) of the tensor's second axis; null: all")


class ArtifactEntry(_Model):
    """What a runtime loads: `path` is the file or folder; a model with external data has more files than its path."""

    path: RelativePath
    files: tuple[FileEntry, ...] = Field(min_length=1)
    inputs: tuple[TensorEntry, ...] = Field(min_length=1)
    outputs: tuple[TensorEntry, ...] = Field(min_length=1)
    feeds: tuple[Feed, ...] = ()

    def feed(self, input: str) -> Feed:
        return next((feed for feed in self.feeds if feed.input == input), Feed(input=input, tensor=input))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


class ComponentEntry(_Model):
    """One component in one format. More than one artifact is a chunked component: each takes from the component's inputs and
    from the outputs of the artifacts before it what its feeds say, and otherwise the tensor of the same name."""

    name: str
    format: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    artifacts: tuple[ArtifactEntry, ...] = Field(min_length=1, description="in the order they run")
    precision: Literal["float32", "float16"] = Field(description="of the arithmetic inside the artifact")
    bits: float = Field(gt=0, le=32, description="mean bits of a stored weight")
    weights: int = Field(ge=0, description="number of stored weights")
    stored_bytes: int = Field(ge=0, description="what the stored weights take, palettes and scales included")
    compute_units: Literal["ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"] | None = Field(
        default=None, description="Core ML: the units to load it with"
    )
    backend: str | None = Field(default=None, description="ExecuTorch: the delegate it is lowered for")
    activations: str | None = Field(default=None, description="how the inputs of linears are rounded; null: they are not")
    delegated: float | None = Field(default=None, ge=0, le=1, description="share of the operations that the backend took")
    delegated_floor: float | None = Field(default=None, ge=0, le=1, description="least share accepted")

    @property
    def bytes(self) -> int:
        return sum(artifact.bytes for artifact in self.artifacts)

    @property
    def compressed(self) -> bool:
        return self.bits < 16

    @model_validator(mode="after")
    def _chunks_fit_together(self) -> ComponentEntry:
        known = {tensor.name: tensor for tensor in self.inputs}
        for artifact in self.artifacts:
            for tensor in artifact.inputs:
                if not _fits(artifact.feed(tensor.name), known, tensor):
                    raise ValueError(f"{artifact.path} takes {tensor.name!r}, which nothing before it gives in that form")
            known |= {tensor.name: tensor for tensor in artifact.outputs}
        missing = [tensor.name for tensor in self.outputs if known.get(tensor.name) != tensor]
        if missing:
            raise ValueError(f"no artifact of {self.name} ({self.format}) gives its output {missing[0]!r}")
        return self


def _fits(feed: Feed, known: dict[str, TensorEntry], wanted: TensorEntry) -> bool:
    """Whether the feed exists and has the type and shape that the input takes."""
    source = known.get(feed.tensor)
    if source is None:
        return False
    shape = source.shape
    if feed.rows is not None:
        start, stop = feed.rows
        if len(shape) < 2 or not 0 <= start < stop <= shape[1]:
            return False
        shape = (shape[0], stop - start, *shape[2:])
    return (source.dtype, shape) == (wanted.dtype, wanted.shape)


def chunk_feeds(chunks: Sequence[tuple[Sequence[TensorEntry], Sequence[TensorEntry]]]) -> list[tuple[Feed, ...]]:
    """The feeds of chunks given as (inputs, outputs), by the transformer's convention: `x` after the first chunk is the
    `x_out` before it, and each chunk takes its own rows of `modulation`, in order."""
    feeds, given, row = [], set[str](), 0
    for inputs, outputs in chunks:
        found = []
        for tensor in inputs:
            if tensor.name == "modulation":
                found.append(Feed(input=tensor.name, tensor=tensor.name, rows=(row, row + tensor.shape[1])))
                row += tensor.shape[1]
            elif f"{tensor.name}_out" in given:
                found.append(Feed(input=tensor.name, tensor=f"{tensor.name}_out"))
        feeds.append(tuple(found))
        given |= {tensor.name for tensor in outputs}
    return feeds


class LoraEntry(_Model):
    name: str = Field(min_length=1, description="file name, or hub id")
    scale: float
    licence: str = Field(description="as the card beside the file states it")


class ModelEntry(_Model):
    name: str = Field(min_length=1)
    family: str = Field(description="sd3")
    fingerprint: Sha256 = Field(description="sha256 of the checkpoint's files, and of LoRAs and their scales")
    loras: tuple[LoraEntry, ...] = Field(default=(), description="what was merged into the weights, in this order")


class ImageSize(_Model):
    height: int = Field(gt=0, multiple_of=8)
    width: int = Field(gt=0, multiple_of=8)


class LatentLayout(_Model):
    """[1, channels, height, width]; the VAE sees latent / scaling_factor + shift_factor (inside the decoder where the
    rewrite `latent_scale_in_decoder` was applied)."""

    channels: int = Field(gt=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    vae_factor: int = Field(gt=0, description="image pixels for each latent pixel, along each side")
    scaling_factor: float
    shift_factor: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, self.channels, self.height, self.width)


class TokenizerEntry(_Model):
    """tokenizer feeds text_encoder, tokenizer_2 feeds text_encoder_2."""

    name: Literal["tokenizer", "tokenizer_2"]
    vocabulary: RelativePath
    merges: RelativePath
    rules: TokenizerRules
    files: tuple[FileEntry, ...]


class SchemeUse(_Model):
    """How many tensors of a component are stored by one scheme."""

    component: str
    format: str
    scheme: str = Field(description='as a person reads it: "palette 6 bit", "integers 8 bit, blocks of 32", "float16"')
    tensors: int = Field(ge=0)
    weights: int = Field(ge=0)
    bytes: int = Field(ge=0)


class LossEntry(_Model):
    """What storing the weights of one format costs the pictures, all components together, from the same noise."""

    format: str
    prompts: int = Field(gt=0, description="that were drawn")
    predicted: float | None = Field(ge=0, description="squared error of the final latents over their variance, by calibration")
    measured: float = Field(ge=0, description="the same, of latents drawn with the stored weights")
    latents: Decibels = Field(description="PSNR of the final latents")
    image: Decibels = Field(description="PSNR of the pictures")


class RecipeEntry(_Model):
    name: str = Field(description='what was asked for, such as "6 mean bits", "size budget" or "recipe file"')
    bits: float = Field(gt=0, description="mean bits asked for; of a size budget or a recipe file, those that came of it")
    calibrated: bool = Field(description="whether errors were weighed by what they do to the final latents")
    schemes: tuple[SchemeUse, ...]
    losses: tuple[LossEntry, ...] = ()


class ParityEntry(_Model):
    """One row of the parity table, worst case over the golden cases. No dB: the row does not have that comparison."""

    component: str
    format: str
    output: str
    lowering: Decibels | None
    quality: Decibels | None
    floor: float | None
    passed: bool


class GoldenPrompt(_Model):
    prompt: str
    seed: int


class GoldenCase(_Model):
    """Which prompt, and for what runs at every step which step, a recorded case comes from."""

    prompt: int = Field(ge=0)
    step: int | None = Field(default=None, ge=0)


class GoldenTensors(_Model):
    """One safetensors file. Tensor names: runtimes/golden.py."""

    component: str
    path: RelativePath
    cases: tuple[GoldenCase, ...] = Field(min_length=1)
    tensors: tuple[str, ...]


class GoldenEntry(_Model):
    prompts: tuple[GoldenPrompt, ...] = Field(min_length=1)
    components: tuple[GoldenTensors, ...]
    images: RelativePath = Field(description="latents at every step and the final image of each prompt")
    files: tuple[FileEntry, ...]


class SelfTestEntry(_Model):
    """Vectors in plain files with which an app tests itself; `path` is their description (runtimes/selftest.py)."""

    path: RelativePath = Field(description="selftest/selftest.json")
    files: tuple[FileEntry, ...] = Field(min_length=1)


class LicenceEntry(_Model):
    name: str = Field(description='as the checkpoint says it, such as "stabilityai-community"')
    attribution: str
    files: tuple[FileEntry, ...] = Field(description="the checkpoint's own licence texts")


class ResourceHints(_Model):
    """Bytes of the artifacts of one format that have to be in memory, for an app to choose how it loads them."""

    format: str
    all_components: int = Field(ge=0, description="everything loaded")
    denoising: int = Field(ge=0, description="the transformer alone, what runs once a prompt having been released")
    largest_component: int = Field(ge=0, description="one component at a time")
    largest_artifact: int = Field(ge=0, description="one chunk at a time")


class Manifest(_Model):
    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelEntry
    target: str
    contract: ContractName
    rewrites: tuple[str, ...] = Field(description="the exact rewrites applied, such as fold_null_tokens")
    formats: tuple[str, ...] = Field(min_length=1)
    components: tuple[ComponentEntry, ...] = Field(min_length=1)
    sigmas: tuple[float, ...] = Field(min_length=2, description="steps + 1 of them; timestep = 1000 * sigma")
    image_size: ImageSize
    latent: LatentLayout
    tokenizers: tuple[TokenizerEntry, ...]
    recipe: RecipeEntry
    parity: tuple[ParityEntry, ...] = ()
    golden: GoldenEntry
    selftest: SelfTestEntry | None = Field(default=None, description="null: the bundle draws nothing, or was made without")
    licence: LicenceEntry
    other_files: tuple[FileEntry, ...] = Field(default=(), description="report, config.json of a diffusers contract")
    resources: tuple[ResourceHints, ...]
    tools: Annotated[dict[str, str], AfterValidator(_sorted)] = Field(
        description="versions of what made it; no dates, so that the same inputs give the same bytes"
    )
    digest: str = Field(default="", pattern=r"^([0-9a-f]{64})?$", description="sha256 of this file with an empty digest")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def component(self, name: str, format: str) -> ComponentEntry | None:
        return next((c for c in self.components if (c.name, c.format) == (name, format)), None)

    def files(self) -> Iterator[FileEntry]:
        """Every file of the bundle except manifest.json."""
        for component in self.components:
            for artifact in component.artifacts:
                yield from artifact.files
        for tokenizer in self.tokenizers:
            yield from tokenizer.files
        yield from self.golden.files
        if self.selftest is not None:
            yield from self.selftest.files
        yield from self.licence.files
        yield from self.other_files

    def paths(self) -> Iterator[str]:
        """Every path that anything may open through this manifest."""
        yield from (file.path for file in self.files())
        yield from (artifact.path for component in self.components for artifact in component.artifacts)
        yield from (path for tokenizer in self.tokenizers for path in (tokenizer.vocabulary, tokenizer.merges))
        yield from (golden.path for golden in self.golden.components)
        yield self.golden.images
        if self.selftest is not None:
            yield self.selftest.path

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        check_sigmas(self.sigmas)
        size, latent = self.image_size, self.latent
        if (size.height, size.width) != (latent.height * latent.vae_factor, latent.width * latent.vae_factor):
            raise ValueError(f"an image of {size.width}x{size.height} does not fit latents of {latent.width}x{latent.height}")
        pairs = [(component.name, component.format) for component in self.components]
        if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
            raise ValueError(f"component {twice[0][0]} is listed twice in format {twice[0][1]}")
        if unlisted := {format for _, format in pairs} ^ set(self.formats):
            raise ValueError(f"formats {sorted(unlisted)} do not agree with the components")
        listed = {file.path for file in self.files()}
        folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents}
        if unknown := [path for path in self.paths() if path not in listed | folders]:
            raise ValueError(f"{unknown[0]} is not among the listed files")
        return self


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raises ValueError unless there are at least two, falling strictly from at most 1 to exactly 0."""
    wrong = f"[{', '.join(f'{sigma:g}' for sigma in sigmas)}] are no sigmas"
    if len(sigmas) < 2 or sigmas[-1] != 0:
        raise ValueError(f"{wrong}: the last must be 0, after at least one other; write it out")
    if not sigmas[0] <= 1:
        raise ValueError(f"{wrong}: the first must be at most 1")
    if not all(first > second for first, second in pairwise(sigmas)):
        raise ValueError(f"{wrong}: each must be below the one before")


def load_manifest(folder: Path) -> Manifest:
    """Raises `BundleError`, one line: no bundle, not JSON, a field that does not fit, a path that leaves the folder."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"no such bundle folder: {folder}")
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}")
    try:
        manifest = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise BundleError(f"{path}: {_first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    home = folder.resolve()
    for name in manifest.paths():
        if not (home / name).resolve().is_relative_to(home):
            raise BundleError(f"{path}: manifest points outside its folder: {name!r} is a link to {(home / name).resolve()}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_bytes(render(manifest))


def render(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, its digest made anew, so that an altered manifest shows as well as any other file."""
    fields = manifest.model_dump(mode="json") | {"digest": ""}
    fields["digest"] = hashlib.sha256(_to_json(fields)).hexdigest()
    return _to_json(fields)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises `BundleError` naming every file that is missing, unlisted or whose bytes are not those that were published."""
    problems = []
    listed = {file.path: file for file in manifest.files()}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    for path, file in sorted(listed.items()):
        if path not in present:
            problems.append(f"{path} is missing")
        elif (folder / path).stat().st_size != file.bytes or sha256(folder / path) != file.sha256:
            problems.append(f"{path} was altered")
    problems += [f"{path} is not in the manifest" for path in sorted(present - listed.keys() - {MANIFEST})]
    if (folder / MANIFEST).read_bytes() != render(manifest):
        problems.append(f"{MANIFEST} was altered")
    if problems:
        raise BundleError(f"{folder} is not as it was published: {'; '.join(problems)}")


def describe_files(folder: Path, paths: Iterable[str]) -> tuple[FileEntry, ...]:
    """Entries, sorted, of the files at `paths` relative to `folder`; a path that is a folder stands for every file below it."""
    files: set[Path] = set()
    for name in paths:
        path = folder / name
        files |= {p for p in path.rglob("*") if p.is_file()} if path.is_dir() else {path}
    return tuple(
        FileEntry(path=file.relative_to(folder).as_posix(), sha256=sha256(file), bytes=file.stat().st_size)
        for file in sorted(files)
    )


def resource_hints(components: Iterable[ComponentEntry]) -> tuple[ResourceHints, ...]:
    """One entry a format, counted from the artifacts."""
    by_format: dict[str, list[ComponentEntry]] = {}
    for component in components:
        by_format.setdefault(component.format, []).append(component)
    return tuple(
        ResourceHints(
            format=format,
            all_components=sum(c.bytes for c in entries),
            denoising=sum(c.bytes for c in entries if c.name == "transformer"),
            largest_component=max(c.bytes for c in entries),
            largest_artifact=max(a.bytes for c in entries for a in c.artifacts),
        )
        for format, entries in by_format.items()
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def schema() -> str:
    """The JSON Schema of manifest.json, as shipped in runtimes/manifest.schema.json."""
    return json.dumps(Manifest.model_json_schema(mode="serialization"), indent=2) + "\n"


def _to_json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _first_line(error: ValidationError) -> str:
    """The first complaint of a validation as one line: where, and what is wrong."""
    first: Any = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["ctx"]["error"]) if "error" in first.get("ctx", {}) else first["msg"]
    return f"{place}: {message}" if place else message


if __name__ == "__main__":
    print(schema(), end="")
