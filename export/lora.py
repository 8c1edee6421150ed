"""LoRA students: low-rank changes of a checkpoint's weights, merged as each tensor is read.

    W + scale * alpha / rank * B A        LoRA (Hu et al. 2021, arXiv 2106.09685); alpha / sqrt(rank) for rsLoRA (2312.03732)
    m / |W + D| * (W + D)                 DoRA (2402.09353), D being the above, |.| the norm of each output channel

In float32, and handed on in float32: what a LoRA adds may be smaller than the steps of a weight's float16. That is what
diffusers' `load_lora_weights` and `fuse_lora` make of the same file and modules in float32, except that keys which they pass
over are refused here: every tensor of the file must find its weight.

Read are the names of diffusers and PEFT (`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, with `text_encoder.` and
`text_encoder_2.` beside it; without any prefix: the transformer's) and the older ones that diffusers still converts
(`.processor.to_q_lora.down.weight`, `.lora.down.weight`, `.lora_linear_layer.down.weight`). alpha and rank come from
`lora_adapter_metadata` in the file's header, or from `.alpha` tensors; with neither, alpha is the rank. diffusers refuses
`.alpha` tensors for SD3; here they mean what they mean everywhere. kohya's names (`lora_unet_...`) and LoKr are nothing that
diffusers takes for SD3, and are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from export.errors import UserError
from export.hub import download_lora
from export.layout import PICKLES
from export.tensors import FLOATS, TensorReader, listed, open_safetensors
from runtimes.bundle import LoraEntry

FOLDERS = ("transformer", "text_encoder", "text_encoder_2")
"""What a LoRA may change; a file says which by a prefix of its names."""

# Older names that diffusers converts (diffusers/utils/state_dict_utils.py, UNET_TO_DIFFUSERS and DIFFUSERS_TO_PEFT).
_OLDER = (
    (r"\.processor\.", "."),
    (r"\.to_out_lora\.(?=down|up)", {"transformer": ".to_out.0.lora.", "text": ".out_proj.lora."}),
    (r"\.to_([qkv])_lora\.(?=down|up)", {"transformer": r".to_\1.lora.", "text": r".\1_proj.lora."}),
    (r"\.to_out\.lora_magnitude_vector", ".to_out.0.lora_magnitude_vector"),
    (r"\.lora_linear_layer\.(?=down|up)", ".lora."),
    (r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector"),
    (r"\.lora\.down\.weight$", ".lora_A.weight"),
    (r"\.lora\.up\.weight$", ".lora_B.weight"),
)
_DOWN, _UP, _SHIFT, _MAGNITUDE, _ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
_KEY = re.compile(r"(?P<module>.+)\.(?P<half>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector|alpha)")
# Entries of PEFT's LoraConfig that change nothing of a merge, or that are read here; others must be off.
_HARMLESS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("lora_bias", "target_modules", "exclude_modules", "lora_dropout", "task_type"),
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
)
_HARMLESS_VALUES: Mapping[str, tuple[object, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


@dataclass(frozen=True)
class Lora:
    """A file or hub id as the user gave it, and how much of it is merged."""

    where: str
    scale: float = 1.0


@dataclass(frozen=True)
class FoundLora:
    """A LoRA on this disk."""

    name: str
    path: Path
    scale: float


def pair_loras(loras: tuple[str, ...], scales: tuple[float, ...]) -> tuple[Lora, ...]:
    """The options --lora and --lora-scale, in their order. Raises `UserError` where they do not pair."""
    if scales and len(scales) != len(loras):
        raise UserError(
            f"--lora-scale is given {len(scales)} times and --lora {len(loras)}; give one for each in order, or none"
        )
    return tuple(Lora(where, scale) for where, scale in zip(loras, scales or [1.0] * len(loras), strict=True))


def as_options(merged: Iterable[LoraEntry]) -> str:
    """What to give for these LoRAs again."""
    return "".join(f" --lora {lora.name} --lora-scale {lora.scale!r}" for lora in merged)


class Change(Protocol):
    """What a file does to one tensor."""

    def apply(self, value: Tensor, original: Tensor) -> Tensor:
        """float32 from float32; `original` is the tensor before any change."""
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """Of a weight [out, in] or [out, in, height, width]: B [out, rank] times A [rank, in * height * width]."""

    read: Callable[[str], Tensor]
    down: str
    up: str
    scale: float
    magnitude: str | None = None

    def apply(self, value: Tensor, original: Tensor) -> Tensor:
        down, up = (self.read(name).to(torch.float32).flatten(1) for name in (self.down, self.up))
        delta = ((up @ down) * self.scale).reshape(value.shape)
        if self.magnitude is None:
            return value + delta
        # PEFT's: the norm is of the unmerged weight, also where other LoRAs were merged before.
        norm = torch.linalg.vector_norm((original + delta).flatten(1), dim=1)
        factor = self.read(self.magnitude).to(torch.float32).flatten() / norm
        return factor.reshape(-1, *[1] * (value.ndim - 1)) * (value + delta)


@dataclass(frozen=True, eq=False)
class Shift:
    """Of a bias [out]."""

    read: Callable[[str], Tensor]
    name: str
    scale: float

    def apply(self, value: Tensor, original: Tensor) -> Tensor:
        return value + self.read(self.name).to(torch.float32) * self.scale


Changes = Mapping[str, Sequence[Change]]


class Merged:
    """A folder's tensors, some of them changed."""

    def __init__(self, reader: TensorReader, changes: Changes) -> None:
        self._reader = reader
        self._changes = changes

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._reader.shapes

    def kind(self, name: str) -> str:
        return "F32" if name in self._changes else self._reader.kind(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self._changes:
            return self._reader.tensor(name)
        original = self._reader.tensor(name).to(torch.float32)
        value = original
        for change in self._changes[name]:
            value = change.apply(value, original)
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{name} is no longer finite with the LoRA merged: the file is broken, or its scale too large")
        return value


def find_lora(lora: Lora) -> FoundLora:
    """A file, or a hub id, which is downloaded. Raises `UserError`."""
    path = Path(lora.where).expanduser()
    if not math.isfinite(lora.scale) or lora.scale == 0:
        raise UserError(f"--lora-scale {lora.scale:g} of {lora.where} merges nothing that is a number; leave the LoRA out")
    if path.suffix in PICKLES:
        raise UserError(f"--lora {lora.where} is a pickle file, which can run code: give the LoRA as safetensors")
    if path.is_file():
        return FoundLora(path.name, path, lora.scale)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", lora.where) and path.suffix != ".safetensors" and not path.is_dir():
        return FoundLora(lora.where, download_lora(lora.where), lora.scale)
    raise UserError(f"--lora {lora.where} is no file here; give a .safetensors file or a hub id")


def read_changes(lora: FoundLora, readers: Mapping[str, TensorReader]) -> dict[str, dict[str, list[Change]]]:
    """By folder and tensor name what the file changes. Raises one `UserError` that names all that does not fit."""
    return _File(lora, readers).changes()


class _File:
    """An opened LoRA, its keys sorted by folder and module."""

    def __init__(self, lora: FoundLora, readers: Mapping[str, TensorReader]) -> None:
        self.lora, self.readers = lora, readers
        self._file = open_safetensors(lora.path)
        self._keys = sorted(self._file.keys())
        self._prefixed = any(key.startswith(tuple(f"{folder}." for folder in FOLDERS)) for key in self._keys)
        self._metadata = self._read_metadata()
        self._faults: dict[str, list[str]] = {}
        self.modules: dict[tuple[str, str], dict[str, str]] = {}
        for key in self._keys:
            self._sort(key)

    def changes(self) -> dict[str, dict[str, list[Change]]]:
        found: dict[str, dict[str, list[Change]]] = {}
        for (folder, module), halves in self.modules.items():
            for name, change in self._changes_of(folder, module, halves):
                found.setdefault(folder, {}).setdefault(name, []).append(change)
        if self._faults:
            what = "; ".join(f"{fault} {listed(names)}" for fault, names in self._faults.items())
            raise UserError(f"--lora {self.lora.name} does not fit this checkpoint: {what}")
        if not found:
            raise UserError(f"--lora {self.lora.name} holds no LoRA: it has no tensors")
        return found

    def _fault(self, what: str, name: str) -> None:
        self._faults.setdefault(what, []).append(name)

    def _sort(self, key: str) -> None:
        """Puts a key to its module, under the current name of its half."""
        folder, name = "transformer", key
        if self._prefixed:
            folder, _, name = key.partition(".")
        if folder not in FOLDERS:
            return self._fault("keys that match no weight:", key)
        match = _KEY.fullmatch(_current(name, folder))
        if match is None:
            return self._fault("keys that diffusers does not take for SD3 either:", key)
        halves = self.modules.setdefault((folder, match["module"]), {})
        if match["half"] in halves:
            return self._fault("two keys for one tensor:", f"{halves[match['half']]} and {key}")
        halves[match["half"]] = key
        if self._file.get_slice(key).get_dtype() not in FLOATS:
            self._fault("not float:", key)

    def _changes_of(self, folder: str, module: str, halves: Mapping[str, str]) -> Iterable[tuple[str, Change]]:
        """The module's changes, by tensor name; faults are noted."""
        shapes = self.readers[folder].shapes
        weight, bias = f"{module}.weight", f"{module}.bias"
        if weight not in shapes or module.endswith("_embedding"):  # of token tables diffusers knows no LoRA
            return self._fault("keys that match no weight:", next(iter(halves.values())))
        if _DOWN not in halves or _UP not in halves:
            return self._fault("one half without the other:", next(iter(halves.values())))
        shape, down, up = shapes[weight], self._shape(halves[_DOWN]), self._shape(halves[_UP])
        rank = down[0] if down else 0
        fits = len(shape) > 1 and rank > 0 and down == (rank, *shape[1:]) and up == (shape[0], rank, *[1] * (len(shape) - 2))
        if not fits:
            return self._fault("of another shape:", f"{halves[_DOWN]} {down} and {halves[_UP]} {up}, for {shape}")
        scale = self._scale(folder, module, rank, halves)
        config = self._metadata.get(folder)
        if config is not None and bool(config.get("use_dora", False)) != (_MAGNITUDE in halves):
            return self._fault("use_dora in the metadata, and lora_magnitude_vector of another mind:", module)
        if _MAGNITUDE in halves and math.prod(self._shape(halves[_MAGNITUDE])) != shape[0]:
            return self._fault("of another shape:", f"{halves[_MAGNITUDE]} {self._shape(halves[_MAGNITUDE])}, for {shape}")
        yield weight, LowRank(self._read, halves[_DOWN], halves[_UP], scale, halves.get(_MAGNITUDE))
        if _SHIFT in halves:
            if shapes.get(bias) != self._shape(halves[_SHIFT]):
                return self._fault("of another shape:", f"{halves[_SHIFT]}, for a bias {shapes.get(bias)}")
            yield bias, Shift(self._read, halves[_SHIFT], scale)

    def _scale(self, folder: str, module: str, rank: int, halves: Mapping[str, str]) -> float:
        config = self._metadata.get(folder)
        if config is None:
            if _ALPHA not in halves:
                return self.lora.scale
            alpha = self._read(halves[_ALPHA])
            if alpha.numel() != 1:
                self._fault("of another shape:", halves[_ALPHA])
                return self.lora.scale
            return float(alpha) / rank * self.lora.scale
        if _ALPHA in halves:
            self._fault("alpha beside lora_adapter_metadata:", halves[_ALPHA])
        said = _matching(config.get("rank_pattern"), module, config.get("r", 8))  # PEFT's default rank and alpha are 8
        if said != rank:
            self._fault("ranks that the metadata gives otherwise:", f"{module} ({rank}, not {said})")
        alpha = _matching(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * self.lora.scale

    def _read_metadata(self) -> dict[str, Mapping[str, Any]]:
        """PEFT's LoraConfig of each folder, where the header has any."""
        text = (self._file.metadata() or {}).get("lora_adapter_metadata")
        if text is None:
            return {}
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"--lora {self.lora.name}: its lora_adapter_metadata is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise UserError(f"--lora {self.lora.name}: its lora_adapter_metadata is no JSON object")
        configs: dict[str, Mapping[str, Any]]
        if self._prefixed:
            configs = {f: {k.removeprefix(f"{f}."): v for k, v in found.items() if k.startswith(f"{f}.")} for f in FOLDERS}
        else:
            configs = {"transformer": found}
        for config in configs.values():
            self._check(config)
        return configs

    def _check(self, config: Mapping[str, Any]) -> None:
        """Raises `UserError` for what a merge does not understand."""
        for name, value in config.items():
            patterns = name in ("rank_pattern", "alpha_pattern")
            if value and name not in _HARMLESS and value not in _HARMLESS_VALUES.get(name, ()):
                raise UserError(f"--lora {self.lora.name} was trained with {name} = {value!r}, which cannot be merged here")
            if name in ("r", "lora_alpha") and not _is_number(value):
                raise UserError(f"--lora {self.lora.name}: its metadata give {name} as {value!r}; it must be a number")
            if patterns and value and not (isinstance(value, dict) and all(map(_is_number, value.values()))):
                raise UserError(f"--lora {self.lora.name}: its metadata give {name} as {value!r}; it must be numbers by module")

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def _read(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"--lora {self.lora.name}: {key} cannot be read ({error})") from error


def _current(name: str, folder: str) -> str:
    """The name as PEFT writes it today."""
    for pattern, replacement in _OLDER:
        if isinstance(replacement, dict):
            replacement = replacement["transformer" if folder == "transformer" else "text"]
        name = re.sub(pattern, replacement, name)
    return name


def _matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry whose pattern is the module's name or the end of it, as PEFT finds it."""
    try:
        return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
    except re.error as error:
        raise UserError(f"the LoRA's metadata have a pattern for modules that is none ({error.pattern!r})") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
