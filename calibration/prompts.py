"""Prompts that a model is run on: those that its checkpoint carries, or these for any model of natural pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NATURAL = (
    "a red fox sitting in fresh snow, soft morning light",
    "a bowl of ramen on a wooden table, steam rising, close-up photograph",
    "an old lighthouse on a cliff above a stormy sea, oil painting",
    "a street market in the rain at night, neon reflections",
)


def golden_prompts(flash: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The first `count` prompts for golden inputs; `flash` is the checkpoint's flash.json."""
    carried = tuple(str(prompt) for prompt in flash.get("prompts", ()))
    return (carried or NATURAL)[:count]
