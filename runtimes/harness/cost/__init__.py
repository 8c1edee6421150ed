"""What an image costs, from the artifacts themselves: multiply-accumulates, bytes, and the least time on a named device.

    cost = bundle_cost(Path("bundles/flash-mini/ios"), "coreml")
    floor = floor_seconds(cost, DEVICES["A17 Pro"])

Nothing is run and no weight is decompressed. `operations.py` says what exactly is counted, `floor.py` what a floor leaves out.
"""

from runtimes.harness.cost.bundle import BundleCost, ComponentCost, Moment, artifact_cost, bundle_cost
from runtimes.harness.cost.floor import BundleFloor, ComponentFloor, floor_seconds
from runtimes.harness.cost.operations import ArtifactCost, OperationCost
from runtimes.harness.cost.tables import cost_table, floor_table, memory_table

__all__ = [
    "ArtifactCost",
    "BundleCost",
    "BundleFloor",
    "ComponentCost",
    "ComponentFloor",
    "Moment",
    "OperationCost",
    "artifact_cost",
    "bundle_cost",
    "cost_table",
    "floor_seconds",
    "floor_table",
    "memory_table",
]
