"""The report command: where the page goes, and what is refused before the work begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.checkpoint import open_checkpoint
from export.errors import UserError
from export.families.family import GraphOptions
from export.report_command import run_report
from runtimes.bundle import BundleError, check_files, load_manifest
from tests.models import TinyModel, write_checkpoint
from tests.onnx_bundles import write_onnx_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyModel(layers=2, dual_layers=(0,), text_layers=2, sample_size=8)
    model = str(write_checkpoint(tmp_path_factory.mktemp("models") / "smallest", tiny))
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    write_onnx_bundle(folder, open_checkpoint(model), GraphOptions(64, 64, (1.0, 0.5, 0.0)))
    return folder


def test_the_page_is_written_beside_the_bundle_and_the_bundle_left_as_it_is(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_report(bundle=bundle, benchmark_file=None, out=None)
    place = bundle.parent / "tiny-report.html"
    assert f"wrote {place}" in capsys.readouterr().out
    html = place.read_text()
    for said in ("tiny for android", "onnxruntime: PSNR along the steps", "onnx: what a picture takes", "no pictures"):
        assert said in html
    check_files(bundle, load_manifest(bundle))


def test_bad_places_and_files_are_one_line(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is inside the bundle, which is sealed"):
        run_report(bundle=bundle, benchmark_file=None, out=bundle / "report.html")
    with pytest.raises(UserError, match="there is no folder"):
        run_report(bundle=bundle, benchmark_file=None, out=tmp_path / "nowhere" / "page.html")
    (tmp_path / "result.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(BundleError, match=r"result\.json is no benchmark result"):
        run_report(bundle=bundle, benchmark_file=tmp_path / "result.json", out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
