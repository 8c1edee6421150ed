"""Prompt adherence read from the pixels by rules, with no learned model: the role that GenEval plays for the paper.

A picture is taken apart into a background (a vertical fade fitted to its rows) and things (pixels nearer to a shaded
object colour than to the background or its shadow, in connected regions). Each thing is compared with templates of every
shape, filled and outlined, at every place and several sizes (correlation by FFT); the best intersection over union names it.

`judge` then checks every fact that the caption stated. A picture adheres when all of them hold.
`frechet_distance` compares sets of pictures on hand-made features (see `features`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import fft, linalg, ndimage

from distill.captions import Facts
from distill.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZE, outline, shape_mask

MIN_AREA = 40  # px; smaller regions are specks
MIN_OVERLAP = 0.62  # intersection over union below which a region is no shape at all
SMALL_BELOW = 22.0  # px of radius, midway between the sizes that scenes draw
_LIGHTS = np.linspace(0.82, 1.18, 9, dtype=np.float32)
_SHADOWS = np.linspace(0.76, 1.0, 5, dtype=np.float32)


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture: centre and radius in px, `overlap` the intersection over union with its template."""

    shape: str
    colour: str
    outlined: bool
    x: float
    y: float
    radius: float
    overlap: float
    mask: np.ndarray  # bool [128, 128], its visible pixels


@dataclass(frozen=True)
class Verdict:
    """Every fact that was checked and whether it holds."""

    checks: dict[str, bool]

    @property
    def adheres(self) -> bool:
        return all(self.checks.values())

    @property
    def share(self) -> float:
        return sum(self.checks.values()) / len(self.checks)


def judge(picture: np.ndarray, facts: Facts) -> Verdict:
    """Compares a picture (uint8 [128, 128, 3]) with what its caption said."""
    fade = _fit_background(picture)
    regions = _find_regions(picture, fade)
    overlapping = facts.relation == "in front of"
    checks: dict[str, bool] = {}
    if overlapping:  # the one behind may fall into pieces: all of a colour is one thing
        regions = [(c, np.logical_or.reduce([m for d, m in regions if d == c])) for c in dict.fromkeys(c for c, _ in regions)]
    checks["count"] = len(regions) == len(facts.things)
    found: list[Seen | None] = []
    front = np.zeros((SIZE, SIZE), dtype=bool)
    for index, said in enumerate(facts.things):
        masks = [m for c, m in regions if c == said.colour]
        mask = max(masks, key=np.count_nonzero) if masks else None
        seen = None if mask is None else _name_shape(said.colour, mask, front if overlapping and index else None)
        if seen is not None and overlapping and index == 0:
            front = seen.mask
        found.append(seen)
        name = f"{said.colour} {said.shape}"
        checks[f"{name}: colour"] = seen is not None
        checks[f"{name}: shape"] = seen is not None and seen.shape == said.shape and seen.overlap >= MIN_OVERLAP
        if said.size is not None:
            checks[f"{name}: {said.size}"] = seen is not None and (seen.radius < SMALL_BELOW) == (said.size == "small")
        if said.outlined is not None:
            checks[f"{name}: {'outlined' if said.outlined else 'filled'}"] = seen is not None and seen.outlined == said.outlined
    if facts.relation is not None:
        first, second = found
        checks[facts.relation] = first is not None and second is not None and _related(first, second, facts.relation)
    if facts.position is not None:
        column, row = POSITIONS[facts.position]
        (thing,) = found
        checks[facts.position] = thing is not None and (_cell(thing.x), _cell(thing.y)) == (column, row)
    if facts.background is not None:
        ends = tuple(_nearest_background(colour) for colour in (fade[3:13].mean(0), fade[-13:-3].mean(0)))
        checks["background"] = ends == facts.background
    return Verdict(checks)


def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Features for `frechet_distance`: float64 [pictures, 64].

    Of each picture: mean and standard deviation of each RGB channel in a 3 x 3 grid of cells (54 values), and a histogram of
    gradient magnitudes of its grey values in ten bins (10), all scaled to about [0, 1].
    """
    rows = []
    for picture in pictures:
        image = picture.astype(np.float64) / 255
        cells = [c for band in np.array_split(image, 3, 0) for c in np.array_split(band, 3, 1)]
        moments = [f for cell in cells for f in (*cell.mean((0, 1)), *cell.std((0, 1)))]
        gradient = np.hypot(*np.gradient(image.mean(-1)))
        histogram, _ = np.histogram(gradient, bins=np.geomspace(1e-3, 0.6, 11))
        rows.append([*moments, *np.log1p(histogram) / np.log(SIZE * SIZE)])
    return np.array(rows)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of two feature sets (Heusel et al. 2017, eq. 6)."""
    cov_a, cov_b = (np.cov(x, rowvar=False) + 1e-8 * np.eye(x.shape[1]) for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * np.real(root)))


def _fit_background(picture: np.ndarray) -> np.ndarray:
    """The vertical fade behind the things: float32 [128, 3], a line through the medians of each row's outer pixels."""
    edge = np.concatenate([picture[:, :5], picture[:, -5:]], 1).astype(np.float32)
    rows = np.median(edge, 1)
    at = np.linspace(-1, 1, SIZE, dtype=np.float32)
    keep = np.ones(SIZE, dtype=bool)
    for _ in range(4):  # rows where a thing touches the edge drop out
        line = np.polynomial.polynomial.polyfit(at[keep], rows[keep], 1)
        fade = line[0] + at[:, None] * line[1]
        error = np.linalg.norm(rows - fade, axis=1)
        keep = error <= max(6.0, 1.5 * float(np.median(error)))
    return fade.astype(np.float32)


def _find_regions(picture: np.ndarray, fade: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(colour, mask) of every connected region that is a thing."""
    pixels = picture.astype(np.float32)
    behind = np.min([np.linalg.norm(pixels - k * fade[:, None], axis=-1) for k in _SHADOWS], 0)
    distances = []
    for colour in COLOURS.values():
        shades = np.clip(np.array(colour, dtype=np.float32) * _LIGHTS[:, None], 0, 255)
        distances.append(np.min([np.linalg.norm(pixels - shade, axis=-1) for shade in shades], 0))
    nearest = np.argmin(distances, 0)
    thing = np.min(distances, 0) < np.minimum(behind, 75)
    regions = []
    for index, colour_name in enumerate(COLOURS):
        labels, count = ndimage.label(thing & (nearest == index), structure=np.ones((3, 3)))
        for label in range(1, count + 1):
            mask = labels == label
            # Rims where two colours mix are long and thin: no pixel of theirs has only its own kind around it.
            solid = ndimage.binary_erosion(mask, structure=np.ones((2, 2))).sum()
            if mask.sum() >= MIN_AREA and solid >= 0.25 * mask.sum():
                regions.append((colour_name, mask))
    largest = max((m.sum() for _, m in regions), default=0)
    return [(c, m) for c, m in regions if m.sum() >= 0.05 * largest]


def _name_shape(colour: str, mask: np.ndarray, hidden: np.ndarray | None) -> Seen:
    """The template that fits a region best. Pixels under `hidden` (the thing in front) count for nothing."""
    ys, xs = np.nonzero(mask)
    reach = (max(np.ptp(ys), np.ptp(xs)) + 1) / 2
    region = fft.rfft2(mask.astype(np.float32))
    free = fft.rfft2((~hidden).astype(np.float32)) if hidden is not None else None
    best: tuple[float, str, bool, float, int, int] = (-1.0, SHAPES[0], False, reach, 64, 64)
    for shape in SHAPES:
        for outlined in (False, True):
            for radius in _radii(shape, reach, hidden is not None):
                template, area = _template(shape, outlined, radius)
                both = fft.irfft2(region * template, (SIZE, SIZE))
                own = area if free is None else fft.irfft2(free * template, (SIZE, SIZE))
                score = both / np.maximum(mask.sum() + own - both, 1)
                at = int(np.argmax(score))
                if score.flat[at] > best[0]:
                    best = (float(score.flat[at]), shape, outlined, radius, at % SIZE, at // SIZE)
    overlap, shape, outlined, radius, x, y = best
    return Seen(shape, colour, outlined, (x + SIZE // 2) % SIZE, (y + SIZE // 2) % SIZE, radius, overlap, mask)


def _radii(shape: str, reach: float, partly_hidden: bool) -> list[float]:
    """Radii in px at which a region that reaches so far from its middle may be this shape."""
    if partly_hidden and reach > 16:
        return np.arange(23.0, 30.1, 1.0).tolist()
    middle = reach / float(np.ptp(outline(shape, 0.0), axis=0).max() / 2)
    return sorted({round(2 * middle * share) / 2 for share in (0.94, 0.97, 1.0, 1.03, 1.06)})


@lru_cache(maxsize=2048)
def _template(shape: str, outlined: bool, radius: float) -> tuple[np.ndarray, float]:
    """The conjugate spectrum of a shape in the middle of the picture, and its area in px."""
    mask = (shape_mask(shape, outlined, SIZE / 2, SIZE / 2, radius) > 0.5).astype(np.float32)
    return np.conj(fft.rfft2(mask)), float(mask.sum())


def _related(first: Seen, second: Seen, relation: str) -> bool:
    dx, dy = first.x - second.x, first.y - second.y
    if relation == "in front of":
        whole = [shape_mask(s.shape, s.outlined, s.x, s.y, s.radius) > 0.5 for s in (first, second)]
        shared = whole[0] & whole[1]
        return bool(shared.sum() >= 12 and first.mask[shared].mean() > 0.7)
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return abs(along) > abs(across) and (along < 0) == (relation in ("left of", "above"))


def _cell(at: float) -> int:
    return int(np.clip(np.rint((at - 64) / 29), -1, 1))


def _nearest_background(colour: np.ndarray) -> str:
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(colour - np.array(BACKGROUNDS[name]))))
