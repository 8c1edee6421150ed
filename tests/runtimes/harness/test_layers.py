"""Walking an artifact and a reference side by side, on a chain whose every value numpy knows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field

import numpy as np
import pytest
from rich.console import Console

from runtimes.harness.layers import ArtifactLayers, LayerReport, ReferenceValue, Visit, compare_layers
from runtimes.harness.probes import Probed

X = np.random.default_rng(0).standard_normal((4, 8))
Step = tuple[str, tuple[str, ...], Callable[..., np.ndarray]]
CHAIN: tuple[Step, ...] = (
    ("double", ("x",), lambda x: 2 * x),
    ("hidden", ("double",), np.tanh),
    ("sum", ("double", "hidden"), lambda a, b: a + b),
    ("side", ("x",), np.cos),
    ("last", ("sum", "side"), lambda a, b: a * b),
)


@dataclass
class Numbers:
    """Computes a chain in float64; as an artifact it may have other functions, names and layouts."""

    steps: tuple[Step, ...] = CHAIN
    changed: dict[str, Callable[..., np.ndarray]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _, _ in self.steps)

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.renamed.get(name, name) for name in self.names)

    def run(self, inputs: Mapping[str, np.ndarray], wanted: Set[str]) -> Iterator[Probed]:
        values = dict(inputs)
        for name, sources, function in self.steps:
            values[name] = self.changed.get(name, function)(*(values[source] for source in sources))
            key = self.renamed.get(name, name)
            yield Probed(f"op_{name}", name, key, values[name].astype(np.float32) if key in wanted else None)

    def follow(self, inputs: Mapping[str, np.ndarray], visit: Visit) -> None:
        values = dict(inputs)
        for name, sources, function in self.steps:
            values[name] = function(*(values[source] for source in sources))
            instead = visit(ReferenceValue((name,), f"module.{name}", sources, values[name]))
            values[name] = values[name] if instead is None else instead.astype(np.float64)


def walked(artifact: Numbers) -> ArtifactLayers:
    layers, operations, nodes = compare_layers(artifact, Numbers(), {"x": X}, 100)
    return ArtifactLayers("c", "torch", "c.pt", 0, 100, operations, nodes, layers)


def test_a_faithful_artifact_parts_nowhere() -> None:
    result = walked(Numbers())
    assert result.passed and (result.operations, result.nodes, len(result.layers)) == (5, 5, 5)
    assert all(layer.db > 130 for layer in result.layers)


@pytest.mark.parametrize("name", [name for name, _, _ in CHAIN])
def test_a_fault_is_named_where_it_is_and_not_where_it_shows(name: str) -> None:
    right = {step: function for step, _, function in CHAIN}[name]
    result = walked(Numbers(changed={name: lambda *given: right(*given) * 1.01 + 0.1}))
    assert result.first is not None and not result.passed
    assert (result.first.name, result.first.module) == (name, f"module.{name}")
    assert str(result.reason).startswith(f"c.pt: parts from the reference at op_{name} '{name}' of module.{name}: ")


def test_a_fault_in_an_operation_without_a_common_name_is_between() -> None:
    result = walked(Numbers(changed={"hidden": np.sin}, renamed={"hidden": "fused"}))
    assert result.first is not None and result.first.name == "sum" and result.first.between == ("op_hidden 'hidden'",)
    assert "or before it op_hidden 'hidden'" in str(result.reason)


def test_operations_in_another_order_are_joined() -> None:
    first, second, third, side, last = CHAIN
    assert walked(Numbers((side, first, second, third, last))).passed


def test_a_name_that_another_value_happens_to_have_is_no_fault() -> None:
    sign = ("flipped", ("side",), lambda a: -a)
    last = ("last", ("sum", "flipped"), lambda a, b: -a * b)
    artifact = Numbers((*CHAIN[:4], sign, last), renamed={"side": "other", "flipped": "side"})
    result = walked(artifact)
    assert result.passed and [layer.name for layer in result.layers if layer.db < 100] == ["flipped"]


def test_rounding_does_not_add_up() -> None:
    error = np.where(np.random.default_rng(2).random(X.shape) < 0.5, -1e-3, 1e-3)
    coarse = {name: lambda *given, f=function: f(*given) + error for name, _, function in CHAIN}
    layers, _, _ = compare_layers(Numbers(changed=coarse), Numbers(), {"x": X}, 40)
    assert len(layers) == 5
    for layer in layers:  # an error of 1e-3 at every operation alike, however many came before
        assert layer.db == pytest.approx(20 * np.log10(np.ptp(values()[layer.name]) / 1e-3), abs=0.1)


def values() -> dict[str, np.ndarray]:
    known = {"x": X}
    for name, sources, function in CHAIN:
        known[name] = function(*(known[source] for source in sources))
    return known


def test_images_with_channels_last_are_turned_and_other_shapes_left_out() -> None:
    image = np.random.default_rng(1).standard_normal((1, 2, 3, 5))
    chain: tuple[Step, ...] = (("a", ("x",), lambda x: x + 1), ("b", ("a",), lambda a: 2 * a))
    turned = Numbers((("a", ("x",), lambda x: (x + 1).transpose(0, 2, 3, 1)), ("b", ("x",), lambda x: (2 * x + 2).ravel())))
    layers, _, nodes = compare_layers(turned, Numbers(chain), {"x": image}, 100)
    assert [(layer.name, layer.parted) for layer in layers] == [("a", False)] and nodes == 2 and layers[0].db > 130


def test_values_that_are_no_numbers_part() -> None:
    result = walked(Numbers(changed={"hidden": lambda x: np.full_like(x, np.nan)}))
    assert result.first is not None and result.first.name == "hidden" and result.first.db == -np.inf
    assert json.loads(LayerReport("m", "t", (result,)).to_json())["artifacts"][0]["layers"][1]["db"] is None


def test_an_artifact_that_shares_no_name_fails() -> None:
    result = walked(Numbers(renamed={name: f"{name}_x" for name, _, _ in CHAIN}))
    assert not result.passed and result.reason == "c.pt: no value has a name that the reference knows"


def test_table_is_whole_at_eighty_columns() -> None:
    broken = walked(Numbers(changed={"sum": lambda a, b: a - b}))
    report = LayerReport("tiny", "ios", (walked(Numbers()), broken))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    rows = [line.split() for line in console.export_text().splitlines()]
    assert rows[-2][:3] == ["c", "torch", "5"] and rows[-2][-1] == "nowhere" and rows[-1][-1] == "sum"
    assert not report.passed and len(report.failures) == 1
