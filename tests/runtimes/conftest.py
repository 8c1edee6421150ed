"""One tiny whole bundle for all tests of a session that draw from one."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.checkpoint import open_checkpoint
from export.families.family import GraphOptions
from tests.bundles import write_bundle
from tests.models import SD35, load_reference, write_checkpoint


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, two prompts, 64 x 96 pixels, artifacts that `tests.bundles.TORCH` runs. Not to be written to."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SD35)
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    options = GraphOptions(width=64, height=96, sigmas=(1.0, 0.75, 0.0))
    prompts = (("the red circle", 0), ("a blue and the", 5))
    write_bundle(folder, open_checkpoint(str(checkpoint)), load_reference(checkpoint), options, prompts)
    return folder
