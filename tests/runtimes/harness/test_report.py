"""The page about a bundle: its content by parsing it, its charts' data against brute force, and the page in a browser."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes.bundle import BundleError, LossEntry, Manifest, ParityEntry, describe_files, load_manifest, write_manifest
from runtimes.golden import read_drawings
from runtimes.harness.drift import prompt_drift
from runtimes.harness.ranges import OperationRange, RangeMap
from runtimes.harness.report import Findings, collect, render_page, write_report
from runtimes.harness.report.pictures import read_gallery
from runtimes.harness.report.recipe import Option, lower_hull, read_evidence
from runtimes.harness.results import describe_model
from runtimes.pipeline import Pipeline, to_image
from runtimes.registry import RUNTIMES
from tests.bundles import FORMAT, TORCH
from tests.runtimes.harness.test_results import result_of

BITS = (3, 4, 6, 8)
NAMES = {"text_encoder": ("a.weight", "b.bias"), "transformer": ("blocks.2.weight", "blocks.10.weight", "blocks.10.bias")}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "wbr", "br", "use", "path"}
# Stands around the page, since a window of Chromium is never narrower than 500 px.
FRAME = '<!DOCTYPE html><body style="margin:0"><iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>'
# Runs in the page once it has loaded, and leaves around it what it saw.
PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", async () => {
  await Promise.all([...document.images].map(image => image.decode().catch(() => errors.push("picture"))));
  const seen = {
    images: [...document.images].filter(image => image.naturalWidth > 0).length,
    charts: [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 40).length,
    width: innerWidth,
    page: document.documentElement.scrollWidth,
    resources: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    errors,
  };
  const found = parent.document.createElement("pre");
  found.textContent = JSON.stringify(seen);
  parent.document.body.append(found);
});
</script>
"""


class Page(HTMLParser):
    """Text, attributes and tables of a page; raises where elements do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def weight(name: str, choose: int) -> dict[str, object]:
    """A weight of 4,096 values as recipe.json has it; a bias of 16 has no choice."""
    if name.endswith("bias"):
        return {"shape": [16], "scheme": {"kind": "float", "bits": 16}, "weighed": []}
    schemes = [{"kind": "palette", "bits": bits, "group": None, "scaled": False, "vector": 1} for bits in BITS]
    size = len(name) / 10
    losses = [size * 4.0**-bits * (1 + 0.3 * math.sin(bits * len(name))) for bits in BITS]
    weighed = [{"scheme": s, "bytes": 512 * s["bits"], "loss": loss} for s, loss in zip(schemes, losses, strict=True)]  # type: ignore[operator]
    return {"shape": [64, 64], "scheme": schemes[choose], "weighed": weighed}


def write_recipe(folder: Path) -> None:
    components = {
        component: {name: weight(name, place % 3 + 1) for place, name in enumerate(names)} for component, names in NAMES.items()
    }
    choices = [choice for weights in components.values() for choice in weights.values()]
    nbytes = sum(512 * c["scheme"]["bits"] if c["weighed"] else 32 for c in choices)  # type: ignore[index]
    recipe = {"version": 1, "formats": {FORMAT: {"bytes": nbytes, "mean_bits": 6.0, "components": components}}}
    (folder / "recipe.json").write_text(json.dumps(recipe))


@pytest.fixture(scope="module")
def made(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Manifest]]:
    """The tiny bundle with what an export adds: pictures, a recipe, parity and losses."""
    folder = tmp_path_factory.mktemp("reports") / "tiny"
    shutil.copytree(tiny_bundle, folder)
    manifest = load_manifest(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNTIMES, "torch", TORCH)
        pipeline = Pipeline.open(folder, "torch")
        (folder / "pictures").mkdir()
        for p, drawing in enumerate(read_drawings(folder, manifest.golden)):
            to_image(drawing.image).save(folder / "pictures" / f"prompt{p}-original.png")
            pixels = np.asarray(pipeline.generate(drawing.prompt, drawing.seed).image).copy()
            pixels[:8, :8] ^= 7  # so that there is something to see
            Image.fromarray(pixels).save(folder / "pictures" / f"prompt{p}-{FORMAT}.png")
        write_recipe(folder)
        parity = (
            ParityEntry(
                component="transformer", format=FORMAT, output="velocity", lowering=71.5, quality=45.25, floor=40, passed=True
            ),
            ParityEntry(component="image", format=FORMAT, output="image", lowering=None, quality=38.5, floor=40, passed=False),
        )
        loss = LossEntry(format=FORMAT, prompts=4, predicted=5.6e-5, measured=2.66e-5, latents=63.5, image=55.4)
        finished = {
            "parity": parity,
            "recipe": manifest.recipe.model_copy(update={"calibrated": True, "losses": (loss,)}),
            "other_files": describe_files(folder, ["pictures", "recipe.json"]),
        }
        write_manifest(folder, manifest.model_copy(update=finished))
        yield folder, load_manifest(folder)


@pytest.fixture(scope="module")
def findings(made: tuple[Path, Manifest]) -> Findings:
    """All that a page can show: drift measured, ranges and a benchmark passed in."""
    folder, manifest = made
    operations = [("near", 39000.0, 0), ("wide", 65000.0, 7), ("small", 0.0, 0)]
    rows = (
        OperationRange("transformer", "transformer.mlpackage", place, "mul", name, 0, largest, largest / 65504, wrong, 8)
        for place, (name, largest, wrong) in enumerate(operations)
    )
    benchmark = result_of("transformer", "image").model_copy(update={"benchmark_model": describe_model(manifest)})
    return collect(folder, manifest, benchmark=benchmark, ranges=RangeMap("tiny", "test", tuple(rows)))


@pytest.fixture(scope="module")
def html(findings: Findings) -> str:
    return render_page(findings)


def test_page_says_what_the_manifest_says(html: str, findings: Findings) -> None:
    page = Page(html)
    manifest = findings.manifest
    for said in ("tiny for test", "1, 0.75, 0", "64 x 96 px in 2 steps", "tiny-licence", "fold_null_tokens", "the red circle"):
        assert said in page.text
    assert "1 of 2 comparisons with the original failed" in page.text
    assert ["transformer", "velocity", "71.5", "45.2", "40", "passed"] in page.rows
    assert ["image", "image", "—", "38.5", "40", "failed"] in page.rows
    assert [FORMAT, "5.6e-05", "2.66e-05", "63.5", "55.4", "4"] in page.rows
    entry = manifest.component("transformer", FORMAT)
    assert entry is not None
    megabytes = [f"{entry.bytes / 1e6:,.2f}", f"{entry.stored_bytes / 1e6:,.2f}"]
    assert ["transformer", "—", *megabytes, "32.00", f"{entry.weights:,}"] in page.rows
    assert ["transformer", "mul", "wide", "65,000.0", "overflow"] in page.rows
    assert "transformer.mlpackage: mul 'wide' overflows float16 first" in page.text
    assert "Host timing" in page.text and "On phones: nowhere yet." in page.text
    (drift,) = findings.drifts
    worst = min(prompt.image for prompt in drift.prompts)
    assert any(row[:3] == ["picture", "—", f"{worst:.1f}"] for row in page.rows)


def test_page_loads_nothing(html: str) -> None:
    page = Page(html)
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert all(value.startswith("#") or value == "data:," for value in page.values("href"))
    assert not page.values("xlink:href") and not page.values("srcset")
    assert not re.search(r"@import|url\((?!#)|<script|https?://", html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = [value[1:] for value in page.values("href") if value.startswith("#")] + re.findall(r"url\(#([^)]+)\)", html)
    assert set(used) <= set(ids)


def test_charts_take_the_pages_colours(html: str) -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--ink)" in svg and "<text" in svg
    assert not re.search(r"#[0-9a-f]{6}\b(?!-)", re.sub(r'"#[^"]*"|url\([^)]*\)', "", svg))


def test_same_findings_give_the_same_bytes(html: str, findings: Findings) -> None:
    assert render_page(findings) == html


def test_report_is_written_into_the_folder(made: tuple[Path, Manifest], findings: Findings, tmp_path: Path) -> None:
    folder, manifest = made
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = write_report(copy, manifest, ranges=findings.ranges, drifts=findings.drifts)
    assert path == copy / "report.html" and path.read_bytes().startswith(b"<!DOCTYPE html>")
    assert "No benchmark is part of this page" in Page(path.read_text()).text


def test_a_bare_bundle_has_a_page_too(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    page = Page(render_page(collect(tiny_bundle, manifest, drifts=())))
    for said in ("no pictures", "no recipe", "No runtime can draw", "no Core ML artifacts", "can be counted", "been compared"):
        assert said in page.text


def test_a_benchmark_of_another_bundle_is_refused(made: tuple[Path, Manifest]) -> None:
    with pytest.raises(BundleError, match=r"was measured on a bundle with digest 222222222222…, this one has"):
        collect(*made, benchmark=result_of(), drifts=())


def test_differences_are_amplified_as_stated(made: tuple[Path, Manifest]) -> None:
    folder, manifest = made
    gallery = read_gallery(folder, manifest)
    first = gallery.prompts[0].artifacts[0]
    original, drawn = (
        np.asarray(Image.open(folder / "pictures" / f"prompt0-{name}.png")).astype(int) for name in ("original", FORMAT)
    )
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.difference.partition(",")[2]))))
    np.testing.assert_array_equal(shown, (gallery.factor * np.abs(drawn - original)).clip(0, 255))
    assert gallery.factor > 1 and first.levels == np.abs(drawn - original).max() >= 1


def test_a_picture_that_is_none_is_one_line(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = made
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "prompt1-original.png").write_text("no picture")
    with pytest.raises(BundleError, match=r"prompt1-original\.png cannot be read as a picture"):
        read_gallery(tmp_path, manifest)


def test_curve_is_the_hull_of_every_combination(made: tuple[Path, Manifest]) -> None:
    evidence = read_evidence(made[0])[FORMAT]
    assert [layer.name for layer in evidence.layers] == [
        "a.weight", "b.bias", "blocks.2.weight", "blocks.10.bias", "blocks.10.weight"
    ]  # fmt: skip
    settled = evidence.nbytes - sum(layer.chosen.nbytes for layer in evidence.weighed if layer.chosen)
    assert settled == 64
    combinations = [
        Option(settled + sum(option.nbytes for option in options), math.fsum(option.loss for option in options))
        for options in itertools.product(*(layer.options for layer in evidence.weighed))
    ]
    corners = lower_hull(combinations)
    curve = evidence.curve()
    found = {option.nbytes: option.loss for option in curve}
    for corner in corners:
        assert found[corner.nbytes] == pytest.approx(corner.loss, rel=1e-9)
    sizes, losses = [option.nbytes for option in curve], [option.loss for option in curve]
    for option in (*combinations, evidence.chosen):
        assert option.loss >= np.interp(option.nbytes, sizes, losses) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text[:-1], "Invalid JSON"),
        (lambda text: text.replace('"palette"', '"pallet"', 1), r"formats\.torch\.components\.text_encoder"),
        (lambda text: text.replace('"loss": 0.', '"loss": -0.', 1), "loss: Input should be greater than or equal to 0"),
    ],
)
def test_a_recipe_that_is_none_is_one_line(
    made: tuple[Path, Manifest], tmp_path: Path, change: Callable[[str], str], complaint: str
) -> None:
    (tmp_path / "recipe.json").write_text(change((made[0] / "recipe.json").read_text()))
    with pytest.raises(BundleError, match=complaint) as error:
        read_evidence(tmp_path)
    assert "\n" not in str(error.value)


def test_drift_of_what_was_drawn_already_is_that_of_a_run(made: tuple[Path, Manifest], findings: Findings) -> None:
    folder, manifest = made
    pipeline = Pipeline.open(folder, "torch")
    drawings = list(read_drawings(folder, manifest.golden))
    rows = tuple(prompt_drift(pipeline.generate(drawing.prompt, drawing.seed), drawing) for drawing in drawings)
    assert rows == findings.drifts[0].prompts


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this system; apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_whole(html: str, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    page = html.replace("</body>", f"{PROBE}</body>").replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=page))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    limits = ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    url = (tmp_path / "frame.html").as_uri()
    done = subprocess.run([*command, *limits, url], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(r"</iframe><pre>(.*?)</pre>", done.stdout)
    assert found is not None, done.stderr
    seen = json.loads(found.group(1))
    assert seen["errors"] == [] and "CONSOLE" not in done.stderr
    assert seen["images"] == 6  # of two prompts the original, the artifact's, and the difference
    assert seen["charts"] == 6  # two components' layers, the curve, drift, ranges, latency
    assert seen["width"] == width and seen["page"] <= width
    assert seen["resources"] == 0
