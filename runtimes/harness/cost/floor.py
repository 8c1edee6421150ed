"""The least time that an image can take on a device: an estimate from its published peaks, never a measurement.

The roofline model (Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52(4), 2009): work takes at least
as long as its multiply-accumulates at the peak rate, and at least as long as its bytes at the peak bandwidth of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtimes.harness.cost.bundle import BundleCost, ComponentCost
from runtimes.harness.devices import Device

LABEL = "estimate"


@dataclass(frozen=True)
class ComponentFloor:
    """Seconds per image of one component, all its runs together.

    compute: its multiply-accumulates at the device's peak; None where no peak is published. memory: what has to move in every
    run, that is the weights as stored and the graph's inputs and outputs, at the peak bandwidth; activations in between may
    stay on the chip. seconds: the larger. unfused: the same for each operation by itself, with its activations through memory:
    the least for a runtime that fuses nothing and has no cache.
    """

    name: str
    compute: float | None
    memory: float
    unfused: float

    @property
    def seconds(self) -> float:
        return max(self.compute or 0.0, self.memory)

    @property
    def bound(self) -> str:
        """What the floor comes from, "compute" or "memory"."""
        return "compute" if self.compute is not None and self.compute >= self.memory else "memory"


@dataclass(frozen=True)
class BundleFloor:
    """Seconds per image on a device. Where it has no published compute peak, the memory alone is counted."""

    device: Device
    components: tuple[ComponentFloor, ...]
    label: str = LABEL

    @property
    def seconds(self) -> float:
        """Per image, one component after another."""
        return sum(component.seconds for component in self.components)

    @property
    def unfused(self) -> float:
        return sum(component.unfused for component in self.components)

    @property
    def compute(self) -> float | None:
        parts = [component.compute for component in self.components if component.compute is not None]
        return sum(parts) if parts else None

    @property
    def memory(self) -> float:
        return sum(component.memory for component in self.components)


def floor_seconds(cost: BundleCost, device: Device) -> BundleFloor:
    """The floor of one image. A model whose weights fit into the chip's cache may beat the part that comes from memory."""
    return BundleFloor(device, tuple(_component(component, device) for component in cost.components))


def _component(component: ComponentCost, device: Device) -> ComponentFloor:
    moved = component.weight_bytes + component.boundary_bytes
    operations = [operation for artifact in component.artifacts for operation in artifact.operations]
    unfused = sum(
        max(device.compute_seconds(each.macs) or 0.0, device.memory_seconds(each.weight_bytes + each.activation_bytes))
        for each in operations
    )
    compute = device.compute_seconds(component.macs)
    return ComponentFloor(
        component.name,
        None if compute is None else component.runs * compute,
        component.runs * device.memory_seconds(moved),
        component.runs * unfused,
    )
