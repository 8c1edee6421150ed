"""A tiny checkpoint, the original that it holds, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.statistics import Statistics
from export.calibrating import CalibrationOptions, calibrate
from export.checkpoint import Checkpoint, open_checkpoint
from export.families import read_family
from export.families.family import GraphOptions
from export.progress import Progress, Silent
from tests.calibration.original import Original
from tests.models import TinyModel, load_reference, write_checkpoint

GRAPH = GraphOptions(96, 64, (1.0, 0.75, 0.0))
PROMPTS = (
    "the red circle",
    "on and on and the red",
    "a square, and the circle",
    "red red red",
    "the",
    "circle on the circle and the circle",
    "and the red on a red",
    "nothing here!",
)

Calibrate = Callable[..., Statistics]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("calibration") / "tiny", TinyModel())))


@pytest.fixture(scope="session")
def original(checkpoint: Checkpoint) -> Original:
    return Original(load_reference(Path(checkpoint.where)), GRAPH)


@pytest.fixture(scope="session")
def run(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Calibrate:
    """Calibrates on the first `count` prompts."""
    folder = tmp_path_factory.mktemp("prompts")

    def calibrated(
        count: int,
        cache: Path,
        *,
        images: Path | None = None,
        chunks: int | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        graph: GraphOptions = GRAPH,
    ) -> Statistics:
        path = folder / f"{count}.txt"
        path.write_text("\n".join(PROMPTS[:count]), encoding="utf-8")
        options = CalibrationOptions(path, images, device, cache, chunks)
        return calibrate(checkpoint, read_family(checkpoint), graph, options, progress or Silent())

    return calibrated


@pytest.fixture(scope="session")
def two(run: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of two prompts, the transformer block by block."""
    return run(2, tmp_path_factory.mktemp("two"))
