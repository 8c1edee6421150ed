"""Publication: what stands in the bundle's place after success, failure, signals and kills, of real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from export import publish
from export.errors import UserError
from export.publish import GateFailed, publishing

FILES = ("manifest.json", "a.bin", "model.mlpackage/Data/weights.bin", "tokenizer/vocab.json")


def write_bundle(folder: Path, generation: str) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(generation)


def publish_one(place: Path, generation: str) -> None:
    with publishing(place, needed_bytes=1000) as working:
        write_bundle(working, generation)


def generation_of(place: Path) -> str:
    """Which bundle stands there; fails unless it is whole."""
    found = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    assert found == sorted(FILES)
    contents = {(place / name).read_text() for name in FILES}
    assert len(contents) == 1
    return contents.pop()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bundle_appears_complete_and_nothing_else_stays(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "ios"
    with publishing(place, needed_bytes=1000) as working:
        assert not place.exists() and working.parent.parent == place.parent and working.parent.name.startswith(".")
        write_bundle(working, "1")
        with tempfile.NamedTemporaryFile(delete=False) as temporary:  # they go with the folder in work
            assert Path(temporary.name).is_relative_to(working.parent)
    assert generation_of(place) == "1" and names(place.parent) == ["ios"]
    assert not Path(tempfile.gettempdir()).is_relative_to(tmp_path / "deep")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "in two renames"])
def test_new_bundle_replaces_the_old_one_and_an_old_failure(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    publish_one(tmp_path / "ios", "1")
    write_bundle(tmp_path / "ios.failed", "0")
    publish_one(tmp_path / "ios", "2")
    assert generation_of(tmp_path / "ios") == "2" and names(tmp_path) == ["ios"]


def test_exchange_swaps_two_folders_or_leaves_both_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "a" / "in a").mkdir(parents=True)
    (tmp_path / "b" / "in b").mkdir(parents=True)
    first, second = (["in b"], ["in a"]) if publish._exchange(tmp_path / "a", tmp_path / "b") else (["in a"], ["in b"])
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (first, second)
    assert not publish._exchange(tmp_path / "a", tmp_path / "nowhere")  # refused by every system
    assert names(tmp_path) == ["a", "b"] and names(tmp_path / "a") == first


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(3)])
def test_exception_leaves_the_old_bundle_and_no_trace(tmp_path: Path, error: BaseException) -> None:
    publish_one(tmp_path / "ios", "1")
    with pytest.raises(type(error)), publishing(tmp_path / "ios", needed_bytes=1000) as working:
        (working / "half").write_text("2")
        raise error
    assert generation_of(tmp_path / "ios") == "1" and names(tmp_path) == ["ios"]


def test_failed_gate_keeps_what_was_made_and_the_old_bundle(tmp_path: Path) -> None:
    publish_one(tmp_path / "ios", "1")
    for generation in ("2", "3"):
        with pytest.raises(GateFailed), publishing(tmp_path / "ios", needed_bytes=1000) as working:
            write_bundle(working, generation)
            raise GateFailed("transformer: 12 dB")
    assert generation_of(tmp_path / "ios") == "1" and generation_of(tmp_path / "ios.failed") == "3"
    assert names(tmp_path) == ["ios", "ios.failed"]


def test_foreign_folder_or_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(UserError, match="is no bundle"):
            publish_one(tmp_path / name, "1")
    (tmp_path / "empty").mkdir()
    publish_one(tmp_path / "empty", "1")
    assert generation_of(tmp_path / "empty") == "1" and (tmp_path / "photos" / "holiday.jpg").exists()


def test_too_little_space_is_said_before_the_work_starts(tmp_path: Path) -> None:
    line = r"too full: .* free, where the bundle needs 1000000000\.00 GB in all"
    with pytest.raises(UserError, match=line), publishing(tmp_path / "ios", needed_bytes=10**18):
        pytest.fail("the work started")
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_that_fills_up_is_one_clear_line(tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC."""
    publish_one(tmp_path / "ios", "1")
    with pytest.raises(UserError, match="too full"), publishing(tmp_path / "ios", needed_bytes=1000) as working:
        (working / "weights.bin").symlink_to("/dev/full")
        (working / "weights.bin").write_bytes(b"x" * 10_000)
    with pytest.raises(UserError, match="too full"), publishing(tmp_path / "ios", needed_bytes=1000):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    line = r"ios/weights\.bin cannot be written: File too large"
    with pytest.raises(UserError, match=line), publishing(tmp_path / "ios", needed_bytes=1000) as working:
        (working / "weights.bin").write_text("as far as it went")
        raise RuntimeError("I/O error: File too large (os error 27)")
    assert generation_of(tmp_path / "ios") == "1" and names(tmp_path) == ["ios"]


def test_unwritable_output_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be made: .*file is a file; choose another --out"):
        publish_one(tmp_path / "file" / "ios", "1")
    line = r"ios/weights\.bin cannot be written: Permission denied; choose another --out"
    with pytest.raises(UserError, match=line), publishing(tmp_path / "ios", 1000) as working:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(working / "weights.bin"))
    with pytest.raises(UserError, match=r"^/somewhere/else: Permission denied$"), publishing(tmp_path / "ios", 1000):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/somewhere/else")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written"):
            publish_one(tmp_path / "ios", "1")
    finally:
        tmp_path.chmod(0o700)


def test_work_of_a_living_process_is_left_alone_and_that_of_a_dead_one_removed(tmp_path: Path) -> None:
    living, dead = tmp_path / ".ios.publishing-1-0", tmp_path / f".ios.publishing-{os.getpid()}-0"
    for folder in (living, dead):
        write_bundle(folder, "half")
    lock = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        publish_one(tmp_path / "ios", "1")
        assert names(tmp_path) == [living.name, "ios"]
    finally:
        os.close(lock)
    publish_one(tmp_path / "ios", "2")
    assert generation_of(tmp_path / "ios") == "2" and names(tmp_path) == ["ios"]


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of publications wait for the disk each time otherwise."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder) / "bundles"


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "in two renames"])
def test_killed_at_every_line_of_publication_leaves_a_whole_bundle_or_none(in_memory: Path, exchange: bool) -> None:
    """A child process is killed at the first line that publication runs, at the second, and so on to the last."""
    killed, line, place = True, 0, in_memory / "ios"
    seen = set()
    while killed:
        line += 1
        shutil.rmtree(in_memory, ignore_errors=True)
        write_bundle(place, "old")
        write_bundle(in_memory / "ios.failed", "0")
        killed = _run_killed_at_line(line, place, exchange)
        state = generation_of(place) if place.exists() else "none"
        seen.add(state)
        with publishing(place, needed_bytes=1000) as working:
            recovered = generation_of(place)  # what was set aside is back
            write_bundle(working, "next")
        assert recovered == ("old" if state == "none" else state)
        assert generation_of(place) == "next" and names(in_memory) == ["ios"]
    assert line > 50 and seen == ({"old", "new"} if exchange else {"old", "none", "new"})


def _run_killed_at_line(line: int, place: Path, exchange: bool) -> bool:
    """Publishes in a child that kills itself when publish.py comes to its `line`th line. False: it ran to its end."""
    child = os.fork()
    if child == 0:
        if not exchange:
            publish._exchange = lambda first, second: False
        count = 0

        def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
            nonlocal count
            if frame.f_code.co_filename != publish.__file__:
                return None
            count += event == "line"
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        publish_one(place, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


CHILD = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # one under nohup this
sys.path.insert(0, {root!r})
from export.publish import publishing
from tests.export.test_publish import publish_one, write_bundle

print("ready", flush=True)
{work}
"""
ALWAYS_PUBLISHING = "for generation in range(1_000_000): publish_one(Path({place!r}), str(generation) * 100_000)"
HALF_WAY = """
with publishing(Path({place!r}), needed_bytes=1000) as working:
    write_bundle(working, "half")
    print("half", flush=True)
    time.sleep(60)
"""


def _start_child(work: str, place: Path) -> subprocess.Popen[bytes]:
    code = CHILD.format(root=str(Path(__file__).parents[2]), work=work.format(place=str(place)))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    return child


def test_processes_killed_at_random_moments_leave_a_whole_bundle_or_none(tmp_path: Path) -> None:
    moments = random.Random(0)
    for _ in range(8):
        child = _start_child(ALWAYS_PUBLISHING, tmp_path / "ios")
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        child.communicate()
        if (tmp_path / "ios").exists():
            generation_of(tmp_path / "ios")
    publish_one(tmp_path / "ios", "last")
    assert generation_of(tmp_path / "ios") == "last" and names(tmp_path) == ["ios"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["interrupted", "terminated", "hung up"])
def test_interrupted_process_leaves_the_old_bundle_and_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    publish_one(tmp_path / "ios", "old")
    child = _start_child(HALF_WAY, tmp_path / "ios")
    assert child.stdout is not None and child.stdout.readline() == b"half\n"
    child.send_signal(number)
    child.communicate()
    assert child.returncode != 0
    assert generation_of(tmp_path / "ios") == "old" and names(tmp_path) == ["ios"]
