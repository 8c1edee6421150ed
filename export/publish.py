"""Publishes a bundle: written beside its place, renamed into it when complete.

    with publishing(Path("bundles/flash-mini/ios"), needed_bytes=120_000_000) as working:
        ...  # write the bundle into the folder `working`

Killed at any moment, the place holds the old bundle, or none if there was none, never a half one. What a stopped export left
beside it is taken up by the next one that makes the same (`key`), or else removed when that one starts; its temporary files
always are. A folder in work holds a lock (flock) that dies with its process, so that the work of another process is never taken
for a dead one's, whatever their process ids.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.errors import UserError
from export.journal import FOLDER as JOURNAL
from export.stopping import stoppable
from runtimes.bundle import MANIFEST

_FULL = (errno.ENOSPC, errno.EDQUOT)
# How numpy's tofile and coremltools' writer of weights say that a write failed; they keep the system's reason to themselves.
_WRITING = ("problem writing", "requested and", "while writing")
BUNDLE = "bundle"  # the folder in work, inside its hidden home
KEY = "key"  # of what is in work there
_CURRENT_FOLDER = -100  # AT_FDCWD of renameat2(2): paths are as given
_RENAME_EXCHANGE = 2


class GateFailed(Exception):
    """Raised inside `publishing` when what was made must not be published: it is kept as `<place>.failed`."""


@contextmanager
def publishing(place: Path, needed_bytes: int, key: str | None = None) -> Iterator[Path]:
    """Yields the folder to write the bundle into; at the end of the block it becomes `place`.

    On `GateFailed` it becomes `<place>.failed` (replacing an older one), on any other exception it is removed; both leave the
    old bundle as it was. So do SIGINT, SIGTERM and SIGHUP, which with a `key` leave what a `Journal` has noted for the next
    call with the same key. Raises `UserError` where a file cannot be written, the disk has less than `needed_bytes` (what the
    finished bundle takes) free or becomes full, or `place` is something other than a bundle.
    """
    place = place.resolve()
    failed = place.with_name(f"{place.name}.failed")
    with _clear_errors(place, needed_bytes):
        place.parent.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(place)
        home, lock = _take_up(place, key) or (None, -1)
        _remove_leftovers(place)
        _check_space(place, needed_bytes - (0 if home is None else _bytes(home)))
        if home is None:
            home, lock = _make_home(place)
    keep = False
    try:
        with stoppable(), _clear_errors(place, needed_bytes, home):
            working = home / BUNDLE
            working.mkdir(exist_ok=True)
            shutil.rmtree(home / "temporary", ignore_errors=True)
            if key is not None:
                (home / KEY).write_text(key)
            try:
                with _temporary_files_in(home / "temporary"):
                    yield working
            except GateFailed:
                _move(working, failed)
                raise
            _flush(working)
            (home / KEY).unlink(missing_ok=True)  # from here on this is nobody's unfinished work
            _move(working, place)
            shutil.rmtree(failed, ignore_errors=True)
    except (KeyboardInterrupt, SystemExit):
        keep = (home / KEY).is_file() and any((home / JOURNAL).glob("*.json"))
        raise
    finally:
        # What lies here now is the unfinished bundle or, after the exchange, the old one.
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
        os.close(lock)


def check_place(place: Path, needed_bytes: int) -> None:
    """Raises the `UserError` that `publishing` would begin with where there is no room, or something else in the place."""
    place = place.resolve()
    _refuse_foreign(place)
    _check_space(place, needed_bytes)


def _refuse_foreign(place: Path) -> None:
    """Only a bundle, a folder with nothing in it, or nothing is ever replaced."""
    if place.is_dir() and ((place / MANIFEST).is_file() or not any(place.iterdir())):
        return
    if place.exists():
        raise UserError(f"{place} exists and is no bundle (no {MANIFEST}); move it away or choose another --out")


def _prefix(place: Path) -> str:
    return f".{place.name}.publishing-"


def _aside(place: Path) -> Path:
    """Where the old bundle waits while it is replaced, on a system that cannot exchange two folders."""
    return place.with_name(f".{place.name}.old")


def _make_home(place: Path) -> tuple[Path, int]:
    """A new hidden folder beside `place` for the bundle and temporary files, and the descriptor that holds its lock."""
    attempt = 0
    while True:
        home = place.with_name(f"{_prefix(place)}{os.getpid()}-{attempt}")
        attempt += 1
        try:
            home.mkdir()
        except FileExistsError:  # another process's, with the same id in another container
            continue
        lock = os.open(home, os.O_RDONLY)
        # A file system without locks refuses everybody's: then no folder is ever taken for a leftover.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if home.exists():  # not removed as a leftover between its making and its locking
            return home, lock
        os.close(lock)


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Inside the block Python's temporary files lie in `folder`: on the disk that has the room, and removed as a leftover."""
    folder.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _take_up(place: Path, key: str | None) -> tuple[Path, int] | None:
    """The home of what a dead process was making under the same key, now locked."""
    for path in sorted(place.parent.iterdir()) if key is not None else ():
        if path.name.startswith(_prefix(place)) and (path / KEY).is_file() and (path / KEY).read_text() == key:
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
            else:
                return path, lock
    return None


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove_leftovers(place: Path) -> None:
    """Puts back an old bundle that was set aside, and removes what dead processes were working on."""
    aside = _aside(place)
    if aside.exists():
        if place.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(place)
    for path in place.parent.iterdir():
        if path.name.startswith(_prefix(place)) and path.is_dir():
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            else:
                shutil.rmtree(path)
            finally:
                os.close(lock)


def _move(working: Path, place: Path) -> None:
    """Gives the complete `working` the name `place`. If that exists, the two are exchanged in one step where possible."""
    if not place.exists():
        working.rename(place)
    elif not _exchange(working, place):
        aside = _aside(place)
        place.rename(aside)
        try:
            working.rename(place)
        except BaseException:
            aside.rename(place)
            raise
        shutil.rmtree(aside)
    _flush_folder(place.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names atomically by Linux's renameat2; False where the system or the file system has no such call."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = (_CURRENT_FOLDER, os.fsencode(first), _CURRENT_FOLDER, os.fsencode(second))
    return rename(*paths, ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def _flush(folder: Path) -> None:
    """Every file and folder down to the disk, so that a power cut cannot leave a name without its bytes."""
    for path in [*folder.rglob("*"), folder]:
        _flush_folder(path)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(place: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(_existing(place)).free
    if free < needed_bytes:
        raise UserError(_full(place, needed_bytes, free))


@contextmanager
def _clear_errors(place: Path, needed_bytes: int, home: Path | None = None) -> Iterator[None]:
    """What the system refuses becomes one clear line that names the file and the reason, however a library wrapped it."""
    try:
        yield
    except (UserError, GateFailed):
        raise
    except Exception as error:
        line = _line(error, place, needed_bytes, home)
        if line is None:
            raise
        raise UserError(line) from error


def _line(error: Exception, place: Path, needed_bytes: int, home: Path | None) -> str | None:
    """None where the error is not the system's."""
    causes = list(_chain(error))
    refused = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno is not None), None)
    if refused is None and any(_says(cause, errno.EFBIG) for cause in causes):
        refused = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if refused is None and home is not None and any(words in str(cause) for words in _WRITING for cause in causes):
        refused = _try_to_write(place, home)
    if any(_says(cause, *_FULL) for cause in (*causes, refused)):
        return _full(place, needed_bytes, shutil.disk_usage(_existing(place)).free)
    if refused is None:
        return None
    if refused.filename is None:  # the file was open already: it is the one written last
        return f"{_shown(_newest(home), place, home)} cannot be written: {refused.strerror}; choose another --out"
    path = Path(os.fsdecode(refused.filename2 or refused.filename)).absolute()  # of two, the second is written
    if isinstance(refused, (FileExistsError, NotADirectoryError)) and (path == place or path in place.parents):
        return f"{place} cannot be made: {path} is a file; choose another --out"
    if path == place or path in place.parents or (home is not None and path.is_relative_to(home)):
        return f"{_shown(path, place, home)} cannot be written: {refused.strerror}; choose another --out"
    return f"{path}: {refused.strerror}"


def _full(place: Path, needed_bytes: int, free: int) -> str:
    return (
        f"the disk of {place} is too full: {_size(free)} free, where the bundle needs {_size(needed_bytes)} in all; "
        "free some space or choose another --out"
    )


def _try_to_write(place: Path, home: Path) -> OSError | None:
    """What the system says to the next bytes of the file written last, or to some more in another one."""
    newest = _newest(home)
    for path, size, name in ((newest, 1 << 12, newest), (home / "more", 1 << 20, place)):
        try:
            if path is not None:
                with path.open("ab", buffering=0) as file:
                    while size:
                        size -= file.write(bytes(size))
        except OSError as error:
            return OSError(error.errno, error.strerror, str(name))
    return None


def _says(error: BaseException | None, *numbers: int) -> bool:
    """Libraries in C++ and Rust pass the system's words on in exceptions of their own."""
    words = str(error).lower()
    return (isinstance(error, OSError) and error.errno in numbers) or any(os.strerror(n).lower() in words for n in numbers)


def _newest(home: Path | None) -> Path | None:
    files = [path for path in home.rglob("*") if path.is_file()] if home is not None else []
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def _shown(path: Path | None, place: Path, home: Path | None) -> Path:
    """A file of the bundle in work, by the name that it was to get."""
    if path is None or home is None or not path.is_relative_to(home):
        return path or place
    if not path.is_relative_to(home / BUNDLE):
        return place
    return place / path.relative_to(home / BUNDLE)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from; what merely happened before it explains nothing."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _size(count: int) -> str:
    """1234567890 -> "1.23 GB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"
