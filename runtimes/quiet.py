"""Keeps the notices that other libraries print while they are imported or run off the terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Drops log records up to WARNING and every Python warning inside the block; errors still come through.

    Use it around an import such as `with quiet(): import coremltools as ct`, which alone logs a dozen notices about
    optional modules. The setting is for the whole process, so keep the block short.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
