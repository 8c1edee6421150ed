"""Whole diffusers models, converted by coremltools, against torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtimes.coreml import Executor, load_executor
from runtimes.quiet import quiet
from tests.runtimes.coreml.mil import ct

with quiet():
    import coremltools.optimize.coreml as cto
    from diffusers import AutoencoderKL, SD3Transformer2DModel


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=128,
            pooled_projection_dim=48,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )

    def forward(self, latent: Tensor, context: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
        velocity: Tensor = self.model(latent, context, pooled, timestep, return_dict=False)[0]
        return velocity


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
        )

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.model.decode(latent, return_dict=False)[0]
        return image


def inputs_of(kind: type[nn.Module]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    if kind is Decoder:
        return (torch.randn(1, 4, 16, 16, generator=generator),)
    shapes = ((1, 4, 16, 16), (1, 20, 64), (1, 48))
    return (*(torch.randn(shape, generator=generator) for shape in shapes), torch.tensor([640.0]))


@cache
def converted(kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    """The module, and coremltools' float16 model of it."""
    torch.manual_seed(0)
    module = kind().eval().requires_grad_(False)
    with quiet():
        exported = torch.export.export(module, inputs_of(kind)).run_decompositions({})
        model = ct.convert(exported, convert_to="mlprogram", skip_model_load=True, minimum_deployment_target=ct.target.iOS18)
    return module, model


def saved(model: Any, path: Path) -> Executor:
    model.save(str(path))
    return load_executor(path)


def arrays_for(executor: Executor, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    return {spec.name: tensor.numpy() for spec, tensor in zip(executor.inputs, inputs, strict=True)}


def psnr(result: np.ndarray, reference: np.ndarray) -> float:
    error = np.mean((result.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10((reference.max() - reference.min()) ** 2 / error))


@pytest.mark.parametrize("kind", [Transformer, Decoder])
def test_a_float16_model_equals_torch(kind: type[nn.Module], tmp_path: Path) -> None:
    module, model = converted(kind)
    inputs = inputs_of(kind)
    executor = saved(model, tmp_path / "a.mlpackage")
    (result,) = executor(arrays_for(executor, inputs)).values()
    assert psnr(result, module(*inputs).numpy()) > 55
    ranges = executor.ranges(arrays_for(executor, inputs))
    assert len(ranges) > 100
    assert all(each.non_finite == 0 and each.share < 0.1 for each in ranges)


def test_a_palettized_model_equals_its_decompressed_form(tmp_path: Path) -> None:
    _, model = converted(Transformer)
    with quiet():
        config = cto.OptimizationConfig(cto.OpPalettizerConfig(mode="uniform", nbits=6, weight_threshold=2048))
        small = cto.palettize_weights(model, config)
        plain = cto.decompress_weights(small)
    compressed, reference = saved(small, tmp_path / "small.mlpackage"), saved(plain, tmp_path / "plain.mlpackage")
    arrays = arrays_for(compressed, inputs_of(Transformer))
    (result,), (expected,) = compressed(arrays).values(), reference(arrays).values()
    np.testing.assert_array_equal(result, expected)
