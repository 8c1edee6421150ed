"""Bundles of real shapes whose ONNX graphs compute next to nothing: for tests that run artifacts in other processes.

The components are those of a tiny checkpoint; the graph of each gives, for every output, zeros plus sigmoid(mean(first input)).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.checkpoint import Checkpoint
from export.components.component import Component
from export.families.family import GraphOptions
from export.families.sd3 import Sd3
from export.recording import entries
from runtimes.bundle import (
    ArtifactEntry,
    ComponentEntry,
    ImageSize,
    LicenceEntry,
    Manifest,
    ModelEntry,
    RecipeEntry,
    TokenizerEntry,
    chunk_feeds,
    describe_files,
    resource_hints,
    write_manifest,
)
from runtimes.golden import Case, Drawing, write_golden
from runtimes.tokenizer import Tokenizer

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}


def write_graph(path: Path, component: Component, external: bool) -> None:
    """model.onnx, its zeros beside it in model.onnx.data where `external`."""
    path.parent.mkdir()
    nodes = [
        helper.make_node("Cast", [component.inputs[0].name], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["wide"], ["mean"], keepdims=0),
        helper.make_node("Sigmoid", ["mean"], ["level"]),
        *(helper.make_node("Add", [f"zeros {spec.name}", "level"], [spec.name]) for spec in component.outputs),
    ]
    zeros = [numpy_helper.from_array(np.zeros(spec.shape, np.float32), f"zeros {spec.name}") for spec in component.outputs]
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.shape) for spec in specs]
        for specs in (component.inputs, component.outputs)
    )
    graph = helper.make_graph(nodes, component.name, inputs, outputs, zeros)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(path), save_as_external_data=external, location="model.onnx.data")


def write_onnx_bundle(
    folder: Path, checkpoint: Checkpoint, options: GraphOptions, *, only: Sequence[str] = (), external: Sequence[str] = ()
) -> Manifest:
    """A bundle of the checkpoint's components (or of `only` some), with two golden cases of random inputs each."""
    folder.mkdir(parents=True)
    family = Sd3.read(checkpoint)
    parts = family.components(options)
    names = [name for name in dict.fromkeys(_owner(part) for part in parts) if not only or name in only]
    components = tuple(_component(folder, [part for part in parts if _owner(part) == name], name in external) for name in names)
    tokenizers = {name: Tokenizer.from_checkpoint(checkpoint.tokenizers[name]) for name in ("tokenizer", "tokenizer_2")}
    for name, tokenizer in tokenizers.items():
        tokenizer.save(folder / name)
    layout = family.latent_layout(options)
    latents = np.zeros((len(options.sigmas), *layout.shape[1:]), np.float32)
    image = np.zeros((3, options.height, options.width), np.float32)
    drawings = [Drawing(prompt, seed, latents, image) for seed, prompt in enumerate(("the red", "the circle"))]
    golden = write_golden(folder, {entry.name: _cases(entry) for entry in components}, drawings)
    manifest = Manifest(
        model=ModelEntry(name="tiny", family=family.name, fingerprint=checkpoint.fingerprint()),
        target="android",
        contract=options.contract,
        rewrites=tuple(name for name, on in vars(options.rewrites).items() if on),
        formats=("onnx",),
        components=components,
        sigmas=options.sigmas,
        image_size=ImageSize(height=options.height, width=options.width),
        latent=layout,
        tokenizers=tuple(
            TokenizerEntry(
                name=name,  # type: ignore[arg-type]
                vocabulary=f"{name}/vocab.json",
                merges=f"{name}/merges.txt",
                rules=tokenizer.rules,
                files=describe_files(folder, [name]),
            )
            for name, tokenizer in tokenizers.items()
        ),
        recipe=RecipeEntry(name="uniform-16", bits=16, calibrated=False, schemes=()),
        golden=golden,
        licence=LicenceEntry(name="tiny-licence", attribution="tests", files=()),
        resources=resource_hints(components),
        tools={"onnxruntime": importlib.metadata.version("onnxruntime")},
    )
    write_manifest(folder, manifest)
    return manifest


def _owner(part: Component) -> str:
    return part.name.partition("_chunk")[0]


def _cases(entry: ComponentEntry) -> list[Case]:
    random = np.random.default_rng(0)
    inputs = [{t.name: random.integers(0, 9, t.shape).astype(t.dtype) for t in entry.inputs} for _ in range(2)]
    return [Case(number, None, given, {}) for number, given in enumerate(inputs)]


def _component(folder: Path, pieces: Sequence[Component], external: bool) -> ComponentEntry:
    tensors = [(entries(piece.inputs), entries(piece.outputs)) for piece in pieces]
    feeds = chunk_feeds(tensors) if len(pieces) > 1 else [()]
    artifacts = []
    for piece, (inputs, outputs), fed in zip(pieces, tensors, feeds, strict=True):
        path = f"{piece.name}/model.onnx"
        write_graph(folder / path, piece, external)
        files = describe_files(folder, [piece.name])
        artifacts.append(ArtifactEntry(path=path, files=files, inputs=inputs, outputs=outputs, feeds=fed))
    rows = sum(tensor.shape[1] for inputs, _ in tensors for tensor in inputs if tensor.name == "modulation")
    first = tuple(
        tensor.model_copy(update={"shape": (1, rows, tensor.shape[2])}) if tensor.name == "modulation" else tensor
        for tensor in tensors[0][0]
    )
    return ComponentEntry(
        name=_owner(pieces[0]),
        format="onnx",
        inputs=first,
        outputs=tensors[-1][1],
        artifacts=tuple(artifacts),
        precision="float32",
        bits=16,
        weights=1,
        stored_bytes=2,
    )
