"""A signal stops an export even where a library swallows the exception that it raises."""

from __future__ import annotations

import os
import signal

import pytest

from export.progress import Silent
from export.stopping import Heeding, stoppable


class _Swallows:
    """What a destructor raises is lost: Python prints it and goes on."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_next_step_stops_where_the_exception_was_lost(number: int, kind: type[BaseException]) -> None:
    progress, before = Heeding(Silent()), signal.getsignal(number)
    with pytest.raises(kind), stoppable():
        progress.step("one")
        _Swallows(number)
        progress.step("two")
    assert signal.getsignal(number) == before
    with stoppable():
        progress.step("of another export")


def test_handlers_of_others_stay() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            Heeding(Silent()).step("one")
    finally:
        signal.signal(signal.SIGTERM, before)
