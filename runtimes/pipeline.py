"""Prompt -> image from a bundle alone, through any runtime.

    pipeline = Pipeline.open(Path("bundles/flash-mini/ios"))
    pipeline.generate("a red circle", seed=0).image.save("circle.png")

No torch module of the checkpoint takes part, and the noise equals torch's for the seed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from runtimes.bundle import BundleError, ComponentEntry, Manifest, load_manifest
from runtimes.conditioning import Arrays, Contract, contract_of
from runtimes.graph import Graph, GraphError
from runtimes.registry import Runtime, choose_runtime, load_component
from runtimes.sampler import noise, sample
from runtimes.tokenizer import Tokenizer, TokenizerError

REQUIRED = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
OnStep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Timing:
    """Seconds that one component took during one `generate`. `load` is 0 where it was in memory already."""

    load: float
    run: float
    calls: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """An image and how it came about. pixels float32 [3, H, W] in [0, 1]; latents: the noise, then one after each step."""

    image: Image.Image
    pixels: np.ndarray
    latents: tuple[np.ndarray, ...]
    timings: Mapping[str, Timing]


class Pipeline:
    """A bundle opened through one runtime. Components are loaded when first needed, and kept unless `low_memory`."""

    def __init__(self, bundle: Path, manifest: Manifest, runtime: Runtime, *, low_memory: bool, threads: int | None) -> None:
        self.manifest = manifest
        self.runtime = runtime
        self.low_memory = low_memory
        self._bundle = bundle
        self._threads = threads
        self._contract: Contract = contract_of(manifest)
        self._tokenizer, self._tokenizer_2 = (_tokenizer(bundle, manifest, name) for name in ("tokenizer", "tokenizer_2"))
        self._loaded: dict[str, Graph] = {}

    @classmethod
    def open(cls, bundle: Path, runtime: str = "auto", *, low_memory: bool = False, threads: int | None = None) -> Pipeline:
        """Raises `BundleError` if the folder is no bundle, lacks a component, or has no artifacts for `runtime`.

        `low_memory` has one artifact in memory at a time: each is loaded, run and released.
        """
        if threads is not None and threads < 1:
            raise BundleError(f"{threads} threads cannot run anything; expected 1 or more")
        manifest = load_manifest(bundle)
        chosen = choose_runtime(manifest, runtime)
        pipeline = cls(bundle, manifest, chosen, low_memory=low_memory, threads=threads)
        for component in REQUIRED:
            pipeline._entry(component)
        return pipeline

    def generate(self, prompt: str, seed: int = 0, on_step: OnStep | None = None) -> Drawn:
        """Draws the prompt from torch's noise for `seed`. `on_step(step, latent)` is called after each denoising step."""
        contract, timings = self._contract, dict[str, Timing]()
        conditioning = self._condition(prompt, timings)
        with self._held("transformer"):

            def velocity(latent: np.ndarray, step: int) -> np.ndarray:
                outputs = self._run("transformer", contract.transformer_inputs(conditioning, latent, step), timings)
                return outputs[contract.names.velocity]

            latents = sample(velocity, noise(seed, self.manifest.latent.shape), self.manifest.sigmas, on_step)
        with self._held("vae_decoder"):
            pixels = contract.pixels(self._run("vae_decoder", contract.decoder_inputs(latents[-1]), timings))
        if wrong := np.count_nonzero(~np.isfinite(pixels)):
            raise GraphError(f"{self.runtime.name} drew an image with {wrong} of {pixels.size} values NaN or infinite")
        return Drawn(to_image(pixels), pixels, tuple(latents), timings)

    def _condition(self, prompt: str, timings: dict[str, Timing]) -> Arrays:
        encoded = []
        for component, tokenizer in (("text_encoder", self._tokenizer), ("text_encoder_2", self._tokenizer_2)):
            with self._held(component):
                encoded.append(self._run(component, {"input_ids": tokenizer(prompt)}, timings))
        first, second = encoded
        if self.manifest.component("conditioner", self.runtime.format) is None:
            return self._contract.unhoisted(first, second, self._entry("transformer").inputs)
        with self._held("conditioner"):
            return self._run("conditioner", self._contract.conditioner_inputs(first, second), timings)

    def _run(self, component: str, inputs: Arrays, timings: dict[str, Timing]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        if component not in self._loaded:
            self._loaded[component] = load_component(
                self._bundle, self._entry(component), self.runtime, self._threads, low_memory=self.low_memory
            )
        loaded = time.perf_counter()
        outputs = self._loaded[component](inputs)
        before = timings.get(component, Timing(0.0, 0.0, 0))
        run = time.perf_counter() - loaded
        timings[component] = Timing(before.load + loaded - start, before.run + run, before.calls + 1)
        return outputs

    @contextmanager
    def _held(self, component: str) -> Iterator[None]:
        """Keeps the component loaded inside the block; in low memory it is released after it."""
        try:
            yield
        finally:
            if self.low_memory and self._loaded.pop(component, None) is not None:
                gc.collect()  # a graph may hold itself in a cycle

    def _entry(self, component: str) -> ComponentEntry:
        entry = self.manifest.component(component, self.runtime.format)
        if entry is None:
            raise BundleError(f"{self._bundle} cannot draw: it has no {component} in format {self.runtime.format}")
        return entry


def to_image(pixels: np.ndarray) -> Image.Image:
    """float [3, H, W] in [0, 1] to an 8-bit picture, rounded as diffusers rounds."""
    return Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def _tokenizer(bundle: Path, manifest: Manifest, name: str) -> Tokenizer:
    entry = next((tokenizer for tokenizer in manifest.tokenizers if tokenizer.name == name), None)
    if entry is None:
        raise BundleError(f"{bundle} cannot draw: it has no {name}")
    try:
        return Tokenizer.from_files(bundle / entry.vocabulary, bundle / entry.merges, entry.rules)
    except TokenizerError as error:
        raise BundleError(str(error)) from error
