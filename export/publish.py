"""Publishes a bundle: written beside its place, renamed into it when complete.

    with publishing(Path("bundles/flash-mini/ios"), needed_bytes=120_000_000) as working:
        ...  # write the bundle into the folder `working`

Killed at any moment, the place holds the old bundle, or none if there was none, never a half one. What a killed export left
beside it is removed when the next one starts. A folder in work holds a lock (flock) that dies with its process, so that the
work of another process is never taken for a dead one's, whatever their process ids.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from export.errors import UserError
from runtimes.bundle import MANIFEST

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_CURRENT_FOLDER = -100  # AT_FDCWD of renameat2(2): paths are as given
_RENAME_EXCHANGE = 2


class GateFailed(Exception):
    """Raised inside `publishing` when what was made must not be published: it is kept as `<place>.failed`."""


@contextmanager
def publishing(place: Path, needed_bytes: int) -> Iterator[Path]:
    """Yields the folder to write the bundle into; at the end of the block it becomes `place`.

    On `GateFailed` it becomes `<place>.failed` (replacing an older one), on any other exception, SIGINT or SIGTERM it is
    removed; both leave the old bundle as it was. Raises `UserError` where the folder cannot be written, the disk has less than
    `needed_bytes` (what the finished bundle takes) free or becomes full, or `place` is something other than a bundle.
    """
    place = place.resolve()
    failed = place.with_name(f"{place.name}.failed")
    with _clear_errors(place, needed_bytes):
        place.parent.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(place)
        _remove_leftovers(place)
        _check_space(place, needed_bytes)
        working, lock = _make_working(place)
    try:
        with _terminate_by_exception(), _clear_errors(place, needed_bytes):
            try:
                yield working
            except GateFailed:
                _move(working, failed)
                raise
            _flush(working)
            _move(working, place)
            shutil.rmtree(failed, ignore_errors=True)
    finally:
        # What stands here now is the unfinished bundle or, after the exchange, the old one.
        shutil.rmtree(working, ignore_errors=True)
        os.close(lock)


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


def _make_working(place: Path) -> tuple[Path, int]:
    """A new hidden folder beside `place`, and the descriptor that holds its lock."""
    attempt = 0
    while True:
        working = place.with_name(f"{_prefix(place)}{os.getpid()}-{attempt}")
        attempt += 1
        try:
            working.mkdir()
        except FileExistsError:  # another process's, with the same id in another container
            continue
        lock = os.open(working, os.O_RDONLY)
        # A file system without locks refuses everybody's: then no folder is ever taken for a leftover.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if working.exists():  # not removed as a leftover between its making and its locking
            return working, lock
        os.close(lock)


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


@contextmanager
def _terminate_by_exception() -> Iterator[None]:
    """Inside the block SIGTERM raises SystemExit, as SIGINT raises KeyboardInterrupt, so that clean-up runs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_space(place: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if free < needed_bytes:
        raise UserError(_full(place, needed_bytes, free))


@contextmanager
def _clear_errors(place: Path, needed_bytes: int) -> Iterator[None]:
    """A full disk or an unwritable folder becomes one clear line, however a library wrapped it."""
    try:
        yield
    except (UserError, GateFailed):
        raise
    except Exception as error:
        causes = list(_chain(error))
        if any(_says_full(cause) for cause in causes):
            raise UserError(_full(place, needed_bytes, shutil.disk_usage(_existing(place)).free)) from error
        for cause in causes:
            if isinstance(cause, OSError) and cause.errno in _UNWRITABLE and _concerns(cause, place):
                raise UserError(f"{place} cannot be written: {cause.strerror}; choose another --out") from error
            if isinstance(cause, (FileExistsError, NotADirectoryError)) and _concerns(cause, place):
                raise UserError(f"{place} cannot be made: {cause.filename} is a file; choose another --out") from error
        raise


def _full(place: Path, needed_bytes: int, free: int) -> str:
    return (
        f"the disk of {place} is too full: {_size(free)} free, where the bundle needs {_size(needed_bytes)} in all; "
        "free some space or choose another --out"
    )


def _says_full(error: BaseException) -> bool:
    """Libraries in C++ and Rust pass the system's words on in exceptions of their own."""
    return (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC).lower() in str(error).lower()


def _concerns(error: OSError, place: Path) -> bool:
    """Whether the error is about the place, its working folder or a folder above, and not about some other file."""
    if not isinstance(error.filename, (str, bytes, os.PathLike)):
        return False
    path = Path(os.fsdecode(error.filename)).absolute()
    working = any(part.startswith(_prefix(place)) for part in path.parts)
    return working or path == place or path in place.parents


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _size(count: int) -> str:
    """1234567890 -> "1.23 GB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"
