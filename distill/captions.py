"""Sentences about scenes, and the facts that each sentence states.

A caption leaves things unsaid (size, position, background) as people do; `Facts` holds only what was said, so that the
scorer never asks for more. Held-out captions describe combinations (see `Scene.combination`) that training never draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distill.scenes import INVERSE, Scene, Thing, sample_scene

HELD_OUT_SHARE = 0.1

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
}
COLOUR_WORDS = {c: (c,) for c in ("red", "orange", "yellow", "green", "blue")} | {"purple": ("purple", "violet")}
BACKGROUND_WORDS = {
    "white": ("white",),
    "grey": ("grey", "gray"),
    "black": ("black",),
    "cream": ("cream", "beige"),
    "pink": ("pink",),
    "mint": ("mint", "mint green"),
    "sky": ("sky blue", "light blue"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
OUTLINED_WORDS, FILLED_WORDS = ("outlined", "hollow"), ("filled", "solid")
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "in front of": ("in front of", "overlapping"),
}
ITS_WORDS = {
    "left of": ("to its left", "on its left"),
    "right of": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
    "in front of": ("in front of it",),
}
POSITION_WORDS = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "top left": ("at the top left", "in the top left corner"),
    "top right": ("at the top right", "in the top right corner"),
    "bottom left": ("at the bottom left", "in the bottom left corner"),
    "bottom right": ("at the bottom right", "in the bottom right corner"),
}
LONE_FORMS = (
    "{a} {position} {background}",
    "a picture of {a} {position} {background}",
    "{background}, {a} {position}",
    "there is {a} {position} {background}",
    "{position} there is {a} {background}",
    "{a} stands alone {position} {background}",
    "draw {a} {position}, {background}",
    "only {a} {background}, {position}",
)
PAIR_FORMS = (
    "{a} {relation} {b} {background}",
    "there is {a} {relation} {b}, {background}",
    "{background}, {a} is {relation} {b}",
    "a picture of {a} {relation} {b} {background}",
    "{b} with {a} {its} {background}",
    "{b} and, {its}, {a}, {background}",
    "draw {a} {relation} {b} {background}",
    "{background} there is {b}, and {a} {its}",
    "two shapes {background}: {a} {relation} {b}",
)


@dataclass(frozen=True)
class ThingFacts:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    colour: str
    size: str | None
    outlined: bool | None


@dataclass(frozen=True)
class Facts:
    """What a caption says of a picture. The relation is that of the first thing to the second."""

    things: tuple[ThingFacts, ...]
    relation: str | None
    position: str | None
    background: tuple[str, str] | None


@dataclass(frozen=True)
class Caption:
    text: str
    facts: Facts


def describe(scene: Scene, rng: np.random.Generator) -> Caption:
    """One of many sentences about a scene."""
    said = [_describe_thing(thing, rng) for thing in scene.things]
    facts, phrases = [f for f, _ in said], [p for _, p in said]
    background = scene.background if rng.random() < 0.85 else None
    words = {"background": _background_phrase(background, rng) if background else "", "a": phrases[0]}
    position = relation = None
    if len(scene.things) == 1:
        position = scene.position if rng.random() < 0.85 else None
        words["position"] = _pick(POSITION_WORDS[position], rng) if position else ""
        form = _pick(LONE_FORMS, rng)
    else:
        relation = scene.relation
        assert relation is not None
        if relation in INVERSE and rng.random() < 0.5:  # the other way round: "b is right of a" for "a is left of b"
            facts, relation = facts[::-1], INVERSE[relation]
            words["a"], words["b"] = phrases[1], phrases[0]
        else:
            words["b"] = phrases[1]
        words["relation"], words["its"] = _pick(RELATION_WORDS[relation], rng), _pick(ITS_WORDS[relation], rng)
        form = _pick(PAIR_FORMS, rng)
    return Caption(_tidy(form.format(**words)), Facts(tuple(facts), relation, position, background))


def is_held_out(scene: Scene) -> bool:
    """Whether a scene's combination is kept from training: a tenth of all combinations, chosen by a hash of their words."""
    return zlib.crc32(" + ".join(scene.combination).encode()) % 1000 < 1000 * HELD_OUT_SHARE


def training_scenes(rng: np.random.Generator) -> Iterator[Scene]:
    """Scenes without end, none of a held-out combination."""
    while True:
        scene = sample_scene(rng)
        if not is_held_out(scene):
            yield scene


@lru_cache(maxsize=1)
def held_out(count: int = 512) -> tuple[tuple[Scene, Caption], ...]:
    """The fixed evaluation set: scenes of held-out combinations and a caption of each."""
    rng = np.random.default_rng(20250921)
    found: list[tuple[Scene, Caption]] = []
    texts: set[str] = set()
    while len(found) < count:
        scene = sample_scene(rng)
        if is_held_out(scene):
            caption = describe(scene, rng)
            if caption.text not in texts:
                texts.add(caption.text)
                found.append((scene, caption))
    return tuple(found)


def _describe_thing(thing: Thing, rng: np.random.Generator) -> tuple[ThingFacts, str]:
    size = thing.size if rng.random() < 0.6 else None
    # An outline is always said; that a shape is filled goes without saying, mostly.
    outlined = thing.outlined if thing.outlined or rng.random() < 0.2 else None
    style = [] if outlined is None else [_pick(OUTLINED_WORDS if outlined else FILLED_WORDS, rng)]
    sizes = [_pick(SIZE_WORDS[size], rng)] if size else []
    colour, shape = _pick(COLOUR_WORDS[thing.colour], rng), _pick(SHAPE_WORDS[thing.shape], rng)
    adjectives = [*sizes, *style] if rng.random() < 0.7 else [*style, *sizes]
    words = " ".join([*adjectives, colour, shape])
    return ThingFacts(thing.shape, thing.colour, size, outlined), f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _background_phrase(background: tuple[str, str], rng: np.random.Generator) -> str:
    top, bottom = (_pick(BACKGROUND_WORDS[name], rng) for name in background)
    if background[0] == background[1]:
        return _pick(("on a {} background", "against a {} backdrop", "on plain {}"), rng).format(top)
    forms = ("on a background fading from {} to {}", "against a gradient from {} to {}", "on {} fading to {}")
    return _pick(forms, rng).format(top, bottom)


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _tidy(text: str) -> str:
    text = " ".join(text.split()).replace(" ,", ",").replace(" :", ":").replace(",,", ",")
    return text.strip(" ,")
