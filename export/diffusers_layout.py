"""What makes a bundle of the diffusers contract a folder that diffusers-like loaders open, beside the graphs themselves.

optimum's ORTStableDiffusion3Pipeline looks for model_index.json, a config.json beside each model.onnx, the scheduler and the
tokenizers (optimum/onnxruntime/modeling_diffusion.py). The scheduler written here shifts nothing: a few-step student is drawn
with the explicit sigmas of the manifest, `pipeline(..., sigmas=[...], guidance_scale=1)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.checkpoint import Checkpoint
from runtimes.bundle import FileEntry, describe_files

_CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder_3": (None, None),
    "tokenizer_3": (None, None),
}
_CONFIGS = {name: name for name in ("text_encoder", "text_encoder_2", "transformer")} | {"vae_decoder": "vae"}


def write_layout(bundle: Path, checkpoint: Checkpoint) -> tuple[FileEntry, ...]:
    """Writes the configurations into a bundle whose components lie in folders of their own names."""
    paths = ["model_index.json", "scheduler/scheduler_config.json"]
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline", "_name_or_path": checkpoint.name}
    _write(bundle / paths[0], index | {name: list(classes) for name, classes in _CLASSES.items()})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    _write(bundle / paths[1], scheduler)
    for component, folder in _CONFIGS.items():
        if (bundle / component).is_dir():
            paths.append(f"{component}/config.json")
            _write(bundle / paths[-1], checkpoint.config(folder))
    return describe_files(bundle, paths)


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
