"""Two test processes share the machine: one thread each, and no look-ups on a network that tests never need."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
