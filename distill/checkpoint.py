"""Writes flash-mini in the plain diffusers folder layout, fp16 safetensors, with sigmas, model card and licence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from distill.loop import RunError
from distill.model import unfold
from distill.student.steps import SIGMAS
from distill.text import TextEncoders

# What an exporter runs the model on when it records golden inputs.
PROMPTS = (
    "a big red heart above a small green circle, against a gradient from sky blue to cream",
    "a large yellow star to the left of an outlined orange cross on a cream background",
    "at the top left there is a large green triangle on a pink background",
    "a tiny orange cross below a filled red circle on plain white",
)
# Which prompts an exporter calibrates on: those in the style of captions.py.
CAPTION_STYLE = "scenes"
TEMPLATES = Path(__file__).parent / "templates"


def pipeline(
    student: SD3Transformer2DModel, vae: AutoencoderKL, text: TextEncoders, dtype: torch.dtype
) -> StableDiffusion3Pipeline:
    """The unmodified diffusers pipeline around copies of these models; its scheduler takes sigmas as given (shift 1)."""
    first, second = (copy.deepcopy(encoder).to(dtype) for encoder in text.encoders)
    return StableDiffusion3Pipeline(
        transformer=unfold(copy.deepcopy(student)).to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=copy.deepcopy(vae).to(dtype, memory_format=torch.contiguous_format),
        text_encoder=first,
        tokenizer=text.tokenizers[0],
        text_encoder_2=second,
        tokenizer_2=text.tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def write(folder: Path, student: SD3Transformer2DModel, vae: AutoencoderKL, text: TextEncoders, card: str) -> None:
    """Writes the folder beside its place and renames it; raises `RunError` when it cannot be written."""
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        pipeline(student, vae, text, torch.float16).save_pretrained(beside, safe_serialization=True)
        for suffix in ("", "_2"):  # transformers would load float16 where diffusers loads float32, and they would not fit
            config = beside / f"text_encoder{suffix}" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        for suffix in ("", "_2"):  # phones read the plain files; transformers writes only tokenizer.json
            source = Path(text.tokenizers[0 if not suffix else 1].name_or_path)
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(source / name, beside / f"tokenizer{suffix}" / name)
        sigmas = {str(n): list(s) for n, s in SIGMAS.items()}
        flash = {"sigmas": sigmas, "prompts": PROMPTS, "caption_style": CAPTION_STYLE}
        (beside / "flash.json").write_text(json.dumps(flash, indent=1) + "\n")
        (beside / "README.md").write_text(card)
        shutil.copyfile(TEMPLATES / "LICENSE", beside / "LICENSE")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunError(
            f"cannot write the checkpoint {folder}: {error.strerror}; free some room or choose another --out"
        ) from error
