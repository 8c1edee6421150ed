"""The weight file reader against Apple's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.coreml.blob import BlobFile, unpack_bits
from runtimes.coreml.datatypes import DATA_TYPES
from runtimes.graph import GraphError
from runtimes.quiet import quiet

with quiet():
    from coremltools.libmilstoragepython import _BlobStorageWriter as BlobWriter

STORED = {data_type.name: data_type for data_type in DATA_TYPES.values() if data_type.blob_code is not None}
WRITTEN = sorted(STORED.keys() - {"bool"})


def values_of(name: str, count: int) -> np.ndarray:
    dtype = STORED[name]
    rng = np.random.default_rng(count)
    if name.startswith("float"):
        return rng.standard_normal(count).astype(dtype.array)
    low = -(1 << (dtype.bits - 1)) if dtype.signed else 0
    return rng.integers(low, low + (1 << dtype.bits), count, dtype=np.int64).astype(dtype.array)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_storage_type_reads_as_it_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    writer = BlobWriter(str(path))
    suffix = {"float16": "fp16", "float32": "float"}.get(name, name)
    arrays = [values_of(name, count) for count in (1, 7, 24, 61)]
    offsets = []
    for array in arrays:
        written = array.view(np.uint16) if name == "float16" else array
        offsets.append(getattr(writer, f"write_{suffix}_data")(written))
    del writer  # closes the file
    file = BlobFile(path)
    for offset, array in zip(offsets, arrays, strict=True):
        np.testing.assert_array_equal(file.blob(offset, STORED[name], (array.size,)).read(), array)


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_unpacking_equals_a_string_of_bits(width: int, data: list[int]) -> None:
    count = len(data) * 8 // width
    stream = "".join(f"{byte:08b}"[::-1] for byte in data)
    expected = [int(stream[i * width : (i + 1) * width][::-1], 2) for i in range(count)]
    assert unpack_bits(np.array(data, np.uint8), width, count).tolist() == expected


def test_damage_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    writer = BlobWriter(str(path))
    offset = writer.write_float_data(values_of("float32", 50))
    del writer
    whole = path.read_bytes()
    float32, int32 = STORED["float32"], STORED["int32"]

    def complaint(data: bytes, dtype_name: str = "float32", count: int = 50) -> str:
        path.write_bytes(data)
        with pytest.raises(GraphError) as caught:
            BlobFile(path).blob(offset, {"float32": float32, "int32": int32}[dtype_name], (count,))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "truncated" in complaint(whole[:20])
    assert "truncated" in complaint(whole[:-1])
    assert "truncated" in complaint(whole[: offset + 10])
    assert "damaged" in complaint(whole[:offset] + b"\0" + whole[offset + 1 :])
    assert "not int32" in complaint(whole, "int32")
    assert "needs 196" in complaint(whole, count=49)
    assert "format 1" in complaint(whole[:4] + b"\1" + whole[5:])
