"""What one image costs: the artifacts of a bundle in one format, each component as often as it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from runtimes.bundle import BundleError, load_manifest
from runtimes.harness.cost.operations import ArtifactCost, Listing, tally

Reader = Callable[[Path], Listing]


def _coreml(path: Path) -> Listing:
    from runtimes.harness.cost import coreml

    return coreml.read(path)


def _onnx(path: Path) -> Listing:
    from runtimes.harness.cost import onnx

    return onnx.read(path)


def _executorch(path: Path) -> Listing:
    from runtimes.harness.cost import executorch

    return executorch.read(path)


# A new format is one reader and one entry. Readers import their library when first used.
READERS: dict[str, Reader] = {"coreml": _coreml, "onnx": _onnx, "executorch": _executorch}

# The moments of a generation in their order, and the components in memory at each; before the next they are released.
MOMENTS: dict[str, tuple[str, ...]] = {
    "conditioning": ("text_encoder", "text_encoder_2", "conditioner"),
    "denoising": ("transformer",),
    "decoding": ("vae_decoder",),
}
EVERY_STEP = MOMENTS["denoising"]  # every other component runs once an image


@dataclass(frozen=True)
class ComponentCost:
    """A component and how often it runs for one image. Sums without "per image" are of one run."""

    name: str
    runs: int
    artifacts: tuple[ArtifactCost, ...]

    @property
    def macs(self) -> int:
        return sum(artifact.macs for artifact in self.artifacts)

    @property
    def stored_bytes(self) -> int:
        """Of its constants, each once an artifact."""
        return sum(artifact.stored_bytes for artifact in self.artifacts)

    @property
    def weight_bytes(self) -> int:
        """Of weights read as they are stored, as often as operations read them; of an embedding its looked-up rows."""
        return sum(artifact.weight_bytes for artifact in self.artifacts)

    @property
    def activation_bytes(self) -> int:
        """Of activations that operations read and write."""
        return sum(artifact.activation_bytes for artifact in self.artifacts)

    @property
    def boundary_bytes(self) -> int:
        """Of its artifacts' inputs and outputs."""
        return sum(artifact.boundary_bytes for artifact in self.artifacts)

    @property
    def macs_per_image(self) -> int:
        return self.runs * self.macs

    @property
    def weight_bytes_per_image(self) -> int:
        return self.runs * self.weight_bytes

    @property
    def activation_bytes_per_image(self) -> int:
        return self.runs * self.activation_bytes


@dataclass(frozen=True)
class Moment:
    """A moment of a generation, and the bytes of the weights then in memory, as they are stored.

    A runtime that unpacks, repacks or widens weights needs more, and activations come on top.
    """

    name: str
    components: tuple[str, ...]
    stored_bytes: int


@dataclass(frozen=True)
class BundleCost:
    """One image of a bundle in one format; `components` are in the order they run."""

    model: str
    target: str
    format: str
    steps: int
    components: tuple[ComponentCost, ...]

    @property
    def macs(self) -> int:
        """Per image."""
        return sum(component.macs_per_image for component in self.components)

    @property
    def weight_bytes(self) -> int:
        """Read per image."""
        return sum(component.weight_bytes_per_image for component in self.components)

    @property
    def activation_bytes(self) -> int:
        """Read and written per image."""
        return sum(component.activation_bytes_per_image for component in self.components)

    @property
    def moments(self) -> tuple[Moment, ...]:
        """Those that the bundle has components for."""
        found = []
        for name, members in MOMENTS.items():
            present = [component for component in self.components if component.name in members]
            if present:
                stored = sum(component.stored_bytes for component in present)
                found.append(Moment(name, tuple(component.name for component in present), stored))
        return tuple(found)

    def to_json(self) -> str:
        """JSON text: the sums and the operations of every component, the sums per image, and the moments."""
        components = [
            {
                "name": component.name,
                "runs": component.runs,
                "macs": component.macs,
                "stored_bytes": component.stored_bytes,
                "weight_bytes": component.weight_bytes,
                "activation_bytes": component.activation_bytes,
                "boundary_bytes": component.boundary_bytes,
                "artifacts": [asdict(artifact) for artifact in component.artifacts],
            }
            for component in self.components
        ]
        image = {"macs": self.macs, "weight_bytes": self.weight_bytes, "activation_bytes": self.activation_bytes}
        head = {"model": self.model, "target": self.target, "format": self.format, "steps": self.steps}
        cost = head | {"image": image, "moments": [asdict(moment) for moment in self.moments], "components": components}
        return json.dumps(cost, indent=2, ensure_ascii=False) + "\n"


def artifact_cost(path: Path, format: str) -> ArtifactCost:
    """One artifact: a .mlpackage folder, a model.onnx with its external data beside it, or a .pte.

    Raises `GraphError` for a file that cannot be read, and for an operation that cannot be counted, by its name.
    """
    if format not in READERS:
        raise BundleError(f"format {format!r} cannot be counted; choose from {', '.join(READERS)}")
    return tally(path.name, READERS[format](path))


def bundle_cost(bundle: Path, format: str) -> BundleCost:
    """Counts every artifact of the bundle in `format` from its file; needs no runtime and runs nothing.

    Raises `BundleError` for a bundle or a format that does not fit, and `GraphError` for an artifact, as `artifact_cost` does.
    """
    manifest = load_manifest(bundle)
    if format not in manifest.formats:
        raise BundleError(f"the bundle has no {format} artifacts; it holds {', '.join(manifest.formats)}")
    entries = {entry.name: entry for entry in manifest.components if entry.format == format}
    order = [name for members in MOMENTS.values() for name in members]
    if unknown := sorted(entries.keys() - set(order)):
        raise BundleError(f"component {unknown[0]} is none of {', '.join(order)}: how often it runs for an image is not known")
    return BundleCost(
        manifest.model.name,
        manifest.target,
        format,
        manifest.steps,
        tuple(
            ComponentCost(
                name,
                manifest.steps if name in EVERY_STEP else 1,
                tuple(artifact_cost(bundle / artifact.path, format) for artifact in entries[name].artifacts),
            )
            for name in order
            if name in entries
        ),
    )
