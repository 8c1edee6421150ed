"""The stored weight: the one representation that formats, the compressed reference and the golden outputs are built from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
VECTOR_BITS = (4, 6, 8)  # of palettes whose entries are two weights
INTEGER_BITS = (4, 8)


@dataclass(frozen=True, eq=False)
class FloatWeight:
    """A weight kept as floating point: `values` float16, or float32 where a format must keep it."""

    values: NDArray[np.floating]

    def __post_init__(self) -> None:
        if self.values.dtype not in (np.float16, np.float32):
            raise ValueError(f"float weights are float16 or float32, not {self.values.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def bits(self) -> int:
        return self.values.dtype.itemsize * 8

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        return self.values.astype(np.float32)


@dataclass(frozen=True, eq=False)
class PaletteWeight:
    """Every weight is an index into a palette of 2**bits entries; one palette a tensor, or one a group of rows of axis 0.

    palettes: float16 [groups, 2**bits, vector]
    indices:  uint8, the weight's shape with axis 0 divided by `vector` (an entry of a vector palette is `vector`
              consecutive weights along axis 0)
    scales:   float16 [out] or None; row i of the weight is its entries times scales[i], rounded once to float16
    """

    bits: int
    palettes: NDArray[np.float16]
    indices: NDArray[np.uint8]
    scales: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        if self.bits not in PALETTE_BITS:
            raise ValueError(f"palettes of {self.bits} bits do not exist; choose from {', '.join(map(str, PALETTE_BITS))}")
        if self.palettes.ndim != 3 or self.palettes.shape[1] != 1 << self.bits or self.palettes.dtype != np.float16:
            raise ValueError(f"palettes are float16 [groups, {1 << self.bits}, vector], not "
                             f"{self.palettes.dtype} {list(self.palettes.shape)}")
        if self.indices.dtype != np.uint8 or self.indices.ndim == 0 or self.indices.shape[0] % self.groups:
            raise ValueError(f"indices {self.indices.dtype} {list(self.indices.shape)} do not divide into {self.groups} groups")
        if self.scales is not None and (self.scales.shape != self.shape[:1] or self.scales.dtype != np.float16):
            raise ValueError(f"palette scales are float16 [{self.shape[0]}], not {self.scales.dtype} {list(self.scales.shape)}")

    @property
    def groups(self) -> int:
        return self.palettes.shape[0]

    @property
    def vector(self) -> int:
        return self.palettes.shape[2]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.indices.shape[0] * self.vector, *self.indices.shape[1:])

    @property
    def nbytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.nbytes
        return packed_bytes(self.indices.size, self.bits) + self.palettes.nbytes + scales

    def dequantize(self) -> NDArray[np.float32]:
        return self.dense().astype(np.float32)

    def dense(self) -> NDArray[np.float16]:
        """The weight as float16: exactly the palettes' entries, or their products with the scales."""
        rows = self.indices.reshape(self.groups, -1)
        flat = np.empty((*rows.shape, self.vector), np.float16)
        for group, row in enumerate(rows):
            np.take(self.palettes[group], row, axis=0, out=flat[group])
        entries = flat.reshape(self.indices.shape[0], -1, self.vector)
        dense = np.ascontiguousarray(entries.transpose(0, 2, 1)).reshape(self.shape)
        if self.scales is None:
            return dense
        # The product of two float16 is exact in float32, so that this rounds once.
        scales = self.scales.astype(np.float32).reshape(-1, *[1] * (dense.ndim - 1))
        with np.errstate(over="ignore"):
            return (dense * scales).astype(np.float16)


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """Symmetric integers with one scale a block of consecutive inputs: weight = ints * scale.

    ints:   int8 [out, in...], 4-bit values in [-8, 7]
    scales: float32 [out, blocks]; the inputs of a row (all axes after the first) are split into `blocks` equal blocks
    scale_bytes: what one scale takes in the artifact (4 float32, 2 bfloat16)
    input_bits: to which a linear's inputs are rounded, 8 or 16, where a runtime rounds them
    """

    bits: int
    ints: NDArray[np.int8]
    scales: NDArray[np.float32]
    scale_bytes: int = 4
    input_bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in INTEGER_BITS:
            raise ValueError(f"block integers have 4 or 8 bits, not {self.bits}")
        if self.ints.dtype != np.int8 or self.scales.dtype != np.float32 or self.scales.ndim != 2:
            raise ValueError("block integers are int8 [out, in...] with float32 scales [out, blocks]")
        if self.scales.shape[0] != self.ints.shape[0] or self._row % self.scales.shape[1]:
            raise ValueError(f"scales {list(self.scales.shape)} do not divide integers {list(self.ints.shape)} into blocks")

    @property
    def _row(self) -> int:
        return self.ints.size // self.ints.shape[0]

    @property
    def block(self) -> int:
        """Weights that share one scale."""
        return self._row // self.scales.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ints.shape

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.ints.size, self.bits) + self.scales.size * self.scale_bytes

    def dequantize(self) -> NDArray[np.float32]:
        blocks = self.ints.reshape(*self.scales.shape, -1).astype(np.float32)
        blocks *= self.scales[:, :, None]
        return blocks.reshape(self.shape)


StoredWeight = FloatWeight | PaletteWeight | IntegerWeight


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take when packed without gaps."""
    return -(-count * bits // 8)


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs values below 2**bits without gaps, least significant bit first (the order of Core ML and of MatMulNBits)."""
    flat = values.reshape(-1)
    if bits == 8:
        return flat.copy()
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"value {int(flat.max())} does not fit in {bits} bits")
    # Eight values make `bits` whole bytes: gather them in one 64-bit word, and keep its low bytes.
    words = np.zeros(-(-flat.size // 8), np.uint64)
    for place in range(8):
        column = flat[place::8]
        words[: column.size] |= column.astype(np.uint64) << np.uint64(bits * place)
    octets = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(octets).reshape(-1)[: packed_bytes(flat.size, bits)]


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` values that `pack_bits` packed."""
    if bits == 8:
        return packed[:count].copy()
    octets = np.zeros((-(-count // 8), 8), np.uint8)
    padded = np.zeros(octets.shape[0] * bits, np.uint8)
    padded[: packed.size] = packed
    octets[:, :bits] = padded.reshape(-1, bits)
    words = octets.view("<u8")
    places = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    return ((words >> places) & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(-1)[:count]
