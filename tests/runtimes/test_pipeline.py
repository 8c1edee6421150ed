"""Pictures drawn from a bundle alone against those of unmodified diffusers, for every contract; runtimes and memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.checkpoint import Checkpoint, open_checkpoint
from export.families.family import GraphOptions
from export.rewrites import Rewrites, rewrites_of
from runtimes import registry
from runtimes.bundle import BundleError, ComponentEntry, Manifest, load_manifest
from runtimes.golden import read_drawings
from runtimes.graph import Graph, GraphError
from runtimes.harness.parity import psnr
from runtimes.pipeline import Pipeline, to_image
from runtimes.registry import RUNTIMES, Runtime, choose_runtime
from tests.bundles import TORCH, TorchGraph, write_bundle
from tests.models import SD35, Reference, load_reference, write_checkpoint

PROMPTS = (("the red circle and the blue!", 0), ("ünïcode “quoted” <|endoftext|> 😀 square", 7))
FLASH = GraphOptions(width=128, height=96, sigmas=(1.0, 0.9, 0.75, 0.5, 0.0))
VARIANTS = {
    "flash": FLASH,
    "flash in 3 chunks": replace(FLASH, chunks=3),
    "nothing rewritten": replace(FLASH, rewrites=Rewrites(False, False, False, False)),
    "only the null tokens folded": replace(FLASH, rewrites=Rewrites(True, False, True, False)),
    "conditioner hoisted, nothing folded": replace(FLASH, rewrites=Rewrites(False, True, True, True)),
    "diffusers": replace(FLASH, contract="diffusers", rewrites=rewrites_of("diffusers")),
    "two steps, tall": GraphOptions(width=64, height=160, sigmas=(1.0, 0.75, 0.0)),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Reference]:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SD35)
    return open_checkpoint(str(folder)), load_reference(folder)


@pytest.fixture(scope="module")
def bundle(tiny: tuple[Checkpoint, Reference], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a variant, made when first asked for."""
    home = tmp_path_factory.mktemp("bundles")

    def get(variant: str) -> Path:
        if not (home / variant).exists():
            write_bundle(home / variant, *tiny, VARIANTS[variant], PROMPTS)
        return home / variant

    return get


@pytest.fixture(autouse=True)
def torch_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "torch", TORCH)


@pytest.mark.parametrize("variant", VARIANTS)
def test_picture_equals_that_of_diffusers(bundle: Callable[[str], Path], variant: str) -> None:
    folder = bundle(variant)
    pipeline = Pipeline.open(folder)
    manifest = load_manifest(folder)
    steps: list[int] = []
    for drawing in read_drawings(folder, manifest.golden):
        drawn = pipeline.generate(drawing.prompt, drawing.seed, lambda step, latent: steps.append(step))
        for latent, expected in zip(drawn.latents, drawing.latents, strict=True):
            assert psnr(latent[0], expected) > 90
        assert psnr(drawn.pixels, drawing.image) > 80
        difference = np.abs(np.asarray(drawn.image).astype(int) - np.asarray(to_image(drawing.image)).astype(int))
        assert difference.max() <= 1 and drawn.image.size == (manifest.image_size.width, manifest.image_size.height)
    assert steps == [*range(manifest.steps)] * len(PROMPTS)
    assert drawn.timings["transformer"].calls == manifest.steps
    assert all(timing.run > 0 for timing in drawn.timings.values())


def test_another_seed_or_prompt_is_another_picture(bundle: Callable[[str], Path]) -> None:
    pipeline = Pipeline.open(bundle("flash"))
    first = pipeline.generate("the red circle", 0).pixels
    assert np.array_equal(first, pipeline.generate("the red circle", 0).pixels)
    assert psnr(pipeline.generate("the red circle", 1).pixels, first) < 40
    assert psnr(pipeline.generate("zzz !!!", 0).pixels, first) < 80


@pytest.mark.parametrize("low_memory", [True, False])
def test_low_memory_holds_one_component_at_a_time(
    bundle: Callable[[str], Path], low_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Graph] = weakref.WeakSet()
    most = 0

    def load(path: Path, component: ComponentEntry, threads: int | None) -> TorchGraph:
        nonlocal most
        graph = TORCH.load(path, component, threads)
        alive.add(graph)
        most = max(most, len(alive))
        assert isinstance(graph, TorchGraph)
        return graph

    expected = Pipeline.open(bundle("flash")).generate("the red circle").pixels
    monkeypatch.setitem(RUNTIMES, "torch", replace(TORCH, load=load))
    pipeline = Pipeline.open(bundle("flash"), low_memory=low_memory)
    drawn = pipeline.generate("the red circle")
    assert np.array_equal(drawn.pixels, expected)
    assert most == (1 if low_memory else 5)
    gc.collect()
    assert len(alive) == (0 if low_memory else 5)
    assert (pipeline.generate("the red circle").timings["transformer"].load > 0.001) == low_memory


def test_loaded_components_outlive_an_error_only_outside_low_memory(bundle: Callable[[str], Path]) -> None:
    pipeline = Pipeline.open(bundle("flash"), low_memory=True)

    def stop(step: int, latent: np.ndarray) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate("the red circle", on_step=stop)
    assert pipeline._loaded == {}


def test_picture_of_no_numbers_is_an_error(bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(TorchGraph):
        def __call__(self, inputs):
            return {name: array * np.nan for name, array in super().__call__(inputs).items()}

    def load(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
        kind = Broken if component.name == "transformer" else TorchGraph
        return kind(path, registry.specs(component.inputs), registry.specs(component.outputs))

    monkeypatch.setitem(RUNTIMES, "torch", replace(TORCH, load=load))
    with pytest.raises(GraphError, match="torch drew an image with 36864 of 36864 values NaN or infinite"):
        Pipeline.open(bundle("flash")).generate("the red circle")


def test_runtime_without_artifacts_is_named_with_what_there_is(bundle: Callable[[str], Path]) -> None:
    with pytest.raises(BundleError, match=r"no artifacts for runtime coreml; it holds torch artifacts: use torch"):
        Pipeline.open(bundle("flash"), "coreml")
    with pytest.raises(BundleError, match=r"'vulkan' does not exist; choose from auto, coreml, onnxruntime, executorch"):
        Pipeline.open(bundle("flash"), "vulkan")
    with pytest.raises(BundleError, match="0 threads"):
        Pipeline.open(bundle("flash"), threads=0)


def test_bundle_without_a_component_or_tokenizer_cannot_draw(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    manifest = load_manifest(bundle("flash"))

    def opened(changed: Manifest) -> None:
        (tmp_path / "manifest.json").write_text(changed.model_dump_json())
        Pipeline.open(tmp_path)

    without = tuple(component for component in manifest.components if component.name != "vae_decoder")
    for tokenizer in manifest.tokenizers:
        for path in (tokenizer.vocabulary, tokenizer.merges):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes((bundle("flash") / path).read_bytes())
    with pytest.raises(BundleError, match="it has no vae_decoder in format torch"):
        opened(manifest.model_copy(update={"components": without}))
    with pytest.raises(BundleError, match="it has no tokenizer_2"):
        opened(manifest.model_copy(update={"tokenizers": manifest.tokenizers[:1]}))
    (tmp_path / manifest.tokenizers[0].vocabulary).write_text("[]")
    with pytest.raises(BundleError, match="holds no JSON object"):
        opened(manifest)


def test_auto_prefers_coreml_then_onnxruntime_then_executorch(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(bundle("flash"))

    def chosen(*formats: str) -> str:
        return choose_runtime(manifest.model_copy(update={"formats": formats})).name

    assert chosen("coreml") == "coreml"
    assert chosen("executorch", "onnx") == "onnxruntime"
    assert chosen("executorch") == "executorch"
    absent = Runtime("onnxruntime", "onnx", "a_package_that_is_not_installed", TORCH.load)
    monkeypatch.setitem(RUNTIMES, "onnxruntime", absent)
    assert chosen("executorch", "onnx") == "executorch"
    with pytest.raises(BundleError, match="needs a package that is not installed: a_package_that_is_not_installed"):
        chosen("onnx")
    with pytest.raises(BundleError, match="artifacts for qnn, which no runtime here can load"):
        chosen("qnn")


def test_artifact_that_is_not_what_the_manifest_says_is_refused(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, component: ComponentEntry, threads: int | None) -> Graph:
        return TorchGraph(path, (), registry.specs(component.outputs))

    monkeypatch.setitem(RUNTIMES, "torch", replace(TORCH, load=load))
    with pytest.raises(GraphError, match=r"text_encoder\.pt has inputs .*; the manifest says input_ids int32"):
        Pipeline.open(bundle("flash")).generate("x")
