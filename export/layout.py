"""The files of a checkpoint in diffusers' folder layout: which ones an export reads, from a listing of names alone.

A listing may come from a disk or from the hub, so that what is downloaded is what is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from export.errors import UserError

FOLDERS = ("text_encoder", "text_encoder_2", "transformer", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2")
CONFIGS = {**{folder: f"{folder}/config.json" for folder in FOLDERS}, "scheduler": "scheduler/scheduler_config.json"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")
# Name before the variant: diffusers' and transformers' own.
_PLAIN = re.compile(r"(diffusion_pytorch_model|model)\.safetensors(\.index\.json)?$")


def weight_files(listing: Sequence[str], folder: str, where: str, read: Callable[[str], Mapping[str, Any]]) -> list[str]:
    """The safetensors files of `folder`: one, or the shards that an index names (`read` gives the index's JSON).

    The full weights come before a variant such as `model.fp16.safetensors`. Raises `UserError`.
    """
    names = [name for name in listing if str(PurePosixPath(name).parent) == folder]
    indices = [name for name in names if _INDEX.search(name)]
    singles = [name for name in names if name.endswith(".safetensors") and not _SHARD.search(name)]
    chosen = _choose([*indices, *singles], folder, where)
    if chosen is None:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise UserError(f"{where}: {pickles[0]} is a pickle file, which can run code: convert it to safetensors")
        raise UserError(f"{where}: {folder} holds no safetensors weights; a checkpoint has them in {', '.join(FOLDERS)}")
    if chosen in singles:
        return [chosen]
    shards = read(chosen).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{where}: {chosen} has no weight_map; download it again")
    return sorted({f"{folder}/{shard}" for shard in shards.values()})


def needed_files(listing: Sequence[str]) -> list[str]:
    """The small files that an export reads or carries along: configurations, tokenizers, licences, flash.json."""
    exact = {"model_index.json", "flash.json", *CONFIGS.values()}
    small = tuple(f"{folder}/" for folder in TOKENIZERS)
    return [name for name in listing if name in exact or is_licence(name) or name.startswith(small)]


def is_licence(name: str) -> bool:
    """Files at the top that must travel with the weights: licences, notices, and the model card."""
    return "/" not in name and re.match(r"(licen[cs]e|notice|copying|readme\.md$|use_policy)", name.lower()) is not None


def _choose(names: Sequence[str], folder: str, where: str) -> str | None:
    plain = [name for name in names if _PLAIN.search(name)]
    if plain:
        return min(plain, key=len)
    if len(names) > 1:
        raise UserError(f"{where}: {folder} holds several variants ({', '.join(sorted(names))}); keep one")
    return names[0] if names else None
