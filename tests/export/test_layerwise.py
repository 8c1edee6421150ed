"""`verify --per-layer` finds a fault planted in one operation of an artifact of each format, and names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.components.component import Component
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, Scheme
from export.compression.stored import IntegerWeight, PaletteWeight, StoredWeight
from export.errors import UserError
from export.formats.format import EmitOptions
from export.layerwise import reference_of
from export.targets import load_format
from runtimes.executorch import load as load_pte
from runtimes.graph import TensorSpec
from runtimes.harness.layers import FLOAT16_FLOOR, FLOAT32_FLOOR, ROUNDED_FLOOR, ArtifactLayers, compare_layers
from runtimes.harness.probes import PROBES
from tests.export.small_components import seeded

WIDTH = 64
INPUTS = {"x": np.random.default_rng(3).standard_normal((1, 6, WIDTH)).astype(np.float32)}


class _Block(nn.Module):
    """Two residual blocks with a norm each: what a transformer is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(nn.functional.silu(self.up(self.norm(states))))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Block(), _Block()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.second(self.first(x)),)


COMPONENT = Component(
    "model",
    "model",
    (TensorSpec("x", "float32", (1, 6, WIDTH)),),
    (TensorSpec("y", "float32", (1, 6, WIDTH)),),
    _Model,
)
SCHEMES: dict[str, Scheme] = {
    "coreml": PaletteScheme(6),
    "onnx": IntegerScheme(8, 32),
    "executorch": IntegerScheme(8),
}
FLOORS = {"coreml": FLOAT16_FLOOR, "onnx": FLOAT32_FLOOR, "executorch": ROUNDED_FLOOR}
PLANTED = "second.up.weight"


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return seeded(COMPONENT)


@pytest.fixture(scope="module")
def made(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, StoredWeight]]]:
    """An artifact of each format and the weights it stores."""
    folder = tmp_path_factory.mktemp("artifacts")
    found = {}
    for format, scheme in SCHEMES.items():
        linears = [name for name, parameter in module.named_parameters() if parameter.ndim == 2]
        wide = FloatScheme(32 if format == "executorch" else 16)
        rest = [name for name, parameter in module.named_parameters() if parameter.ndim == 1]
        recipe = dict.fromkeys(linears, scheme) | (dict.fromkeys(rest, wide) if format != "onnx" else {})
        stored = round_weights(dict(module.named_parameters()), recipe)
        (artifact,) = load_format(format).emit(COMPONENT, module, stored, folder, EmitOptions())
        found[format] = artifact.path, stored
    return found


def layers_of(format: str, path: Path, module: nn.Module, stored: dict[str, StoredWeight]) -> ArtifactLayers:
    reference = reference_of(format, COMPONENT, module, stored)
    layers, operations, nodes = compare_layers(PROBES[format](path), reference, INPUTS, FLOORS[format])
    return ArtifactLayers("model", format, path.name, 0, FLOORS[format], operations, nodes, layers)


@pytest.mark.parametrize("format", list(SCHEMES))
def test_a_faithful_artifact_parts_nowhere(format: str, made: dict, module: nn.Module) -> None:
    path, stored = made[format]
    result = layers_of(format, path, module, stored)
    assert result.passed, result.reason
    assert len(result.layers) >= 10
    assert {layer.module for layer in result.layers} >= {"first.up", "first.down", "second.up", "second.down", "second.norm"}


@pytest.mark.parametrize("format", list(SCHEMES))
def test_a_fault_in_one_weight_is_named(format: str, made: dict, module: nn.Module, tmp_path: Path) -> None:
    path, stored = made[format]
    broken = PLANT[format](path, stored[PLANTED], tmp_path)
    result = layers_of(format, broken, module, stored)
    assert result.first is not None and result.first.module == "second.up", result.layers
    operations = {"coreml": "linear", "onnx": "MatMulNBits", "executorch": "FullyConnected"}
    assert result.first.operation == operations[format]
    assert "of second.up" in str(result.reason)


def plant_in_package(path: Path, weight: StoredWeight, folder: Path) -> Path:
    """Some entries of the palette of one weight change places with others."""
    assert isinstance(weight, PaletteWeight)
    broken = folder / path.name
    shutil.copytree(path, broken)
    palette = weight.palettes.reshape(-1)
    (file,) = broken.rglob("weight.bin")
    content = file.read_bytes()
    assert content.count(palette.tobytes()) == 1
    file.write_bytes(content.replace(palette.tobytes(), np.roll(palette, 4).tobytes()))
    return broken


def plant_in_onnx(path: Path, weight: StoredWeight, folder: Path) -> Path:
    """One initializer: the scales of one linear are off by a tenth."""
    shutil.copytree(path.parent, folder / "model")
    model = onnx.load(str(folder / "model" / "model.onnx"))
    (scales,) = (each for each in model.graph.initializer if each.name == f"{PLANTED}.scales")
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * np.float32(1.1), scales.name))
    onnx.save(model, str(folder / "model" / "model.onnx"))
    return folder / "model" / "model.onnx"


def plant_in_pte(path: Path, weight: StoredWeight, folder: Path) -> Path:
    """The integers of one linear are turned around."""
    assert isinstance(weight, IntegerWeight)
    content = path.read_bytes()
    assert content.count(weight.ints.tobytes()) == 1
    broken = folder / path.name
    broken.write_bytes(content.replace(weight.ints.tobytes(), np.ascontiguousarray(weight.ints[::-1]).tobytes()))
    return broken


PLANT = {"coreml": plant_in_package, "onnx": plant_in_onnx, "executorch": plant_in_pte}


def test_what_is_probed_in_a_pte_is_what_the_pte_computes(made: dict) -> None:
    path, _ = made["executorch"]
    probe = PROBES["executorch"](path)
    *_, last = probe.run(INPUTS, probe.keys)
    assert last.value is not None
    np.testing.assert_array_equal(last.value, load_pte(path)(INPUTS)["y"])


def test_the_reference_computes_what_the_module_does(module: nn.Module) -> None:
    with torch.no_grad():
        (expected,) = module(torch.from_numpy(INPUTS["x"]))
    seen: dict[str, np.ndarray] = {}
    for format in SCHEMES:
        reference = reference_of(format, COMPONENT, module, {})
        reference.follow(INPUTS, lambda node: seen.update(dict.fromkeys(node.names, node.value)))
        np.testing.assert_allclose(seen.pop("y"), expected.numpy(), atol=1e-5)


def test_a_format_without_a_trace_is_one_line(module: nn.Module) -> None:
    with pytest.raises(UserError, match="--per-layer cannot walk torch artifacts; choose from coreml, onnx, executorch"):
        reference_of("torch", COMPONENT, module, {})
