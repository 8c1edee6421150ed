"""SIGINT, SIGTERM and SIGHUP stop an export by an exception, so that clean-up runs; where a library swallows it, the next step
of the export raises it again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from export.progress import Progress

_HANDLED: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
_raised: list[BaseException] = []


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside the block SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP SystemExit. Handlers of others stay."""

    def stop(number: int, frame: FrameType | None) -> None:
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        _raised.append(error)
        raise error

    main = threading.current_thread() is threading.main_thread()
    caught = [number for number, usual in _HANDLED.items() if main and signal.getsignal(number) == usual]
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, _HANDLED[number])
        _raised.clear()


@dataclass(frozen=True)
class Heeding:
    """A `Progress` whose steps stop where a signal did not: an exception inside a destructor or a callback from C is lost."""

    progress: Progress

    def stage(self, name: str, total: int) -> None:
        self.progress.stage(name, total)

    def step(self, detail: str) -> None:
        if _raised:
            raise _raised[0]
        self.progress.step(detail)
