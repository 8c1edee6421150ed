"""Core ML packages: palettes bit by bit, lowering parity through the executor, identical bytes, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from torch import Tensor, nn

from export.components.component import Component
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, Scheme
from export.compression.stored import PaletteWeight, StoredWeight
from export.errors import UserError
from export.formats.coreml import CoreMLFormat
from export.formats.format import Artifact, EmitOptions
from runtimes.coreml import load_executor
from runtimes.graph import TensorSpec
from tests.export.small_components import (
    conditioner,
    decoder,
    denoiser,
    encoder,
    encoder_with_all_states,
    real_inputs,
    run,
    seeded,
    stored_by_plan,
    worst_psnr,
)

FORMAT = CoreMLFormat()
IOS17, IOS18 = EmitOptions("iOS17", "someone", "some licence", "1"), EmitOptions("iOS18")


def decompressed(path: Path, target: ct.target) -> dict[str, np.ndarray]:
    """Every palettized constant of a package, as coremltools itself decompresses it, scaled where it is."""
    spec = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
    program = load_program(spec, target.value, str(path / "Data/com.apple.CoreML/weights"))
    constants = [op for kind in ("constexpr_lut_to_dense", "constexpr_blockwise_shift_scale")
                 for op in program.functions["main"].find_ops(op_type=kind)]
    return {op.outputs[0].name: op.materialized_val_inference() for op in constants
            if not any(child.op_type.startswith("constexpr_") for child in op.outputs[0].child_ops)}


@pytest.mark.parametrize(("options", "target", "scheme"), [
    (IOS17, ct.target.iOS17, PaletteScheme(4)),
    (IOS18, ct.target.iOS18, PaletteScheme(3, 16)),
    (IOS18, ct.target.iOS18, PaletteScheme(4, scaled=True)),
    (IOS18, ct.target.iOS18, PaletteScheme(6, 16, scaled=True)),
    (IOS18, ct.target.iOS18, PaletteScheme(8, vector=2)),
    (IOS18, ct.target.iOS18, PaletteScheme(4, 16, scaled=True, vector=2)),
])
def test_packages_hold_our_palettes_bit_by_bit(options: EmitOptions, target: ct.target, scheme: Scheme, tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    names = ["text_model.encoder.layers.0.mlp.fc1.weight", "text_model.encoder.layers.1.self_attn.q_proj.weight",
             "text_projection.weight"]
    stored = round_weights(dict(module.named_parameters()), dict.fromkeys(names, scheme))
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, options)
    found = decompressed(artifact.path, target)
    assert len(found) == len(names)
    for name in names:
        (value,) = [value for key, value in found.items() if name.replace(".", "_") in key]
        weight = stored[name]
        assert isinstance(weight, PaletteWeight)
        np.testing.assert_array_equal(value, weight.dense())


def emit_within_float16(component: Component, module: nn.Module, stored: Mapping[str, StoredWeight], folder: Path,
                        options: EmitOptions) -> list[Artifact]:
    """Fails where conversion makes a constant infinite."""
    with np.errstate(over="raise"):
        return FORMAT.emit(component, module, stored, folder, options)


@pytest.mark.parametrize(("bits", "options", "floor"), [(16, IOS17, 45), (6, IOS17, 40), (6, IOS18, 40)])
def test_text_encoder_equals_its_compressed_reference(bits: int, options: EmitOptions, floor: float, tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "coreml", bits)
    (artifact,) = emit_within_float16(component, module, stored, tmp_path, options)
    graph = load_executor(artifact.path)
    assert (graph.inputs, graph.outputs) == (component.inputs, component.outputs)
    inputs = real_inputs(component)
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), graph(inputs)) >= floor
    assert artifact.nbytes < sum(weight.nbytes for weight in stored.values()) + 120_000


@pytest.mark.parametrize("make", [denoiser, conditioner])
def test_transformer_and_conditioner_equal_their_compressed_references(make: Callable[[], Component], tmp_path: Path) -> None:
    component = make()
    module = seeded(component)
    stored = stored_by_plan(component, module, "coreml", 6)
    (artifact,) = emit_within_float16(component, module, stored, tmp_path, IOS17)
    graph = load_executor(artifact.path)
    inputs = real_inputs(component)
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), graph(inputs)) >= 40


def test_image_decoder_equals_its_compressed_reference(tmp_path: Path) -> None:
    component = decoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "coreml", 6)
    (artifact,) = emit_within_float16(component, module, stored, tmp_path, IOS17)
    inputs = real_inputs(component)
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), load_executor(artifact.path)(inputs)) >= 40


class _GroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8, eps=1e-6)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(states),)


def test_group_norm_does_not_overflow_on_activations_whose_squares_do(tmp_path: Path) -> None:
    shape = (1, 8, 6, 4)
    specs = [(TensorSpec(name, "float32", shape),) for name in ("x", "y")]
    component = Component("norm", "norm", *specs, _GroupNorm)
    module = seeded(component)
    stored = round_weights(dict(module.named_parameters()), {name: FloatScheme(16) for name, _ in module.named_parameters()})
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, IOS17)
    inputs = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 3000}
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), load_executor(artifact.path)(inputs)) >= 45


class _Alias(nn.Module):
    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.aten.alias.default(states * 2), torch.ops.aten.alias.default(states) + 1


def test_alias_operations_are_taken_out(tmp_path: Path) -> None:
    specs = [TensorSpec(name, "float32", (2, 3)) for name in ("x", "double", "more")]
    component = Component("alias", "alias", tuple(specs[:1]), tuple(specs[1:]), _Alias)
    (artifact,) = FORMAT.emit(component, _Alias(), {}, tmp_path, IOS17)
    inputs = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    outputs = load_executor(artifact.path)(inputs)
    np.testing.assert_array_equal(outputs["double"], 2 * inputs["x"])
    np.testing.assert_array_equal(outputs["more"], inputs["x"] + 1)


class _LinearAndConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 32)
        self.conv = nn.Conv2d(2, 16, 3, padding=1)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        return (self.conv(self.linear(states).reshape(1, 2, 4, 4)),)


@pytest.mark.parametrize("scheme", [PaletteScheme(3), PaletteScheme(6, 8), PaletteScheme(4, scaled=True),
                                    PaletteScheme(6, 4, scaled=True), PaletteScheme(8, vector=2),
                                    PaletteScheme(6, 8, scaled=True, vector=2)])
def test_linears_and_convolutions_run_from_every_form_of_palette(scheme: PaletteScheme, tmp_path: Path) -> None:
    component = Component("both", "both", (TensorSpec("x", "float32", (1, 24)),),
                          (TensorSpec("y", "float32", (1, 16, 4, 4)),), _LinearAndConvolution)
    module = seeded(component)
    recipe = {"linear.weight": scheme, "conv.weight": scheme, "linear.bias": FloatScheme(16)}
    stored = round_weights(dict(module.named_parameters()), recipe)
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, IOS18)
    assert len(decompressed(artifact.path, ct.target.iOS18)) == 2
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 24)).astype(np.float32)}
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), load_executor(artifact.path)(inputs)) >= 60


class _Transposed(nn.Module):
    """Uses its weight as [in, out], which conversion stores the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 48).normal_())

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        return (states @ self.weight,)


@pytest.mark.parametrize(("options", "target", "scheme"), [
    (IOS17, ct.target.iOS17, PaletteScheme(6)),
    (IOS18, ct.target.iOS18, PaletteScheme(4, 8)),
    (IOS18, ct.target.iOS18, PaletteScheme(4, 8, scaled=True, vector=2)),
])
def test_weights_that_conversion_transposes_and_renames_are_followed(options: EmitOptions, target: ct.target, scheme: Scheme,
                                                                     tmp_path: Path) -> None:
    component = Component("product", "product", (TensorSpec("x", "float32", (1, 5, 32)),),
                          (TensorSpec("y", "float32", (1, 5, 48)),), _Transposed)
    module = seeded(component)
    stored = round_weights(dict(module.named_parameters()), {"weight": scheme})
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, options)
    (value,) = decompressed(artifact.path, target).values()
    np.testing.assert_array_equal(value, stored["weight"].dequantize().T)


def test_a_weight_that_the_program_does_not_hold_is_an_error_naming_it(tmp_path: Path) -> None:
    class Folded(_Transposed):
        def forward(self, states: Tensor) -> tuple[Tensor, ...]:
            return (states @ (self.weight * 2 + 1),)

    component = Component("product", "product", (TensorSpec("x", "float32", (1, 5, 32)),),
                          (TensorSpec("y", "float32", (1, 5, 48)),), Folded)
    module = seeded(component)
    with pytest.raises(UserError, match="product: the converted Core ML program does not hold weight"):
        stored = round_weights(dict(module.named_parameters()), {"weight": PaletteScheme(6)})
        FORMAT.emit(component, module, stored, tmp_path, IOS17)


def test_two_exports_are_identical_described_and_name_no_folder(tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "coreml", 6)
    contents = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (artifact,) = FORMAT.emit(component, module, stored, tmp_path / folder, IOS17)
        contents.append({name: (tmp_path / folder / name).read_bytes() for name in artifact.files})
    assert contents[0] == contents[1]
    description = ct.models.MLModel(str(artifact.path), skip_model_load=True).get_spec().description
    assert all(feature.shortDescription for feature in (*description.input, *description.output))
    assert (description.metadata.author, description.metadata.license) == ("someone", "some licence")
    assert not any(str(Path(__file__).parents[2]).encode() in content for content in contents[0].values())


def test_what_core_ml_cannot_hold_is_refused_from_shapes_alone() -> None:
    component = encoder()
    name = "text_model.encoder.layers.0.mlp.fc1.weight"

    def reasons(scheme: Scheme, options: EmitOptions = IOS17) -> list[str]:
        return FORMAT.refuse(component, {name: scheme}, options)

    assert reasons(PaletteScheme(5)) == ["--bits 5 is not a Core ML palette size; choose from 1, 2, 3, 4, 6, 8"]
    assert "need --deployment-target iOS18" in reasons(PaletteScheme(3))[0]
    assert "need --deployment-target iOS18" in reasons(PaletteScheme(4, 16))[0]
    assert "a scale per output channel need --deployment-target iOS18" in reasons(PaletteScheme(4, scaled=True))[0]
    assert "palettes of vectors need --deployment-target iOS18" in reasons(PaletteScheme(8, vector=2))[0]
    assert "groups of 48 channels do not divide 128" in reasons(PaletteScheme(4, 48), IOS18)[0]
    assert "vectors of 2 channels do not divide 1" in reasons(PaletteScheme(4, 1, vector=2), IOS18)[0]
    assert "3 bits do not hold vectors of 2; those of 2 weights have 4, 6, 8" in reasons(PaletteScheme(3, vector=2), IOS18)[0]
    assert "not 8-bit integers" in reasons(IntegerScheme(8))[0]
    assert "not float32" in reasons(FloatScheme(32))[0]
    assert "choose from iOS17, iOS18" in reasons(FloatScheme(16), EmitOptions("iOS12"))[0]
    assert not reasons(PaletteScheme(3, 16), IOS18)
    assert not reasons(PaletteScheme(8, 16, scaled=True, vector=2), IOS18)
    assert "--contract flash" in FORMAT.refuse(encoder_with_all_states(), {}, IOS17)[0]


_EMIT = """
import sys
from pathlib import Path
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, weight_infos
from export.formats.coreml import CoreMLFormat
from export.formats.format import EmitOptions
from tests.export.small_components import denoiser, seeded
component = denoiser()
module = seeded(component)
stored = round_weights(dict(module.named_parameters()), {info.name: FloatScheme(16) for info in weight_infos(module)})
CoreMLFormat().emit(component, module, stored, Path(sys.argv[1]), EmitOptions(deployment_target="iOS18"))
"""


def test_processes_that_hash_strings_differently_write_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for seed in ("1", "7"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", _EMIT, str(tmp_path / seed)]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True)
        files = sorted(path for path in (tmp_path / seed).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / seed): path.read_bytes() for path in files})
    assert len(contents[0]) == 3 and contents[0] == contents[1]
