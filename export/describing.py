"""The manifest's entries from what an export made."""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from export.compression.recipe import FormatRecipe
from export.compression.schemes import FloatScheme, PaletteScheme, Scheme
from export.compression.stored import FloatWeight, IntegerWeight, PaletteWeight, StoredWeight
from export.formats.format import Artifact
from export.measuring import Loss
from export.planning import ExportPlan, Part
from export.recording import entries
from runtimes.bundle import (
    ArtifactEntry,
    ComponentEntry,
    FileEntry,
    ImageSize,
    LicenceEntry,
    LoraEntry,
    LossEntry,
    Manifest,
    ModelEntry,
    RecipeEntry,
    SchemeUse,
    TensorEntry,
    TokenizerEntry,
    chunk_feeds,
    describe_files,
    resource_hints,
)
from runtimes.golden import GoldenEntry
from runtimes.tokenizer import Tokenizer

TOOLS = ("torch", "diffusers", "transformers", "coremltools", "onnx", "onnxruntime", "executorch", "torchao")
DELEGATED_FLOOR = 0.5  # least share of the multiply-accumulates that ExecuTorch's backend must take


def component_entry(
    folder: Path, plan: ExportPlan, part: Part, artifacts: Sequence[Artifact], stored: Mapping[str, StoredWeight]
) -> ComponentEntry:
    """One component in one format, from its pieces' artifacts and stored weights in order."""
    tensors = [(entries(artifact.inputs), entries(artifact.outputs)) for artifact in artifacts]
    feeds = chunk_feeds(tensors) if len(artifacts) > 1 else [()]
    weights = stored.values()
    count = sum(math.prod(weight.shape) for weight in weights)
    nbytes = sum(weight.nbytes for weight in weights)
    format = artifacts[0].format
    executorch = format == "executorch"
    return ComponentEntry(
        name=part.name,
        format=format,
        inputs=_component_inputs(tensors),
        outputs=tensors[-1][1],
        artifacts=tuple(
            ArtifactEntry(
                path=artifact.path.relative_to(folder).as_posix(),
                files=describe_files(folder, artifact.files),
                inputs=inputs,
                outputs=outputs,
                feeds=fed,
            )
            for artifact, (inputs, outputs), fed in zip(artifacts, tensors, feeds, strict=True)
        ),
        precision="float16" if format == "coreml" else "float32",
        bits=8 * nbytes / count,
        weights=count,
        stored_bytes=nbytes,
        compute_units=plan.target.compute_units.get(part.name, "ALL") if format == "coreml" else None,  # type: ignore[arg-type]
        backend=artifacts[0].details.get("backend"),
        activations=artifacts[0].details.get("activations") if any(isinstance(w, IntegerWeight) for w in weights) else None,
        delegated=min(artifact.delegated for artifact in artifacts) if executorch else None,
        delegated_floor=DELEGATED_FLOOR if executorch else None,
    )


def scheme_uses(component: str, format: str, stored: Mapping[str, StoredWeight]) -> list[SchemeUse]:
    """How many tensors are stored by each scheme."""
    weights = stored.values()
    tensors = Counter(_scheme_words(weight) for weight in weights)
    return [
        SchemeUse(
            component=component,
            format=format,
            scheme=words,
            tensors=count,
            weights=sum(math.prod(w.shape) for w in weights if _scheme_words(w) == words),
            bytes=sum(w.nbytes for w in weights if _scheme_words(w) == words),
        )
        for words, count in sorted(tensors.items())
    ]


def describe_scheme(scheme: Scheme) -> str:
    """A scheme as a person reads it."""
    if isinstance(scheme, FloatScheme):
        return f"float{scheme.bits}"
    if isinstance(scheme, PaletteScheme):
        groups = f", groups of {scheme.group}" if scheme.group else ""
        return _palette_words(scheme.bits, groups, scheme.vector, scheme.scaled)
    blocks = f", blocks of {scheme.block}" if scheme.block else ""
    return f"integers {scheme.bits} bit{blocks}" + _input_words(scheme.input_bits)


def describe_lora(lora: LoraEntry) -> str:
    """What a merged LoRA is, in a line."""
    return f"LoRA {lora.name} at scale {lora.scale:g} (licence: {lora.licence})"


def make_recipe_entry(
    plan: ExportPlan, recipes: Mapping[str, FormatRecipe], losses: Mapping[str, Loss], schemes: Sequence[SchemeUse]
) -> RecipeEntry:
    """What the weights are stored as, and what it costs the pictures."""
    return RecipeEntry(
        name=plan.budget.name.removeprefix("--"),
        bits=plan.budget.bits or max(recipe.mean_bits for recipe in recipes.values()),
        calibrated=plan.calibration is not None,
        schemes=tuple(schemes),
        losses=tuple(
            LossEntry(
                format=name,
                prompts=found.prompts,
                predicted=recipes[name].predicted_loss,
                measured=found.latents,
                latents=found.latents_psnr,
                image=found.image_psnr,
            )
            for name, found in losses.items()
        ),
    )


def make_manifest(
    folder: Path,
    plan: ExportPlan,
    components: Sequence[ComponentEntry],
    recipe: RecipeEntry,
    golden: GoldenEntry,
    fingerprint: str,
    tokenizers: Mapping[str, Tokenizer],
    others: Sequence[FileEntry],
) -> Manifest:
    """The manifest of a folder that holds everything but it; parity comes in once it has been measured."""
    checkpoint, graph = plan.checkpoint, plan.graph
    return Manifest(
        model=ModelEntry(name=checkpoint.title, family=plan.family.name, fingerprint=fingerprint, loras=checkpoint.merged),
        target=plan.target.name,
        contract=graph.contract,
        rewrites=tuple(name for name, on in vars(graph.rewrites).items() if on),
        formats=tuple(format.name for format in plan.formats),
        components=tuple(components),
        sigmas=graph.sigmas,
        image_size=ImageSize(height=graph.height, width=graph.width),
        latent=plan.family.latent_layout(graph),
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
        recipe=recipe,
        golden=golden,
        licence=LicenceEntry(
            name=checkpoint.licence or "unstated",
            attribution="; ".join((checkpoint.name_or_path or checkpoint.name, *map(describe_lora, checkpoint.merged))),
            files=describe_files(folder, [path.name for path in checkpoint.licence_files]),
        ),
        other_files=tuple(others),
        resources=resource_hints(components),
        tools={name: importlib.metadata.version(name) for name in TOOLS},
    )


def _component_inputs(tensors: Sequence[tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]]) -> tuple[TensorEntry, ...]:
    """The inputs of the whole: the first piece's, with the modulation rows of all pieces."""
    rows = sum(tensor.shape[1] for inputs, _ in tensors for tensor in inputs if tensor.name == "modulation")
    return tuple(
        tensor.model_copy(update={"shape": (1, rows, tensor.shape[2])}) if tensor.name == "modulation" else tensor
        for tensor in tensors[0][0]
    )


def _scheme_words(weight: StoredWeight) -> str:
    if isinstance(weight, FloatWeight):
        return f"float{weight.bits}"
    if isinstance(weight, PaletteWeight):
        groups = f", {weight.groups} groups" if weight.groups > 1 else ""
        return _palette_words(weight.bits, groups, weight.vector, weight.scales is not None)
    assert isinstance(weight, IntegerWeight)
    row = math.prod(weight.shape[1:])
    blocks = f"blocks of {weight.block}" if weight.block < row else "one scale a row"
    return f"integers {weight.bits} bit, {blocks}" + _input_words(weight.input_bits)


def _input_words(bits: int) -> str:
    return f", inputs of {bits} bits" if bits > 8 else ""


def _palette_words(bits: int, groups: str, vector: int, scaled: bool) -> str:
    vectors = f", {vector} weights an entry" if vector > 1 else ""
    return f"palette {bits} bit{vectors}{groups}" + (", a scale a row" if scaled else "")
