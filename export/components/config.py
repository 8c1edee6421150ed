"""From a checkpoint's config.json to a frozen dataclass: the fields it knows, the defaults of the original class, no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from export.errors import UserError

Config = TypeVar("Config")


def read_config(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """`kind(**values)` with unknown keys left out and lists made tuples; a missing key is named with its file `where`."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            value = values[field.name]
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{where} has no {field.name!r}; the configuration of the original model is needed")
    return kind(**chosen)


def require(condition: bool, where: str, name: str, value: object, accepted: str) -> None:
    """Raises a `UserError` that names a configuration value this family cannot build."""
    if not condition:
        raise UserError(f"{where}: {name} is {value!r}; export-flash builds {accepted}")
