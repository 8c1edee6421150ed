"""The float16 range map, on programs whose magnitudes are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from runtimes.bundle import (
    ArtifactEntry,
    BundleError,
    ComponentEntry,
    Feed,
    Manifest,
    TensorEntry,
    describe_files,
    load_manifest,
    resource_hints,
    write_manifest,
)
from runtimes.golden import Case, Drawing, write_golden
from runtimes.harness.ranges import component_ranges, measure_ranges
from tests.runtimes.coreml.mil import mb, package

SPEC = TensorEntry(name="x", dtype="float16", shape=(2, 4))
INPUTS = [np.linspace(-1, 1, 8).reshape(2, 4).astype(np.float16), np.linspace(-2, 3, 8).reshape(2, 4).astype(np.float16)]


def overflowing(x: object) -> object:
    """13000 x stays within float16, 13000 x * 10 does not where |x| > 0.5."""
    near = mb.mul(x=x, y=np.float16(13000), name="near")
    wide = mb.mul(x=near, y=np.float16(10), name="wide")
    return mb.tanh(x=wide, name="y")


def artifact(folder: Path, name: str, feeds: tuple[Feed, ...] = ()) -> ArtifactEntry:
    package(folder / f"{name}.mlpackage", overflowing, {"x": INPUTS[0]})
    output = SPEC.model_copy(update={"name": "y"})
    path = f"{name}.mlpackage"
    return ArtifactEntry(path=path, files=describe_files(folder, [path]), inputs=(SPEC,), outputs=(output,), feeds=feeds)


def component(*artifacts: ArtifactEntry) -> ComponentEntry:
    return ComponentEntry(
        name="transformer",
        format="coreml",
        inputs=(SPEC,),
        outputs=artifacts[-1].outputs,
        artifacts=artifacts,
        precision="float16",
        bits=16,
        weights=1,
        stored_bytes=2,
    )


def bundle(folder: Path, like: Manifest) -> Path:
    entry = component(artifact(folder, "transformer"))
    cases = [Case(0, step, {"x": x}, {"y": x}) for step, x in enumerate(INPUTS)]
    drawing = Drawing("a circle", 0, np.zeros((3, 4, 12, 8), np.float32), np.zeros((3, 96, 64), np.float32))
    golden = write_golden(folder, {"transformer": cases}, [drawing])
    changes = {"components": (entry,), "formats": ("coreml",), "golden": golden, "resources": resource_hints([entry])}
    write_manifest(folder, like.model_copy(update=changes))
    return folder


def test_a_planted_overflow_is_reported_with_its_first_operation(tiny_bundle: Path, tmp_path: Path) -> None:
    ranges = measure_ranges(bundle(tmp_path, load_manifest(tiny_bundle)))
    assert [(row.operation, row.name) for row in ranges.operations] == [("mul", "near"), ("mul", "wide"), ("tanh", "y")]
    near, wide, _ = ranges.operations
    exact = [np.float16(13000).astype(np.float64) * x.astype(np.float64) for x in INPUTS]
    assert near.largest == pytest.approx(np.abs(exact[1]).max(), rel=1e-6) and near.case == 1
    assert near.share == pytest.approx(near.largest / 65504) and near.near and not near.overflows
    rounded = [values.astype(np.float16).astype(np.float64) * 10 for values in exact]
    assert wide.largest == pytest.approx(np.abs(rounded[1]).max(), rel=1e-6)
    assert (wide.case, wide.non_finite, wide.elements) == (1, int((np.abs(rounded[1]) >= 65520).sum()), 8)
    assert ranges.overflows == (wide,) and ranges.near == (near,) and not ranges.passed
    (failure,) = ranges.failures
    assert failure.startswith("transformer.mlpackage: mul 'wide' overflows float16 first, in golden case 1: 7 of 8 values")
    fields = json.loads(ranges.to_json())
    assert not fields["passed"] and fields["operations"][1]["overflows"]

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ranges.table())
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split() for line in shown.splitlines()[-3:]] == [
        ["transformer", "mul", "390,080.0", "overflow", "wide"],
        ["mul", "39,000.0", "59.5%", "near"],
        ["tanh", "1.0", "0.0%", "y"],
    ]


def test_the_chunk_after_another_is_given_its_output(tmp_path: Path) -> None:
    first = artifact(tmp_path, "first")
    second = artifact(tmp_path, "second", (Feed(input="x", tensor="y"),))
    rows = component_ranges(tmp_path, component(first, second), [{"x": INPUTS[0]}])
    largest = {(row.artifact, row.name): row.largest for row in rows}
    assert largest["second.mlpackage", "near"] == pytest.approx(13000)  # tanh gave 1
    assert [row.artifact for row in rows] == ["first.mlpackage"] * 3 + ["second.mlpackage"] * 3


def test_a_bundle_without_core_ml_is_one_line(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no Core ML artifacts, whose float16 ranges could be measured; it holds torch"):
        measure_ranges(tiny_bundle)
