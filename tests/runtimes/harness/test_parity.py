"""The parity gate: figures against float64 by hand, and every way in which a bundle must fail."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from export.checkpoint import open_checkpoint
from export.families.family import GraphOptions
from runtimes.bundle import BundleError, ComponentEntry, load_manifest, write_manifest
from runtimes.golden import Case, Drawing, read_cases, read_drawings, write_golden
from runtimes.graph import Graph, GraphError
from runtimes.harness import parity
from runtimes.harness.parity import Comparison, Report, check_artifact, compare_component, floor_of, psnr, verify_bundle
from runtimes.registry import RUNTIMES, load_component
from tests.bundles import TORCH, TorchGraph, load_torch, write_bundle
from tests.models import SD35, load_reference, write_checkpoint

OPTIONS = GraphOptions(width=64, height=96, sigmas=(1.0, 0.75, 0.0))
PROMPTS = (("the red circle", 0), ("a blue and the", 5))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SD35)
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(folder, open_checkpoint(str(checkpoint)), load_reference(checkpoint), OPTIONS, PROMPTS)
    return folder


@pytest.fixture(autouse=True)
def torch_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "torch", TORCH)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e3), offset=st.floats(-1e3, 1e3))
def test_psnr_is_the_peak_to_peak_range_over_the_mean_squared_error(seed: int, scale: float, offset: float) -> None:
    generator = np.random.default_rng(seed)
    b = (generator.standard_normal((3, 7)) * scale + offset).astype(np.float32)
    a = (b + generator.standard_normal(b.shape) * scale * 0.01).astype(np.float32)
    error = sum((float(x) - float(y)) ** 2 for x, y in zip(a.flat, b.flat, strict=True)) / b.size
    if error > 0:
        assert psnr(a, b) == pytest.approx(10 * math.log10((float(b.max()) - float(b.min())) ** 2 / error), abs=1e-9)


def test_psnr_at_its_edges() -> None:
    ramp = np.linspace(0, 1, 10, dtype=np.float32)
    assert psnr(ramp, ramp) == math.inf
    assert psnr(ramp, np.zeros_like(ramp)) == -math.inf
    assert math.isnan(psnr(ramp * np.nan, ramp))
    assert psnr(np.float32([65504, 0]), np.float32([0, 65504])) == pytest.approx(0)
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(ramp, ramp[:1])


def test_golden_cases_and_drawings_are_read_as_they_were_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def arrays(*names: str) -> dict[str, np.ndarray]:
        return {name: generator.standard_normal((2, 3)).astype(np.float32) for name in names}

    cases = [
        Case(
            p,
            s,
            {**arrays("latent"), "ids": np.arange(3, dtype=np.int32)},
            arrays("hidden_states.0", "v"),
            {"onnx": arrays("v")},
        )
        for p in range(2)
        for s in range(6)
    ]
    drawings = [Drawing("ein Kreis", 3, generator.random((3, 4, 2, 2), np.float32), generator.random((3, 16, 16), np.float32))]
    golden = write_golden(tmp_path, {"transformer": cases}, drawings)
    first = (tmp_path / "golden" / "transformer.safetensors").read_bytes()
    for case, read in zip(cases, read_cases(tmp_path, golden, "transformer"), strict=True):
        assert (read.prompt, read.step, set(read.compressed)) == (case.prompt, case.step, {"onnx"})
        for ours, theirs in (
            (read.inputs, case.inputs),
            (read.reference, case.reference),
            (read.expected("onnx"), case.expected("onnx")),
        ):
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
        assert np.array_equal(read.expected("coreml")["v"], case.reference["v"])
    (drawing,) = read_drawings(tmp_path, golden)
    assert np.array_equal(drawing.latents, drawings[0].latents) and np.array_equal(drawing.image, drawings[0].image)
    assert write_golden(tmp_path, {"transformer": cases}, drawings) == golden
    assert (tmp_path / "golden" / "transformer.safetensors").read_bytes() == first
    with pytest.raises(BundleError, match=r"no golden cases of 'vae_decoder'; it has \['transformer'\]"):
        next(read_cases(tmp_path, golden, "vae_decoder"))


def test_faithful_bundle_passes_with_a_row_for_every_output(bundle: Path) -> None:
    seen: list[tuple[str, str]] = []
    report = verify_bundle(bundle, on_component=lambda component, format: seen.append((component, format)))
    assert report.passed and report.failures == ()
    components = ["text_encoder", "text_encoder_2", "conditioner", "transformer", "vae_decoder", "image"]
    assert [component for component, _ in seen] == components
    assert [(row.component, row.output) for row in report.comparisons] == [
        *(("text_encoder", "hidden_states"), ("text_encoder", "pooled")),
        *(("text_encoder_2", "hidden_states"), ("text_encoder_2", "pooled")),
        *(("conditioner", "encoder_hidden_states"), ("conditioner", "modulation")),
        *(("transformer", "velocity"), ("vae_decoder", "image"), ("image", "final latent"), ("image", "image")),
    ]
    assert all(row.lowering is not None and row.lowering > 80 for row in report.comparisons[:-2])
    assert report.comparisons[-1].quality is not None and report.comparisons[-1].quality > 80

    fields = json.loads(report.to_json())
    assert fields["passed"] and len(fields["comparisons"]) == 10
    text = shown(report, 80)
    assert "vae_decoder" in text and "—" in text and "passed" in text and "failed" not in text
    manifest = load_manifest(bundle)
    assert len(manifest.model_copy(update={"parity": report.to_entries()}).parity) == 10


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_every_name_and_figure_whole(width: int) -> None:
    def row(name: str, output: str, lowering: float | None, reason: str | None = None) -> Comparison:
        return Comparison(name, "executorch", output, 1_234_567_890, 16.0, lowering, -math.inf, 40, reason)

    components = ["text_encoder_2", "conditioner", "vae_decoder"]
    rows = [row(name, "first", math.inf) for name in components] + [row("conditioner", "second", 123.46, "too low")]
    latent = Comparison("image", "executorch", "final latent", None, None, None, 57.5, None, None)
    image = Comparison("image", "executorch", "image", 3_234_567_890, 8.12, None, 44.4, 40, None)
    report = Report("model", "android", (*rows, latent, image))
    title, *lines = shown(report, width).splitlines()
    assert title == "model for android" and max(map(len, lines)) <= 80
    assert [line.split() for line in lines[3:]] == [
        ["text_encoder_2", "executorch", "1,234.57", "16.00", "identical", "-inf", "40", "passed"],
        ["conditioner", "executorch", "1,234.57", "16.00", "123.5", "-inf", "40", "failed"],  # its worst output
        ["vae_decoder", "executorch", "1,234.57", "16.00", "identical", "-inf", "40", "passed"],
        ["final", "latent", "executorch", "—", "—", "—", "57.5", "—", "passed"],
        ["image", "executorch", "3,234.57", "8.12", "—", "44.4", "40", "passed"],
    ]


def shown(report: Report, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.table())
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


class Disturbed:
    """A real graph whose outputs are changed on the way out."""

    def __init__(self, graph: Graph, level: float) -> None:
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self._graph, self._level = graph, level

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: self._disturb(array) for name, array in self._graph(inputs).items()}

    def _disturb(self, array: np.ndarray) -> np.ndarray:
        signs = np.where(np.random.default_rng(0).random(array.shape) < 0.5, -1, 1)
        return (array + signs * self._level * np.ptp(array)).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "floor"),
    [({}, 80), ({"precision": "float16"}, 45), ({"bits": 8.3}, 40), ({"bits": 6, "precision": "float16"}, 40)],
)
def test_each_kind_of_artifact_has_its_floor(bundle: Path, changes: dict, floor: float) -> None:
    manifest = load_manifest(bundle)
    component = manifest.component("transformer", "torch")
    assert component is not None
    entry = component.model_copy(update=changes)
    graph = load_component(bundle, entry, TORCH)
    cases = [*read_cases(bundle, manifest.golden, "transformer")]
    assert len(cases) == 4 and floor_of(entry) == floor
    for distance, passed in ((-0.5, False), (0.5, True)):
        level = 10 ** (-(floor + distance) / 20)  # an error of one size everywhere: PSNR = -20 log10(level)
        (row,) = compare_component(entry, Disturbed(graph, level), cases)
        assert row.lowering == pytest.approx(floor + distance, abs=0.3)
        assert row.passed == passed and (row.reason is None) == passed


def test_lowering_is_against_the_compressed_reference_and_quality_against_the_original(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    entry = manifest.component("vae_decoder", "torch")
    assert entry is not None
    graph = load_component(bundle, entry, TORCH)
    cases = [
        replace(case, reference={"image": case.reference["image"] + np.float32(0.01)}, compressed={"torch": case.reference})
        for case in read_cases(bundle, manifest.golden, "vae_decoder")
    ]
    (row,) = compare_component(entry, graph, cases)
    spans = [np.ptp(case.reference["image"].astype(np.float64)) for case in cases]
    assert row.lowering is not None and row.lowering > 100
    assert row.quality == pytest.approx(20 * math.log10(min(spans) / 0.01), abs=0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_no_number_fails(bundle: Path, value: float) -> None:
    manifest = load_manifest(bundle)
    entry = manifest.component("vae_decoder", "torch")
    assert entry is not None
    inner = load_component(bundle, entry, TORCH)

    class Broken(Disturbed):
        def _disturb(self, array: np.ndarray) -> np.ndarray:
            array.flat[5] = value
            return array

    cases = [*read_cases(bundle, manifest.golden, "vae_decoder")]
    (row,) = compare_component(entry, Broken(inner, 0), cases)
    assert not row.passed and "1 of 18432 values of the artifact's output are NaN or infinite" in str(row.reason)
    bad = [replace(case, reference={"image": np.full_like(case.reference["image"], value)}) for case in cases]
    (row,) = compare_component(entry, inner, bad)
    assert not row.passed and "of the reference are NaN" in str(row.reason)
    (row,) = compare_component(entry, inner, [replace(case, reference={}) for case in cases])
    assert row.reason == "golden case 0 does not record it"
    (row,) = compare_component(entry, inner, [])
    assert row.reason == "no golden case was recorded"


def test_artifact_that_did_not_shrink_or_was_not_delegated_fails(bundle: Path) -> None:
    entry = load_manifest(bundle).component("transformer", "torch")
    assert entry is not None and check_artifact(entry) == ()
    large = entry.artifacts[0].model_copy(
        update={"files": (entry.artifacts[0].files[0].model_copy(update={"bytes": 9_000_000}),)}
    )
    fat = entry.model_copy(update={"artifacts": (large,), "stored_bytes": 4_000_000})
    (row,) = check_artifact(fat)
    assert not row.passed and row.reason == "did not shrink: 9,000,000 bytes for stored weights of 4,000,000"
    assert check_artifact(fat.model_copy(update={"stored_bytes": 8_000_000})) == ()
    lowered = entry.model_copy(update={"backend": "xnnpack", "delegated": 0.875, "delegated_floor": 0.9})
    (row,) = check_artifact(lowered)
    assert row.reason == "xnnpack took 87.5% of the operations; at least 90.0% expected"
    assert check_artifact(lowered.model_copy(update={"delegated": 0.9})) == ()
    (row,) = check_artifact(lowered.model_copy(update={"delegated": None}))
    assert "an unknown share" in str(row.reason)


def test_wrong_component_fails_its_own_row_and_the_image(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
        graph = load_torch(path, component, threads)
        return Disturbed(graph, 0.05) if component.name == "transformer" else graph

    monkeypatch.setitem(RUNTIMES, "torch", replace(TORCH, load=load))
    report = verify_bundle(bundle)
    assert not report.passed
    assert [row.component for row in report.comparisons if not row.passed] == ["transformer", "image"]
    assert report.failures[0].startswith("transformer torch velocity: 26.0 dB from the compressed reference; at least 80")
    assert "at least 40 expected" in report.failures[1]


def test_graph_that_cannot_load_or_run_fails_its_row(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
        if component.name == "vae_decoder":
            raise GraphError("operation 'foo' is unknown")
        graph = load_torch(path, component, threads)
        if component.name == "conditioner":
            graph.inputs = (replace(graph.inputs[0], shape=(1, 2, 3)), *graph.inputs[1:])
        return graph

    monkeypatch.setitem(RUNTIMES, "torch", replace(TORCH, load=load))
    report = verify_bundle(bundle)
    failed = {row.component: row.reason for row in report.comparisons if not row.passed}
    assert failed["vae_decoder"] == "operation 'foo' is unknown"
    assert "conditioner.pt has inputs" in str(failed["conditioner"]) and failed.keys() == {
        "conditioner",
        "vae_decoder",
        "image",
    }


def test_compressed_bundle_has_no_floor_for_its_image(bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(bundle)
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        (tmp_path / path.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(bundle)).write_bytes(path.read_bytes())
    compressed = tuple(component.model_copy(update={"bits": 6.0}) for component in manifest.components)
    write_manifest(tmp_path, manifest.model_copy(update={"components": compressed}))
    report = verify_bundle(tmp_path, ["torch"])
    assert report.passed and report.comparisons[-1].floor is None and report.comparisons[0].floor == parity.COMPRESSED_FLOOR


def test_altered_bundle_is_refused_before_anything_runs(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        verify_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="no artifacts for runtime onnxruntime"):
        verify_bundle(bundle, ["onnxruntime"])
    path = bundle / "transformer.pt"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        with pytest.raises(BundleError, match=r"transformer\.pt was altered"):
            verify_bundle(bundle)
    finally:
        path.write_bytes(whole)


def test_json_has_words_where_decibels_are_no_numbers() -> None:
    row = parity.Comparison("image", "onnx", "image", 1, 16.0, math.inf, -math.inf, 40.0, None)
    (fields,) = json.loads(Report("m", "t", (row,)).to_json())["comparisons"]
    assert fields["lowering"] == "identical" and fields["quality"] is None and fields["passed"]
    (entry,) = Report("m", "t", (row,)).to_entries()
    assert entry.lowering == math.inf and entry.quality is None


def test_torch_graph_answers_the_graph_protocol(bundle: Path) -> None:
    entry = load_manifest(bundle).component("vae_decoder", "torch")
    assert entry is not None
    graph = load_component(bundle, entry, TORCH)
    assert isinstance(graph, TorchGraph)
    with pytest.raises(GraphError, match="missing"):
        graph({})
