"""The cost model against independent counts: formulas by hand, torch's own counter, and the bytes of what was stored."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export.components.component import Component
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, Scheme
from export.formats.coreml import CoreMLFormat
from export.formats.executorch import ExecuTorchFormat
from export.formats.format import EmitOptions, Format, example_inputs
from export.formats.onnx import OnnxFormat
from runtimes.bundle import (
    ArtifactEntry,
    BundleError,
    ComponentEntry,
    Feed,
    GoldenEntry,
    GoldenPrompt,
    ImageSize,
    LatentLayout,
    LicenceEntry,
    Manifest,
    ModelEntry,
    RecipeEntry,
    TensorEntry,
    describe_files,
    write_manifest,
)
from runtimes.coreml.operations import OPERATIONS
from runtimes.graph import GraphError, TensorSpec
from runtimes.harness.cost import (
    ArtifactCost,
    BundleCost,
    ComponentCost,
    OperationCost,
    artifact_cost,
    bundle_cost,
    coreml,
    cost_table,
    floor_seconds,
    floor_table,
    memory_table,
)
from runtimes.harness.cost.operations import Listing, Step, Value, attention_macs, einsum_macs, tally
from runtimes.harness.devices import DEVICES, Device, Figure
from tests.export.small_components import decoder, encoder, seeded
from tests.runtimes.coreml.mil import mb, package

FORMATS: dict[str, Format] = {"coreml": CoreMLFormat(), "onnx": OnnxFormat(), "executorch": ExecuTorchFormat()}
WEIGHT_BYTES = {"coreml": 2, "onnx": 4, "executorch": 4}  # of a weight that is stored as the format stores floats


class _One(nn.Module):
    """A single layer that returns a tuple, as components do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(*inputs),)


class _Layers(nn.Module):
    """One of each kind of layer, side by side, no two of an equal cost."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 40, bias=False)  # ONNX adds a bias by an operation of its own
        self.convolution = nn.Conv2d(4, 12, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.transposed = nn.ConvTranspose2d(10, 12, 3, stride=2)
        self.embedding = nn.Embedding(50, 12)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        states, image, channels, small, query, key, value, ids = inputs
        attention = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
        images = self.convolution(image), self.depthwise(channels), self.transposed(small)
        return (self.linear(states), *images, attention, self.embedding(ids))


SHAPES = ((1, 5, 24), (1, 4, 9, 6), (1, 12, 5, 7), (1, 10, 4, 3), (2, 6, 8), (2, 10, 8), (2, 10, 4), (1, 5))
MACS = {
    "linear": 5 * 24 * 40,
    "convolution": (12 * 5 * 3) * (2 * 3 * 3),
    "depthwise": (12 * 5 * 7) * (3 * 3),
    "transposed": (10 * 4 * 3) * (12 * 3 * 3),
    "query by key": 2 * 6 * 10 * 8,
    "scores by value": 2 * 6 * 10 * 4,
}


def component_of(name: str, make: Callable[[], nn.Module], shapes: Sequence[tuple[int, ...]]) -> Component:
    """Inputs of two dimensions are token ids, all others numbers."""
    inputs = tuple(TensorSpec(f"x{i}", "int32" if len(each) == 2 else "float32", each) for i, each in enumerate(shapes))
    with torch.no_grad():
        results = make()(*example_inputs(inputs))
    outputs = tuple(TensorSpec(f"y{i}", "float32", tuple(each.shape)) for i, each in enumerate(results))
    return Component(name, name, inputs, outputs, make)


def linear(name: str, inputs: int = 16, outputs: int = 16) -> Component:
    return component_of(name, lambda: _One(nn.Linear(inputs, outputs)), [(1, 3, inputs)])


def emit(
    component: Component, module: nn.Module, format: str, folder: Path, schemes: Mapping[str, Scheme] | None = None
) -> Path:
    stored = round_weights(dict(module.named_parameters()), dict(schemes or {}))
    (artifact,) = FORMATS[format].emit(component, module, stored, folder, EmitOptions(deployment_target="iOS18"))
    return artifact.path


def torchs_count(component: Component, module: nn.Module) -> int:
    """torch counts a multiplication and an addition as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*example_inputs(component.inputs))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("format", FORMATS)
def test_layers_cost_what_formulas_and_torch_say(format: str, tmp_path: Path) -> None:
    component = component_of("layers", _Layers, SHAPES)
    module = seeded(component)
    assert torchs_count(component, module) == sum(MACS.values())
    cost = artifact_cost(emit(component, module, format, tmp_path), format)
    read = {operation.macs: operation.weight_bytes for operation in cost.operations if operation.macs}
    assert sorted(read) == sorted(MACS.values()) and cost.macs == sum(MACS.values())

    sizes = {name: WEIGHT_BYTES[format] * sum(p.numel() for p in layer.parameters()) for name, layer in module.named_children()}
    if format == "coreml":
        sizes["linear"] += 40 * 2  # a bias of zeros, which conversion stores
    assert {name: read[macs] for name, macs in MACS.items()} == {name: sizes.get(name, 0) for name in MACS}
    assert 0 <= cost.stored_bytes - sum(sizes.values()) <= 32  # formats differ in the few numbers that guard an index
    (look_up,) = (each for each in cost.operations if each.type in ("gather", "Gather", "aten::embedding.out"))
    assert look_up.weight_bytes == 5 * 12 * WEIGHT_BYTES[format] < sizes["embedding"]
    specs = [*component.inputs, *component.outputs]
    assert cost.boundary_bytes == sum(4 * math.prod(spec.shape) for spec in specs)


@pytest.mark.parametrize("make", [encoder, decoder])
def test_a_component_costs_the_same_in_every_format(make: Callable[[], Component], tmp_path: Path) -> None:
    component = make()
    module = seeded(component)
    counts = {format: artifact_cost(emit(component, module, format, tmp_path), format).macs for format in FORMATS}
    assert set(counts.values()) == {torchs_count(component, module)}


@pytest.mark.parametrize(("format", "scheme"), [
    ("coreml", PaletteScheme(6)),
    ("coreml", PaletteScheme(3, 8, scaled=True)),
    ("onnx", IntegerScheme(4, 32)),
    ("onnx", IntegerScheme(8, 64)),
    ("executorch", IntegerScheme(8)),
    ("executorch", IntegerScheme(4, 32, bfloat16_scales=True)),
])
def test_compressed_weights_count_as_they_are_stored(format: str, scheme: Scheme, tmp_path: Path) -> None:
    component = linear("linear", 64, 48)
    module = seeded(component)
    path = emit(component, module, format, tmp_path, {"layer.weight": scheme, "layer.bias": FloatScheme(32)})
    cost = artifact_cost(path, format)
    (weight,) = round_weights(dict(module.named_parameters()), {"layer.weight": scheme}).values()
    assert cost.macs == 3 * 64 * 48
    assert cost.stored_bytes == cost.weight_bytes == weight.nbytes + 48 * WEIGHT_BYTES[format]


def test_multi_head_attention_counts_both_of_its_products(tmp_path: Path) -> None:
    tokens, others, heads, size, value = 3, 5, 2, 9, 8
    shapes = {"q": (1, tokens, heads * size), "k": (1, others, heads * size), "v": (1, others, heads * value)}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, tokens, heads * value))
    node = helper.make_node("MultiHeadAttention", [*shapes], ["y"], domain="com.microsoft", num_heads=heads)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "attention.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=opsets), str(path))
    assert artifact_cost(path, "onnx").macs == heads * tokens * others * (size + value)


def test_tensors_that_share_what_is_stored_take_it_once_and_read_it_each() -> None:
    listing = Listing(
        steps=[Step("a", "mul", 0, ("x", "w"), ("a",)), Step("b", "mul", 0, ("a", "v"), ("b",))],
        values={name: Value((10,), 16) for name in ("x", "w", "v", "a", "b")},
        stored={"w": {"indices": 8, "palette": 4}, "v": {"others": 6, "palette": 4}},
        inputs=("x",),
        outputs=("b",),
    )
    cost = tally("shared", listing)
    assert (cost.stored_bytes, cost.weight_bytes, cost.activation_bytes, cost.boundary_bytes) == (18, 22, 80, 40)


def test_what_depends_on_constants_alone_is_no_operation(tmp_path: Path) -> None:
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [4, 4], [1.0] * 16) for name in ("a", "b")]
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("MatMul", ["x", "c"], ["y"])]
    (only,) = artifact_cost(save(tmp_path / "constants.onnx", nodes, weights), "onnx").operations
    assert (only.name, only.macs, only.weight_bytes) == ("y", 2 * 4 * 4, 2 * 64)


def save(path: Path, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> Path:
    """A graph from x to y, float32 [2, 4]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy")
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=opset), str(path))
    return path


def test_einsums_and_attention_by_hand() -> None:
    assert einsum_macs("bik,bkj->bij", [(2, 3, 4), (2, 4, 5)]) == 2 * 3 * 4 * 5
    assert einsum_macs("nhwpqc->nchpwq", [(1, 2, 3, 4, 5, 6)]) == 0
    assert attention_macs((2, 6, 8), (2, 10, 8), (2, 10, 4)) == 2 * 6 * 10 * 12
    pair = [(1, 2), (2, 3)]
    for equation, shapes in (("ab,bc,cd->ad", [*pair, (3, 4)]), ("...a,ab->...b", pair), ("ab,bc", pair), ("ab->c", pair[:1])):
        with pytest.raises(ValueError, match="einsum"):
            einsum_macs(equation, shapes)


def test_every_operation_of_the_executor_is_classified() -> None:
    counted = {"conv", "conv_transpose", "einsum", "linear", "matmul", "scaled_dot_product_attention"}
    refused = {"affine", "crop_resize", "lstm", "resample", "rnn"}
    assert set(OPERATIONS) == coreml.NO_MACS | counted | refused and not coreml.NO_MACS & (counted | refused)


class _Distances(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return (torch.cdist(first, second),)


def test_operations_that_cannot_be_counted_are_refused_by_name(tmp_path: Path) -> None:
    component = component_of("distances", _Distances, [(1, 3, 4), (1, 5, 4)])
    program = emit(component, seeded(component), "executorch", tmp_path)
    with pytest.raises(GraphError, match=r"distances\.pte: operation aten::_cdist_forward\.out .* is none that the cost model"):
        artifact_cost(program, "executorch")
    nodes = [helper.make_node("DeformConv", ["x", "x", "x"], ["y"])]
    with pytest.raises(GraphError, match=r"odd\.onnx: operation DeformConv \(output 'y'\) is none that the cost model"):
        artifact_cost(save(tmp_path / "odd.onnx", nodes, []), "onnx")

    def build(x: object) -> object:
        boxes = mb.const(val=torch.zeros(1, 1, 4, 1, 1).numpy())
        return mb.crop_resize(x=x, roi=boxes, target_height=2, target_width=2)

    odd = package(tmp_path / "odd.mlpackage", build, {"x": torch.zeros(1, 1, 4, 4).numpy()}, 6)
    with pytest.raises(GraphError, match=r"odd\.mlpackage: operation crop_resize .* is none that the cost model"):
        artifact_cost(odd, "coreml")


def test_files_that_are_no_artifact_are_one_line(tmp_path: Path) -> None:
    component = linear("linear")
    whole = emit(component, seeded(component), "executorch", tmp_path).read_bytes()
    other = tmp_path / "other"
    for content in (b"", b"nothing of the kind", whole[:40], whole[:200], whole[: len(whole) // 2]):
        other.write_bytes(content)
        with pytest.raises(GraphError, match="other") as caught:
            artifact_cost(other, "executorch")
        assert "\n" not in str(caught.value)
    other.write_bytes(b"\x08\x0anothing of the kind")
    with pytest.raises(GraphError, match="is no ONNX model") as caught:
        artifact_cost(other, "onnx")
    assert "\n" not in str(caught.value)
    for format in FORMATS:
        with pytest.raises(GraphError, match="nowhere"):
            artifact_cost(tmp_path / "nowhere", format)
    with pytest.raises(BundleError, match="format 'torch' cannot be counted; choose from coreml"):
        artifact_cost(other, "torch")


def entries(specs: tuple[TensorSpec, ...], names: Mapping[str, str]) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(name=names.get(s.name, s.name), dtype=s.dtype, shape=s.shape) for s in specs)


def write_bundle(folder: Path) -> Manifest:
    """A bundle of linears in ONNX: a text encoder, a transformer of two chunks for three steps, and a decoder."""
    folder.mkdir()
    chunks = {"text_encoder": ("text_encoder",), "transformer": ("transformer_chunk1", "transformer_chunk2"),
              "vae_decoder": ("vae_decoder",)}
    components = []
    for name, parts in chunks.items():
        artifacts = []
        for number, part in enumerate(parts):
            component = linear(part)
            emit(component, seeded(component), "onnx", folder)
            output = {"y0": f"y{number}"}
            feeds = (Feed(input="x0", tensor=f"y{number - 1}"),) if number else ()
            artifacts.append(
                ArtifactEntry(path=f"{part}/model.onnx", files=describe_files(folder, [part]), feeds=feeds,
                              inputs=entries(component.inputs, {}), outputs=entries(component.outputs, output))
            )
        components.append(
            ComponentEntry(name=name, format="onnx", inputs=artifacts[0].inputs, outputs=artifacts[-1].outputs,
                           artifacts=tuple(artifacts), precision="float32", bits=32, weights=272 * len(parts),
                           stored_bytes=1088 * len(parts))
        )
    (folder / "text").write_text("text\n")
    text = describe_files(folder, ["text"])
    manifest = Manifest(
        model=ModelEntry(name="tiny", family="sd3", fingerprint="0" * 64), target="android", contract="flash", rewrites=(),
        formats=("onnx",), components=tuple(components), sigmas=(1.0, 0.9, 0.5, 0.0),
        image_size=ImageSize(height=16, width=16),
        latent=LatentLayout(channels=4, height=2, width=2, vae_factor=8, scaling_factor=1, shift_factor=0), tokenizers=(),
        recipe=RecipeEntry(name="none", bits=32, calibrated=False, schemes=()),
        golden=GoldenEntry(prompts=(GoldenPrompt(prompt="a", seed=0),), components=(), images="text", files=text),
        licence=LicenceEntry(name="none", attribution="tests", files=()), resources=(), tools={},
    )
    write_manifest(folder, manifest)
    return manifest


def test_a_bundle_is_summed_over_an_image_as_often_as_each_part_runs(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "tiny")
    cost = bundle_cost(tmp_path / "tiny", "onnx")
    assert [(each.name, each.runs, each.macs) for each in cost.components] == [
        ("text_encoder", 1, 768), ("transformer", 3, 1536), ("vae_decoder", 1, 768),
    ]
    assert cost.macs == 768 + 3 * 1536 + 768
    weights, values = (16 * 16 + 16) * 4, 3 * 16 * 4
    assert cost.weight_bytes == (1 + 3 * 2 + 1) * weights
    assert all(each.boundary_bytes == len(each.artifacts) * 2 * values for each in cost.components)
    assert [(each.name, each.stored_bytes) for each in cost.moments] == [
        ("conditioning", weights), ("denoising", 2 * weights), ("decoding", weights),
    ]
    written = json.loads(cost.to_json())
    assert written["image"]["macs"] == cost.macs and written["steps"] == 3
    assert written["components"][1]["artifacts"][0]["operations"][0]["type"]
    with pytest.raises(BundleError, match="no coreml artifacts; it holds onnx"):
        bundle_cost(tmp_path / "tiny", "coreml")
    renamed = manifest.components[0].model_copy(update={"name": "upscaler"})
    write_manifest(tmp_path / "tiny", manifest.model_copy(update={"components": (renamed,)}))
    with pytest.raises(BundleError, match="component upscaler is none of text_encoder"):
        bundle_cost(tmp_path / "tiny", "onnx")


def big() -> BundleCost:
    """Terabytes and teramacs: the widest figures that tables show."""
    operations = tuple(OperationCost(name, "conv", 5 * 10**11, 10**9, 2 * 10**9, 10**9) for name in "ab")
    artifact = ArtifactCost("model", operations, 2 * 10**9, 10**9)
    names = {"text_encoder_2": 1, "transformer": 4, "vae_decoder": 1}
    components = tuple(ComponentCost(name, runs, (artifact,)) for name, runs in names.items())
    return BundleCost("sd3.5-flash", "android", "executorch", 4, components)


def test_the_floor_is_the_larger_of_compute_and_memory() -> None:
    cost, source = big(), Figure(1, "bytes", "a", "b")
    device = Device("d", "d", "p", Figure(10, "TOPS", "int8", "b"), Figure(100, "GB/s", "a", "b"), source, source)
    floor = floor_seconds(cost, device)
    encoder_floor, transformer_floor, _ = floor.components
    assert encoder_floor.compute == pytest.approx(2 * 10**12 / 10**13) and encoder_floor.bound == "compute"
    assert encoder_floor.memory == pytest.approx((2 * 10**9 + 10**9) / 10**11)
    assert encoder_floor.unfused == pytest.approx(2 * max(0.1, 0.04))
    assert transformer_floor.seconds == pytest.approx(4 * 0.2) and floor.seconds == pytest.approx(6 * 0.2)
    without = floor_seconds(cost, replace(device, peak=None))
    assert without.compute is None and without.components[0].bound == "memory"
    assert without.seconds == without.memory == pytest.approx(6 * 0.03) and without.unfused == pytest.approx(6 * 0.08)
    assert floor.label == "estimate"


def test_devices_say_where_every_figure_comes_from() -> None:
    assert list(DEVICES) == ["A17 Pro", "A18 Pro", "M2", "M4", "Snapdragon 8 Gen 3", "Snapdragon 8 Elite"]
    for device in DEVICES.values():
        for figure in (device.peak, device.bandwidth, device.memory, device.app_limit):
            assert figure is None or (figure.value > 0 and figure.basis and figure.source)
        assert "rule of thumb" in device.app_limit.basis and device.app_limit.value < device.memory.value
        assert device.peak is None or "precision" in device.peak.basis


def test_tables_fit_80_columns_and_say_estimate() -> None:
    cost, devices = big(), list(DEVICES.values())
    printed = io.StringIO()
    console = Console(file=printed, width=80)
    for table in (cost_table(cost), floor_table(cost, devices), memory_table(cost, devices)):
        console.print(table)
    text = printed.getvalue()
    assert "…" not in text and text.count("estimate") == 2 and "not published" in text
    assert "6,000.000" in text and "12,000.00" in text
    with pytest.raises(ValueError, match="do not fit beside each other"):
        memory_table(cost, [*devices, *devices])
