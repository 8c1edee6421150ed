"""The first operation where an artifact and a reference part.

A reference is the traced graph of the original modules, run eagerly with torch (export/layerwise.py): it shares neither the
artifact's operations nor its constants. Both run side by side. Where they compute the same value, known by its name, the two
are compared, and then the reference goes on with the artifact's value: so every figure is the error of one operation (or of
the few since the last common value) on the artifact's own inputs, and neither rounding nor compression adds up on the way.

A value that differs too much is left to the artifact: the reference goes on with its own. If nothing after it differs, the
two values only share a name (a pass has reused it, or has moved a factor past it), and they do not part there.
All figures are PSNR in dB, of one golden case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np
from rich.table import Table
from rich.text import Text

from runtimes.harness.drift import decibels_in_json, decibels_in_table
from runtimes.harness.parity import psnr
from runtimes.harness.probes import Probe, Probed
from runtimes.tables import compact_table

# Least dB of one operation by itself. On small trained and random components float32 operations have 140 dB and more, float16
# results 75; where activations are rounded to 8 bits a row, two correct implementations round some to different sides.
FLOAT32_FLOOR, FLOAT16_FLOOR, ROUNDED_FLOOR = 90.0, 55.0, 40.0
_SHOWN = 4  # operations between two common values that a message names


@dataclass(frozen=True, eq=False)
class ReferenceValue:
    """One node of the reference. names: its own, then others by which an artifact may know it; module: the checkpoint's module
    that it belongs to; sources: names of the nodes that it takes; value: None where it is no floating-point tensor."""

    names: tuple[str, ...]
    module: str
    sources: tuple[str, ...]
    value: np.ndarray | None


Visit = Callable[[ReferenceValue], np.ndarray | None]


class Reference(Protocol):
    """An eager graph that can be followed node by node."""

    @property
    def names(self) -> frozenset[str]:
        """Every name of every node."""
        ...

    def follow(self, inputs: Mapping[str, np.ndarray], visit: Visit) -> None:
        """Runs the graph; `visit` sees every node after it ran and may give what is to stand in its place."""
        ...


@dataclass(frozen=True)
class Layer:
    """One value that artifact and reference both compute.

    operation, name: in the artifact; node, module: in the reference; between: the artifact's operations since the last common
    value, which is where a fault lies if not in `operation` itself; db: PSNR on the artifact's own inputs.
    """

    operation: str
    name: str
    node: str
    module: str
    between: tuple[str, ...]
    db: float
    parted: bool

    def __str__(self) -> str:
        where = f" of {self.module}" if self.module else ""
        since = f", or before it {', '.join(self.between[-_SHOWN:])}" if self.between else ""
        return f"{self.operation} {self.name!r}{where}{since}"


@dataclass(frozen=True)
class ArtifactLayers:
    """One artifact beside its reference on one golden case, in the reference's order.

    operations: how many the artifact has; nodes: how many floating-point values the reference has.
    """

    component: str
    format: str
    artifact: str
    case: int
    floor: float
    operations: int
    nodes: int
    layers: tuple[Layer, ...]

    @property
    def first(self) -> Layer | None:
        """Where they part first; None where they never do."""
        return next((layer for layer in self.layers if layer.parted), None)

    @property
    def passed(self) -> bool:
        return bool(self.layers) and self.first is None

    @property
    def reason(self) -> str | None:
        """One line that says where they part; None where they do not."""
        if not self.layers:
            return f"{self.artifact}: no value has a name that the reference knows"
        if self.first is None:
            return None
        return (
            f"{self.artifact}: parts from the reference at {self.first}: {decibels_in_table(self.first.db)} dB by itself; "
            f"at least {self.floor:.0f} expected"
        )


@dataclass(frozen=True)
class LayerReport:
    """What `verify --per-layer` found."""

    model: str
    target: str
    artifacts: tuple[ArtifactLayers, ...]

    @property
    def passed(self) -> bool:
        return all(artifact.passed for artifact in self.artifacts)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line an artifact that parts from its reference."""
        return tuple(artifact.reason for artifact in self.artifacts if artifact.reason is not None)

    def to_json(self) -> str:
        """JSON text; a dB is a number, "identical", or null."""
        fields = asdict(self) | {"passed": self.passed}
        for artifact in fields["artifacts"]:
            for layer in artifact["layers"]:
                layer["db"] = decibels_in_json(layer["db"])
        return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> Table:
        """A line an artifact, at 80 columns or more: how many values were compared, the worst, and where they part."""
        title = f"{self.model} for {self.target}: operations beside eager torch"
        table = compact_table(title, ("artifact", "format"), ("common\nvalues", "worst\ndB", "floor\ndB"), "parts at")
        for each in self.artifacts:
            agreed = [layer.db for layer in each.layers if layer.parted or layer.db >= each.floor]
            worst = decibels_in_table(min(agreed)) if agreed else "—"
            verdict = Text("nowhere", "green") if each.passed else Text(each.first.name if each.first else "unknown", "red")
            name = each.artifact.rpartition("/model.onnx")[0] or each.artifact.rpartition(".")[0]
            table.add_row(name, each.format, str(len(each.layers)), worst, f"{each.floor:.0f}", verdict)
        return table


def compare_layers(
    probe: Probe, reference: Reference, inputs: Mapping[str, np.ndarray], floor: float
) -> tuple[tuple[Layer, ...], int, int]:
    """The common values of an artifact and a reference, and how many operations and nodes there are.

    Raises `GraphError` where the artifact cannot run.
    """
    walk = _Walk(probe, reference.names, inputs, floor)
    reference.follow(inputs, walk.visit)
    return walk.layers(), walk.operations(), walk.nodes


class _Walk:
    """Joins the artifact's values, which come in its order, to the reference's, which come in theirs."""

    def __init__(self, probe: Probe, names: frozenset[str], inputs: Mapping[str, np.ndarray], floor: float) -> None:
        self.nodes = 0
        self._floor = floor
        self._common = probe.keys & names
        self._values: Iterator[Probed] = probe.run(inputs, self._common)
        self._pulled = 0
        self._held: dict[str, tuple[Probed, tuple[str, ...]]] = {}
        self._between: list[str] = []
        self._found: list[Layer] = []
        self._nearest: dict[str, frozenset[int]] = {}  # node -> places in `_found` of the common values that it comes from
        self._followers: dict[int, list[int]] = {}

    def visit(self, node: ReferenceValue) -> np.ndarray | None:
        before = frozenset(place for source in node.sources for place in self._nearest.get(source, ()))
        self._nearest[node.names[0]] = before
        value = node.value
        if value is None:
            return None
        self.nodes += 1
        found = self._find(node.names)
        if found is None:
            return None
        probed, between = found
        made = _aligned(probed.value, value)
        if made is None or not np.isfinite(value).all() or np.ptp(value) == 0:
            return None  # another layout, a mask, or a constant: nothing that a PSNR could say
        db = psnr(made, value) if np.isfinite(made).all() else -np.inf
        place = len(self._found)
        self._found.append(Layer(probed.operation, probed.name, node.names[0], node.module, between, db, not db >= self._floor))
        for earlier in before:
            self._followers.setdefault(earlier, []).append(place)
        self._nearest[node.names[0]] = frozenset((place,))
        return None if self._found[-1].parted else made

    def layers(self) -> tuple[Layer, ...]:
        """A value that differs is where they part if one that follows from it differs too, or none follows."""
        return tuple(
            layer if not layer.parted or self._matters(place) else replace(layer, parted=False)
            for place, layer in enumerate(self._found)
        )

    def operations(self) -> int:
        """Of the artifact; runs what is left of it."""
        return self._pulled + sum(1 for _ in self._values)

    def _matters(self, place: int) -> bool:
        followers = self._followers.get(place, [])
        return not followers or any(self._found[follower].parted for follower in followers)

    def _find(self, names: tuple[str, ...]) -> tuple[Probed, tuple[str, ...]] | None:
        """The artifact's value of one of the names; values that come before it are kept for their turn."""
        for name in names:
            if name not in self._common:
                continue
            while name not in self._held:
                probed = next(self._values, None)
                if probed is None:
                    break
                self._pulled += 1
                if probed.key in self._common:
                    self._held[probed.key] = (probed, tuple(self._between))
                    self._between.clear()
                else:
                    self._between.append(f"{probed.operation} {probed.name!r}")
            if name in self._held:
                return self._held.pop(name)
        return None


def _aligned(made: np.ndarray | None, reference: np.ndarray) -> np.ndarray | None:
    """The artifact's value in the reference's shape; XNNPACK keeps images [N, H, W, C]. None where it is another value."""
    if made is None or not np.issubdtype(made.dtype, np.floating):
        return None
    if made.shape == reference.shape:
        return made
    if made.ndim == reference.ndim == 4 and made.transpose(0, 3, 1, 2).shape == reference.shape:
        return made.transpose(0, 3, 1, 2)
    return None
