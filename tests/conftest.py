"""Two test processes share the machine: one thread each, and no look-ups on a network that tests never need."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What calibration keeps is kept for this run of the tests alone."""
    os.environ["EXPORT_FLASH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
