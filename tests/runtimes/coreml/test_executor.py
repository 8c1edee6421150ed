"""What the executor models, what it reports, and how it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.coreml import load, load_executor
from runtimes.coreml.operations import OPERATIONS
from runtimes.coreml.package import open_package
from runtimes.coreml.program import read_program
from runtimes.coreml.schema import Model
from runtimes.graph import GraphError, TensorSpec
from tests.runtimes.coreml.mil import MODEL, ct, mb, package, run, write

RNG = np.random.default_rng(2)
X = RNG.standard_normal((2, 8)).astype(np.float16)
EVERY_HALF = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)


def layer(x: Any) -> Any:
    hidden = mb.linear(x=x, weight=np.full((4, 8), 0.5, np.float16), name="hidden")
    return mb.gelu(x=hidden, name="result")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return package(tmp_path / "model.mlpackage", layer, {"x": X})


# -- arithmetic ------------------------------------------------------------------------------------------------------


NO_FLOATS = {"logical_not", "non_zero", "shape"}
UNARY = {name for name, each in OPERATIONS.items() if each.stored and list(each.parameters) == ["x"]}


@pytest.mark.parametrize("name", sorted(UNARY - NO_FLOATS))
def test_float16_kernels_equal_float32_rounded_once(name: str) -> None:
    """Operations that run on float16 as it is stored, over every float16 there is."""
    function = OPERATIONS[name].function
    torch.testing.assert_close(function(EVERY_HALF), function(EVERY_HALF.float()).half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "real_div", "maximum", "minimum"])
def test_binary_float16_kernels_equal_float32_rounded_once(name: str) -> None:
    function = OPERATIONS[name].function
    generator = torch.Generator().manual_seed(0)
    other = EVERY_HALF[torch.randperm(EVERY_HALF.numel(), generator=generator)]
    result, reference = function(EVERY_HALF, other), function(EVERY_HALF.float(), other.float()).half()
    torch.testing.assert_close(result, reference, rtol=0, atol=0, equal_nan=True)


def test_matrix_products_accumulate_in_float32(tmp_path: Path) -> None:
    """4096 products of 1/64: in float16 the sum would stall at 32 (where half a unit in the last place is 1/64)."""
    x = np.ones((1, 4096), np.float16)
    weight = np.full((2, 4096), 1 / 64, np.float16)
    (result,) = run(tmp_path / "a.mlpackage", lambda x: mb.linear(x=x, weight=weight), {"x": x})
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, np.full((1, 2), 64, np.float16))


def test_separate_operations_are_rounded_separately(tmp_path: Path) -> None:
    x = np.full((3,), 2048, np.float16)
    one = np.float16(1)
    (result,) = run(tmp_path / "a.mlpackage", lambda x: mb.sub(x=mb.add(x=x, y=one), y=np.float16(2048)), {"x": x})
    np.testing.assert_array_equal(result, np.zeros(3, np.float16))  # 2049 is no float16


def test_float32_values_stay_float32(tmp_path: Path) -> None:
    x = np.full((3,), 1e6, np.float32)
    (result,) = run(tmp_path / "a.mlpackage", lambda x: mb.add(x=x, y=np.float32(0.0625)), {"x": x})
    np.testing.assert_array_equal(result, np.full(3, 1e6 + 0.0625, np.float32))


def test_overflow_is_infinite(tmp_path: Path) -> None:
    x = np.array([300, 10, -300], np.float16)
    (result,) = run(tmp_path / "a.mlpackage", lambda x: mb.mul(x=mb.square(x=x), y=x), {"x": x})
    np.testing.assert_array_equal(result, np.array([np.inf, 1000, -np.inf], np.float16))


# -- reports ---------------------------------------------------------------------------------------------------------


def test_ranges_report_a_planted_overflow(tmp_path: Path) -> None:
    x = np.array([[100, 2], [1, 400]], np.float16)
    large = np.array([1e5, 1.0], np.float32)
    rounded = package(tmp_path / "cast.mlpackage", lambda x: mb.cast(x=x, dtype="fp16", name="rounded"), {"x": large})
    (cast,) = load_executor(rounded).ranges({"x": large})
    assert (cast.operation, cast.largest, cast.non_finite) == ("cast", 1e5, 1)

    def build(x: Any) -> Any:
        squares = mb.square(x=x, name="squares")
        return mb.mul(x=mb.reduce_mean(x=squares, axes=[-1], name="mean"), y=np.float16(1e-3), name="scaled")

    executor = load_executor(package(tmp_path / "a.mlpackage", build, {"x": x}))
    ranges = {each.name: each for each in executor.ranges({"x": x})}
    assert list(ranges) == ["squares", "mean", "scaled"]
    squares = ranges["squares"]
    assert (squares.operation, squares.largest, squares.non_finite, squares.elements) == ("square", 160000.0, 1, 4)
    assert squares.share == pytest.approx(160000 / 65504)
    assert ranges["mean"].non_finite == 1
    assert ranges["mean"].largest == pytest.approx(5002, rel=1e-3)
    assert ranges["mean"].share < 0.08


def test_intermediates_come_in_order_with_their_values(path: Path) -> None:
    executor = load_executor(path)
    seen = []
    for each in executor.intermediates({"x": X}):
        assert not torch.is_inference_mode_enabled()  # the caller's own torch code is not affected
        seen.append(each)
    assert [(each.operation, each.name) for each in seen] == [("linear", "hidden"), ("gelu", "result")]
    np.testing.assert_array_equal(
        seen[0].value, (X.astype(np.float32).sum(1, keepdims=True) * 0.5).astype(np.float16).repeat(4, 1)
    )
    np.testing.assert_array_equal(seen[1].value, executor({"x": X})["result"])


def test_inputs_and_outputs_are_declared(path: Path) -> None:
    graph = load(path)
    assert graph.inputs == (TensorSpec("x", "float16", (2, 8)),)
    assert graph.outputs == (TensorSpec("result", "float16", (2, 4)),)
    with pytest.raises(GraphError, match="missing \\['x'\\], unexpected \\['y'\\]"):
        graph({"y": X})
    with pytest.raises(GraphError, match="has shape"):
        graph({"x": X[:1]})


def test_an_output_may_be_an_input_or_a_constant(tmp_path: Path) -> None:
    constant = np.arange(6, dtype=np.float32).reshape(2, 3)
    built = package(tmp_path / "a.mlpackage", lambda x: (mb.identity(x=x), mb.const(val=constant), mb.relu(x=x)), {"x": X})
    executor = load_executor(built)
    first = executor({"x": X})
    for result in first.values():
        result += 1  # what was returned is the caller's own
    second = list(executor({"x": X}).values())
    np.testing.assert_array_equal(second[0], X)
    np.testing.assert_array_equal(second[1], constant)


def test_values_are_freed_after_their_last_use(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        for _ in range(20):
            x = mb.add(x=x, y=np.float16(1))
        return x

    executor = load_executor(package(tmp_path / "a.mlpackage", build, {"x": X}))
    values = {"x": torch.from_numpy(X)}
    most = max(len(values) for _ in executor._run(executor._plan, values, exact=False))
    assert most <= 2
    assert len(values) == 1


# -- refusals --------------------------------------------------------------------------------------------------------


def complaint(act: Callable[[], Any]) -> str:
    with pytest.raises(GraphError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    return message


def edited(path: Path, change: Callable[[Any], None]) -> Path:
    """The package with its program changed."""
    file = path / "Data" / MODEL
    model = Model.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    return path


def operations_of(model: Any) -> Any:
    return model.mlProgram.functions[0].value.block_specializations[0].value.operations


def test_unknown_operations_are_named_before_anything_runs(path: Path) -> None:
    def change(model: Any) -> None:
        for operation in operations_of(model):
            operation.type = {"gelu": "swish_glu", "linear": "hyperbolic"}.get(operation.type, operation.type)

    message = complaint(lambda: load_executor(edited(path, change)))
    assert "hyperbolic (output 'hidden')" in message
    assert "swish_glu (output 'result')" in message


@pytest.mark.parametrize("name", ["random_normal", "make_list"])
def test_randomness_and_lists_are_refused_by_name(name: str, tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        if name == "random_normal":
            return mb.add(x=mb.random_normal(shape=[2, 8], mean=0.0, stddev=1.0), y=mb.cast(x=x, dtype="fp32"))
        values = mb.list_write(ls=mb.make_list(init_length=1, elem_shape=(2, 8), dtype="fp16"), index=0, value=x)
        return mb.list_read(ls=values, index=0)

    assert f"{name} (output" in complaint(lambda: load_executor(package(tmp_path / "a.mlpackage", build, {"x": X})))


def test_unknown_and_missing_inputs_of_an_operation_are_named(path: Path) -> None:
    def rename(model: Any) -> None:
        for operation in operations_of(model):
            for entry in operation.inputs:
                entry.key = "weights" if entry.key == "weight" else entry.key

    assert "linear (output 'hidden') has an input 'weights'" in complaint(lambda: load_executor(edited(path, rename)))

    def remove(model: Any) -> None:
        for operation in operations_of(model):
            kept = [entry for entry in operation.inputs if entry.key != "weights"]
            del operation.inputs[:]
            operation.inputs.extend(kept)

    assert "linear (output 'hidden') lacks its input 'weight'" in complaint(lambda: load_executor(edited(path, remove)))


def test_a_wrong_declared_shape_is_named(path: Path) -> None:
    def change(model: Any) -> None:
        operations_of(model)[-1].outputs[0].type.tensorType.dimensions[1].constant.size = 5

    executor = load_executor(edited(path, change))
    assert "gelu (output 'result') gave shape (2, 4); the program declares (2, 5)" in complaint(lambda: executor({"x": X}))


def test_a_failing_operation_is_named(tmp_path: Path) -> None:
    build = lambda x: mb.gather(x=np.ones((3, 2), np.float32), indices=x)  # noqa: E731
    executor = load_executor(package(tmp_path / "a.mlpackage", build, {"x": np.int32([0, 1])}))
    assert "operation gather (output 'gather_0') failed" in complaint(lambda: executor({"x": np.int32([0, 7])}))


def test_packages_that_are_none_are_refused(path: Path, tmp_path: Path) -> None:
    assert "no such Core ML package" in complaint(lambda: load(tmp_path / "nothing.mlpackage"))
    empty = tmp_path / "empty.mlpackage"
    empty.mkdir()
    assert "Manifest.json is missing" in complaint(lambda: load(empty))
    manifest = path / "Manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text("{")
    assert "does not name a model" in complaint(lambda: load(path))
    content["itemInfoEntries"]["a"]["path"] = "../../elsewhere"
    manifest.write_text(json.dumps(content))
    assert "points outside the package" in complaint(lambda: load(path))
    content["itemInfoEntries"]["a"]["path"] = "gone.mlmodel"
    manifest.write_text(json.dumps(content))
    assert "'gone.mlmodel' is missing" in complaint(lambda: load(path))


def test_damaged_models_and_weights_are_refused(tmp_path: Path) -> None:
    weight = RNG.standard_normal((64, 8)).astype(np.float16)
    path = package(tmp_path / "a.mlpackage", lambda x: mb.linear(x=x, weight=weight), {"x": X})
    blob = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    whole = blob.read_bytes()
    blob.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in complaint(lambda: load(path))
    blob.write_bytes(whole[:64] + bytes(64) + whole[128:])
    assert "damaged" in complaint(lambda: load(path))
    blob.unlink()
    assert "'weight.bin' is missing" in complaint(lambda: load(path))
    file = path / "Data" / MODEL
    file.write_bytes(file.read_bytes()[:-40])
    assert "damaged or truncated" in complaint(lambda: load(path))


def test_a_weight_file_outside_the_package_is_refused(tmp_path: Path) -> None:
    weight = RNG.standard_normal((64, 8)).astype(np.float16)
    path = package(tmp_path / "a.mlpackage", lambda x: mb.linear(x=x, weight=weight), {"x": X})
    shutil.copy(path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin", tmp_path / "weight.bin")

    def change(model: Any) -> None:
        for operation in operations_of(model):
            for entry in operation.attributes:
                if entry.value.HasField("blobFileValue"):
                    entry.value.blobFileValue.fileName = "@model_path/../../../weight.bin"

    assert "lies outside the package" in complaint(lambda: load(edited(path, change)))


def test_other_model_types_and_flexible_shapes_are_refused(path: Path, tmp_path: Path) -> None:
    with_network = ct.proto.Model_pb2.Model(specificationVersion=4)
    with_network.neuralNetwork.layers.add(name="a")
    assert "is no ML program" in complaint(lambda: load(write(tmp_path / "a.mlpackage", with_network)))

    def change(model: Any) -> None:
        dimension = model.mlProgram.functions[0].value.inputs[0].type.tensorType.dimensions[0]
        dimension.ClearField("constant")
        dimension.unknown.SetInParent()

    assert "flexible shape" in complaint(lambda: load(edited(path, change)))


def test_reading_a_program_needs_no_coremltools(path: Path) -> None:
    """The schema of our own reads what coremltools wrote, and the import brings neither coremltools nor a word."""
    code = (
        "import sys, runtimes.coreml as c; c.load(sys.argv[1]);"
        "assert not {'coremltools', 'torchao', 'diffusers'} & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read_program(open_package(path)).block.operations[-1].type == "gelu"
