"""The weight file of a package (MIL blob storage, format 2), memory-mapped.

A blob is a 64-byte header, aligned to 64 bytes, then the data elsewhere in the file. Header fields, little-endian: a sentinel
and a data type (uint32 each), then size in bytes and offset of the data (uint64 each).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.coreml.datatypes import DataType
from runtimes.graph import GraphError

_HEADER = struct.Struct("<IIQQ")
_HEADER_BYTES = 64
_SENTINEL = 0xDEADBEEF


def unpack_bits(packed: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """`count` numbers of 1 to 8 bits from a uint8 array that holds them end to end, least significant bits first."""
    if bits == 8:
        numbers = packed[:count]
    elif bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        numbers = ((packed[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
    else:
        # 3 and 6 bits: three bytes hold a whole number of them.
        padded = np.zeros(-(-packed.size // 3) * 3, dtype=np.uint8)
        padded[: packed.size] = packed
        triples = padded.reshape(-1, 3).astype(np.uint32)
        words = triples[:, 0] | (triples[:, 1] << 8) | (triples[:, 2] << 16)
        numbers = np.empty((words.size, 24 // bits), dtype=np.uint8)
        for position in range(24 // bits):
            numbers[:, position] = (words >> (position * bits)) & ((1 << bits) - 1)
        numbers = numbers.reshape(-1)[:count]
    if not signed or bits == 8:
        return numbers
    sign = np.uint8(1 << (bits - 1))
    return ((numbers ^ sign).astype(np.int16) - int(sign)).astype(np.int8)


@dataclass(frozen=True)
class Packed:
    """Numbers of less than a byte each, still packed: uint8 `data` that holds them end to end."""

    data: np.ndarray
    dtype: DataType
    shape: tuple[int, ...]

    def unpack(self) -> np.ndarray:
        return unpack_bits(self.data, self.dtype.bits, math.prod(self.shape), self.dtype.signed).reshape(self.shape)


@dataclass(frozen=True)
class Blob:
    """One tensor in a weight file; the header was checked when the program was read, the data is read on use."""

    data: np.ndarray  # uint8, a view of the memory-mapped file
    dtype: DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.data.size

    def read(self) -> np.ndarray:
        """The tensor; without a copy where its numbers are whole bytes."""
        content = self.content()
        return content.unpack() if isinstance(content, Packed) else content

    def content(self) -> np.ndarray | Packed:
        """The tensor as it lies in the file."""
        if self.dtype.bits < 8:
            return Packed(self.data, self.dtype, self.shape)
        return self.data.view(self.dtype.array).reshape(self.shape)


class BlobFile:
    """A memory-mapped weight file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.stat().st_size < _HEADER_BYTES:
            raise GraphError(f"{path}: the weight file is truncated: it has no header")
        # Copy-on-write gives torch a writable array, so that it shares the pages without a warning; nobody writes.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
        version = int.from_bytes(self._bytes[4:8].tobytes(), "little")
        if version != 2:
            raise GraphError(f"{path}: the weight file has format {version}; only format 2 is known")

    def blob(self, offset: int, dtype: DataType, shape: tuple[int, ...]) -> Blob:
        """The tensor whose header lies at `offset`. Raises `GraphError` if header, type or size do not fit."""
        where = f"{self._path}: the weight at offset {offset}"
        if offset + _HEADER_BYTES > self._bytes.size:
            raise GraphError(f"{where} lies beyond the end of the file ({self._bytes.size} bytes): truncated?")
        header = self._bytes[offset : offset + _HEADER.size].tobytes()
        sentinel, code, nbytes, start = _HEADER.unpack(header)
        if sentinel != _SENTINEL:
            raise GraphError(f"{where} has no valid header: the weight file is damaged")
        if code != dtype.blob_code:
            raise GraphError(f"{where} has storage type {code}, which is not {dtype.name} as the program declares")
        wanted = -(-math.prod(shape) * dtype.bits // 8)
        if nbytes != wanted:
            raise GraphError(f"{where} has {nbytes} bytes; {dtype.name} {shape} needs {wanted}")
        if start + nbytes > self._bytes.size:
            raise GraphError(f"{where} ends beyond the end of the file ({self._bytes.size} bytes): truncated?")
        return Blob(np.asarray(self._bytes[start : start + nbytes]), dtype, shape)
