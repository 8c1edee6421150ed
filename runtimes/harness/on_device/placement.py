"""Where Core ML means to run each operation of a package: `MLComputePlan`, summed by kind of operation and unit.

A plan is the system's own estimate, made without running the package. The cost of an operation is a share of the artifact's.
Operations that the plan gives neither a unit nor a cost, such as constants, are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runtimes.bundle import ComponentEntry
from runtimes.harness.on_device.device import DeviceError
from runtimes.harness.results import PlacedOperations, Placement, Unit
from runtimes.quiet import quiet

ASKS_FOR_NEURAL_ENGINE = "CPU_AND_NE"
MOST = 0.5  # of the estimated cost
MAIN = "main"


def read_placements(folder: Path, entry: ComponentEntry) -> Iterator[Placement]:
    """Where this Mac means to run each artifact of a component. Raises `DeviceError` where Core ML makes no plan of it."""
    with quiet():
        import coremltools as ct
        from coremltools.models.compute_plan import MLComputePlan
        from coremltools.models.utils import compile_model
    requested = entry.compute_units or "ALL"
    for artifact in entry.artifacts:
        with TemporaryDirectory() as scratch:
            try:
                compiled = compile_model(str(folder / artifact.path), str(Path(scratch) / "model.mlmodelc"))
                plan = MLComputePlan.load_from_path(compiled, compute_units=ct.ComputeUnit[requested])
            except (RuntimeError, ValueError) as error:
                raise DeviceError(f"{folder / artifact.path}: Core ML makes no compute plan: {error}") from error
            yield place(plan, entry.name, artifact.path, requested)


def place(plan: Any, name: str, artifact: str, requested: str) -> Placement:
    """The sums of a plan (`coremltools.models.compute_plan.MLComputePlan`) of one artifact. Raises `DeviceError`."""
    program = plan.model_structure.program
    if program is None or MAIN not in program.functions:
        raise DeviceError(f"{artifact} is no ML program with a function {MAIN!r}")
    counts: Counter[tuple[str, Unit]] = Counter()
    costs: dict[tuple[str, Unit], float] = {}
    for operation in _operations(program.functions[MAIN].block):
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
        if usage is None and cost is None:
            continue
        key = (_short(operation.operator_name), "unknown" if usage is None else unit_of(usage.preferred_compute_device))
        counts[key] += 1
        costs[key] = costs.get(key, 0.0) + (0.0 if cost is None else cost.weight)
    whole = max(sum(costs.values()), 1.0)  # weights are rounded, and may come to a little more than 1
    shares: dict[Unit, float] = {}
    for (_, unit), weight in costs.items():
        shares[unit] = min(shares.get(unit, 0.0) + weight / whole, 1.0)
    operations = tuple(
        PlacedOperations(operator=operator, unit=unit, count=counts[operator, unit], cost=min(weight / whole, 1.0))
        for (operator, unit), weight in sorted(costs.items(), key=lambda item: (-item[1], item[0]))
    )
    warning = _warning(requested, shares)
    return Placement(name=name, artifact=artifact, requested=requested, cost=shares, operations=operations, warning=warning)


def unit_of(device: object) -> Unit:
    """The unit that one of coremltools' compute devices stands for."""
    with quiet():
        from coremltools.models.compute_device import MLCPUComputeDevice, MLGPUComputeDevice, MLNeuralEngineComputeDevice
    units: tuple[tuple[type, Unit], ...] = (
        (MLCPUComputeDevice, "cpu"),
        (MLGPUComputeDevice, "gpu"),
        (MLNeuralEngineComputeDevice, "neural_engine"),
    )
    return next((unit for kind, unit in units if isinstance(device, kind)), "unknown")


def _warning(requested: str, shares: dict[Unit, float]) -> str | None:
    if requested != ASKS_FOR_NEURAL_ENGINE:
        return None
    if not sum(shares.values()):
        return "the Neural Engine was asked for, and the plan gives no cost to tell by"
    share = shares.get("neural_engine", 0.0)
    if share > MOST:
        return None
    return f"the Neural Engine was asked for, and is to run {share:.0%} of the estimated cost"


def _operations(block: Any) -> Iterator[Any]:
    """Every operation of a block and of the blocks inside."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _short(operator: str) -> str:
    """ "ios18.linear" -> "linear"."""
    return operator.rpartition(".")[2]
