"""Reads flatbuffers with the compiler and the schemas that the executorch package ships, without importing that package."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes.graph import GraphError

PROGRAM = "exir/_serialize/program.fbs"
XNNPACK_GRAPH = "backends/xnnpack/serialization/schema.fbs"

# flatc writes these as bare words, which are no JSON; Python's own words for them are.
_WORDS = {b"inf": b"Infinity", b"-inf": b"-Infinity", b"nan": b"NaN", b"-nan": b"NaN"}
_BARE_WORD = re.compile(rb"(?<=[:,\[]) ?(-?inf|-?nan)(?=\s*[,\]}\n])")


def decode(schema: str, buffers: Sequence[bytes]) -> list[dict[str, Any]]:
    """The buffers' root tables as dictionaries, defaults included. Raises `GraphError` for bytes that do not fit the schema."""
    if not buffers:
        return []
    home = _executorch()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.bin" for number in range(len(buffers))]
        for file, buffer in zip(files, buffers, strict=True):
            file.write_bytes(buffer)
        flags = ["--json", "--defaults-json", "--strict-json", "-o", folder]
        command = [str(home / "data" / "bin" / "flatc"), *flags, str(home / schema), "--", *map(str, files)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise GraphError(f"the executorch package's flatbuffer compiler cannot be run: {error}") from error
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise GraphError(f"a flatbuffer that does not fit {schema}: {reason[0]}")
        return [json.loads(_BARE_WORD.sub(_word, file.with_suffix(".json").read_bytes())) for file in files]


def _executorch() -> Path:
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise GraphError("reading a .pte needs the package executorch, which is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _word(match: re.Match[bytes]) -> bytes:
    return _WORDS[match[1]]
