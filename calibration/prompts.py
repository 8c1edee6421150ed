"""Prompts that a model is run on: those that its checkpoint carries or asks for, or these for any model of natural pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError
from calibration.scenes import SCENES

NATURAL = (
    "a red fox sitting in fresh snow, soft morning light",
    "a bowl of ramen on a wooden table, steam rising, close-up photograph",
    "an old lighthouse on a cliff above a stormy sea, oil painting",
    "a street market in the rain at night, neon reflections",
    "portrait of an elderly fisherman with a grey beard and a yellow raincoat",
    "two white cups beside a blue teapot on a linen tablecloth",
    "a steam locomotive crossing a stone viaduct, wide shot, autumn forest below",
    "three sleeping kittens in a wicker basket",
    "an astronaut riding a brown horse across a desert, cinematic",
    "a glass greenhouse full of tropical plants, sunlight through the roof",
    "a watercolour of sailing boats in a small harbour at dawn",
    "a cat to the left of a dog, both looking out of a window",
    "macro photograph of a dew drop on a blade of grass",
    "a futuristic city of white towers and hanging gardens, aerial view",
    "a little girl in a green dress flying a red kite on the beach",
    "isometric illustration of a tiny bakery with people queueing outside",
    "a mountain lake that mirrors snowy peaks, long exposure",
    "an empty subway platform at midnight, fluorescent light, film grain",
    "five colourful hot-air balloons over a valley at sunrise",
    "a charcoal sketch of a ballet dancer tying her shoe",
    "a slice of chocolate cake with raspberries on a black plate",
    "a knight in silver armour kneeling in a field of poppies",
    "a purple armchair next to a tall brass floor lamp, minimalist living room",
    "a pod of dolphins leaping in front of a sailing ship",
    "a low-poly rendering of a pine forest with a wooden cabin",
    "hands of a potter shaping a clay vase on a wheel",
    "an owl perched on top of a stack of old books, candle light",
    "a yellow taxi driving past a brick building covered in ivy",
    "a robot watering sunflowers in a rooftop garden, digital art",
    "a snowy village at dusk with warm lights in every window",
    "a plate of sushi arranged in a circle, seen from directly above",
    "an elephant and her calf walking through tall dry grass",
    "a stained glass window showing a peacock",
    "a jazz trio playing in a dim club, smoke in the spotlight",
    "a red bicycle leaning against a turquoise wall",
    "a waterfall in a mossy canyon, a tiny hiker at its foot",
    "close-up of a chameleon with orange and green scales",
    "a paper-cut collage of whales swimming under the moon",
    "four wooden chairs around a round table in an empty white room",
    "an old man feeding pigeons in a sunny square",
    "a dragon made of clouds above a quiet fishing village, ink wash painting",
    "a pile of oranges and lemons in a blue ceramic bowl, still life",
    "a surfer inside the barrel of a green wave",
    "a library with spiral staircases that reach up into fog",
    "a child building a sandcastle while a small crab watches",
    "a black vintage motorcycle under a single street lamp",
    "a field of lavender with a lone tree on the horizon, pastel colours",
    "two chefs tossing vegetables in a busy restaurant kitchen",
    "a polar bear standing on a small drifting floe, overcast sky",
    "a clay-animation style hedgehog wearing a tiny scarf",
    "the northern lights over a row of red wooden houses",
    "a marble statue wrapped in flowering vines, shallow depth of field",
    "a hummingbird hovering in front of a pink hibiscus",
    "an abandoned amusement park reclaimed by trees, foggy morning",
    "a woman reading by a rainy window, a cup of tea on the sill",
    "a spaceship landing behind a farmhouse, retro science fiction painting",
    "a flat vector illustration of mountains under a large orange sun",
    "a pair of worn leather boots on a wet doorstep",
    "a school of silver fish circling a coral tower",
    "a golden retriever carrying a stick larger than itself",
    "a desert canyon road curving to the right, motion blur",
    "a grandmother and her grandson kneading dough, flour in the air",
    "a crystal chess set on a mirror, dramatic side light",
    "a windmill behind a canal lined with tulips in rows of red and yellow",
)

STYLES = {"scenes": SCENES}
"""What a checkpoint that was not trained on natural pictures names in its flash.json as `caption_style`."""


def golden_prompts(flash: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The first `count` prompts for golden inputs; `flash` is the checkpoint's flash.json."""
    carried = tuple(str(prompt) for prompt in flash.get("prompts", ()))
    return (carried or NATURAL)[:count]


def calibration_prompts(flash: Mapping[str, Any]) -> tuple[str, ...]:
    """64 prompts in the checkpoint's own style. Raises `CalibrationError` for a style that is not known here."""
    style = flash.get("caption_style")
    if style is None:
        return NATURAL
    if style not in STYLES:
        raise CalibrationError(
            f"flash.json: caption_style {style!r} is not known; give --calibration-prompts or choose from {', '.join(STYLES)}"
        )
    return STYLES[style]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line; empty lines are none. Raises `CalibrationError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"--calibration-prompts {path} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise CalibrationError(f"--calibration-prompts {path} cannot be read: {error.strerror}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise CalibrationError(f"--calibration-prompts {path} holds no prompts; write one a line")
    return prompts
