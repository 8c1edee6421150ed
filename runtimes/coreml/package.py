"""The folder `<name>.mlpackage`: its manifest, the model file and the folder with the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.graph import GraphError


@dataclass(frozen=True)
class Package:
    """Where a package keeps its parts. `@model_path` in the model file stands for `model.parent`."""

    path: Path
    model: Path

    def blob_path(self, name: str) -> Path:
        """The file that a weight refers to. Raises `GraphError` if it lies outside the package or does not exist."""
        prefix = "@model_path/"
        file = (self.model.parent / name.removeprefix(prefix)).resolve()
        if not file.is_relative_to(self.path.resolve()):
            raise GraphError(f"{self.path}: the weight file {name!r} lies outside the package")
        if not file.is_file():
            raise GraphError(f"{self.path}: the weight file {file.name!r} is missing")
        return file


def open_package(path: Path) -> Package:
    """Finds the model file through the package's manifest."""
    if not path.is_dir():
        raise GraphError(f"{path}: no such Core ML package (a folder named *.mlpackage)")
    manifest = path / "Manifest.json"
    if not manifest.is_file():
        raise GraphError(f"{path}: not a Core ML package: Manifest.json is missing")
    try:
        content: Any = json.loads(manifest.read_text(encoding="utf-8"))
        relative = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        model = path / "Data" / relative
    except (ValueError, KeyError, TypeError) as error:
        raise GraphError(f"{path}: Manifest.json does not name a model: {error!r}") from error
    if not model.resolve().is_relative_to(path.resolve()):
        raise GraphError(f"{path}: Manifest.json points outside the package: {relative!r}")
    if not model.is_file():
        raise GraphError(f"{path}: the model file {relative!r} is missing")
    return Package(path, model)
