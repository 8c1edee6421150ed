"""What a terminal shows on the way: bars that stay whole and know the time left, lines as they are, and nobody's noise."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from export.console import StageBars, noise_to, say


def test_bars_stay_whole_beside_a_long_prompt_and_tell_the_time_left_of_slow_steps() -> None:
    now, file = 0.0, io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, get_time=lambda: now)
    with StageBars(console) as bars:
        bars.stage("reference pictures", 10)
        for _ in range(4):
            bars.step("a lighthouse on a cliff above a stormy sea, oil painting")
            now += 100
        now -= 100
        bars._bars.refresh()
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "3/10" in shown and "0:05:00" in shown and "0:11:40" in shown  # 7 of 10 steps of 100 seconds are left
        assert "a lighthouse on a cliff" in shown and "oil painting" not in shown
    assert "10/10" in file.getvalue()


def test_lines_are_shown_as_they_are() -> None:
    file = io.StringIO()
    line = "bundles/[bold]/" + "x" * 100 + " is ready: 4 dB"
    say(Console(file=file, width=80), line)
    assert file.getvalue() == line + "\n"


def test_what_libraries_print_and_log_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "new" / "export.log"
    with noise_to(log) as console:
        print("printed")
        print("to stderr", file=sys.stderr)
        logging.getLogger("library").warning("logged")
        os.write(1, b"written by C\n")
        subprocess.run([sys.executable, "-c", "print('by a child')"], check=True)
        say(console, "ours")
    print("after")
    assert tuple(capfd.readouterr()) == ("after\n", "ours\n")
    assert all(words in log.read_text() for words in ("printed", "to stderr", "logged", "by C", "by a child"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_log_on_a_full_disk_stops_nobody_and_hides_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the real one"), noise_to(Path("/dev/full")):
        print("x" * 100_000)
        sys.stdout.flush()
        raise ValueError("the real one")
    print("after")
    assert tuple(capfd.readouterr()) == ("after\n", "")
