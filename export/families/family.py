"""What a model family answers: from a checkpoint, the components of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from export.components.component import Component
from export.rewrites import Rewrites
from runtimes.bundle import LatentLayout

Contract = Literal["flash", "diffusers"]


@dataclass(frozen=True)
class GraphOptions:
    """What fixes the shapes and contracts of the graphs. Width and height in pixels; sigmas as `check_sigmas` passes."""

    width: int
    height: int
    sigmas: tuple[float, ...]
    contract: Contract = "flash"
    rewrites: Rewrites = field(default_factory=Rewrites)
    chunks: int = 1


class Family(Protocol):
    """A checkpoint's model, read from its configurations alone."""

    @property
    def name(self) -> str:
        """The family's name, as the manifest says it."""
        ...

    @property
    def tokens(self) -> int:
        """Positions of a tokenized prompt."""
        ...

    @property
    def default_resolution(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained for."""
        ...

    @property
    def blocks(self) -> int:
        """Blocks of the transformer: the most chunks that it can be cut into."""
        ...

    def latent_shape(self, options: GraphOptions) -> tuple[int, int, int, int]:
        """[1, C, h, w] of the latent."""
        ...

    def latent_layout(self, options: GraphOptions) -> LatentLayout:
        """What the manifest says about the latent."""
        ...

    def components(self, options: GraphOptions) -> tuple[Component, ...]:
        """Every component of the export, in the order of use. Raises `UserError` for options that this model cannot take."""
        ...
