"""Compressed weights: what the executor computes with equals torch with the weights that coremltools decompresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from runtimes.coreml import load_executor
from runtimes.coreml.blob import Packed
from runtimes.coreml.compressed import CONSTANT_EXPRESSIONS
from runtimes.coreml.datatypes import DATA_TYPES
from runtimes.quiet import quiet
from tests.runtimes.coreml.mil import ct, mb, package, program

with quiet():
    import coremltools.optimize.coreml as cto

RNG = np.random.default_rng(1)
WEIGHT = RNG.standard_normal((32, 64)).astype(np.float32)
KERNEL = RNG.standard_normal((16, 32, 3, 3)).astype(np.float32)
X = RNG.standard_normal((2, 64)).astype(np.float32)


def build(x: Any) -> Any:
    y = mb.reshape(x=mb.linear(x=x, weight=WEIGHT, name="first"), shape=[2, 32, 1, 1])
    return mb.conv(x=mb.tile(x=y, reps=[1, 1, 4, 4]), weight=KERNEL, pad_type="same", name="second")


def palette(bits: int, **options: Any) -> Callable[[Any], Any]:
    config = cto.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=1, **options)
    return lambda model: cto.palettize_weights(model, cto.OptimizationConfig(config))


def vectors(model: Any) -> Any:
    config = cto.OpPalettizerConfig(mode="kmeans", nbits=4, cluster_dim=2, weight_threshold=1)
    return cto.palettize_weights(model, cto.OptimizationConfig(config))


def linear(**options: Any) -> Callable[[Any], Any]:
    config = cto.OpLinearQuantizerConfig(weight_threshold=1, **options)
    return lambda model: cto.linear_quantize_weights(model, cto.OptimizationConfig(config))


def pruned(model: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.7, weight_threshold=1)
    return cto.prune_weights(model, cto.OptimizationConfig(config))


def jointly(second: str) -> Callable[[Any], Any]:
    """Prunes first, then compresses what is left."""

    def compress(model: Any) -> Any:
        if second == "palettize":
            config = cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=1)
            return cto.palettize_weights(pruned(model), cto.OptimizationConfig(config), joint_compression=True)
        config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=1)
        return cto.linear_quantize_weights(pruned(model), cto.OptimizationConfig(config), joint_compression=True)

    return compress


GROUPED: dict[str, Any] = {"granularity": "per_grouped_channel", "group_size": 8}
BLOCKS: dict[str, Any] = {"granularity": "per_block", "block_size": 16}

# name -> specification version, what compresses, and the operation that must then stand in the program
COMPRESSIONS: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    **{f"palette-{bits}-ios16": (7, palette(bits), "constexpr_lut_to_dense") for bits in (1, 2, 4, 6, 8)},
    **{f"palette-{bits}-ios18": (9, palette(bits), "constexpr_lut_to_dense") for bits in (1, 2, 3, 4, 6, 8)},
    "palette-grouped": (9, palette(4, **GROUPED), "constexpr_lut_to_dense"),
    "palette-grouped-inputs": (9, palette(3, channel_axis=1, **GROUPED), "constexpr_lut_to_dense"),
    "palette-scaled": (9, palette(6, enable_per_channel_scale=True), "constexpr_blockwise_shift_scale"),
    "palette-vectors": (9, vectors, "constexpr_lut_to_dense"),
    "linear-ios16": (7, linear(mode="linear"), "constexpr_affine_dequantize"),
    "linear-symmetric": (9, linear(mode="linear_symmetric"), "constexpr_blockwise_shift_scale"),
    "linear-int4": (9, linear(mode="linear_symmetric", dtype="int4", **BLOCKS), "constexpr_blockwise_shift_scale"),
    "linear-uint4": (9, linear(mode="linear", dtype="uint4", **BLOCKS), "constexpr_blockwise_shift_scale"),
    "pruned-ios16": (7, pruned, "constexpr_sparse_to_dense"),
    "pruned-ios18": (9, pruned, "constexpr_sparse_to_dense"),
    "pruned-palette": (9, jointly("palettize"), "constexpr_lut_to_sparse"),
    "pruned-linear": (9, jointly("quantize"), "constexpr_sparse_blockwise_shift_scale"),
}


def converted(specification: int) -> Any:
    targets = {7: ct.target.iOS16, 9: ct.target.iOS18}
    with quiet():
        return ct.convert(
            program(build, {"x": X}, specification),
            convert_to="mlprogram",
            skip_model_load=True,
            minimum_deployment_target=targets[specification],
        )


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    return {specification: converted(specification) for specification in (7, 9)}


def decompressed(model: Any) -> dict[str, np.ndarray]:
    """The weights as coremltools itself decompresses them, by the operation that they belong to."""
    with quiet():
        plain = cto.decompress_weights(model)
        weights = cto.get_weights_metadata(plain, weight_threshold=1)
    return {name: metadata.val.astype(np.float32) for name, metadata in weights.items()}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_weights_equal_decompressed_ones(name: str, models: dict[int, Any], tmp_path: Path) -> None:
    specification, compress, expression = COMPRESSIONS[name]
    with quiet():
        model = compress(models[specification])
    path = tmp_path / "model.mlpackage"
    model.save(str(path))
    function = model.get_spec().mlProgram.functions["main"]
    kinds = {operation.type for operation in function.block_specializations[function.opset].operations}
    assert expression in kinds

    weights = decompressed(model)
    (first,) = [array for array in weights.values() if array.shape == WEIGHT.shape]
    (second,) = [array for array in weights.values() if array.shape == KERNEL.shape]
    hidden = (torch.from_numpy(X).half().float() @ torch.from_numpy(first).T).half().float()
    image = hidden.reshape(2, 32, 1, 1).expand(-1, -1, 4, 4)
    expected = F.conv2d(image, torch.from_numpy(second), padding=1).half().float().numpy()

    executor = load_executor(path)
    (result,) = executor({executor.inputs[0].name: X}).values()
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=2e-3 * float(np.abs(expected).max()))


def test_every_memory_limit_gives_the_same_result(models: dict[int, Any], tmp_path: Path) -> None:
    with quiet():
        model = palette(4)(models[9])
    path = tmp_path / "model.mlpackage"
    model.save(str(path))
    unlimited = load_executor(path)
    inputs = {unlimited.inputs[0].name: X}
    (expected,) = unlimited(inputs).values()
    both = 4 * (WEIGHT.size + KERNEL.size)
    assert unlimited.held_bytes >= both
    for limit in (0, 4 * WEIGHT.size, 4 * KERNEL.size, both - 1):
        executor = load_executor(path, memory_limit_bytes=limit)
        for _ in range(2):
            (result,) = executor(inputs).values()
            np.testing.assert_array_equal(result, expected)
            assert executor.held_bytes <= limit


def test_an_unpacked_palette_follows_the_definition() -> None:
    lut_to_dense = CONSTANT_EXPRESSIONS["constexpr_lut_to_dense"]
    lut = np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float16).reshape(2, 1, 4, 1)
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
    expected = [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]
    np.testing.assert_array_equal(lut_to_dense(indices, lut), expected)


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    places = (indices.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(places.astype(np.uint8), bitorder="little")


@given(
    bits=st.sampled_from([1, 2, 3, 4, 6, 8]),
    groups=st.sampled_from([1, 2, 3]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_packed_indices_give_what_unpacked_ones_do(bits: int, groups: int, rows: int, columns: int, seed: int) -> None:
    """Groups that end within a byte, or a 12-bit code, included."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 1 << bits, (groups * rows, columns)).astype(np.uint8)
    palettes = rng.standard_normal((groups, 1 << bits)).astype(np.float16)
    expected = np.stack([palettes[row // rows][indices[row]] for row in range(groups * rows)])
    lut_to_dense = CONSTANT_EXPRESSIONS["constexpr_lut_to_dense"]
    lut = palettes.reshape(groups, 1, -1, 1)
    unsigned = next(each for each in DATA_TYPES.values() if each.name == f"uint{bits}")
    np.testing.assert_array_equal(lut_to_dense(Packed(pack(indices, bits), unsigned, indices.shape), lut), expected)
    np.testing.assert_array_equal(lut_to_dense(indices, lut), expected)
    if groups == 1 and bits != 3:
        np.testing.assert_array_equal(lut_to_dense(pack(indices, bits), palettes[0], np.array(indices.shape)), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_vectors_fill_their_axis(axis: int) -> None:
    lut_to_dense = CONSTANT_EXPRESSIONS["constexpr_lut_to_dense"]
    lut = np.array([[1, 2, 3], [4, 5, 6]], np.float16).reshape(1, 1, 1, 2, 3)
    indices = RNG.integers(0, 2, (2, 3, 4)).astype(np.uint8)
    dense = lut_to_dense(indices, lut, None, np.int32(axis))
    for place in np.ndindex(indices.shape):
        for step in range(3):
            target = list(place)
            target[axis] = place[axis] * 3 + step
            assert dense[tuple(target)] == lut[0, 0, 0, indices[place], step]


def test_half_precision_constants_are_widened(tmp_path: Path) -> None:
    """constexpr_cast, which only older converters write."""
    weight = RNG.standard_normal((5, 4)).astype(np.float16)
    x = RNG.standard_normal((3, 4)).astype(np.float32)

    def linear_of_cast(x: Any) -> Any:
        return mb.linear(x=x, weight=mb.constexpr_cast(source_val=weight, output_dtype="fp32"))

    path = package(tmp_path / "model.mlpackage", linear_of_cast, {"x": x}, specification=7)
    (result,) = load_executor(path)({"x": x}).values()
    np.testing.assert_allclose(result, x @ weight.astype(np.float32).T, rtol=1e-5, atol=1e-5)
