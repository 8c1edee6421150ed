"""A checkpoint, whatever it lies in: a diffusers folder, a hub id, or Stability's single safetensors file.

All three answer alike: configurations by folder, tensors by folder and diffusers' name, each read from its file when it is
asked for. Only safetensors are read: a pickle can run code. Tokenizers, licence files and the carried sigmas come along.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from torch import Tensor

from export.errors import UserError
from export.hub import download
from export.layout import CONFIGS, FOLDERS, PICKLES, TOKENIZERS, is_licence, weight_files
from export.lora import Change, Lora, Merged, find_lora, read_changes
from export.single_file import read_single_file
from export.tensors import FLOATS, SafetensorsReader, TensorReader, listed
from runtimes.bundle import LoraEntry

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")  # the first two are what phone tokenizers read


@dataclass(frozen=True)
class Checkpoint:
    """Open readers and configurations of one checkpoint. Made by `open_checkpoint`."""

    where: str
    name: str
    pipeline: str
    configs: Mapping[str, Mapping[str, Any]]
    readers: Mapping[str, TensorReader]
    tokenizers: Mapping[str, Path]
    flash: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    licence: str | None = None
    name_or_path: str | None = None
    licence_files: tuple[Path, ...] = ()
    content: tuple[tuple[str, Path], ...] = ()
    merged: tuple[LoraEntry, ...] = ()

    @property
    def title(self) -> str:
        """The name, with those of the LoRAs that are merged into it."""
        return "+".join((self.name, *(Path(lora.name).stem for lora in self.merged)))

    def config(self, folder: str) -> Mapping[str, Any]:
        """The folder's config.json, or what stands in its place."""
        return self.configs[folder]

    def tensor(self, folder: str, name: str) -> Tensor:
        """One tensor by its diffusers (or transformers) name, in the element type it is stored in."""
        return self.readers[folder].tensor(name)

    def shapes(self, folder: str) -> Mapping[str, tuple[int, ...]]:
        return self.readers[folder].shapes

    @property
    def tokens(self) -> int:
        """Positions of a tokenized prompt: the first tokenizer's `model_max_length`, as in diffusers' pipeline."""
        path = self.tokenizers["tokenizer"] / "tokenizer_config.json"
        tokens = read_json(path).get("model_max_length")
        if not isinstance(tokens, int) or not 1 < tokens < 100_000:
            raise UserError(f"{path}: model_max_length is {tokens!r}; the positions of a prompt are needed, such as 77")
        return tokens

    def check(self, folder: str, expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Raises `UserError` naming missing, unexpected and mis-shaped tensors, and those of other types than floats.

        Names that begin with one of `ignored` may be there or not.
        """
        shapes = self.shapes(folder)
        missing = sorted(expected.keys() - shapes.keys())
        unexpected = sorted(name for name in shapes.keys() - expected.keys() if not name.startswith(ignored))
        both = sorted(expected.keys() & shapes.keys())
        other = [f"{name} is {shapes[name]} instead of {expected[name]}" for name in both if shapes[name] != expected[name]]
        reader = self.readers[folder]
        kinds = [f"{name} is {reader.kind(name)}" for name in both if reader.kind(name) not in FLOATS]
        found = {"missing": missing, "unexpected": unexpected, "of another shape:": other, "not float:": kinds}
        faults = [f"{what} {listed(names)}" for what, names in found.items() if names]
        if faults:
            raise UserError(f"{self.where}: tensors of {folder} do not fit its configuration: {'; '.join(faults)}")

    def fingerprint(self, progress: Callable[[int], None] = lambda size: None) -> str:
        """sha256 over names and bytes of all files that the export depends on; `progress` gets the bytes as they are read."""
        whole = hashlib.sha256()
        for name, path in self.content:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    progress(len(block))
            whole.update(f"{name}\0{digest.hexdigest()}\n".encode())
        return whole.hexdigest()


def open_checkpoint(where: str, tokenizer: Path | None = None, loras: Sequence[Lora] = ()) -> Checkpoint:
    """Opens `where`: a folder, a hub id such as `org/name`, or a safetensors file.

    `tokenizer` is a folder with `tokenizer/` and `tokenizer_2/`: a single file needs one, another checkpoint may take its
    tokenizers from there. `loras` are merged into the weights in their order, as these are read. Reads headers and
    configurations only. Raises `UserError`.
    """
    return _with_loras(_open(where, tokenizer), loras)


def _open(where: str, tokenizer: Path | None) -> Checkpoint:
    path = Path(where).expanduser()
    if path.suffix in PICKLES:
        raise UserError(f"{where} is a pickle file, which can run code: give the checkpoint as safetensors")
    if path.is_file():
        return _open_file(where, path, tokenizer)
    if path.is_dir():
        return _open_folder(where, path.resolve().name, path, tokenizer)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", where) and path.suffix != ".safetensors":
        return _open_folder(where, where.split("/")[1], download(where), tokenizer)
    raise UserError(f"there is no folder or file {where}; --model takes a diffusers folder, a hub id or a .safetensors file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing or broken file is one `UserError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the checkpoint is incomplete") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def _open_folder(where: str, name: str, folder: Path, tokenizer: Path | None) -> Checkpoint:
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise UserError(f"{where} has no model_index.json: it is no diffusers checkpoint (one holds {', '.join(FOLDERS)})")
    index = read_json(index_path)
    pipeline = str(index.get("_class_name"))
    if missing := [part for part in FOLDERS if not (folder / part).is_dir()]:
        raise UserError(f"{where} ({pipeline}) has no {missing[0]} folder; an SD3 checkpoint holds {', '.join(FOLDERS)}")
    notes = []
    if (index.get("text_encoder_3") or [None])[0] is not None:
        notes.append("text_encoder_3 (T5) is left out: prompts reach the transformer through the two CLIP encoders alone")
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    listing = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    weights = {part: weight_files(listing, part, where, lambda file: read_json(folder / file)) for part in FOLDERS}
    configs = {part: read_json(folder / path) for part, path in CONFIGS.items()}
    tokenizers = _tokenizers(where, tokenizer or folder)
    flash = read_json(folder / "flash.json") if "flash.json" in listing else {}
    parts = [file for files in weights.values() for file in files]
    parts += [*CONFIGS.values(), *(["flash.json"] if flash else [])]
    return Checkpoint(
        where=where,
        name=name,
        pipeline=pipeline,
        configs=configs,
        readers={part: SafetensorsReader(folder / file for file in files) for part, files in weights.items()},
        tokenizers=tokenizers,
        flash=flash,
        notes=tuple(notes),
        licence=_licence(folder / "README.md"),
        name_or_path=index.get("_name_or_path"),
        licence_files=tuple(folder / file for file in listing if is_licence(file)),
        content=(*((part, folder / part) for part in sorted(parts)), *_tokenizer_files(tokenizers)),
    )


def _open_file(where: str, path: Path, tokenizer: Path | None) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise UserError(f"{where} is no .safetensors file; --model takes a diffusers folder, a hub id or a .safetensors file")
    found = read_single_file(path)
    if tokenizer is None:
        raise UserError(f"{where} holds no tokenizers: add --tokenizer FOLDER, one with tokenizer/ and tokenizer_2/ in it")
    tokenizers = _tokenizers(where, tokenizer)
    return Checkpoint(
        where=where,
        name=path.stem,
        pipeline="StableDiffusion3Pipeline",
        configs=found.configs,
        readers=found.readers,
        tokenizers=tokenizers,
        notes=found.notes,
        licence_files=tuple(sorted(file for file in path.parent.iterdir() if file.is_file() and is_licence(file.name))),
        licence=_licence(path.parent / "README.md"),
        content=((path.name, path), *_tokenizer_files(tokenizers)),
    )


def _with_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    if not loras:
        return checkpoint
    found = [find_lora(lora) for lora in loras]
    changes: dict[str, dict[str, list[Change]]] = {folder: {} for folder in checkpoint.readers}
    notes, merged = [], []
    for number, lora in enumerate(found):
        if any(lora.path.samefile(other.path) for other in found[:number]):
            raise UserError(f"--lora {lora.name} is given twice; give it once, at the sum of its scales")
        counts = []
        for folder, tensors in read_changes(lora, checkpoint.readers).items():
            counts.append(f"{len(tensors)} tensors of {folder}")
            for name, steps in tensors.items():
                changes[folder].setdefault(name, []).extend(steps)
        licence = _licence(lora.path.parent / "README.md") or "unstated"
        notes.append(f"LoRA {lora.name} is merged into {', '.join(counts)}, at scale {lora.scale:g}; its licence: {licence}")
        merged.append(LoraEntry(name=lora.name, scale=lora.scale, licence=licence))
    readers = {folder: Merged(reader, changes[folder]) for folder, reader in checkpoint.readers.items()}
    # Scale and place stand in the names, which the fingerprint covers.
    content = [(f"lora {number} at {float(lora.scale)!r}", lora.path) for number, lora in enumerate(found)]
    return dataclasses.replace(
        checkpoint,
        readers=readers,
        notes=(*checkpoint.notes, *notes),
        content=(*checkpoint.content, *content),
        merged=tuple(merged),
    )


def _tokenizers(where: str, folder: Path) -> dict[str, Path]:
    """The tokenizer folders; each must hold what phone tokenizers read."""
    found = {name: folder / name for name in TOKENIZERS}
    for path in found.values():
        for file in _TOKENIZER_FILES:
            if not (path / file).is_file():
                raise UserError(f"{where}: {path / file} is missing; every tokenizer needs {', '.join(_TOKENIZER_FILES)}")
    return found


def _tokenizer_files(tokenizers: Mapping[str, Path]) -> Iterable[tuple[str, Path]]:
    for name, folder in sorted(tokenizers.items()):
        for path in sorted(folder.iterdir()):
            if path.is_file():
                yield f"{name}/{path.name}", path


def _licence(card: Path) -> str | None:
    """The licence that a model card states in its header."""
    if not card.is_file():
        return None
    try:
        header = metadata_load(card) or {}
    except ValueError as error:
        raise UserError(f"{card}: the header of the model card cannot be read ({error})") from error
    licence = header.get("license_name") or header.get("license")
    return None if licence is None else str(licence)
