"""The fixed prompts' pictures side by side, each artifact's beside its amplified difference from the original's."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtimes.bundle import BundleError, Manifest
from runtimes.harness.parity import psnr

FACTORS = (1, 2, 5, 10, 20, 50, 100)
QUANTILE = 0.999  # of the differences, which the amplification keeps within white
LARGEST = 512  # pixels along a side; larger pictures are averaged down to it


@dataclass(frozen=True)
class ArtifactPicture:
    """What one format's artifacts drew. decibels, levels: PSNR and largest difference of the 8-bit pictures (of 255)."""

    format: str
    uri: str
    difference: str
    decibels: float
    levels: int


@dataclass(frozen=True)
class PromptPictures:
    """One golden prompt."""

    prompt: str
    seed: int
    original: str
    artifacts: tuple[ArtifactPicture, ...]


@dataclass(frozen=True)
class Gallery:
    """All prompts. factor: what every difference is multiplied by; reduced: whether pictures are shown smaller than drawn."""

    prompts: tuple[PromptPictures, ...] = ()
    factor: int = 1
    reduced: bool = False


def read_gallery(bundle: Path, manifest: Manifest) -> Gallery:
    """What pictures/ holds; a gallery without prompts where the bundle has none. Raises `BundleError`."""
    originals = {p: bundle / "pictures" / f"prompt{p}-original.png" for p in range(len(manifest.golden.prompts))}
    shown = {p: _read(path) for p, path in originals.items() if path.exists()}
    drawn = {
        (p, format): _read(path)
        for p in shown
        for format in manifest.formats
        if (path := bundle / "pictures" / f"prompt{p}-{format}.png").exists()
    }
    for (p, format), picture in drawn.items():
        if picture.shape != shown[p].shape:
            raise BundleError(f"{bundle}: pictures of prompt {p} differ in size: original and {format}")
    differences = {key: np.abs(picture.astype(np.int16) - shown[key[0]]) for key, picture in drawn.items()}
    factor = _factor(list(differences.values()))

    def artifacts(p: int) -> tuple[ArtifactPicture, ...]:
        return tuple(
            ArtifactPicture(
                format,
                _data_uri(picture),
                _data_uri((factor * differences[q, format]).clip(0, 255).astype(np.uint8)),
                psnr(picture, shown[p]),
                int(differences[q, format].max()),
            )
            for (q, format), picture in drawn.items()
            if q == p
        )

    prompts = tuple(
        PromptPictures(golden.prompt, golden.seed, _data_uri(shown[p]), artifacts(p))
        for p, golden in enumerate(manifest.golden.prompts)
        if p in shown
    )
    return Gallery(prompts, factor, any(max(picture.shape[:2]) > LARGEST for picture in shown.values()))


def _factor(differences: list[np.ndarray]) -> int:
    """The largest amplification that leaves all but the few greatest differences of every picture below white."""
    most = max((float(np.quantile(difference, QUANTILE)) for difference in differences), default=0.0)
    return max(factor for factor in FACTORS if factor == 1 or factor * most <= 255)


def _read(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise BundleError(f"{path} cannot be read as a picture: {error}") from None


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
