"""The ONNX runtime module: contract, errors, silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtimes.graph import GraphError, TensorSpec
from runtimes.onnx import load


def write(path: Path, size: int | str = 3) -> Path:
    """double = x + x; shifted = x + n, on x float32 [2, size] and n int32 [1]."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["double"]),
        helper.make_node("Cast", ["n"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "wide"], ["shifted"]),
    ]
    shape = [2, size]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
              helper.make_tensor_value_info("n", TensorProto.INT32, [1])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("shifted", "double")]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)],
                              ir_version=10)
    onnx.save(model, str(path))
    return path


def test_outputs_come_by_name_in_the_order_of_the_graph(tmp_path: Path) -> None:
    graph = load(write(tmp_path / "model.onnx"), threads=1)
    assert graph.inputs == (TensorSpec("x", "float32", (2, 3)), TensorSpec("n", "int32", (1,)))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = graph({"n": np.array([5], np.int32), "x": x})
    assert list(outputs) == ["shifted", "double"]
    np.testing.assert_array_equal(outputs["shifted"], x + 5)
    np.testing.assert_array_equal(outputs["double"], 2 * x)


def test_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    graph = load(write(tmp_path / "model.onnx"))
    with pytest.raises(GraphError, match="missing \\['n'\\], unexpected \\['m'\\]"):
        graph({"x": np.zeros((2, 3), np.float32), "m": np.zeros(1, np.int32)})
    with pytest.raises(GraphError, match="'x' has shape"):
        graph({"x": np.zeros((2, 4), np.float32), "n": np.zeros(1, np.int32)})


def test_files_that_are_no_graph_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GraphError, match="does not exist"):
        load(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0anothing of the kind")
    with pytest.raises(GraphError, match="is no ONNX model") as caught:
        load(tmp_path / "broken.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(GraphError, match="only fixed shapes"):
        load(write(tmp_path / "free.onnx", "columns"))
    assert capfd.readouterr() == ("", "")
