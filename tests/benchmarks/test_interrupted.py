"""What `benchmarks.full_size interrupted` compares: when units were finished, and which files differ."""

from __future__ import annotations

from pathlib import Path

from benchmarks.full_size.interrupted import finished_at, unequal


def test_a_unit_is_finished_where_its_last_stage_ends() -> None:
    seconds = {
        "plan": 1.0,
        "reference pictures": 2.0,
        "components: text_encoder: coreml": 4.0,
        "components: text_encoder: golden cases": 8.0,
        "components: transformer: coreml": 16.0,
        "parity: transformer: coreml": 32.0,
    }
    stages = [{"name": name, "seconds": took} for name, took in seconds.items()]
    assert finished_at(stages) == {"drawings": 3, "text_encoder": 15, "transformer": 31}


def test_files_of_other_bytes_and_of_one_folder_alone_are_named(tmp_path: Path) -> None:
    for folder, texts in {"one": {"same": "a", "sub/other": "b", "only": "c"}, "two": {"same": "a", "sub/other": "d"}}.items():
        for name, text in texts.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert unequal(tmp_path / "one", tmp_path / "one") == []
    assert unequal(tmp_path / "one", tmp_path / "two") == unequal(tmp_path / "two", tmp_path / "one") == ["only", "sub/other"]
