"""Costs as tables that a terminal of 80 columns shows whole."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from runtimes.harness.cost.bundle import BundleCost
from runtimes.harness.cost.floor import LABEL, floor_seconds
from runtimes.harness.devices import Device
from runtimes.tables import compact_table, megabytes

_SIDE_BY_SIDE = 6  # devices that fit beside each other


def cost_table(cost: BundleCost) -> Table:
    """A line a component, and one for the image. Stored: its constants. Read: weights, then activations, an image."""
    figures = ("runs", "GMAC\na run", "GMAC\nan image", "MB\nstored", "weights\nMB read", "activations\nMB moved")
    table = compact_table(_title(cost, "cost of an image"), ("component",), figures)
    for each in cost.components:
        table.add_row(
            each.name,
            str(each.runs),
            _giga(each.macs),
            _giga(each.macs_per_image),
            megabytes(each.stored_bytes),
            megabytes(each.weight_bytes_per_image),
            megabytes(each.activation_bytes_per_image),
        )
    stored = sum(each.stored_bytes for each in cost.components)
    table.add_section()
    table.add_row(
        "image", "", "", _giga(cost.macs), megabytes(stored), megabytes(cost.weight_bytes), megabytes(cost.activation_bytes)
    )
    return table


def floor_table(cost: BundleCost, devices: Sequence[Device]) -> Table:
    """A line a device: milliseconds of compute and of memory for an image, the floor, and the same without fusion.

    "—": the vendor publishes no peak, and the floor is that of memory alone.
    """
    figures = ("compute\nms", "memory\nms", "floor\nms", "unfused\nms")
    table = compact_table(_title(cost, f"least time of an image, {LABEL}"), ("device",), figures, "peak")
    for device in devices:
        floor = floor_seconds(cost, device)
        table.add_row(
            device.name,
            "—" if floor.compute is None else _milliseconds(floor.compute),
            _milliseconds(floor.memory),
            _milliseconds(floor.seconds),
            _milliseconds(floor.unfused),
            "not published" if device.peak is None else f"{device.peak.value:g} {device.peak.unit}",
        )
    return table


def memory_table(cost: BundleCost, devices: Sequence[Device]) -> Table:
    """A line a moment: megabytes of stored weights in memory, and their share of what an app may use on each device."""
    if len(devices) > _SIDE_BY_SIDE:
        raise ValueError(f"{len(devices)} devices do not fit beside each other; pass at most {_SIDE_BY_SIDE}")
    headings = [f"{device.short}\n%" for device in devices]
    table = compact_table(_title(cost, f"weights in memory of an app's limit, {LABEL}"), ("moment",), ("MB", *headings))
    for moment in cost.moments:
        shares = [f"{100 * moment.stored_bytes / device.app_limit.value:.1f}" for device in devices]
        table.add_row(moment.name, megabytes(moment.stored_bytes), *shares)
    table.add_section()
    table.add_row("limit, GB", "", *(f"{device.app_limit.value / 1e9:.1f}" for device in devices))
    return table


def _title(cost: BundleCost, what: str) -> str:
    return f"{cost.model} for {cost.target} ({cost.format}): {what}"


def _giga(macs: int) -> str:
    return f"{macs / 1e9:,.3f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"
