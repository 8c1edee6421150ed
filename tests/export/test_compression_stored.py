"""Stored weights: packing, decompression and bytes, against plain loops and bit strings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.compression.stored import (
    INTEGER_BITS,
    PALETTE_BITS,
    FloatWeight,
    IntegerWeight,
    PaletteWeight,
    pack_bits,
    packed_bytes,
    unpack_bits,
)
from runtimes.quiet import quiet

with quiet():
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_blockwise_shift_scale
    from coremltools.optimize._utils import lut_to_dense

BITS = st.sampled_from(PALETTE_BITS)


@st.composite
def small_values(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(BITS)
    return draw(hnp.arrays(np.uint8, st.integers(0, 40), elements=st.integers(0, (1 << bits) - 1))), bits


@given(small_values())
def test_packing_is_a_gapless_bit_string_of_lowest_bits_first(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    string = "".join(format(int(value), f"0{bits}b")[::-1] for value in values)
    string += "0" * (-len(string) % 8)
    expected = [int(string[i : i + 8][::-1], 2) for i in range(0, len(string), 8)]
    assert pack_bits(values, bits).tolist() == expected
    assert len(expected) == packed_bytes(values.size, bits)


@given(small_values())
def test_unpacking_gives_the_packed_values_back(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    np.testing.assert_array_equal(unpack_bits(pack_bits(values, bits), bits, values.size), values)


def test_packing_refuses_a_value_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="value 8 does not fit in 3 bits"):
        pack_bits(np.array([1, 8], np.uint8), 3)


@pytest.mark.parametrize("vector", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", PALETTE_BITS)
def test_palette_weights_look_up_the_palette_of_their_rows(bits: int, groups: int, vector: int) -> None:
    generator = np.random.default_rng(bits)
    palettes = generator.standard_normal((groups, 1 << bits, vector)).astype(np.float16)
    indices = generator.integers(0, 1 << bits, (6, 5)).astype(np.uint8)
    weight = PaletteWeight(bits, palettes, indices)
    expected = np.zeros((6 * vector, 5), np.float32)
    for row in range(6):
        for column in range(5):
            expected[row * vector : (row + 1) * vector, column] = palettes[row * groups // 6, indices[row, column]]
    assert weight.shape == expected.shape
    np.testing.assert_array_equal(weight.dequantize(), expected)
    assert weight.nbytes == len(pack_bits(indices, bits)) + palettes.nbytes


@pytest.mark.parametrize("vector", [1, 2])
def test_palette_scales_multiply_rows_as_core_ml_does(vector: int) -> None:
    """coremltools' own decompression of the same numbers, subnormal products included."""
    generator = np.random.default_rng(vector)
    palettes = (generator.standard_normal((2, 16, vector)) * 1e-4).astype(np.float16)
    indices = generator.integers(0, 16, (6, 5, 3)).astype(np.uint8)
    scales = np.exp(generator.standard_normal(6 * vector)).astype(np.float16)
    weight = PaletteWeight(4, palettes, indices, scales)
    looked_up = lut_to_dense(indices, palettes.reshape(2, 1, 1, 16, vector), np.int32(0))
    expected = constexpr_blockwise_shift_scale.decompress(looked_up, scales.reshape(-1, 1, 1), None)
    assert expected.dtype == np.float16
    np.testing.assert_array_equal(weight.dense(), expected)
    assert weight.nbytes == 45 + palettes.nbytes + 2 * 6 * vector


@pytest.mark.parametrize("bits", INTEGER_BITS)
def test_integer_weights_scale_every_block_of_inputs(bits: int) -> None:
    generator = np.random.default_rng(bits)
    ints = generator.integers(-(1 << (bits - 1)), 1 << (bits - 1), (3, 4, 2)).astype(np.int8)
    scales = generator.random((3, 2)).astype(np.float32)
    weight = IntegerWeight(bits, ints, scales)
    expected = ints.reshape(3, 8).astype(np.float32)
    for row in range(3):
        for column in range(8):
            expected[row, column] *= scales[row, column // 4]
    np.testing.assert_array_equal(weight.dequantize(), expected.reshape(3, 4, 2))
    assert weight.block == 4
    assert weight.nbytes == 24 * bits // 8 + 6 * 4


def test_float_weights_count_their_own_bytes() -> None:
    weight = FloatWeight(np.ones((2, 3), np.float16))
    assert (weight.bits, weight.nbytes, weight.shape) == (16, 12, (2, 3))
    assert weight.dequantize().dtype == np.float32


def test_malformed_weights_are_refused() -> None:
    half = np.zeros((1, 32, 1), np.float16)
    with pytest.raises(ValueError, match="5 bits"):
        PaletteWeight(5, half, np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="groups"):
        PaletteWeight(4, np.zeros((2, 16, 1), np.float16), np.zeros((3, 2), np.uint8))
    for scales in (np.ones(3, np.float16), np.ones(4, np.float32)):
        with pytest.raises(ValueError, match=r"palette scales are float16 \[4\]"):
            PaletteWeight(4, np.zeros((1, 16, 2), np.float16), np.zeros((2, 2), np.uint8), scales)
    with pytest.raises(ValueError, match="blocks"):
        IntegerWeight(8, np.zeros((2, 6), np.int8), np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="float64"):
        FloatWeight(np.zeros(3))
