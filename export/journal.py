"""What is finished of an export, noted beside the bundle in work, so that an export that was stopped goes on where it was.

A unit of work is noted with the files that it wrote into the bundle and with what the rest of the export needs to know of it.
It is there whole or not at all: a note is written last, beside its place, and renamed. Files are checked against their notes
when the work is taken up again; what does not fit, and what no note knows, is removed and made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes.bundle import FileEntry, describe_files

FOLDER = "journal"


class Journal:
    """The notes about the bundle in work in the folder `bundle`, kept beside it. Opening it clears the bundle of all else."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._folder = bundle.parent / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._notes: dict[str, Any] = {}
        kept: set[str] = set()
        for path in sorted(self._folder.glob("*.json")):
            note = json.loads(path.read_text(encoding="utf-8"))
            files = [FileEntry.model_validate(entry) for entry in note["files"]]
            if all(self._is_whole(file) for file in files):
                self._notes[note["unit"]] = note["result"]
                kept |= {file.path for file in files}
            else:
                path.unlink()
        for path in [path for path in bundle.rglob("*") if path.is_file()]:
            if path.relative_to(bundle).as_posix() not in kept:
                path.unlink()

    def recall(self, unit: str) -> Any:
        """What was noted of a unit, as JSON has it; None where it is still to be done."""
        return self._notes.get(unit)

    def note(self, unit: str, result: Any, paths: Sequence[str]) -> None:
        """Notes that a unit is done. `paths` are its files and folders in the bundle."""
        files = [entry.model_dump(mode="json") for entry in describe_files(self._bundle, paths)]
        path = self._folder / f"{unit}.json"
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps({"unit": unit, "files": files, "result": result}), encoding="utf-8")
        beside.rename(path)
        self._notes[unit] = result

    def _is_whole(self, file: FileEntry) -> bool:
        path = self._bundle / file.path
        return path.is_file() and describe_files(self._bundle, [file.path]) == (file,)
