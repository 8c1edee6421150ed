"""safetensors files written as their bytes come: a header from shapes alone, then the tensors in order.

The format (github.com/huggingface/safetensors, "Format"): the header's length as a little-endian uint64, the header as JSON,
padded with spaces to 8 bytes, then the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.full_size.models import Shapes

SHARD_BYTES = 1_000_000_000
_ITEM = 2  # bytes of a float16


@dataclass(frozen=True)
class Shard:
    """One file: its name and the tensors in it, in order."""

    file: str
    shapes: Shapes

    @property
    def header(self) -> bytes:
        """What stands before the data."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.shapes.items():
            start, end = end, end + _ITEM * math.prod(shape)
            entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + nbytes(self.shapes)


def nbytes(shapes: Shapes) -> int:
    """Of the data."""
    return sum(_ITEM * math.prod(shape) for shape in shapes.values())


def split(shapes: Shapes, stem: str, most: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """In the libraries' naming: STEM.safetensors, or STEM-00001-of-00005.safetensors of at most `most` bytes of data each
    (a tensor larger than that has a file to itself)."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if groups[-1] and nbytes(groups[-1]) + nbytes({name: shape}) > most:
            groups.append({})
        groups[-1][name] = shape
    if len(groups) == 1:
        return (Shard(f"{stem}.safetensors", groups[0]),)
    return tuple(
        Shard(f"{stem}-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, start=1)
    )


def index(shards: tuple[Shard, ...]) -> Mapping[str, Any]:
    """The JSON that says which tensor lies in which shard."""
    size = sum(nbytes(shard.shapes) for shard in shards)
    return {"metadata": {"total_size": size}, "weight_map": {name: shard.file for shard in shards for name in shard.shapes}}
