"""ONNX artifacts: lowering parity against the compressed reference, what is stored, identical bytes, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export.components.component import Component
from export.compression.ladders import ladder
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, WeightInfo, weight_infos
from export.compression.stored import IntegerWeight
from export.errors import UserError
from export.formats.format import EmitOptions
from export.formats.onnx import OnnxFormat, round_per_block
from runtimes.graph import TensorSpec
from runtimes.onnx import load
from tests.export.small_components import (
    conditioner,
    decoder,
    denoiser,
    encoder,
    encoder_with_all_states,
    psnr,
    real_inputs,
    run,
    seeded,
    stored_by_plan,
    worst_psnr,
)

FORMAT, OPTIONS = OnnxFormat(), EmitOptions()


def operations(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]


@pytest.mark.parametrize("bits", [16, 8, 6])
def test_text_encoder_equals_its_compressed_reference(bits: int, tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "onnx", bits)
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, OPTIONS)
    graph = load(artifact.path, threads=1)
    assert (graph.inputs, graph.outputs) == (component.inputs, component.outputs)
    inputs = real_inputs(component)
    reference = run(component, FORMAT.reference(module, stored), inputs)
    assert worst_psnr(reference, graph(inputs)) >= 100
    assert artifact.nbytes == sum((tmp_path / name).stat().st_size for name in artifact.files)
    # Beside the weights there are only masks and the graph itself.
    assert artifact.nbytes < sum(weight.nbytes for weight in stored.values()) + 40_000
    assert ("MatMulNBits" in operations(artifact.path)) == (bits != 16)


@pytest.mark.parametrize("make", [denoiser, conditioner])
def test_transformer_and_conditioner_equal_their_compressed_references(make: Callable[[], Component], tmp_path: Path) -> None:
    component = make()
    module = seeded(component)
    stored = stored_by_plan(component, module, "onnx", 6)
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, OPTIONS)
    graph = load(artifact.path, threads=1)
    inputs = real_inputs(component)
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), graph(inputs)) >= 80


@pytest.mark.parametrize("bits", [16, 8])
def test_image_decoder_equals_its_compressed_reference(bits: int, tmp_path: Path) -> None:
    component = decoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "onnx", bits)
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, OPTIONS)
    inputs = real_inputs(component)
    reference = run(component, FORMAT.reference(module, stored), inputs)
    assert worst_psnr(reference, load(artifact.path, threads=1)(inputs)) >= 80
    assert ("DequantizeLinear" in operations(artifact.path)) == (bits == 8)


@pytest.mark.parametrize("make", [encoder, denoiser, conditioner])
def test_int8_activations_are_in_the_compressed_reference(make: Callable[[], Component], tmp_path: Path) -> None:
    component = make()
    module = seeded(component)
    fast = OnnxFormat(activations="int8")
    stored = stored_by_plan(component, module, "onnx", 8)
    (artifact,) = fast.emit(component, module, stored, tmp_path, OPTIONS)
    inputs = real_inputs(component)
    made = load(artifact.path, threads=1)(inputs)
    with_rounding = worst_psnr(run(component, fast.reference(module, stored), inputs), made)
    without = worst_psnr(run(component, FORMAT.reference(module, stored), inputs), made)
    assert with_rounding >= 45 and with_rounding >= without + 3, (with_rounding, without)
    assert "int8" in artifact.details["activations"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 64, 256])
def test_onnx_runtime_rounds_the_inputs_of_a_linear_by_blocks_as_we_do(bits: int, block: int, tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", (1, 7, 512))
    component = Component("linear", "linear", (spec,), (TensorSpec("y", "float32", (1, 7, 48)),), _Linear)
    module = seeded(component)
    stored = round_weights(dict(module.named_parameters()), {"linear.weight": IntegerScheme(bits, block)})
    (artifact,) = OnnxFormat(activations="int8").emit(component, module, stored, tmp_path, OPTIONS)
    assert operations(artifact.path) == ["MatMulNBits"]  # the bias is inside
    generator = np.random.default_rng(0)
    x = (generator.standard_normal(spec.shape) * np.exp(generator.standard_normal((1, 7, 1)))).astype(np.float32)
    x[0, 3] = 0.0
    made = load(artifact.path, threads=1)({"x": x})["y"]
    blocks = x.astype(np.float64).reshape(7, -1, block)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / 127
    rounded = (np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)) * scales).reshape(7, 512)
    bias = module.get_parameter("linear.bias").numpy()
    expected = rounded @ stored["linear.weight"].dequantize().T.astype(np.float64) + bias
    assert psnr(expected, made[0]) >= 100
    np.testing.assert_allclose(round_per_block(torch.from_numpy(x), block).numpy()[0], rounded, rtol=1e-6, atol=1e-7)
    assert psnr(x[0].astype(np.float64) @ stored["linear.weight"].dequantize().T + bias, made[0]) < 75  # what rounding does


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(512, 48)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(x),)


def test_attention_without_a_mask_is_one_operation(tmp_path: Path) -> None:
    component = denoiser()
    module = seeded(component)
    (artifact,) = FORMAT.emit(component, module, stored_by_plan(component, module, "onnx", 8), tmp_path, OPTIONS)
    kinds = operations(artifact.path)
    assert kinds.count("MultiHeadAttention") == 3 and "Softmax" not in kinds  # two joint attentions and the dual one
    assert kinds.count("Gelu") == 3 and "Tanh" not in kinds


def test_with_int8_activations_linears_have_the_largest_blocks_alone() -> None:
    wide, narrow = WeightInfo("a.weight", (64, 1536), "linear"), WeightInfo("b.weight", (512, 192), "linear")
    assert ladder(wide, "onnx", "iOS18", "int8") == (IntegerScheme(4, 256), IntegerScheme(8, 256), FloatScheme(16))
    assert ladder(narrow, "onnx", "iOS18", "int8") == (IntegerScheme(4, 64), IntegerScheme(8, 64), FloatScheme(16))
    assert IntegerScheme(8, 16) in ladder(wide, "onnx", "iOS18")


def test_every_output_of_the_diffusers_contract_keeps_its_name_and_place(tmp_path: Path) -> None:
    component = encoder_with_all_states()
    module = seeded(component)
    (artifact,) = FORMAT.emit(component, module, stored_by_plan(component, module, "onnx", 8), tmp_path, OPTIONS)
    graph = load(artifact.path, threads=1)
    assert (graph.inputs, graph.outputs) == (component.inputs, component.outputs)
    assert [spec.name for spec in graph.outputs][:3] == ["text_embeds", "last_hidden_state", "hidden_states.0"]


def test_integers_in_the_file_are_the_stored_ones(tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    stored = round_weights(dict(module.named_parameters()), {name: IntegerScheme(4, 32)})
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, OPTIONS)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(artifact.path)).graph.initializer}
    packed = constants[f"{name}.ints"].reshape(-1)
    weight = stored[name]
    assert isinstance(weight, IntegerWeight)
    unpacked = np.stack([packed & 15, packed >> 4], axis=1).reshape(weight.shape).astype(np.int16) - 8
    np.testing.assert_array_equal(unpacked, weight.ints)
    np.testing.assert_array_equal(constants[f"{name}.scales"], weight.scales)


def test_two_exports_are_identical_and_name_no_folder(tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "onnx", 8)
    contents = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (artifact,) = FORMAT.emit(component, module, stored, tmp_path / folder, OPTIONS)
        contents.append({name: (tmp_path / folder / name).read_bytes() for name in artifact.files})
    assert contents[0] == contents[1]
    assert str(Path(__file__).parents[2]).encode() not in contents[0]["text_encoder/model.onnx"]


def test_an_integer_weight_that_feeds_no_product_is_an_error_naming_it(tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    name = "text_model.embeddings.position_embedding.weight"
    with pytest.raises(UserError, match=f"{name} feeds Add, which takes no integers|{name} feeds Slice"):
        stored = round_weights(dict(module.named_parameters()), {name: IntegerScheme(8)})
        FORMAT.emit(component, module, stored, tmp_path, OPTIONS)


def test_what_onnx_runtime_cannot_hold_is_refused_from_shapes_alone() -> None:
    component = encoder()
    linear, table = "text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"

    def reasons(name: str, scheme: FloatScheme | IntegerScheme | PaletteScheme) -> list[str]:
        return FORMAT.refuse(component, {name: scheme}, OPTIONS)

    assert reasons(linear, IntegerScheme(6, 32)) == ["MatMulNBits does not hold 6 bits; choose from 4, 8"]
    assert "no blocks of None" in reasons(linear, IntegerScheme(8))[0]
    assert "blocks of 128 do not divide its 64 inputs" in reasons(linear, IntegerScheme(8, 128))[0]
    assert "8 bits or not at all" in reasons(linear, IntegerScheme(8, 32, input_bits=16))[0]
    assert "no palettes" in reasons(linear, PaletteScheme(6))[0]
    assert "8-bit integers with one scale a row" in reasons(table, IntegerScheme(4, 32))[0]
    assert "only linears" in reasons("text_model.final_layer_norm.weight", IntegerScheme(8))[0]
    assert "another model" in reasons("blocks.0.weight", FloatScheme(16))[0]
    assert not FORMAT.refuse(component, {info.name: FloatScheme(16) for info in weight_infos(component.blank())}, OPTIONS)
