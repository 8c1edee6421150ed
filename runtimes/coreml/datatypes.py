"""The data types of MIL values, and how each is held while a program runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class DataType:
    """One MIL data type.

    `array` is the numpy type of unpacked values; types below 8 bits are unpacked to 8. `storage` is the torch type that
    holds such a value at run time: wider than `array` where torch has no arithmetic for it.
    """

    name: str
    bits: int
    blob_code: int | None  # dtype field of a blob header (MIL storage format 2)
    array: np.dtype
    storage: torch.dtype

    @property
    def signed(self) -> bool:
        return self.name.startswith("int")


def _type(name: str, bits: int, blob_code: int | None, array: type, storage: torch.dtype) -> DataType:
    return DataType(name, bits, blob_code, np.dtype(array), storage)


STRING = DataType("string", 0, None, np.dtype(object), torch.bool)

# Keys are the numbers of MIL.proto's DataType.
DATA_TYPES = {
    1: _type("bool", 8, 3, np.bool_, torch.bool),
    2: STRING,
    10: _type("float16", 16, 1, np.float16, torch.float16),
    11: _type("float32", 32, 2, np.float32, torch.float32),
    12: _type("float64", 64, None, np.float64, torch.float64),
    21: _type("int8", 8, 4, np.int8, torch.int8),
    22: _type("int16", 16, 6, np.int16, torch.int16),
    23: _type("int32", 32, 14, np.int32, torch.int32),
    24: _type("int64", 64, None, np.int64, torch.int64),
    25: _type("int4", 4, 8, np.int8, torch.int8),
    31: _type("uint8", 8, 3, np.uint8, torch.uint8),
    32: _type("uint16", 16, 7, np.uint16, torch.int32),
    33: _type("uint32", 32, 15, np.uint32, torch.int64),
    35: _type("uint4", 4, 11, np.uint8, torch.uint8),
    36: _type("uint2", 2, 10, np.uint8, torch.uint8),
    37: _type("uint1", 1, 9, np.uint8, torch.uint8),
    38: _type("uint6", 6, 13, np.uint8, torch.uint8),
    39: _type("uint3", 3, 12, np.uint8, torch.uint8),
}

# The names that `cast` and `output_dtype` take, besides those above.
_SHORT_NAMES = {"fp16": "float16", "fp32": "float32"}
_BY_NAME = {data_type.name: data_type for data_type in DATA_TYPES.values()}


def data_type_named(name: str) -> DataType:
    """The type that MIL calls `name`, such as "fp16". Raises `ValueError` for an unknown name."""
    try:
        return _BY_NAME[_SHORT_NAMES.get(name, name)]
    except KeyError:
        raise ValueError(f"unknown data type {name!r}") from None
