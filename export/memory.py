"""Memory that is free goes back to the system.

glibc learns from large blocks that are freed and serves the next ones from its heap, where whatever small thing lies behind
them keeps them from being returned: a process that reads a large model layer by layer would come to hold most of it.
"""

from __future__ import annotations

import ctypes
import gc
import sys

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE = 1 << 20


def keep_large_blocks_apart() -> None:
    """From now on blocks of a MiB or more are mapped by themselves and unmapped when freed (glibc alone)."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def release() -> None:
    """Collects cycles, and gives back what the allocator holds (glibc alone)."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
