"""What recipe.json says of every weight, and the least loss that its evidence allows at every size.

The curve is the lower convex hull of summed loss against summed bytes. Losses and bytes both add up over the weights, so it is
found without a search: each weight's own hull is a chain of steps, and taking the steps of all weights by the loss that they
save a byte, the steepest first, visits the hull's corners. Each corner minimises loss + lambda * bytes for some lambda
(Everett 1963, generalized Lagrange multipliers); a choice between two corners can come near the hull but never below it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtimes.bundle import BundleError

RECIPE = "recipe.json"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Scheme(_Entry):
    kind: Literal["float", "palette", "integer"]
    bits: int = Field(ge=1)
    group: int | None = None
    scaled: bool = False
    vector: int = Field(default=1, ge=1)
    block: int | None = None
    bfloat16_scales: bool = False

    def words(self) -> str:
        if self.kind == "float":
            return f"float{self.bits}"
        if self.kind == "integer":
            return f"integers {self.bits} bit" + (f", blocks of {self.block}" if self.block else "")
        vectors = f", {self.vector} weights an entry" if self.vector > 1 else ""
        groups = f", groups of {self.group}" if self.group else ""
        return f"palette {self.bits} bit{vectors}{groups}" + (", a scale a row" if self.scaled else "")


class _Weighed(_Entry):
    scheme: _Scheme
    bytes: int = Field(ge=0)
    loss: float = Field(ge=0, allow_inf_nan=False)


class _Choice(_Entry):
    shape: tuple[int, ...]
    scheme: _Scheme
    weighed: tuple[_Weighed, ...] = ()


class _Format(_Entry):
    components: Mapping[str, Mapping[str, _Choice]]
    bytes: int = Field(ge=0)


class _Recipe(_Entry):
    formats: Mapping[str, _Format]


@dataclass(frozen=True)
class Option:
    """Bytes, and the loss that comes with them: of one weight, or summed over all."""

    nbytes: int
    loss: float


@dataclass(frozen=True)
class Layer:
    """One weight. bits: of a stored value, palettes and scales included where they were weighed; chosen, options: what was
    weighed, None and empty where there was no choice."""

    component: str
    name: str
    weights: int
    scheme: str
    bits: float
    chosen: Option | None
    options: tuple[Option, ...]

    @property
    def loss(self) -> float:
        """Predicted of what was chosen; 0 where there was no choice."""
        return 0.0 if self.chosen is None else self.chosen.loss


@dataclass(frozen=True)
class FormatEvidence:
    """One format's section: every weight in the model's order, and the bytes of all of them."""

    format: str
    nbytes: int
    layers: tuple[Layer, ...]

    @property
    def weighed(self) -> tuple[Layer, ...]:
        """The weights that had a choice."""
        return tuple(layer for layer in self.layers if layer.chosen is not None)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.component for layer in self.layers))

    @property
    def chosen(self) -> Option:
        """All bytes, and the summed loss of what was chosen."""
        return Option(self.nbytes, math.fsum(layer.loss for layer in self.layers))

    def curve(self) -> tuple[Option, ...]:
        """Corners of the lower convex hull, the fewest bytes first; weights without a choice are in the bytes of each."""
        settled = self.nbytes - sum(layer.chosen.nbytes for layer in self.layers if layer.chosen)
        hulls = [lower_hull(layer.options) for layer in self.weighed]
        steps = sorted((step for hull in hulls for step in pairwise(hull)), key=lambda step: _saved(*step), reverse=True)
        sizes = accumulate((more.nbytes - less.nbytes for less, more in steps), initial=sum(h[0].nbytes for h in hulls))
        # Losses are summed from the small end, where a step saves less than the large ones' last digit.
        losses = accumulate((less.loss - more.loss for less, more in reversed(steps)), initial=sum(h[-1].loss for h in hulls))
        return tuple(Option(settled + n, loss) for n, loss in zip(sizes, reversed(list(losses)), strict=True))


def read_evidence(bundle: Path) -> dict[str, FormatEvidence]:
    """The sections of a bundle's recipe.json by format; none where it has no such file. Raises `BundleError`, one line."""
    path = bundle / RECIPE
    if not path.exists():
        return {}
    try:
        recipe = _Recipe.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    formats = recipe.formats.items()
    return {name: FormatEvidence(name, section.bytes, tuple(_layers(path, section))) for name, section in formats}


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, ascending in bytes and descending in loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _saved(hull[-2], hull[-1]) <= _saved(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _saved(less: Option, more: Option) -> float:
    """Loss saved a byte."""
    return (less.loss - more.loss) / (more.nbytes - less.nbytes)


def _layers(path: Path, section: _Format) -> Iterable[Layer]:
    for component in sorted(section.components, key=_in_order_of_use):
        for name, choice in sorted(section.components[component].items(), key=lambda item: _natural(item[0])):
            options = {weighed.scheme: Option(weighed.bytes, weighed.loss) for weighed in choice.weighed}
            chosen = options.get(choice.scheme)
            if options and chosen is None:
                raise BundleError(f"{path}: {component} {name} is stored by a scheme that was not weighed")
            count = math.prod(choice.shape)
            bits = choice.scheme.bits / choice.scheme.vector if chosen is None else 8 * chosen.nbytes / count
            yield Layer(component, name, count, choice.scheme.words(), bits, chosen, tuple(options.values()))


def _in_order_of_use(component: str) -> tuple[int, str]:
    order = ("text_encoder", "text_encoder_2", "conditioner", "transformer", "vae_decoder")
    return order.index(component) if component in order else len(order), component


def _natural(name: str) -> list[tuple[int, str]]:
    """Blocks by their numbers: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
