"""The ExecuTorch runtime module: the contract inside the file, errors, silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn

from runtimes.executorch import CONTRACT_METHOD, load
from runtimes.graph import GraphError, TensorSpec


class _TwoOutputs(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return x + n.to(torch.float32), x * 2


def write(path: Path, named: bool = True) -> Path:
    exported = torch.export.export(_TwoOutputs(), (torch.zeros(2, 3), torch.zeros(1, dtype=torch.int32)))
    contract = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [2, 3]}, {"name": "n", "dtype": "int32", "shape": [1]}],
        "outputs": [{"name": name, "dtype": "float32", "shape": [2, 3]} for name in ("shifted", "double")],
    }
    listed = torch.tensor(list(json.dumps(contract).encode()), dtype=torch.uint8)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()],
                                          constant_methods={CONTRACT_METHOD: listed} if named else None)
    path.write_bytes(lowered.to_executorch().buffer)
    return path


def test_programs_carry_their_names_and_results_outlive_the_next_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "graph.pte")
    capfd.readouterr()
    graph = load(path, threads=1)
    assert graph.inputs == (TensorSpec("x", "float32", (2, 3)), TensorSpec("n", "int32", (1,)))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = graph({"n": np.array([5], np.int32), "x": x})
    graph({"n": np.array([0], np.int32), "x": 0 * x})
    assert list(outputs) == ["shifted", "double"]
    np.testing.assert_array_equal(outputs["shifted"], x + 5)
    np.testing.assert_array_equal(outputs["double"], 2 * x)
    assert capfd.readouterr() == ("", "")


def test_files_that_are_no_graph_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GraphError, match="does not exist"):
        load(tmp_path / "none.pte")
    (tmp_path / "other.pte").write_bytes(b"nothing of the kind")
    with pytest.raises(GraphError, match="is no ExecuTorch program"):
        load(tmp_path / "other.pte")
    path = write(tmp_path / "graph.pte", named=False)
    capfd.readouterr()
    with pytest.raises(GraphError, match="does not name its inputs"):
        load(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(GraphError, match="cannot be loaded") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
