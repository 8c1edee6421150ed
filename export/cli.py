"""The `export-flash` command: options in, one call out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click


class Commands(click.Group):
    """`export-flash --target ...` exports; `export-flash generate|verify|inspect ...` work on a bundle."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h", "--version"):
            args = ["export", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="export-flash")
def command() -> None:
    """Gets few-step text-to-image models onto phones.

    \b
    export-flash --target ios|android|all [--model ...]   makes bundles (see: export-flash export --help)
    export-flash generate BUNDLE "a prompt"                draws a picture from a bundle
    export-flash analyze --out recipe.json                 chooses how each weight is stored
    export-flash verify BUNDLE                             runs and compares every artifact
    export-flash inspect BUNDLE                            says what a bundle holds
    export-flash bench BUNDLE                              measures latency and memory
    export-flash cost BUNDLE                               counts operations, bytes and memory
    export-flash report BUNDLE                             writes a page about a bundle
    """


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, in the order in which --help shows them."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_file = click.Path(path_type=Path)
_of_the_loras = _options(
    click.option(
        "--lora", "loras", metavar="FILE|HUB_ID", multiple=True, help="Merge a LoRA in diffusers' format; repeatable."
    ),
    click.option("--lora-scale", "lora_scales", type=float, multiple=True, help="One for each --lora, in order [1]."),
)
_of_the_model = _options(
    click.option("--model", metavar="FOLDER|HUB_ID|FILE", help="Folder, hub id or .safetensors file [flash-mini]."),
    _of_the_loras,
    click.option("--tokenizer", type=_file, help="Folder of tokenizer/ and tokenizer_2/, for a file."),
)
_of_the_graphs = _options(
    click.option("--steps", type=int, help="Denoising steps; the checkpoint carries the sigmas of its own [4]."),
    click.option("--sigmas", help='Explicit noise levels, ending in 0: "1 0.9 0.75 0.5 0".'),
    click.option("--resolution", help="Pixels, 512 or WIDTHxHEIGHT [the model's own]."),
    click.option(
        "--contract", type=click.Choice(["flash", "diffusers"]), default="flash", show_default=True, help="Graph inputs."
    ),
    click.option(
        "--activations",
        type=click.Choice(["float", "int8", "int16"]),
        default="float",
        show_default=True,
        help="Android: what linears multiply. int8 rounds all their inputs to 8 bits: faster, but not as exact. int16 has "
        "ExecuTorch round them to 16 wherever that helps: slower, but more exact.",
    ),
    click.option("--deployment-target", default="iOS18", show_default=True, help="Core ML: iOS17 or iOS18."),
    click.option("--format", "formats", multiple=True, help="Only these formats of the target: coreml, onnx, executorch."),
    click.option("--component", "components", multiple=True, help="Only these components."),
)
_of_the_calibration = _options(
    click.option("--calibration-prompts", type=_file, help="A prompt a line [64 of the checkpoint's kind]."),
    click.option("--calibration-images", type=_file, help="Safetensors with clean `latents` of those prompts."),
    click.option("--calibration-device", help="cpu, cuda or mps [the best there is]."),
)
_of_the_weights = _options(
    click.option("--bits", type=float, help="Mean bits of a weight, 16 for none compressed [ios 6, android 8]."),
    click.option("--size-budget", help="Instead: bytes of the weights of each format, such as 1.2GB."),
    click.option("--preset", help="Instead: best, balanced or small."),
    click.option("--calibration/--no-calibration", default=True, show_default=True, help="Choose and round by what errors do."),
    _of_the_calibration,
)


@command.command()
@click.option("--target", type=click.Choice(["ios", "android", "all"]), required=True, help="What the bundle is for.")
@_of_the_model
@click.option("--out", type=_file, help="Where bundles go [./bundles/<model name>].")
@_of_the_graphs
@_of_the_weights
@click.option("--recipe", type=_file, help="Instead: the choices in a file of export-flash analyze.")
@click.option("--chunks", default="auto", show_default=True, help="Pieces of the transformer: auto or a number.")
@click.option("--rewrite/--no-rewrite", "rewrite", default=True, show_default=True, help="All exact rewrites on or off.")
@click.option("--without", multiple=True, help="Leave out one exact rewrite, such as fold_null_tokens.")
@click.option(
    "--check",
    type=click.Choice(["pictures", "step"]),
    help="Compare whole pictures, or one denoising step and one decode [step for large models].",
)
@click.option("--dry-run", is_flag=True, help="Print what would be made and every refusal; read no weights.")
def export(**given: Any) -> None:
    """Makes a bundle: calibrates, traces, compresses, writes, runs and compares every component."""
    from export import commands

    commands.run_export(**given)


@command.command()
@click.option("--target", type=click.Choice(["ios", "android", "all"]), default="all", show_default=True, help="For whom.")
@_of_the_model
@click.option("--out", type=_file, default=Path("recipe.json"), show_default=True, help="The recipe.")
@_of_the_graphs
@_of_the_weights
def analyze(**given: Any) -> None:
    """Chooses how each weight is stored and writes the choices, with their evidence, for `export --recipe`."""
    from export import commands

    commands.run_analyze(**given)


@command.command()
@click.argument("bundle", type=_file)
@click.argument("prompt")
@click.option("--seed", default=0, show_default=True, help="Of the starting noise, torch's for the same seed.")
@click.option("--runtime", default="auto", show_default=True, help="auto, coreml, onnxruntime or executorch.")
@click.option("--out", type=_file, default=Path("image.png"), show_default=True, help="The picture.")
@click.option("--low-memory", is_flag=True, help="One component in memory at a time.")
@click.option("--threads", type=int, help="Threads of the runtime [its own choice].")
def generate(**given: Any) -> None:
    """Draws a picture from a bundle alone."""
    from export import commands

    commands.run_generate(**given)


@command.command()
@click.argument("bundle", type=_file)
@click.option("--runtime", "runtimes", multiple=True, help="Only these runtimes [one for each format].")
@click.option("--json", "json_file", type=_file, help="Also write the report as JSON.")
@click.option("--low-memory", is_flag=True, help="One component in memory at a time.")
@click.option("--per-layer", is_flag=True, help="Instead: name the first operation where an artifact and --model part.")
@click.option("--ranges", is_flag=True, help="Instead: how near Core ML's values come to float16's end.")
@click.option("--drift", is_flag=True, help="Instead: distance from the original's latents after each step.")
@click.option("--against", type=_file, help="Instead: compare with another bundle of the same checkpoint.")
@click.option("--model", help="Of --per-layer: the bundle's checkpoint [flash-mini].")
@_of_the_loras
@click.option("--component", "components", multiple=True, help="Of --per-layer: only these.")
@click.option("--case", type=click.IntRange(min=0), default=0, show_default=True, help="Of --per-layer: golden case.")
@_of_the_calibration
def verify(**given: Any) -> None:
    """Checks every file, then runs and compares every artifact; exit 1 where something is not as it should be."""
    from export import verify_command

    verify_command.run_verify_command(**given)


@command.command()
@click.argument("bundle", type=_file)
def inspect(bundle: Path) -> None:
    """Says what a bundle holds."""
    from export import commands

    commands.run_inspect(bundle)


@command.command()
@click.argument("bundle", type=_file)
@click.option("--runtime", help="coreml, onnxruntime or executorch [the first that fits].")
@click.option("--threads", type=int, help="Threads of the runtime [its own choice].")
@click.option("--iterations", type=int, help="Measured runs of each component and of the picture [30].")
@click.option("--against", type=click.Choice(["diffusers", "torch", "torch-compile"]), help="Also run the original in turns.")
@click.option("--model", metavar="FOLDER|HUB_ID|FILE", help="The checkpoint for --against [flash-mini].")
@_of_the_loras
@click.option("--json", "json_file", type=_file, help="Also write the result as JSON.")
@click.option("--compare", "compare_with", metavar="FILE|last", help="An earlier result's JSON, or the last one filed.")
@click.option("--import", "import_file", type=_file, help="File a result that a phone handed back.")
@click.option("--device", metavar="mac|iphone[:NAME]|android[:SERIAL]", help="Measure on a device instead of here.")
@click.option("--runner", type=_file, help="Android: executor_runner or onnxruntime_perf_test built for the phone.")
@click.option("--sustained", type=float, metavar="SECONDS", help="Of --device: then run the transformer without a pause.")
def bench(**given: Any) -> None:
    """Measures latency and memory of every component and of the whole picture."""
    from export import bench_command

    bench_command.run_bench(**given)


@command.command()
@click.argument("bundle", type=_file)
@click.option("--benchmark", "benchmark_file", type=_file, help="Also show a result of bench --json.")
@click.option("--out", type=_file, help="The page [<bundle>-report.html beside the bundle].")
def report(**given: Any) -> None:
    """Writes a page about a bundle: pictures, parity, sizes, drift, ranges and cost."""
    from export import report_command

    report_command.run_report(**given)


@command.command()
@click.argument("bundle", type=_file)
@click.option("--format", "formats", multiple=True, help="Only these formats of the bundle.")
@click.option("--json", "json_file", type=_file, help="Also write every operation as JSON.")
def cost(**given: Any) -> None:
    """Counts what an image takes: operations, bytes, memory, and the least time on named devices (an estimate)."""
    from export import cost_command

    cost_command.run_cost(**given)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; bad input is one clear line and exit code 2."""
    try:
        command.main(args=args, prog_name="export-flash", standalone_mode=False)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped; nothing half-made was left, and the same export goes on from here", 130)
    except Exception as error:
        from calibration.errors import CalibrationError
        from export.errors import UserError
        from runtimes.bundle import BundleError
        from runtimes.graph import GraphError
        from runtimes.tokenizer import TokenizerError

        if not isinstance(error, (UserError, CalibrationError, BundleError, GraphError, TokenizerError)):
            raise
        _fail(str(error), 2)


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        click.echo(f"export-flash: {line}", err=True)
    sys.exit(code)
