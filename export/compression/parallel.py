"""Work on many tensors, on all cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_worker = threading.local()


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`work(item)` for every item, in the order of the items, on all cores (or `workers` threads); numpy and torch compute
    outside the interpreter's lock. Inside of another `in_order` it computes in the thread that it is called from."""
    threads = workers or os.cpu_count() or 1
    if threads == 1 or getattr(_worker, "busy", False):
        yield from map(work, items)
        return

    def mark() -> None:
        _worker.busy = True

    with ThreadPoolExecutor(threads, initializer=mark) as pool:
        yield from pool.map(work, items)
