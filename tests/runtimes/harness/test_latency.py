"""Measuring a bundle: rows, processes of their own, the order of turns, and refusals. No time is asserted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export.checkpoint import Checkpoint, open_checkpoint
from export.families.family import GraphOptions
from runtimes.bundle import BundleError, load_manifest, write_manifest
from runtimes.graph import GraphError
from runtimes.harness import latency
from runtimes.harness.latency import WARM_UP, OpenBundle, interleave, measure, open_bundle, start_worker
from runtimes.harness.results import IMAGE, Result
from runtimes.harness.worker import Request, load_mode, serve
from runtimes.registry import RUNTIMES
from tests.models import TinyModel, write_checkpoint
from tests.onnx_bundles import write_onnx_bundle

OPTIONS = GraphOptions(width=64, height=64, sigmas=(1.0, 0.5, 0.0))
COMPONENTS = ("text_encoder", "text_encoder_2", "conditioner", "transformer", "vae_decoder")


class Heard:
    """A listener that keeps what it hears: each stage with its length, and its steps."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: list[list[str]] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))
        self.steps.append([])

    def step(self, detail: str) -> None:
        self.steps[-1].append(detail)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    model = TinyModel(layers=2, dual_layers=(0,), text_layers=2, sample_size=8)
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("models") / "smallest", model)))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that draws; the transformer is in two chunks, and its weights are beside its graph."""
    folder = tmp_path_factory.mktemp("bundles") / "whole"
    options = GraphOptions(OPTIONS.width, OPTIONS.height, OPTIONS.sigmas, chunks=2)
    write_onnx_bundle(folder, checkpoint, options, external=["transformer"])
    return folder


@pytest.fixture
def part(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A bundle of one component, to be damaged."""
    write_onnx_bundle(tmp_path / "part", checkpoint, OPTIONS, only=["text_encoder"], external=["text_encoder"])
    return tmp_path / "part"


@pytest.fixture(scope="module")
def measured(bundle: Path) -> tuple[Result, Heard]:
    heard = Heard()
    return measure(open_bundle(bundle), threads=1, iterations=4, listener=heard), heard


def test_every_component_and_the_picture_have_a_row(measured: tuple[Result, Heard], bundle: Path) -> None:
    result, heard = measured
    manifest = load_manifest(bundle)
    assert tuple(row.name for row in result.rows) == (*COMPONENTS, IMAGE)
    for row in result.rows:
        assert len(row.warm_up) == WARM_UP and row.latency.measured_samples == 4
        assert row.model_load_time.first > 0 and row.model_load_time.warm > 0
        assert row.memory is not None and row.memory.peak_resident >= row.memory.baseline_resident > 1_000_000
    assert [row.bytes for row in result.rows[:-1]] == [entry.bytes for entry in manifest.components]
    assert result.rows[-1].bytes == sum(entry.bytes for entry in manifest.components)
    assert result.host and result.benchmark_model.digest == manifest.digest
    assert (result.backend_settings.framework, result.backend_settings.threads) == ("onnxruntime", 1)
    steps = ["first load", *["warm-up"] * WARM_UP, *["run"] * 4, "warm load"]
    assert heard.stages == [(name, len(steps)) for name in (*COMPONENTS, IMAGE)]
    assert heard.steps == [steps] * 6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_load_mode_is_what_the_process_did(measured: tuple[Result, Heard], tmp_path: Path) -> None:
    result, _ = measured
    modes = {row.name: row.load_mode for row in result.rows}
    assert modes == dict.fromkeys(COMPONENTS, "read") | {"transformer": "mmap", IMAGE: "mmap"}
    (tmp_path / "never loaded").touch()
    assert load_mode((tmp_path / "never loaded",)) == "read"
    assert load_mode((Path(sys.executable).resolve(),)) == "mmap"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot begin anew")
def test_memory_is_that_of_a_process_of_its_own(bundle: Path) -> None:
    ballast = bytearray(os.urandom(1 << 20) * 200)  # a forked child's ru_maxrss would begin with it
    with start_worker(Request(bundle=bundle, component="vae_decoder", runtime="onnxruntime", threads=1)) as worker:
        assert worker.process.pid != os.getpid()
        worker.load()
        worker.run()
        memory = worker.memory()
    assert 0 < memory.baseline <= memory.peak < len(ballast)


def test_leaving_the_block_ends_the_process(bundle: Path) -> None:
    with start_worker(Request(bundle=bundle, component="vae_decoder", runtime="onnxruntime", threads=1)) as worker:
        worker.load()
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(GraphError, match=r"vae_decoder: the measuring process was ended by signal 9: is there memory"):
            worker.run()
    assert worker.process.returncode == -9


def test_process_that_cannot_do_it_says_why_in_one_line(part: Path) -> None:
    request = Request(bundle=part, component="text_encoder", runtime="onnxruntime", threads=1)
    with start_worker(request, "no_such_module") as worker, pytest.raises(GraphError) as caught:
        worker.load()
    assert "ended with exit code 1: " in str(caught.value) and "No module named no_such_module" in str(caught.value)
    (part / "text_encoder" / "model.onnx").write_bytes(b"\x08\x0anothing of the kind")
    with start_worker(request) as worker, pytest.raises(GraphError, match="no ONNX model that ONNX Runtime can load") as caught:
        worker.load()
    assert "\n" not in str(caught.value)


def test_worker_answers_each_command_with_a_line() -> None:
    class Subject:
        paths: tuple[Path, ...] = ()

        def load(self) -> float:
            return 1.0

        def run(self) -> float:
            return 2.0

    answers = io.StringIO()
    serve(Subject(), io.StringIO("load\nrun\nmemory\nload\n"), answers)
    lines = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [line["seconds"] for line in lines] == [1.0, 2.0, 0.0, 1.0]
    assert lines[2]["peak"] >= lines[2]["baseline"] > 0


def test_runs_take_turns_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PAUSE", 0)
    ran: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self) -> float:
            ran.append(self.name)
            return float(len(ran))

    heard = Heard()
    heard.stage("x", 0)
    artifact, other = interleave(Fake("A"), Fake("B"), 3, heard)  # type: ignore[arg-type]
    assert ran == ["A", "B"] * (WARM_UP + 3)
    first = 2 * WARM_UP + 1
    assert artifact == [first, first + 2, first + 4] and other == [first + 1, first + 3, first + 5]


def test_measuring_imports_no_exporter() -> None:
    modules = ", ".join(f"runtimes.harness.{name}" for name in ("latency", "worker", "history", "bench_tables"))
    heavy = {"export", "diffusers", "transformers", "torch"}
    code = f"import sys, {modules}\nprint(*{heavy} & {{name.split('.')[0] for name in sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert shown.stdout == "\n"


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remade(part: Path, tools: dict[str, str]) -> None:
    write_manifest(part, load_manifest(part).model_copy(update={"tools": tools}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda part: alter(part / "text_encoder/model.onnx.data"), "text_encoder/model.onnx.data was altered"),
        (lambda part: (part / "text_encoder/model.onnx").unlink(), "text_encoder/model.onnx is missing"),
        (lambda part: (part / "manifest.json").unlink(), "is no bundle"),
        (lambda part: remade(part, {"onnxruntime": "1.2.3"}), r"was made for onnxruntime 1\.2\.3, but .* is installed"),
        (lambda part: remade(part, {}), "does not say which version of onnxruntime"),
    ],
)
def test_bundle_that_is_not_what_was_published_is_not_measured(
    part: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    damage(part)
    with pytest.raises(BundleError, match=complaint) as caught:
        open_bundle(part)
    assert "\n" not in str(caught.value)


def test_patch_release_and_build_of_the_runtime_do_not_matter(part: Path) -> None:
    major, minor, *_ = load_manifest(part).tools["onnxruntime"].split(".")
    remade(part, {"onnxruntime": f"{major}.{minor}.999+build"})
    opened = open_bundle(part)
    assert isinstance(opened, OpenBundle) and not opened.draws


def test_runtimes_and_counts_that_do_not_exist_are_refused(part: Path) -> None:
    with pytest.raises(BundleError, match="no artifacts for runtime coreml"):
        open_bundle(part, "coreml")
    opened = open_bundle(part)
    for threads, iterations, complaint in ((0, 1, "0 threads"), (1, 0, "0 iterations")):
        with pytest.raises(BundleError, match=complaint):
            measure(opened, threads=threads, iterations=iterations, listener=Heard())


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself runs")
def test_executor_of_core_ml_packages_is_not_called_core_ml() -> None:
    settings = latency._settings(RUNTIMES["coreml"], None)
    assert settings.framework == "coreml on torch" and settings.framework_version.startswith("2.")
