"""Benchmark results: statistics against numpy and by hand, the published schema, refusals, the history, verdicts, tables."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from runtimes.bundle import BundleError, ImageSize
from runtimes.harness.bench_tables import pairs_table, result_table, three_figures, verdict_table
from runtimes.harness.history import append, compare, differences, history_file, judge, latest_like, read_history
from runtimes.harness.results import (
    BackendSettings,
    BenchmarkModel,
    Comparison,
    EnvironmentInfo,
    Latency,
    LoadTime,
    Memory,
    Pairs,
    Result,
    Row,
    now,
    parse_result,
    read_result,
    schema,
)

SAMPLES = (0.004, 0.001, 0.002, 0.005, 0.003)
SETTINGS = BackendSettings(framework="onnxruntime", framework_version="1.31.1", format="onnx", threads=2)
seconds = st.lists(st.floats(1e-5, 1e3), min_size=5, max_size=40)
examples = settings(max_examples=50, deadline=None)


def result_of(*names: str, samples: Sequence[float] = SAMPLES, host: bool = True) -> Result:
    rows = tuple(
        Row(
            name=name,
            delegate=None,
            bytes=123_456_789,
            load_mode="mmap",
            model_load_time=LoadTime(first=123.456, warm=0.1),
            warm_up=(0.0042, 0.003),
            latency=Latency.of(samples),
            memory=Memory(baseline_resident=68_000_000, peak_resident=12_345_678_901),
        )
        for name in names or ("text_encoder_2", "image")
    )
    return Result(
        host=host,
        start_datetime=now(),
        benchmark_model=BenchmarkModel(
            name="tiny",
            target="android",
            quantization="uniform-8",
            fingerprint="1" * 64,
            digest="2" * 64,
            image_size=ImageSize(height=96, width=128),
            steps=4,
        ),
        backend_settings=SETTINGS,
        environment_info=EnvironmentInfo(
            platform="linux" if host else "android", device="some processor", arch="x", os="y\u2028z", cores=2, total_mem=1
        ),
        rows=rows,
    )


def changed(result: Result, part: str, **fields: object) -> Result:
    return result.model_copy(update={part: getattr(result, part).model_copy(update=fields)})


def test_statistics_of_five_samples_by_hand() -> None:
    latency = Latency.of(SAMPLES)
    assert (latency.p50, latency.min, latency.max, latency.measured_samples) == (0.003, 0.001, 0.005, 5)
    assert latency.mean == pytest.approx(0.003) and latency.measured_duration == pytest.approx(0.015)
    assert latency.p90 == pytest.approx(0.0046)  # 0.9 * 4 = 3.6: 0.6 of the way from the fourth to the fifth
    assert latency.p99 == pytest.approx(0.00496)
    assert latency.quartiles == pytest.approx((0.002, 0.004))
    assert latency.samples == SAMPLES  # in the order they ran


@examples
@given(seconds)
def test_statistics_are_numpys_and_survive_json(samples: list[float]) -> None:
    latency = Latency.of(samples)
    assert [latency.p50, latency.p90, latency.p99] == pytest.approx(np.percentile(samples, [50, 90, 99]).tolist())
    assert latency.mean == pytest.approx(np.mean(samples))
    assert Latency.model_validate_json(latency.model_dump_json()) == latency


@examples
@given(seconds, st.floats(0.01, 100))
def test_ratio_of_pairs_is_of_each_run_to_its_own_partner(samples: list[float], factor: float) -> None:
    pairs = Pairs.of("image", [factor * sample for sample in samples], samples)
    assert (pairs.ratio.q25, pairs.ratio.median, pairs.ratio.q75) == pytest.approx((factor,) * 3)


def test_ratio_by_hand() -> None:
    ratio = Pairs.of("image", [1.0, 4.0, 9.0], [2.0, 2.0, 3.0]).ratio  # 0.5, 2, 3
    assert (ratio.q25, ratio.median, ratio.q75) == (1.25, 2.0, 2.5)


def test_published_schema_is_that_of_the_models() -> None:
    assert (Path(__file__).parents[3] / "runtimes" / "benchmark.schema.json").read_text() == schema()


def test_json_is_read_back_as_it_was(tmp_path: Path) -> None:
    pairs = (Pairs.of("image", [1.0, 2.0], [2.0, 2.0]),)
    comparison = Comparison(against="torch", versions={"torch": "2"}, pairs=pairs)
    result = result_of().model_copy(update={"comparison": comparison})
    (tmp_path / "result.json").write_text(result.to_json())
    assert read_result(tmp_path / "result.json") == result
    fields = json.loads(result.to_json())
    assert fields["host"] is True and fields["schema_version"] == 2


def latency(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["rows"][0]["latency"]


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    fields = json.loads(result_of().to_json())
    edit(fields)
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "x is not valid JSON: "),
        ("[" * 100_000, "x is not valid JSON: "),
        ("[]", "x is no benchmark result: Input should be a valid dictionary"),
        (edited(lambda r: r.pop("host")), "host: Field required"),
        (edited(lambda r: r.update(schema_version=3)), "schema_version: Input should be 1 or 2"),
        (edited(lambda r: r.update(host=False)), "host is False, but the platform is linux"),
        (edited(lambda r: r.update(start_datetime="2026-01-01T00:00:00")), "start_datetime: Input should have timezone info"),
        (edited(lambda r: r.update(phone="mine")), "phone: Extra inputs are not permitted"),
        (edited(lambda r: r["rows"].append(r["rows"][0])), "text_encoder_2 is listed twice"),
        (edited(lambda r: latency(r).update(p90=0.2)), "rows.0.latency: p90 is 0.2, but that of the samples is 0.0046"),
        (edited(lambda r: latency(r)["samples"].append(0)), "rows.0.latency.samples.5: Input should be greater than 0"),
        (edited(lambda r: latency(r).update(p50=float("nan"))), "rows.0.latency.p50: Input should be a finite number"),
    ],
)
def test_json_that_does_not_fit_is_one_line(text: str, complaint: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_result(text, "x")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, complaint in (("none", "No such file"), ("binary", "no text in UTF-8"), (".", "Is a directory")):
        with pytest.raises(BundleError, match=complaint):
            read_result(tmp_path / name)


def test_history_keeps_every_result_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a" / "history.jsonl"
    assert read_history(path) == ()
    results = [result_of(samples=[number] * 5) for number in (1.0, 2.0, 3.0)]
    for result in results:
        before = path.read_bytes() if path.exists() else b""
        append(result, path)
        assert path.read_bytes().startswith(before)
    assert list(read_history(path)) == results
    assert latest_like(result_of(), read_history(path)) == results[-1]
    assert latest_like(changed(result_of(), "backend_settings", threads=1), read_history(path)) is None
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(BundleError, match=r"line 4 of .*history\.jsonl is not valid JSON"):
        read_history(path)
    with pytest.raises(BundleError, match="cannot be written: File exists"):
        append(results[0], path / "inside a file")


def test_history_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "export-flash" / "bundles" / "history.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert history_file().is_relative_to(Path.home())


def around(middle: float, spread: float) -> list[float]:
    """Nine samples of this median, whose interquartile range is `spread` of it."""
    return [middle * (1 + spread * step) for step in (-1, -0.9, -0.5, -0.2, 0, 0.2, 0.5, 0.9, 5)]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (around(1, 0.03), around(0.88, 0.02), "faster by 12 % (beyond the spread of 3 %)"),
        (around(1, 0.03), around(1.25, 0.002), "slower by 25 % (beyond the spread of 3 %)"),
        (around(1, 0.03), around(0.98, 0.01), "no difference beyond noise"),
        (around(1, 0.01), around(0.98, 0.03), "no difference beyond noise"),
        (around(1, 0.03)[:4], around(0.5, 0.01), "too few runs to tell: 5 are needed"),
    ],
)
def test_verdicts_on_samples_made_for_them(before: list[float], after: list[float], words: str) -> None:
    assert judge("image", Latency.of(before), Latency.of(after)).words == words


@examples
@given(seconds, seconds, st.floats(0.1, 10))
def test_verdict_turns_with_its_sides_and_knows_no_unit(before: list[float], after: list[float], unit: float) -> None:
    verdict = judge("image", Latency.of(before), Latency.of(after))
    back = judge("image", Latency.of(after), Latency.of(before))
    assert verdict.differs == back.differs
    if verdict.differs:
        assert {verdict.words.split()[0], back.words.split()[0]} == {"faster", "slower"}
    assert not judge("image", Latency.of(before), Latency.of(before)).differs
    scaled = judge("image", *(Latency.of([unit * sample for sample in side]) for side in (before, after)))
    assert scaled.spread == pytest.approx(verdict.spread, rel=1e-6, abs=1e-9)


def test_normal_noise_is_hardly_ever_called_a_difference() -> None:
    random = np.random.default_rng(0)
    verdicts = [judge("image", *(Latency.of(random.normal(1, 0.05, 30).tolist()) for _ in "ab")) for _ in range(200)]
    assert sum(verdict.differs for verdict in verdicts) <= 2


def test_results_are_compared_row_by_row() -> None:
    old, new = result_of("a", "b"), result_of("b", "c", samples=around(0.1, 0.01))
    (verdict,) = compare(old, new)
    assert (verdict.name, verdict.before, verdict.after) == ("b", 0.003, 0.1) and verdict.differs
    other = changed(new, "backend_settings", threads=None, framework="executorch", framework_version="1.4.1")
    assert differences(old, new) == ()
    assert differences(old, other) == (
        "runtime: onnxruntime 1.31.1 before, executorch 1.4.1 now",
        "threads: 2 before, the runtime's choice now",
    )


@pytest.mark.parametrize(
    ("new", "complaint"),
    [
        (changed(result_of(), "benchmark_model", fingerprint="3" * 64), "they are different checkpoints"),
        (changed(result_of(), "benchmark_model", steps=2), "128 x 96 px in 4 steps and of 128 x 96 px in 2 steps"),
        (result_of(host=False), "a result of a computer and one of a phone"),
        (result_of("other"), "no component in common"),
    ],
)
def test_results_of_other_things_are_not_compared(new: Result, complaint: str) -> None:
    with pytest.raises(BundleError, match=complaint):
        compare(result_of(), new)


def test_tables_are_whole_at_80_columns() -> None:
    result = result_of("text_encoder_2", "image", samples=[99.123, 100.2, 123.4, 150.1, 160.9])
    pairs = (Pairs.of("text_encoder_2", [123.4, 99.5], [100.0, 99.0]), Pairs.of("image", [0.00123], [0.0456]))
    versions = {"diffusers": "0.42.1", "transformers": "5.23.0", "torch": "2.13.0+cpu"}
    comparison = Comparison(against="torch-compile", versions=versions, pairs=pairs)
    out = io.StringIO()
    console = Console(file=out, width=80)
    for table in (
        result_table(result),
        pairs_table(comparison),
        verdict_table(result, compare(result_of(), result)),
    ):
        console.print(table)
    shown = out.getvalue()
    assert "…" not in shown and max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "host timings" in shown and "(beyond the spread of" in " ".join(shown.split())
    assert result_table(result_of(host=False)).title.plain.splitlines()[1].startswith("phone timings")  # type: ignore[union-attr]


def test_three_figures() -> None:
    shown = {0: "0.00", 1.2345: "1.23", 0.0012345: "0.00123", 98.76: "98.8", 15300: "15300", 1e-6: "0.00000"}
    assert {value: three_figures(value) for value in shown} == shown
