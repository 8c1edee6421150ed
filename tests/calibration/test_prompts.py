"""Which prompts a checkpoint is calibrated on, and what a file of them may be."""

from __future__ import annotations

from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from calibration.errors import CalibrationError
from calibration.prompts import NATURAL, calibration_prompts, golden_prompts, read_prompts
from calibration.scenes import SCENES
from distill.captions import describe, held_out, training_scenes
from export.checkpoint import open_checkpoint

FLASH_MINI = str(resources.files("distill") / "flash-mini")


def test_there_are_64_different_prompts_in_either_style() -> None:
    assert len(set(NATURAL)) >= 64 and len(set(SCENES)) >= 64


def test_flash_mini_is_calibrated_on_captions_of_its_own_kind_and_others_on_natural_ones() -> None:
    assert calibration_prompts(open_checkpoint(FLASH_MINI).flash) == SCENES
    assert calibration_prompts({"sigmas": {}}) == NATURAL


def test_captions_are_drawn_from_training_and_never_evaluated_on() -> None:
    rng = np.random.default_rng(64)
    assert [describe(scene, rng).text for scene in islice(training_scenes(rng), 64)] == list(SCENES)
    assert not {caption.text for _, caption in held_out()} & set(SCENES)


def test_golden_prompts_are_the_checkpoints_own_or_the_first_natural_ones() -> None:
    assert golden_prompts({"prompts": ["a", "b", "c"]}, 2) == ("a", "b")
    assert golden_prompts({}, 2) == NATURAL[:2]


def test_a_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle \n\n  “ünïcode”, two of them\r\n", encoding="utf-8")
    assert read_prompts(path) == ("a red circle", "“ünïcode”, two of them")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read: No such file"), (b"\n \n", "holds no prompts"), (b"\xff\xfe", "no UTF-8 text")],
)
def test_a_bad_file_of_prompts_is_one_line(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=said) as error:
        read_prompts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_style_is_one_line() -> None:
    with pytest.raises(CalibrationError, match=r"caption_style 'haiku' is not known; .* choose from scenes"):
        calibration_prompts({"caption_style": "haiku"})
