"""What `export-flash bench` does with its options: checks them, measures or takes in, shows the result and files it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from export.console import NOWHERE, StageBars, noise_to, say
from export.errors import UserError
from export.lora import Lora, pair_loras
from runtimes.bundle import load_manifest
from runtimes.harness.bench_tables import pairs_table, result_table, verdict_table
from runtimes.harness.history import append, check_comparable, compare, differences, history_file, latest_like, read_history
from runtimes.harness.latency import ITERATIONS, check_counts, measure, open_bundle
from runtimes.harness.on_device.device import Asked
from runtimes.harness.on_device.registry import connect
from runtimes.harness.on_device.tables import notes, placement_table
from runtimes.harness.results import IMAGE, Against, BenchmarkModel, Result, describe_model, read_result

LAST = "last"
"""What --compare takes in the place of a file: the latest result of the same kind in the history."""


@dataclass(frozen=True)
class Earlier:
    """What --compare asks for: one result, or the history to look for one in; by default neither."""

    result: Result | None = None
    history: Sequence[Result] | None = None

    @classmethod
    def read(cls, compare_with: str | None) -> Earlier:
        if compare_with is None:
            return cls()
        if compare_with == LAST:
            return cls(history=read_history(history_file()))
        return cls(result=read_result(Path(compare_with)))

    def check(self, model: BenchmarkModel, host: bool) -> None:
        """Raises `BundleError` where a new result of this model could not be compared."""
        if self.result is not None:
            check_comparable(self.result, model, host)


def run_bench(
    *,
    bundle: Path,
    runtime: str | None,
    threads: int | None,
    iterations: int | None,
    against: Against | None,
    model: str | None,
    json_file: Path | None,
    compare_with: str | None,
    import_file: Path | None,
    device: str | None = None,
    runner: Path | None = None,
    sustained: float | None = None,
    loras: tuple[str, ...] = (),
    lora_scales: tuple[float, ...] = (),
) -> None:
    """Measures a bundle here or on a device, or takes in what a phone measured of it; the result is shown and filed.

    Raises `UserError` or `BundleError`, one line, before the measuring begins, and `GraphError` where that fails.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file} cannot be written: there is no folder {json_file.parent}; choose another file")
    if model is not None and against is None:
        raise UserError(f"--model {model} is for --against; a bundle alone is measured without its checkpoint")
    if (loras or lora_scales) and against is None:
        raise UserError("--lora and --lora-scale are for --against; a bundle alone is measured without its checkpoint")
    merged = pair_loras(loras, lora_scales)
    if device is None:
        _refuse({"--runner": runner, "--sustained": sustained}, "is for --device; give that too, or leave it out")
    earlier = Earlier.read(compare_with)
    if import_file is not None:
        measuring = {"--runtime": runtime, "--threads": threads, "--iterations": iterations, "--against": against}
        _refuse(measuring | {"--device": device}, "is for measuring here; --import takes a result as it is: leave one out")
        result = _imported(bundle, import_file)
        earlier.check(result.benchmark_model, result.host)
        _finish(Console(), result, earlier, json_file)
    else:
        with noise_to(NOWHERE) as console:
            count = ITERATIONS if iterations is None else iterations
            if device is not None:
                _refuse({"--against": against}, "runs the original on this computer, not on --device: leave one out")
                asked = Asked(threads, count, sustained)
                result = _measured_on_device(console, bundle, device, runner, runtime, asked, earlier)
            else:
                result = _measured(console, bundle, runtime or "auto", threads, count, against, model, merged, earlier)
            _finish(console, result, earlier, json_file)


def _measured(
    console: Console,
    bundle: Path,
    runtime: str,
    threads: int | None,
    iterations: int,
    against: Against | None,
    model: str | None,
    loras: tuple[Lora, ...],
    earlier: Earlier,
) -> Result:
    check_counts(threads, iterations)
    opened = open_bundle(bundle, runtime)
    earlier.check(describe_model(opened.manifest), host=True)
    if against is None:
        with StageBars(console) as bars:
            return measure(opened, threads=threads, iterations=iterations, listener=bars)
    from export.benchmarking import check_original, compare_with_original
    from export.commands import built_in

    original = model or built_in()
    check_original(opened, original, against, loras)
    with StageBars(console) as bars:
        result = measure(opened, threads=threads, iterations=iterations, listener=bars)
        compared = compare_with_original(
            opened, original, against, loras, threads=threads, iterations=iterations, progress=bars
        )
    return result.model_copy(update={"comparison": compared})


def _measured_on_device(
    console: Console, bundle: Path, device: str, runner: Path | None, runtime: str | None, asked: Asked, earlier: Earlier
) -> Result:
    check_counts(asked.threads, asked.iterations)
    target = connect(device, runner, runtime)
    opened = open_bundle(bundle, target.runtime)
    target.check(opened, asked)
    earlier.check(describe_model(opened.manifest), target.host)
    with StageBars(console) as bars:
        return target.measure(opened, asked, bars)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raises `UserError` for the first of the options that was given."""
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} {value} {why}")


def _imported(bundle: Path, file: Path) -> Result:
    """A result from elsewhere, if it is one of this bundle."""
    manifest, result = load_manifest(bundle), read_result(file)
    if result.benchmark_model != describe_model(manifest):
        found, wanted = result.benchmark_model.digest[:12], manifest.digest[:12]
        raise UserError(f"--import {file} was not measured on {bundle}: its bundle has digest {found}…, this one {wanted}…")
    format = result.backend_settings.format
    known = {entry.name for entry in manifest.components if entry.format == format} | {IMAGE}
    pairs = result.comparison.pairs if result.comparison else ()
    if unknown := [name for name in (*(row.name for row in result.rows), *(pair.name for pair in pairs)) if name not in known]:
        raise UserError(f"--import {file} measured {unknown[0]}, which {bundle} does not have in format {format}")
    return result


def _finish(console: Console, result: Result, earlier: Earlier, json_file: Path | None) -> None:
    """Shows the result, beside an earlier one where that is asked for; then writes it."""
    console.print(result_table(result))
    if result.comparison is not None:
        console.print("", pairs_table(result.comparison), sep="\n")
    if result.placements:
        console.print("", placement_table(result.placements), sep="\n")
    for line in notes(result):
        say(console, line)
    before = earlier.result
    if earlier.history is not None:
        before = latest_like(result, earlier.history)
        if before is None:
            say(console, "there is no earlier result of this kind to compare with")
    if before is not None:
        console.print("", verdict_table(before, compare(before, result)), sep="\n")
        for line in differences(before, result):
            say(console, f"note: {line}")
    if json_file is not None:
        try:
            json_file.write_text(result.to_json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error.strerror}; choose another file") from error
    append(result, history_file())
    say(console, f"filed in {history_file()}")
