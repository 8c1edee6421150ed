"""A checkpoint or a LoRA from the Hugging Face hub: only the files that an export reads, into the hub's own cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from export.errors import UserError
from export.layout import FOLDERS, needed_files, weight_files

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name for it


def download(repository: str) -> Path:
    """The folder of a hub model in the local cache; without a network, what lies there. Raises `UserError`."""
    return _from_hub(repository, _download, ["model_index.json"])


def download_lora(repository: str) -> Path:
    """The LoRA of a hub model in the local cache, its card beside it: diffusers' file name, or the only safetensors file."""
    folder = _from_hub(repository, _download_lora, ["*.safetensors", "README.md"])
    return folder / _lora_file(repository, sorted(path.name for path in folder.glob("*.safetensors")))


def _from_hub(repository: str, fetch: Callable[[str], Path], cached: list[str]) -> Path:
    """The folder that `fetch` gives; without a network that of the cache, which must hold one of `cached`."""
    try:
        return fetch(repository)
    except GatedRepoError as error:
        raise UserError(
            f"{repository} wants its licence accepted: do so on its page of the hub, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{repository} is neither a folder here nor a hub model (for a private one: `hf auth login`)"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError):
        return _cached(repository, cached)
    except OSError as error:
        raise UserError(f"{repository} cannot be downloaded ({str(error).splitlines()[0]})") from error


def _download_lora(repository: str) -> Path:
    listing = [file.rfilename for file in HfApi().model_info(repository).siblings or []]
    name = _lora_file(repository, sorted(name for name in listing if "/" not in name and name.endswith(".safetensors")))
    return Path(snapshot_download(repository, allow_patterns=[name, "README.md"]))


def _lora_file(repository: str, names: list[str]) -> str:
    if LORA_FILE in names:
        return LORA_FILE
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise UserError(f"--lora {repository}: one safetensors file is needed at its top, or {LORA_FILE}; there are: {found}")
    return names[0]


def _download(repository: str) -> Path:
    listing = sorted(file.rfilename for file in HfApi().model_info(repository).siblings or [])

    def read(name: str) -> Mapping[str, Any]:
        return json.loads(Path(hf_hub_download(repository, name)).read_text(encoding="utf-8"))

    weights = [file for folder in FOLDERS for file in weight_files(listing, folder, repository, read)]
    # By branch, not by commit: only so does the cache note which commit to give without a network.
    return Path(snapshot_download(repository, allow_patterns=[*needed_files(listing), *weights]))


def _cached(repository: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        reason = "no such folder here, the hub cannot be reached, and its cache lacks this model"
        raise UserError(f"{repository}: {reason}; give a folder, or run once with a network") from error
