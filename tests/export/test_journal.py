"""What an export that was stopped finds when it starts again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from export.exporter import key_of
from export.journal import Journal
from export.planning import ExportOptions, make_plan
from export.targets import TARGETS
from tests.models import SD3, write_checkpoint


def bundle_of(tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    (bundle / "part").mkdir(parents=True)
    (bundle / "part" / "a.bin").write_bytes(b"aaaa")
    (bundle / "b.bin").write_bytes(b"bb")
    return bundle


def test_finished_units_are_remembered_with_their_files(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    journal = Journal(bundle)
    (bundle / "part").mkdir()
    (bundle / "part" / "a.bin").write_bytes(b"aaaa")
    journal.note("one", {"figure": 1.5}, ["part"])
    assert journal.recall("one") == {"figure": 1.5}
    again = Journal(bundle)
    assert again.recall("one") == {"figure": 1.5} and again.recall("two") is None
    assert (bundle / "part" / "a.bin").read_bytes() == b"aaaa"


def test_files_of_no_finished_unit_are_removed(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    journal = Journal(bundle)
    assert not (bundle / "part" / "a.bin").exists()  # nothing was noted yet
    (bundle / "b.bin").write_bytes(b"bb")
    journal.note("two", None, ["b.bin"])
    (bundle / "part" / "half").write_bytes(b"h")
    Journal(bundle)
    assert (bundle / "b.bin").exists() and not (bundle / "part" / "half").exists()


def test_unit_whose_files_were_altered_or_cut_is_done_again(tmp_path: Path) -> None:
    for fault in (b"axaa", b"aa", None):
        bundle = tmp_path / str(fault) / "bundle"
        bundle.mkdir(parents=True)
        journal = Journal(bundle)
        (bundle / "a.bin").write_bytes(b"aaaa")
        (bundle / "b.bin").write_bytes(b"bb")
        journal.note("one", 1, ["a.bin"])
        journal.note("two", 2, ["b.bin"])
        if fault is None:
            (bundle / "a.bin").unlink()
        else:
            (bundle / "a.bin").write_bytes(fault)
        again = Journal(bundle)
        assert again.recall("one") is None and again.recall("two") == 2
        assert not (bundle / "a.bin").exists() and (bundle / "b.bin").exists()


def test_note_that_was_never_finished_counts_for_nothing(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    Journal(bundle)
    (tmp_path / "journal" / "one.part").write_text('{"unit": "one", "fi')
    assert Journal(bundle).recall("one") is None


def test_what_was_finished_is_taken_up_by_the_same_export_alone(tmp_path: Path) -> None:
    options = ExportOptions(str(write_checkpoint(tmp_path / "model", SD3)), formats=("onnx", "executorch"))

    def key(**other: object) -> str:
        return key_of(make_plan(TARGETS["android"], replace(options, **other)), "fingerprint")  # type: ignore[arg-type]

    others = [key(bits=7.5), key(formats=("onnx",)), key(resolution=(64, 64)), key(calibrate=False)]
    others += [key(activations="int8"), key(activations="int16")]
    assert key() == key()
    assert len({key(), *others}) == 7
    onnx = key(formats=("onnx",), calibrate=False)  # whose weights are the same with other activations
    assert onnx != key(formats=("onnx",), calibrate=False, activations="int8")
