"""Clean latents of pictures, as `--calibration-images` gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from calibration.errors import CalibrationError

TENSOR = "latents"


def read_latents(path: Path, shape: tuple[int, ...], count: int) -> np.ndarray:
    """float32 [count, C, h, w] from a safetensors file's tensor `latents`; `shape` is (C, h, w), `count` one a prompt.

    Latents as the transformer sees them: (encoded - shift_factor) * scaling_factor. Raises `CalibrationError`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if TENSOR not in names:
                raise CalibrationError(f"{path} has no tensor {TENSOR}; it holds {', '.join(names) or 'nothing'}")
            found = file.get_tensor(TENSOR).to(torch.float32).numpy()
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path} cannot be read as safetensors ({error})") from error
    if found.shape != (count, *shape):
        wanted = f"{[count, *shape]}: one latent a prompt, of this model at this resolution"
        raise CalibrationError(f"{path}: {TENSOR} is {list(found.shape)}; expected {wanted}")
    if not np.isfinite(found).all():
        raise CalibrationError(f"{path}: {TENSOR} holds NaN or infinite values")
    return found
