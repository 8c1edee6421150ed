"""How the steps of an export are told: a stage of known length at a time, so that whoever listens can show what is left."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears of the stages of a long piece of work, in order."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` equal steps begins; the one before it is over."""
        ...

    def step(self, detail: str) -> None:
        """A step of the present stage begins; `detail` is what it works on."""
        ...


class Silent:
    """Tells nobody."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, detail: str) -> None: ...
