"""Compressed constants: MIL's constexpr operations, decompressed with numpy.

Each function carries MIL's input names. The iOS 16 and iOS 18 forms of an operation share a name and differ in their inputs:
the older one packs its data into bytes and gives the `shape` apart. Scaling is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from runtimes.coreml.blob import Packed, unpack_bits
from runtimes.coreml.datatypes import data_type_named

Array = np.ndarray
Decompress = Callable[..., Array | tuple[Array, Array]]

CONSTANT_EXPRESSIONS: dict[str, Decompress] = {}

TAKES_PACKED = {("constexpr_lut_to_dense", "indices")}
"""The inputs that arrive as `Packed` where they lie in the file like that; all others are unpacked before."""


def dense_array(values: Array | Packed) -> Array:
    return values.unpack() if isinstance(values, Packed) else values


def _constant_expression(name: str) -> Callable[[Decompress], Decompress]:
    def register(function: Decompress) -> Decompress:
        CONSTANT_EXPRESSIONS[name] = function
        return function

    return register


def _codes(packed: Array, bits: int) -> tuple[Array, int]:
    """Packed indices as numbers of several indices each, so that one look-up gives several weights; and the bits of such a
    number: a byte, or 12 bits for indices of 3 and 6 bits."""
    if bits not in (3, 6):
        return packed, 8
    whole = np.zeros(-(-packed.size // 3) * 3, dtype=np.uint8)
    whole[: packed.size] = packed
    first, second, third = whole.reshape(-1, 3).T
    codes = np.empty((first.size, 2), dtype=np.uint16)
    codes[:, 0] = first | ((second & np.uint16(15)) << 8)
    codes[:, 1] = (second >> 4) | (third.astype(np.uint16) << 4)
    return codes.reshape(-1), 12


def _look_up_packed(palettes: Array, packed: Array, bits: int, count: int) -> Array | None:
    """[groups, entries] and packed indices, an equal run of them for each group -> [count].

    None if a group ends within a code. This is a few times as fast as looking up unpacked indices.
    """
    codes, width = _codes(packed, bits)
    per_code, per_group = width // bits, count // len(palettes)
    if len(palettes) > 1 and per_group % per_code:
        return None
    numbers = np.arange(1 << width)[:, None] >> np.arange(0, width, bits) & ((1 << bits) - 1)
    step = per_group // per_code if len(palettes) > 1 else codes.size
    dense = np.empty((len(palettes), step, per_code), dtype=palettes.dtype)
    for group, palette in enumerate(palettes):
        np.take(palette[numbers], codes[group * step : (group + 1) * step], axis=0, out=dense[group], mode="clip")
    return dense.reshape(-1)[:count]


def _groups(shape: tuple[int, ...], counts: tuple[int, ...]) -> Array:
    """The number of the group of each element, when each dimension falls into `counts` equal blocks."""
    numbers = np.zeros((1,) * len(shape), dtype=np.int32)
    for axis, (size, count) in enumerate(zip(shape, counts, strict=True)):
        along = np.arange(size, dtype=np.int32) // (size // count)
        numbers = numbers * count + along.reshape([-1 if each == axis else 1 for each in range(len(shape))])
    return numbers


@_constant_expression("constexpr_lut_to_dense")
def lut_to_dense(indices: Array | Packed, lut: Array, shape: Array | None = None, vector_axis: Array | None = None) -> Array:
    """iOS 16: packed `indices` and one palette `lut` [entries]. iOS 18: lut [*groups, entries, vector], a palette for each
    block of indices; each index gives `vector` numbers that follow each other along `vector_axis`."""
    if shape is not None:
        sizes = tuple(int(size) for size in shape)
        bits = int(lut.size).bit_length() - 1
        dense = _look_up_packed(lut.reshape(1, -1), dense_array(indices), bits, math.prod(sizes))
        assert dense is not None
        return dense.reshape(sizes)
    groups, entries, vector = lut.shape[:-2], lut.shape[-2], lut.shape[-1]
    if vector == 1 and math.prod(groups[1:]) == 1 and (isinstance(indices, Packed) or entries == 256):
        packed = indices.data if isinstance(indices, Packed) else indices.reshape(-1)
        dense = _look_up_packed(lut.reshape(-1, entries), packed, entries.bit_length() - 1, math.prod(indices.shape))
        if dense is not None:
            return dense.reshape(indices.shape)
    numbers = dense_array(indices)
    places = numbers if math.prod(groups) == 1 else _groups(numbers.shape, groups) * np.int32(entries) + numbers
    if vector == 1:
        return np.take(lut.reshape(-1), places, mode="clip")
    axis = int(vector_axis) % numbers.ndim if vector_axis is not None else numbers.ndim - 1
    vectors = np.moveaxis(np.take(lut.reshape(-1, vector), places, axis=0, mode="clip"), -1, axis + 1)
    return vectors.reshape([size * vector if each == axis else size for each, size in enumerate(numbers.shape)])


@_constant_expression("constexpr_affine_dequantize")
def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """scale * (data - zero point), each a scalar or one number an element of the axis."""
    sizes = [-1 if each == int(axis) % quantized_data.ndim else 1 for each in range(quantized_data.ndim)]
    factor, zero = (each.astype(np.float32).reshape(sizes if each.ndim else ()) for each in (scale, zero_point))
    return ((quantized_data.astype(np.float32) - zero) * factor).astype(scale.dtype)


@_constant_expression("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset); each dimension of `scale` divides that of `data` into blocks."""
    blocks = [each for count, size in zip(scale.shape, data.shape, strict=True) for each in (count, size // count)]
    once = [each for count in scale.shape for each in (count, 1)]
    values = data.astype(np.float32).reshape(blocks)
    if offset is not None:
        values -= offset.astype(np.float32).reshape(once)
    values *= scale.astype(np.float32).reshape(once)
    return values.reshape(data.shape).astype(scale.dtype)


@_constant_expression("constexpr_sparse_to_dense")
def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """The data in row-major order where the mask is 1, zeros elsewhere."""
    if shape is not None:
        sizes = tuple(int(size) for size in shape)
        mask = unpack_bits(mask, 1, math.prod(sizes)).reshape(sizes)
    dense = np.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@_constant_expression("constexpr_lut_to_sparse")
def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """-> the mask (repeated along the vector axis) and the looked-up numbers where it is 1."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, None, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        axis = int(vector_axis) if vector_axis is not None else indices_mask.ndim - 1
        mask = np.repeat(mask, lut.shape[-1], axis=axis)
    return mask, dense[mask != 0]


@_constant_expression("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """-> the mask and the scaled numbers where it is 1."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


@_constant_expression("constexpr_cast")
def cast(source_val: Array, output_dtype: Array) -> Array:
    return source_val.astype(data_type_named(str(output_dtype.item())).array)
