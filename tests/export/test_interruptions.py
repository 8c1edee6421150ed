"""Whole exports that are interrupted, killed or run out of disk: what is left, what is said, and the run after that."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtimes.bundle import check_files, load_manifest
from tests.export.forked import Blow, Forks
from tests.models import TinyModel, write_checkpoint

COMMAND = Path(sys.executable).with_name("export-flash")
SMALLEST = TinyModel(layers=1, dual_layers=(0,), text_layers=2, sample_size=8, text_width=256, joint_width=320)
ONE_GRAPH = ("--bits", 16, "--component", "text_encoder")
ONNX = ("--target", "android", "--format", "onnx", *ONE_GRAPH)
STOPPED = "export-flash: stopped; nothing half-made was left, and the same export goes on from here"
# Of such an export's twenty steps: the checkpoint is read, pictures are drawn, the graph is made, others are recorded, parity.
MOMENTS = (Blow(1), Blow(3, seconds=0.02), Blow(4), Blow(6), Blow(6, seconds=0.1), Blow(14), Blow(19), Blow(20))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "smallest", SMALLEST, dtype=torch.float16)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first, undisturbed export puts its bundle."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def forks(checkpoint: Path, out: Path) -> Iterator[Forks]:
    forks = Forks(out, *ONNX, "--model", checkpoint, "--out", out)
    yield forks
    forks.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_whole(bundle: Path) -> None:
    check_files(bundle, load_manifest(bundle))


@pytest.mark.parametrize("old", [True, False], ids=["over an old bundle", "where there was none"])
def test_export_stopped_at_any_moment_leaves_the_old_bundle_or_none_and_the_next_one_succeeds(
    old: bool, forks: Forks, checkpoint: Path, out: Path, tmp_path: Path
) -> None:
    place = tmp_path / "android"
    command = (*ONNX, "--model", checkpoint, "--out", tmp_path)
    if old:
        shutil.copytree(out / "android", place)
    stopped = 0
    for number, moment in enumerate(MOMENTS):
        kind = (signal.SIGINT, signal.SIGKILL)[(number + old) % 2]
        ended = forks.run(*command, blow=replace(moment, signal=kind))
        left = names(tmp_path) - {"android", "export.log"}
        if kind is signal.SIGKILL:
            assert ended.code in (-signal.SIGKILL, 0), ended.shown
        else:
            assert ended.code in (130, 0), ended.shown
            assert ended.code == 0 or ended.shown.strip() == STOPPED
        assert all(name.startswith(".android.publishing-") for name in left)
        stopped += ended.code != 0
        if old or place.exists():
            assert_whole(place)
    assert stopped >= len(MOMENTS) - 1  # the last of them may come too late
    ended = forks.run(*command)
    assert ended.code == 0, ended.shown
    assert names(tmp_path) == {"android", "export.log"}
    assert forks.run("verify", place).code == 0


def test_killed_at_ten_random_moments_it_repeats_nothing_finished_and_gives_the_bytes_of_an_undisturbed_run(
    forks: Forks, checkpoint: Path, tmp_path: Path
) -> None:
    whole = ("--target", "android", "--format", "onnx", "--bits", 8, "--no-calibration", "--model", checkpoint)
    assert forks.run(*whole, "--out", tmp_path / "undisturbed").code == 0
    command, rng, finished = (*whole, "--out", tmp_path / "killed"), random.Random(0), dict[str, int]()
    for _ in range(10):
        moment = Blow(rng.randint(2, 18), signal.SIGKILL, seconds=rng.choice((0.0, 0.05, 0.2)))
        ended = forks.run(*command, blow=moment)
        assert ended.code != 0 and not (tmp_path / "killed" / "android").exists()
        homes = list((tmp_path / "killed").glob(".android.publishing-*"))
        assert len(homes) <= 1
        for path in (path for home in homes for note in (home / "journal").glob("*.json") for path in noted(home, note)):
            name = path.relative_to(homes[0] / "bundle").as_posix()
            assert finished.setdefault(name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, f"{name} was made again"
    assert any(name.endswith(".onnx") for name in finished)
    assert forks.run(*command).code == 0
    made, undisturbed = (tmp_path / name / "android" for name in ("killed", "undisturbed"))
    assert all((made / name).stat().st_mtime_ns == time_made for name, time_made in finished.items())
    files = sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("*"))
    assert files == sorted(path.relative_to(made) for path in made.rglob("*"))
    assert [f for f in files if (made / f).is_file() and (made / f).read_bytes() != (undisturbed / f).read_bytes()] == []


def noted(home: Path, note: Path) -> list[Path]:
    """The files of a unit of work that is finished."""
    return [home / "bundle" / entry["path"] for entry in json.loads(note.read_text())["files"]]


def test_ctrl_c_is_one_line_and_exit_code_130(checkpoint: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, *map(str, ONNX), "--model", checkpoint, "--out", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background has it ignored
    )
    while not any(tmp_path.glob(".android.publishing-*/bundle")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    shown, told = process.communicate()
    assert (process.returncode, shown, told.strip()) == (130, "", STOPPED)
    assert all(name.startswith(".android.publishing-") for name in names(tmp_path) - {"export.log"})


@pytest.mark.parametrize(
    ("target", "format", "file"),
    [("android", "executorch", "android/text_encoder.pte"), ("android", "onnx", "android"), ("ios", "coreml", "ios")],
)
def test_file_that_cannot_be_written_to_its_end_is_named_or_the_bundle_where_a_library_hides_the_file(
    target: str, format: str, file: str, forks: Forks, checkpoint: Path, tmp_path: Path
) -> None:
    command = ("--target", target, "--format", format, *ONE_GRAPH, "--model", checkpoint, "--out", tmp_path)
    ended = forks.run(*command, file_bytes=200_000)
    (line,) = ended.shown.strip().splitlines()
    assert ended.code == 2
    assert line == f"export-flash: {tmp_path}/{file} cannot be written: File too large; choose another --out"
    assert names(tmp_path) == {"export.log"}
    assert "Traceback" in (tmp_path / "export.log").read_text()  # where it happened is in the log alone


def test_disk_that_fills_up_is_one_line_and_the_old_bundle_stays(
    forks: Forks, checkpoint: Path, out: Path, tmp_path: Path
) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", tmp_path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no disk of its own can be mounted here: {mount.stderr.strip()}")
    try:
        shutil.copytree(out / "android", tmp_path / "android")
        command = (*ONNX, "--model", checkpoint, "--out", tmp_path)
        ended = forks.run(*command, blow=Blow(5, fill=str(tmp_path)))
        assert ended.code == 2 and len(ended.shown.strip().splitlines()) == 1, ended.shown
        assert f"the disk of {tmp_path}/android is too full" in ended.shown
        assert names(tmp_path) == {"android", "export.log", "filler"}
        ended = forks.run(*command)  # now too full from the beginning
        assert ended.code == 2 and "free some space or choose another --out" in ended.shown
        assert_whole(tmp_path / "android")
        (tmp_path / "filler").unlink()
        assert forks.run(*command).code == 0
    finally:
        subprocess.run(["umount", tmp_path], check=True)


OWN_LINES = (
    r"\w+ weights cost the final latents .* of their variance.*: .* dB, pictures .* dB \(\d+ prompts\)",
    r".+ \d+/\d+ +[\d:]+ +[-\d:]+.*",  # a bar
    r"smallest for (ios|android)",
    r" +lowering  quality  floor",
    r"component +format +MB +bits +dB +dB +dB  verdict",
    r"─+",
    r"text_encoder +(coreml|onnx|executorch) .* passed",
    r"\S+ is ready: export-flash generate \S+ \"a prompt\"",
)


def foreign(shown: str) -> list[str]:
    """Lines that are not ours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n")
    lines = [line.rstrip() for line in plain.split("\n") if line.strip()]
    return [line for line in lines if not any(re.fullmatch(own, line) for own in OWN_LINES)]


def in_terminal(*command: object) -> tuple[int, str]:
    """Exit code and everything that a terminal of 80 columns gets."""
    own, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(
        [str(word) for word in command], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(own, 1 << 16)
        except OSError:  # Linux's end of file of a terminal
            break
    os.close(own)
    return process.wait(), shown.decode()


def test_terminal_and_pipe_get_nothing_of_what_libraries_print(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--target", "all", "--model", checkpoint, "--component", "text_encoder", "--out", tmp_path)
    code, shown = in_terminal(COMMAND, *arguments)
    assert code == 0, shown
    assert foreign(shown) == []
    assert "Running MIL" in (tmp_path / "export.log").read_text()
    verified = subprocess.run([COMMAND, "verify", tmp_path / "android"], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr, foreign(verified.stdout)) == (0, "", [])
