"""ExecuTorch programs: lowering parity with the dynamic rounding in the reference, the integers themselves, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis

from export.components.component import Component
from export.compression.integers import quantize
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, Scheme
from export.compression.stored import IntegerWeight
from export.formats.executorch import ExecuTorchFormat, IntegerEmbedding
from export.formats.executorch_inputs import round_per_token
from export.formats.format import EmitOptions
from runtimes.executorch import load
from runtimes.graph import TensorSpec
from runtimes.harness.parity import psnr
from tests.export.small_components import decoder, encoder, real_inputs, run, seeded, stored_by_plan, worst_psnr

FORMAT, OPTIONS = ExecuTorchFormat(), EmitOptions()


@pytest.mark.parametrize("bits", [8, 6])
def test_text_encoder_equals_its_compressed_reference(bits: int, tmp_path: Path) -> None:
    component = encoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "executorch", bits)
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, OPTIONS)
    graph = load(artifact.path)
    assert (graph.inputs, graph.outputs) == (component.inputs, component.outputs)
    inputs = real_inputs(component)
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), graph(inputs)) >= 40
    assert artifact.delegated >= 0.95
    assert artifact.nbytes < sum(weight.nbytes for weight in stored.values()) + 100_000


def test_image_decoder_equals_its_reference_and_runs_in_the_delegate(tmp_path: Path) -> None:
    component = decoder()
    module = seeded(component)
    stored = stored_by_plan(component, module, "executorch", 8)
    (artifact,) = FORMAT.emit(component, module, stored, tmp_path, OPTIONS)
    inputs = real_inputs(component)
    assert worst_psnr(run(component, FORMAT.reference(module, stored), inputs), load(artifact.path)(inputs)) >= 80
    assert artifact.delegated >= 0.95


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(states),)


def test_two_exports_are_identical_and_hold_our_integers(tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", (1, 3, 64))
    component = Component("linear", "linear", (spec,), (TensorSpec("y", "float32", (1, 3, 64)),), _Linear)
    module = seeded(component)
    stored = round_weights(dict(module.named_parameters()), {"linear.weight": IntegerScheme(8)})
    contents = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (artifact,) = FORMAT.emit(component, module, stored, tmp_path / folder, OPTIONS)
        contents.append(artifact.path.read_bytes())
    assert contents[0] == contents[1]
    weight = stored["linear.weight"]
    assert isinstance(weight, IntegerWeight)
    assert weight.ints.tobytes() in contents[0]


@pytest.mark.parametrize("scheme", [IntegerScheme(8, input_bits=16), IntegerScheme(4, 32, True, input_bits=16)])
def test_inputs_of_16_bits_leave_the_product_of_the_stored_weight(scheme: IntegerScheme, tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", (1, 50, 64))
    component = Component("linear", "linear", (spec,), (TensorSpec("y", "float32", (1, 50, 64)),), _Linear)
    module = seeded(component)
    states = (np.random.default_rng(0).standard_normal(spec.shape) * np.geomspace(0.1, 30, 64)).astype(np.float32)
    found, sizes = {}, {}
    for asked in (replace(scheme, input_bits=8), scheme):
        stored = round_weights(dict(module.named_parameters()), {"linear.weight": asked})
        (artifact,) = FORMAT.emit(component, module, stored, tmp_path, OPTIONS)
        found[asked.input_bits], sizes[asked.input_bits] = load(artifact.path)({"x": states})["y"], artifact.nbytes
        reference = run(component, FORMAT.reference(module, stored), {"x": states})["y"]
        assert psnr(found[asked.input_bits], reference) >= 60
    weight, bias = stored["linear.weight"].dequantize().astype(np.float64), module.get_parameter("linear.bias").numpy()
    exact = states.astype(np.float64) @ weight.T + bias
    assert psnr(found[16], exact) >= 80 > 60 > psnr(found[8], exact)
    assert artifact.delegated == 1 and sizes[16] - sizes[8] < 8000
    assert "twice" in artifact.details["activations"]


def test_dynamic_rounding_equals_torchaos() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    states = torch.randn(2, 5, 64) * torch.tensor([0.01, 1, 30, 1, 1])[:, None]
    states[0, 3] = 0.0
    states[0, 4] = states[0, 4].abs() + 1
    quantize_(linear, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)))
    ours = nn.functional.linear(round_per_token(states), linear.weight.dequantize())
    torch.testing.assert_close(ours, linear(states), rtol=1e-5, atol=1e-5)


def test_integer_embeddings_give_the_decompressed_rows() -> None:
    weight = quantize(np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32), 8)
    ids = torch.tensor([[3, 19, 0]])
    np.testing.assert_array_equal(IntegerEmbedding(weight)(ids).numpy()[0], weight.dequantize()[[3, 19, 0]])


def test_what_xnnpack_computes_wrongly_is_refused_from_shapes_alone() -> None:
    linear, table = "text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"

    def reasons(name: str, scheme: Scheme) -> list[str]:
        return FORMAT.refuse(encoder(), {name: scheme}, OPTIONS)

    assert "no palettes" in reasons(linear, PaletteScheme(6))[0]
    assert "layer norm of width 256" in reasons(linear, FloatScheme(16))[0]
    assert "not blocks of 32" in reasons(linear, IntegerScheme(8, 32))[0]
    assert "groups of 32 with bfloat16 scales" in reasons(linear, IntegerScheme(4, 64, True))[0]
    assert "choose from 4, 8" in reasons(linear, IntegerScheme(6))[0]
    assert "only linears have inputs of 16 bits" in reasons(table, IntegerScheme(8, input_bits=16))[0]
    assert "8 bits, not 4" in reasons(table, IntegerScheme(4, 32, True))[0]
    convolution = FORMAT.refuse(decoder(), {"decoder.conv_in.weight": IntegerScheme(8)}, OPTIONS)
    assert "convolutions with weight-only integers wrongly" in convolution[0]
    assert not reasons(linear, IntegerScheme(4, 32, True)) and not reasons(linear, IntegerScheme(8))
