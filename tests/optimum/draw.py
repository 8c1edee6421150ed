"""Opens a bundle of the diffusers contract in optimum's ORTStableDiffusion3Pipeline and draws its first golden prompt.

    make optimum

Exits 1 where the picture is not what unmodified diffusers drew at export (at least 60 dB, both as 8-bit pixels).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTStableDiffusion3Pipeline
from PIL import Image

FLOOR = 60.0  # dB

bundle = Path(sys.argv[1])
manifest = json.loads((bundle / "manifest.json").read_text())
golden = manifest["golden"]["prompts"][0]
picture = ORTStableDiffusion3Pipeline.from_pretrained(bundle)(
    golden["prompt"],
    height=manifest["image_size"]["height"],
    width=manifest["image_size"]["width"],
    num_inference_steps=len(manifest["sigmas"]) - 1,
    sigmas=manifest["sigmas"][:-1],
    guidance_scale=1.0,
    generator=torch.Generator("cpu").manual_seed(golden["seed"]),
).images[0]
original = np.asarray(Image.open(bundle / "pictures" / "prompt0-original.png"), np.float64)
error = np.mean((np.asarray(picture, np.float64) - original) ** 2)
decibels = 10 * np.log10(255**2 / max(error, 1e-9))
print(f"optimum's picture of {golden['prompt']!r} against unmodified diffusers: {decibels:.1f} dB")
sys.exit(0 if decibels >= FLOOR else 1)
