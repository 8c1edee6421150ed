"""The pictures that flash-mini learns: one or two flat shapes on a plain or fading background, 128 x 128 px.

A `Scene` says everything that is drawn. `sample_scene` draws one at random, `render` makes the picture: each shape is
drawn four times larger and reduced (antialiasing), shaded from light to dark, with a soft shadow under it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, shift

SIZE = 128
OVERSAMPLE = 4

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 48, 52),
    "orange": (244, 138, 32),
    "yellow": (246, 208, 36),
    "green": (46, 158, 78),
    "blue": (44, 98, 214),
    "purple": (138, 62, 186),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (176, 178, 184),
    "black": (26, 26, 32),
    "cream": (246, 232, 204),
    "pink": (248, 206, 218),
    "mint": (200, 238, 220),
    "sky": (196, 222, 248),
}
RADII: dict[str, tuple[float, float]] = {"small": (16.5, 19.0), "large": (25.0, 28.0)}  # px, centre to tip
RELATIONS = ("left of", "right of", "above", "below", "in front of")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Where a lone object may stand: name -> (column, row) in units of 29 px from the centre.
POSITIONS: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}

SizeName = Literal["small", "large"]


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where it is drawn (centre and radius in px)."""

    shape: str
    colour: str
    size: SizeName
    outlined: bool
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What is drawn. `things` are in the order of the caption: with the relation "in front of" the first hides the second."""

    things: tuple[Thing, ...]
    relation: str | None  # of the first thing to the second
    position: str | None  # of a lone thing
    background: tuple[str, str]  # top and bottom colour; equal for a plain background

    @property
    def combination(self) -> tuple[str, ...]:
        """What training and held-out scenes never share: a pair's colours and shapes, or a lone thing's every trait."""
        if len(self.things) == 2:
            return tuple(sorted(f"{t.colour} {t.shape}" for t in self.things))
        (t,) = self.things
        return (t.colour, t.shape, t.size, "outlined" if t.outlined else "filled")


def sample_scene(rng: np.random.Generator, pair_share: float = 0.65, front_share: float = 0.3) -> Scene:
    """A random scene: two things with probability `pair_share`, one of them in front of the other in `front_share` of those.

    The things of a pair differ in colour. What stands in front is shown more often than any other relation: it is harder.
    """
    background = _sample_background(rng)
    if rng.random() >= pair_share:
        position = str(rng.choice(tuple(POSITIONS)))
        thing = _sample_thing(rng, _choice(rng, tuple(COLOURS)), _choice(rng, ("small", "large")))
        column, row = POSITIONS[position]
        return Scene((_place(rng, thing, 64 + 29 * column, 64 + 29 * row),), None, position, background)
    first, second = (str(c) for c in rng.choice(tuple(COLOURS), 2, replace=False))
    relation = "in front of" if rng.random() < front_share else _choice(rng, tuple(INVERSE))
    if relation == "in front of":
        # The one in front is small and stands lower, as nearer things do; the one behind is large: both stay recognisable.
        front = _sample_thing(rng, first, "small", outlined=False)
        back = _sample_thing(rng, second, "large", outlined=False)
        angle = rng.uniform(0.15 * math.pi, 0.85 * math.pi)  # y points down
        centre_x, centre_y = 64 + rng.uniform(-10, 10), 64 + rng.uniform(-10, 10)
        reach = back.radius * rng.uniform(0.7, 0.9)
        return Scene(
            (
                _place(rng, front, centre_x + reach * math.cos(angle), centre_y + reach * math.sin(angle)),
                _place(rng, back, centre_x, centre_y),
            ),
            relation,
            None,
            background,
        )
    things = [_sample_thing(rng, c, _choice(rng, ("small", "large"))) for c in (first, second)]
    sign = -1 if relation in ("left of", "above") else 1
    offset, drift = sign * 31.0, rng.uniform(-12, 12, 2)
    if relation in ("left of", "right of"):
        spots = [(64 + offset, 64 + drift[0]), (64 - offset, 64 + drift[1])]
    else:
        spots = [(64 + drift[0], 64 + offset), (64 + drift[1], 64 - offset)]
    placed = tuple(_place(rng, t, x, y) for t, (x, y) in zip(things, spots, strict=True))
    return Scene(placed, relation, None, background)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: uint8 [128, 128, 3]."""
    top, bottom = (np.array(BACKGROUNDS[name], dtype=np.float32) for name in scene.background)
    fade = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    picture = np.broadcast_to(top * (1 - fade) + bottom * fade, (SIZE, SIZE, 3)).copy()
    for thing in reversed(scene.things):  # the first stands in front
        alpha = shape_mask(thing.shape, thing.outlined, thing.x, thing.y, thing.radius)
        shadow = shift(gaussian_filter(alpha, 2.5), (3, 1), order=0)
        picture *= 1 - 0.22 * shadow[..., None]
        rows = (np.arange(SIZE, dtype=np.float32) - thing.y) / (2 * thing.radius)  # -1/2 .. 1/2 over the thing
        light = np.clip(1.0 - 0.28 * rows, 0.8, 1.2)[:, None, None]
        colour = np.clip(np.array(COLOURS[thing.colour], dtype=np.float32) * light, 0, 255)
        picture += alpha[..., None] * (colour - picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def shape_mask(shape: str, outlined: bool, x: float, y: float, radius: float) -> np.ndarray:
    """Coverage in [0, 1] of a shape centred at (x, y) px: float32 [128, 128]."""
    reach = math.ceil(radius) + 2
    left, upper = math.floor(x) - reach, math.floor(y) - reach
    side = (2 * reach + 1) * OVERSAMPLE
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    stroke = max(0.22 * radius, 4.2) / radius if outlined else 0.0
    for inset, value in ((0.0, 255), (stroke, 0)) if outlined else ((0.0, 255),):
        points = outline(shape, inset) * radius + (x - left + 0.5, y - upper + 0.5)
        draw.polygon([tuple(p) for p in (points * OVERSAMPLE).tolist()], fill=value)
    patch = np.asarray(image, dtype=np.float32).reshape(side // OVERSAMPLE, OVERSAMPLE, -1, OVERSAMPLE).mean((1, 3)) / 255
    mask = np.zeros((SIZE, SIZE), dtype=np.float32)
    y0, y1, x0, x1 = max(upper, 0), min(upper + len(patch), SIZE), max(left, 0), min(left + len(patch), SIZE)
    if y0 < y1 and x0 < x1:
        mask[y0:y1, x0:x1] = patch[y0 - upper : y1 - upper, x0 - left : x1 - left]
    return mask


@lru_cache(maxsize=256)
def outline(shape: str, inset: float) -> np.ndarray:
    """The polygon of a shape of radius 1, moved inwards by `inset`: float64 [points, 2], y down."""
    if shape == "circle":
        angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        return (1 - inset) * np.stack([np.cos(angle), np.sin(angle)], 1)
    if shape == "square":
        half = 0.86 - inset
        return half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64)
    if shape == "triangle":
        corners = np.array([(0, -0.98), (1, 0.78), (-1, 0.78)], dtype=np.float64)
        centre = np.array([0.0, 0.19])  # about the incircle's centre; its radius is 0.59
        return centre + (corners - centre) * (1 - inset / 0.59)
    if shape == "star":
        angle = -np.pi / 2 + np.arange(10) * np.pi / 5
        tips = np.where(np.arange(10) % 2 == 0, 1.05, 0.5)
        return np.stack([np.cos(angle), np.sin(angle)], 1) * tips[:, None] * (1 - 0.75 * inset / 0.5)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        x, y = 16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([x, y], 1) / 16.5 - (0, 0.12)
        centre = np.array([0.0, -0.1])
        return centre + (points - centre) * (1 - inset / 0.72)
    if shape == "cross":
        arm, reach = 0.36 - 0.7 * inset, 0.98 - 0.7 * inset
        notch, quarter = list[tuple[float, float]](), [(arm, -reach), (arm, -arm), (reach, -arm)]
        for _ in range(4):
            notch += quarter
            quarter = [(-down, right) for right, down in quarter]
        return np.array(notch, dtype=np.float64)
    raise ValueError(f"no shape {shape!r}; choose from {', '.join(SHAPES)}")


def _sample_background(rng: np.random.Generator) -> tuple[str, str]:
    top = _choice(rng, tuple(BACKGROUNDS))
    if rng.random() < 0.65:
        return top, top
    return top, _choice(rng, tuple(b for b in BACKGROUNDS if b != top))


def _sample_thing(rng: np.random.Generator, colour: str, size: str, outlined: bool | None = None) -> Thing:
    outlined = bool(rng.random() < 0.35) if outlined is None else outlined
    radius = rng.uniform(*RADII[size])
    return Thing(_choice(rng, SHAPES), colour, "small" if size == "small" else "large", outlined, 64.0, 64.0, radius)


def _place(rng: np.random.Generator, thing: Thing, x: float, y: float) -> Thing:
    x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
    return Thing(thing.shape, thing.colour, thing.size, thing.outlined, x, y, thing.radius)


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
