"""The recipe file: a scheme for every weight of a model, with the evidence for each choice. Versioned JSON.

A recipe belongs to one model's shapes: it is refused, by tensor name and shape, for another's. It holds a section for each
format, since formats differ in the schemes that they can store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, Scheme
from export.errors import UserError


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FloatEntry(_Entry):
    kind: Literal["float"] = "float"
    bits: Literal[16, 32]

    def scheme(self) -> Scheme:
        return FloatScheme(self.bits)


class PaletteEntry(_Entry):
    """group: rows of axis 0 that share a palette (null: all); scaled: a scale an output channel; vector: weights an entry."""

    kind: Literal["palette"] = "palette"
    bits: Literal[1, 2, 3, 4, 6, 8]
    group: int | None = Field(default=None, ge=1)
    scaled: bool = False
    vector: int = Field(default=1, ge=1)

    def scheme(self) -> Scheme:
        return PaletteScheme(self.bits, self.group, self.scaled, self.vector)


class IntegerEntry(_Entry):
    """block: inputs that share a scale (null: one scale an output channel); input_bits: of a linear's inputs, where they are
    rounded."""

    kind: Literal["integer"] = "integer"
    bits: Literal[4, 8]
    block: int | None = Field(default=None, ge=1)
    bfloat16_scales: bool = False
    input_bits: Literal[8, 16] = 8

    def scheme(self) -> Scheme:
        return IntegerScheme(self.bits, self.block, self.bfloat16_scales, self.input_bits)


SchemeEntry = Annotated[FloatEntry | PaletteEntry | IntegerEntry, Field(discriminator="kind")]


class Evidence(_Entry):
    """A scheme that was weighed: its bytes, and the relative squared error of the result that it was predicted to cause."""

    scheme: SchemeEntry
    bytes: int
    loss: float


class WeightChoice(_Entry):
    """The scheme of one weight, and every scheme that was weighed for it (none where there was no choice)."""

    shape: tuple[int, ...]
    scheme: SchemeEntry
    weighed: tuple[Evidence, ...] = ()

    @property
    def loss(self) -> float:
        """The predicted loss of what was chosen; 0 where nothing was weighed."""
        return next((evidence.loss for evidence in self.weighed if evidence.scheme == self.scheme), 0.0)


class FormatRecipe(_Entry):
    """Choices of one format by component and weight. Losses are squared errors of the final latents relative to their variance.

    predicted_loss: the sum over the weights that act on the latents, all but the VAE decoder's; None without calibration.
    measured_loss: that of the latents drawn with all weights rounded, and whatever the format rounds besides.
    """

    components: Mapping[str, Mapping[str, WeightChoice]]
    bytes: int
    mean_bits: float
    predicted_loss: float | None = None
    measured_loss: float | None = None

    def schemes(self, component: str) -> dict[str, Scheme]:
        """By weight; empty for a component that the recipe does not have."""
        return {name: choice.scheme.scheme() for name, choice in self.components.get(component, {}).items()}


class RecipeFile(_Entry):
    """What `export-flash analyze` writes and `--recipe` reads. prompts: those calibrated on; None without calibration."""

    version: Literal[1] = 1
    model: str
    fingerprint: str
    sigmas: tuple[float, ...]
    resolution: tuple[int, int]
    prompts: int | None
    formats: Mapping[str, FormatRecipe]

    def schemes(self, format: str, component: str) -> dict[str, Scheme]:
        """By weight; empty for what the recipe does not have."""
        return self.formats[format].schemes(component) if format in self.formats else {}

    def save(self, path: Path) -> None:
        """Writes it as JSON; the same recipe gives the same bytes."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def read_recipe(path: Path) -> RecipeFile:
    """A recipe file. Raises `UserError` in one line where it is none, or asks for what does not exist."""
    try:
        return RecipeFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--recipe {path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"--recipe {path}: {where}: {first['msg']}; export-flash analyze writes recipes") from error


def check_fits(recipe: RecipeFile, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], format: str) -> None:
    """Raises `UserError` naming the first weight, by component, that the model and the recipe do not share.

    The recipe may hold components besides those of `shapes`, which are going to be exported.
    """
    if format not in recipe.formats:
        raise UserError(f"the recipe has no choices for {format}, only for {', '.join(recipe.formats)}; analyze that target")
    for component, weights in shapes.items():
        choices = recipe.formats[format].components.get(component, {})
        for name in sorted(weights.keys() | choices.keys()):
            here, there = weights.get(name), choices[name].shape if name in choices else None
            if here != there:
                words = [f"of shape {list(shape)}" if shape else "not there" for shape in (there, here)]
                raise UserError(
                    f"the recipe is of another model: for {format}, {component} {name} is {words[0]} in the recipe and "
                    f"{words[1]} in the model; make one with export-flash analyze"
                )


def scheme_entry(scheme: Scheme) -> FloatEntry | PaletteEntry | IntegerEntry:
    """A scheme as the file has it."""
    if isinstance(scheme, FloatScheme):
        return FloatEntry.model_validate(vars(scheme))
    if isinstance(scheme, PaletteScheme):
        return PaletteEntry.model_validate(vars(scheme))
    return IntegerEntry.model_validate(vars(scheme))
