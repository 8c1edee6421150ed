"""What every kind of device answers, whatever reaches it: it takes an open bundle and gives a `Result`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtimes.bundle import BundleError, ComponentEntry
from runtimes.golden import read_cases
from runtimes.graph import GraphError
from runtimes.harness.latency import Listener, OpenBundle
from runtimes.harness.results import Result
from runtimes.registry import fed


class DeviceError(GraphError):
    """A device that is not there or cannot do what was asked; the message is the one line that the user sees."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured. `threads` of the runtime, None for its own choice; `iterations` are the measured runs of each
    component; `sustained` is for how many seconds one of them is then run without a pause, None for not at all."""

    threads: int | None
    iterations: int
    sustained: float | None = None

    def __post_init__(self) -> None:
        """Raises `BundleError` for a time that is no time."""
        if self.sustained is not None and not 1 <= self.sustained <= 86_400:
            raise BundleError(f"--sustained {self.sustained:g} is not a time to run for; expected 1 to 86400 seconds")


class OnDevice(Protocol):
    """One device that was found and can be talked to; `connect` of its file makes it."""

    @property
    def host(self) -> bool:
        """Whether it is this computer."""
        ...

    @property
    def runtime(self) -> str:
        """Name, as in `runtimes.registry.RUNTIMES`, of the runtime whose artifacts it is given."""
        ...

    def check(self, opened: OpenBundle, asked: Asked) -> None:
        """Raises `DeviceError` for what this device cannot be asked; starts nothing."""
        ...

    def measure(self, opened: OpenBundle, asked: Asked, listener: Listener) -> Result:
        """The result of every component. Raises `GraphError` where one cannot be loaded or run, and leaves nothing behind."""
        ...


def artifact_inputs(opened: OpenBundle, entry: ComponentEntry) -> Iterator[dict[str, np.ndarray]]:
    """What each artifact of a component takes on the first golden case, in the types of the manifest.

    What a chunk takes from the chunks before it is computed here, with the runtime of this computer.
    """
    values = dict(next(read_cases(opened.folder, opened.manifest.golden, entry.name)).inputs)
    for artifact in entry.artifacts:
        tensors = {spec.name: fed(artifact.feed(spec.name), values) for spec in artifact.inputs}
        given = {spec.name: np.ascontiguousarray(tensors[spec.name], spec.dtype) for spec in artifact.inputs}
        yield given
        if artifact is not entry.artifacts[-1]:
            values |= opened.runtime.load(opened.folder / artifact.path, entry, None)(given)


def sustained_entry(opened: OpenBundle) -> ComponentEntry:
    """Which component is run without a pause: the transformer, which most of a picture is, or else the largest."""
    transformer = next((entry for entry in opened.components if entry.name == "transformer"), None)
    return transformer or max(opened.components, key=lambda entry: entry.bytes)
