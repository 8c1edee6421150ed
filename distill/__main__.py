"""`python -m distill STAGE`: trains flash-mini stage by stage, each going on where it stopped."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

logging.disable(logging.WARNING)  # import-time notes of libraries about optional parts that are not installed
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

from distill import stages  # noqa: E402
from distill.loop import Run, RunError, cannot_write, refusal  # noqa: E402
from distill.settings import CONTINUED, FULL, SMOKE  # noqa: E402

logging.disable(logging.NOTSET)


@click.command()
@click.argument("stage", type=click.Choice([*stages.STAGES, "all"]))
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), default=Path("runs/flash-mini"), help="Where the run keeps its state."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Where `evaluate` writes the checkpoint [RUN/flash-mini]."
)
@click.option(
    "--from",
    "start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=None,
    help="A finished checkpoint to begin at: its autoencoder and text encoders stay, the teacher begins at its transformer.",
)
@click.option("--seed", default=0, help="Seed of everything random.")
@click.option("--smoke", is_flag=True, help="A few steps of every stage, to see that all of it runs.")
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", help="auto: a GPU where there is one.")
def main(stage: str, folder: Path, out: Path | None, start: Path | None, seed: int, smoke: bool, device: str) -> None:
    """Trains and distills flash-mini: autoencoder, text, teacher, student, evaluate, or all of them in order."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu" or not torch.cuda.is_available())
    run = Run(folder, seed, accelerator, save_seconds=120, start=start)
    settings = SMOKE if smoke else FULL if start is None else CONTINUED
    try:
        run.check_start()
        for name in stages.STAGES if stage == "all" else (stage,):
            stages.STAGES[name](run, settings, out or folder / "flash-mini")
    except (OSError, SafetensorError) as error:
        if (reason := refusal(error)) is None:
            raise
        raise RunError(cannot_write(Path(getattr(error, "filename", None) or folder), reason)) from error


if __name__ == "__main__":
    try:
        main.main(standalone_mode=False)
    except RunError as error:
        sys.exit(click.style(f"distill: {error}", fg="red"))
    except click.ClickException as error:
        click.echo(f"distill: {error.format_message()}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("distill: stopped; the same command goes on from the last saved state", err=True)
        sys.exit(130)
