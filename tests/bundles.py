"""Small whole bundles for the tests of the runtimes, with artifacts that torch itself runs.

The components are the real ones on a tiny checkpoint (tests/models.py). Their artifacts are the modules' weights, and the
runtime `TORCH` runs the modules: so these tests depend on no exported format, and show that a new runtime is one entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint
from export.components.component import Component
from export.families.family import GraphOptions
from export.families.sd3 import Sd3
from runtimes.bundle import (
    ArtifactEntry,
    ComponentEntry,
    ImageSize,
    LatentLayout,
    LicenceEntry,
    Manifest,
    ModelEntry,
    RecipeEntry,
    TensorEntry,
    TokenizerEntry,
    chunk_feeds,
    describe_files,
    resource_hints,
    sha256,
    write_manifest,
)
from runtimes.golden import Case, Drawing, write_golden
from runtimes.graph import TensorSpec, check_inputs
from runtimes.registry import Runtime
from runtimes.tokenizer import Tokenizer
from tests.models import Reference

FORMAT = "torch"
PARTS: dict[str, Component] = {}  # what an artifact's weights belong to, by the hash of its file


class TorchGraph:
    """A component's module with the weights that were saved."""

    def __init__(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._module = PARTS[sha256(path)].make().eval()
        self._module.load_state_dict(load_file(path))

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = check_inputs(self.inputs, inputs)
        with torch.no_grad():
            results = self._module(*(torch.from_numpy(array) for array in arrays.values()))
        return {spec.name: result.numpy() for spec, result in zip(self.outputs, results, strict=True)}


def load_torch(path: Path, component: ComponentEntry, threads: int | None) -> TorchGraph:
    artifact = next(artifact for artifact in component.artifacts if path.name == artifact.path)
    return TorchGraph(path, _specs(artifact.inputs), _specs(artifact.outputs))


TORCH = Runtime("torch", FORMAT, "torch", load_torch)


def write_bundle(
    folder: Path, checkpoint: Checkpoint, reference: Reference, options: GraphOptions, prompts: Sequence[tuple[str, int]]
) -> Manifest:
    """A complete bundle in `folder`, golden images drawn by unmodified diffusers from the (prompt, seed) pairs."""
    folder.mkdir(parents=True)
    family = Sd3.read(checkpoint)
    parts = family.components(options)
    modules = {part.name: part.load(checkpoint) for part in parts}
    for part in parts:
        # Graphs of equal weights may differ in their constants, so each file is made different.
        save_file(modules[part.name].state_dict(), folder / f"{part.name}.pt", metadata={"number": str(len(PARTS))})
        PARTS[sha256(folder / f"{part.name}.pt")] = part
    names = dict.fromkeys(part.name.partition("_chunk")[0] for part in parts)
    entries = tuple(_component(folder, name, [p for p in parts if p.name.partition("_chunk")[0] == name]) for name in names)
    tokenizers = {name: Tokenizer.from_checkpoint(checkpoint.tokenizers[name]) for name in ("tokenizer", "tokenizer_2")}
    for name, tokenizer in tokenizers.items():
        tokenizer.save(folder / name)
    drawings = [draw(reference, options, prompt, seed) for prompt, seed in prompts]
    _, channels, height, width = family.latent_shape(options)
    cases = record(entries, modules, tokenizers, drawings) if {"conditioner", "transformer"} <= modules.keys() else {}
    (folder / "LICENSE").write_text("Do as you please.\n")
    manifest = Manifest(
        model=ModelEntry(name="tiny", family=family.name, fingerprint="0" * 64),
        target="test",
        contract=options.contract,
        rewrites=tuple(name for name, on in vars(options.rewrites).items() if on),
        formats=(FORMAT,),
        components=entries,
        sigmas=options.sigmas,
        image_size=ImageSize(height=options.height, width=options.width),
        latent=LatentLayout(
            channels=channels,
            height=height,
            width=width,
            vae_factor=family.vae.factor,
            scaling_factor=reference.vae.config.scaling_factor,
            shift_factor=reference.vae.config.shift_factor,
        ),
        tokenizers=tuple(
            TokenizerEntry(
                name=name,
                vocabulary=f"{name}/vocab.json",
                merges=f"{name}/merges.txt",
                rules=tokenizer.rules,
                files=describe_files(folder, [name]),
            )
            for name, tokenizer in tokenizers.items()
        ),
        recipe=RecipeEntry(name="none", bits=16, calibrated=False, schemes=()),
        golden=write_golden(folder, cases, drawings),
        licence=LicenceEntry(name="tiny-licence", attribution="tests", files=describe_files(folder, ["LICENSE"])),
        resources=resource_hints(entries),
        tools={"torch": torch.__version__},
    )
    write_manifest(folder, manifest)
    return manifest


def draw(reference: Reference, options: GraphOptions, prompt: str, seed: int) -> Drawing:
    """The image and latents of unmodified diffusers."""
    latents: list[np.ndarray] = []

    def keep(pipeline: object, step: int, timestep: object, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"][0].numpy().copy())
        return values

    shape = (1, reference.transformer.config.in_channels, options.height // 8, options.width // 8)
    start = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    image = reference.pipeline()(
        prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=len(options.sigmas) - 1,
        sigmas=list(options.sigmas[:-1]),
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        callback_on_step_end=keep,
    ).images[0]
    return Drawing(prompt, seed, np.stack([start[0].numpy(), *latents]), image.transpose(2, 0, 1))


def record(
    entries: Sequence[ComponentEntry],
    modules: Mapping[str, torch.nn.Module],
    tokenizers: Mapping[str, Tokenizer],
    drawings: Sequence[Drawing],
) -> dict[str, list[Case]]:
    """Golden cases of a flash bundle in one piece each, by the modules before they were saved."""
    cases: dict[str, list[Case]] = {entry.name: [] for entry in entries}
    named = {entry.name: entry for entry in entries}

    def run(name: str, prompt: int, step: int | None, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            outputs = tuple(output.numpy() for output in modules[name](*(torch.from_numpy(array) for array in arrays)))
        given = dict(zip((tensor.name for tensor in named[name].inputs), arrays, strict=True))
        made = dict(zip((tensor.name for tensor in named[name].outputs), outputs, strict=True))
        cases[name].append(Case(prompt, step, given, made))
        return outputs

    for p, drawing in enumerate(drawings):
        hidden, pooled = run("text_encoder", p, None, tokenizers["tokenizer"](drawing.prompt))
        hidden_2, pooled_2 = run("text_encoder_2", p, None, tokenizers["tokenizer_2"](drawing.prompt))
        context, modulation = run("conditioner", p, None, hidden, hidden_2, pooled, pooled_2)
        for step in range(len(modulation)):
            run("transformer", p, step, drawing.latents[step : step + 1], context, modulation[step : step + 1])
        run("vae_decoder", p, None, drawing.latents[-1:])
    return cases


def _component(folder: Path, name: str, parts: Sequence[Component]) -> ComponentEntry:
    tensors = [(_entries(part.inputs), _entries(part.outputs)) for part in parts]
    feeds = chunk_feeds(tensors) if len(parts) > 1 else [()]
    artifacts = tuple(
        ArtifactEntry(
            path=f"{part.name}.pt",
            files=describe_files(folder, [f"{part.name}.pt"]),
            inputs=inputs,
            outputs=outputs,
            feeds=fed,
        )
        for part, (inputs, outputs), fed in zip(parts, tensors, feeds, strict=True)
    )
    rows = sum(tensor.shape[1] for inputs, _ in tensors for tensor in inputs if tensor.name == "modulation")
    first = tuple(
        tensor.model_copy(update={"shape": (1, rows, tensor.shape[2])}) if tensor.name == "modulation" else tensor
        for tensor in tensors[0][0]
    )
    weights = sum(int(np.prod(shape)) for part in parts for shape in part.reads().values())
    return ComponentEntry(
        name=name,
        format=FORMAT,
        inputs=first,
        outputs=tensors[-1][1],
        artifacts=artifacts,
        precision="float32",
        bits=32,
        weights=weights,
        stored_bytes=4 * weights,
    )


def _entries(tensors: Sequence[TensorSpec]) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in tensors)


def _specs(tensors: Sequence[TensorEntry]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
