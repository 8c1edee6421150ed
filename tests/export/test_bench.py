"""The bench command: what it shows and files, results handed back by a phone, the original in turns, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import bench_command
from export.bench_command import run_bench
from export.benchmark_worker import graph_options, torch_runtime
from export.benchmarking import check_original, compare_with_original
from export.checkpoint import open_checkpoint
from export.errors import UserError
from export.families import read_family
from export.families.family import GraphOptions
from export.progress import Silent
from export.recording import run
from export.rewrites import rewrites_of
from runtimes.bundle import BundleError, load_manifest
from runtimes.golden import read_cases
from runtimes.graph import GraphError
from runtimes.harness.history import history_file, read_history
from runtimes.harness.latency import Listener, OpenBundle, environment, open_bundle
from runtimes.harness.on_device.device import Asked
from runtimes.harness.results import (
    IMAGE,
    BackendSettings,
    Latency,
    LoadTime,
    Result,
    Row,
    Sustained,
    describe_model,
    now,
    read_result,
)
from runtimes.registry import load_component
from tests.models import TinyModel, write_checkpoint
from tests.onnx_bundles import write_onnx_bundle

OPTIONS = GraphOptions(width=64, height=64, sigmas=(1.0, 0.5, 0.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = TinyModel(layers=2, dual_layers=(0,), text_layers=2, sample_size=8)
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "smallest", tiny))


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that draws, its transformer in two chunks."""
    folder = tmp_path_factory.mktemp("bundles") / "whole"
    write_onnx_bundle(folder, open_checkpoint(model), GraphOptions(64, 64, OPTIONS.sigmas, chunks=2))
    return folder


@pytest.fixture(scope="module")
def part(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one component."""
    folder = tmp_path_factory.mktemp("bundles") / "part"
    write_onnx_bundle(folder, open_checkpoint(model), OPTIONS, only=["text_encoder"])
    return folder


@pytest.fixture(autouse=True)
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return history_file()


def bench(bundle: Path, **options: Any) -> None:
    names = ("runtime", "threads", "iterations", "against", "model", "json_file", "compare_with", "import_file")
    run_bench(bundle=bundle, **(dict.fromkeys(names) | options))


def phone_result(bundle: Path, *names: str) -> Result:
    """What an app hands back."""
    rows = tuple(
        Row(
            name=name,
            delegate="xnnpack",
            bytes=1,
            load_mode=None,
            model_load_time=LoadTime(first=1, warm=1),
            warm_up=(),
            latency=Latency.of([0.1] * 5),
            memory=None,
        )
        for name in names
    )
    return Result(
        host=False,
        start_datetime=now(),
        benchmark_model=describe_model(load_manifest(bundle)),
        backend_settings=BackendSettings(framework="onnxruntime", framework_version="1.31.1", format="onnx", threads=4),
        environment_info=environment().model_copy(update={"platform": "android", "device": "a phone"}),
        rows=rows,
    )


def test_result_is_shown_written_filed_and_compared_with_the_last(
    part: Path, history: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench(part, threads=1, iterations=5, json_file=tmp_path / "first.json", compare_with="last")
    shown = capfd.readouterr().err
    assert "there is no earlier result of this kind" in shown and f"filed in {history}" in shown
    bench(part, threads=1, iterations=5, compare_with="last")
    shown = capfd.readouterr().err
    assert "tiny for android, onnxruntime" in shown and "host timings" in shown and "verdict" in shown
    tables = [line.rstrip() for line in shown.splitlines() if str(history) not in line]
    assert max(map(len, tables)) <= 80 and "…" not in shown
    results = read_history(history)
    assert len(results) == 2 and results[0] == read_result(tmp_path / "first.json")
    assert [row.name for row in results[0].rows] == ["text_encoder"] and results[0].comparison is None


def test_result_of_a_phone_is_filed_and_compared(
    whole: Path, history: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = phone_result(whole, "transformer", IMAGE)
    (tmp_path / "phone.json").write_text(result.to_json())
    bench(whole, import_file=tmp_path / "phone.json", compare_with=str(tmp_path / "phone.json"))
    shown = capfd.readouterr().out
    assert "phone timings, a phone" in shown and shown.count("no difference beyond noise") == 2
    assert read_history(history) == (result,)


def test_result_of_a_device_is_shown_and_filed(
    part: Path, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Device:
        host, runtime = False, "onnxruntime"

        def check(self, opened: OpenBundle, asked: Asked) -> None:
            assert asked == Asked(2, 5, 60.0)

        def measure(self, opened: OpenBundle, asked: Asked, listener: Listener) -> Result:
            sustained = Sustained.of("text_encoder", 60, [0.1, 0.2])
            return phone_result(opened.folder, "text_encoder").model_copy(update={"sustained": sustained})

    monkeypatch.setattr(bench_command, "connect", lambda device, runner, runtime: Device())
    bench(part, device="android", runner=Path("x"), threads=2, iterations=5, sustained=60.0)
    shown = capfd.readouterr().err
    assert "phone timings, a phone" in shown and "text_encoder for 60 s: 2 runs, 100 ms at first and 200 ms at last" in shown
    (result,) = read_history(history)
    assert result.sustained is not None and result.sustained.trend == pytest.approx(2)


def edited(bundle: Path, file: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    fields = json.loads(phone_result(bundle, IMAGE).to_json())
    edit(fields)
    file.write_text(json.dumps(fields))
    return file


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda r: r.pop("rows"), "is no benchmark result: rows: Field required"),
        (lambda r: r["benchmark_model"].update(digest="0" * 64), "was not measured on .*: its bundle has digest 000000000000…"),
        (lambda r: r["rows"][0].update(name="text_encoder_3"), "measured text_encoder_3, which .* does not have"),
    ],
)
def test_results_that_are_not_of_the_bundle_are_not_filed(
    whole: Path, history: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    with pytest.raises((UserError, BundleError), match=complaint) as caught:
        bench(whole, import_file=edited(whole, tmp_path / "phone.json", edit))
    assert "\n" not in str(caught.value) and not history.exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"iterations": 0}, "0 iterations measure nothing"),
        ({"threads": 0}, "0 threads cannot run anything"),
        ({"runtime": "vulkan"}, "runtime 'vulkan' does not exist"),
        ({"model": "x"}, "--model x is for --against"),
        ({"json_file": Path("no/such/folder/x.json")}, "there is no folder no/such/folder"),
        ({"compare_with": "none.json"}, "none.json cannot be read"),
        ({"import_file": Path("none.json")}, "none.json cannot be read"),
        ({"import_file": Path("x"), "threads": 2}, "--threads 2 is for measuring here"),
        ({"import_file": Path("x"), "device": "android"}, "--device android is for measuring here"),
        ({"sustained": 3.0}, "--sustained 3.0 is for --device"),
        ({"runner": Path("x")}, "--runner x is for --device"),
        ({"device": "watch"}, "--device watch does not exist"),
        ({"device": "android", "against": "torch"}, "--against torch runs the original on this computer"),
        ({"device": "android", "sustained": 0.5}, "--sustained 0.5 is not a time to run for"),
        ({"device": "mac:mine"}, "only this one can be measured"),
        ({"against": "diffusers"}, "--against diffusers: diffusers draws pictures, which .* cannot: choose torch"),
        ({"against": "torch"}, "--model .*flash-mini is not what .* was made of: its fingerprint is"),
        ({"against": "torch", "model": "no/such/model/here"}, "there is no folder or file no/such/model/here"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_measured(
    part: Path, history: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((UserError, BundleError, GraphError), match=complaint) as caught:
        bench(part, **options)
    assert "\n" not in str(caught.value) and not history.exists()


def test_old_result_of_another_sort_is_refused_before_anything_is_measured(part: Path, history: Path, tmp_path: Path) -> None:
    (tmp_path / "phone.json").write_text(phone_result(part, "text_encoder").to_json())
    with pytest.raises(BundleError, match="a result of a computer and one of a phone cannot be compared"):
        bench(part, compare_with=str(tmp_path / "phone.json"))
    assert not history.exists()


def test_modules_run_in_turns_with_the_artifacts(part: Path, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    bench(part, threads=1, iterations=2, against="torch", model=model)
    (result,) = read_history(history_file())
    assert result.comparison is not None and result.comparison.versions == {"torch": torch.__version__}
    (pair,) = result.comparison.pairs  # no picture, for the bundle draws none
    assert pair.name == "text_encoder" and len(pair.artifact.samples) == len(pair.other.samples) == 2
    assert "in turns with torch" in capfd.readouterr().err


def test_diffusers_draws_in_turns_with_the_bundle(whole: Path, model: str) -> None:
    opened = open_bundle(whole)
    check_original(opened, model, "diffusers")
    compared = compare_with_original(opened, model, "diffusers", threads=1, iterations=2, progress=Silent())
    assert [pair.name for pair in compared.pairs] == [IMAGE]
    assert set(compared.versions) == {"diffusers", "transformers", "torch"}
    assert compared.pairs[0].other.measured_samples == 2


@pytest.mark.parametrize("contract", ["flash", "diffusers"])
def test_other_side_is_the_module_of_each_artifact(contract: str, model: str, whole: Path, tmp_path: Path) -> None:
    checkpoint, folder = open_checkpoint(model), whole
    if contract == "diffusers":
        folder = tmp_path / "diffusers"
        options = GraphOptions(64, 64, OPTIONS.sigmas, "diffusers", rewrites_of("diffusers"))
        write_onnx_bundle(folder, checkpoint, options, only=["text_encoder", "transformer"])
    manifest = load_manifest(folder)
    options = graph_options(manifest, "onnx")
    runtime = torch_runtime(checkpoint, options, "onnx", compiled=False)
    for entry in manifest.components:
        pieces = [p for p in read_family(checkpoint).components(options) if p.name.partition("_chunk")[0] == entry.name]
        assert len(pieces) == len(entry.artifacts)
        case = next(iter(read_cases(folder, manifest.golden, entry.name)))
        expected = run([(piece, piece.load(checkpoint)) for piece in pieces], case.inputs)
        outputs = load_component(folder, entry, runtime)(case.inputs)
        assert outputs.keys() == expected.keys()
        for name, output in outputs.items():
            np.testing.assert_array_equal(output, expected[name])


def test_compiling_is_asked_of_torch_and_its_errors_are_one_line(
    part: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(module: object) -> Callable[..., object]:
        def call(*tensors: object) -> object:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    manifest = load_manifest(part)
    runtime = torch_runtime(open_checkpoint(model), graph_options(manifest, "onnx"), "onnx", compiled=True)
    case = next(iter(read_cases(part, manifest.golden, "text_encoder")))
    graph = load_component(part, manifest.components[0], runtime)
    with pytest.raises(GraphError, match=r"torch cannot run text_encoder: .* No working C\+\+ compiler found$"):
        graph(case.inputs)
