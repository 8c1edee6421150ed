"""The model families. A new one is a file here and an entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable

from export.checkpoint import Checkpoint
from export.errors import UserError
from export.families.family import Family
from export.families.sd3 import Sd3

FAMILIES: dict[str, Callable[[Checkpoint], Family]] = {"StableDiffusion3Pipeline": Sd3.read}
"""By the `_class_name` of a checkpoint's model_index.json."""


def read_family(checkpoint: Checkpoint) -> Family:
    """The model that a checkpoint holds; `UserError` for a pipeline that no family knows."""
    if checkpoint.pipeline not in FAMILIES:
        raise UserError(f"{checkpoint.where} is a {checkpoint.pipeline}; export-flash takes {', '.join(sorted(FAMILIES))}")
    return FAMILIES[checkpoint.pipeline](checkpoint)
