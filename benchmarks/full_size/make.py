"""`make`: a checkpoint of SD3.5-Medium's exact sizes in diffusers' layout, float16, with random weights.

    python -m benchmarks.full_size make /tmp/sd35-random

For measuring what an export takes at full size where no licence has been accepted and nothing can be downloaded. Written tensor
by tensor, beside its place, and renamed when it is whole. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.full_size.models import LAYERS, Configs, sd35_medium, shapes
from benchmarks.full_size.shards import Shard, index, split
from benchmarks.full_size.vocabulary import END, write_tokenizer
from benchmarks.full_size.weights import Piece, pieces, values

STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
SIGMAS = {"4": [1.0, 0.9, 0.75, 0.5, 0.0], "2": [0.98, 0.6, 0.0]}  # flash-mini's
PROMPTS = (
    "a red fox sitting in the snow at sunrise, soft light, detailed fur",
    "a wooden boat on a quiet lake, surrounded by mountains and fog",
    "an old man reading a book by the window, oil painting",
    "a small robot holding a yellow flower, close up photograph",
)
SMALL_FILES = 8 << 20  # bytes, more than tokenizers and configurations take
THREADS = 2
CARD = """---
license: apache-2.0
library_name: diffusers
tags: [random-weights]
---
# Random weights in the sizes of SD3.5-Medium

These weights were never trained: they were drawn at random (seed {seed}, {layers} of {whole} transformer blocks), and what this
pipeline draws is noise. Only names, shapes and sizes are those of Stable Diffusion 3.5 Medium without T5; no value comes from
Stability AI's model. Made by `python -m benchmarks.full_size make` of export-flash, to measure an export at full size.
diffusers opens it with `StableDiffusion3Pipeline.from_pretrained(DIR, text_encoder_3=None, tokenizer_3=None)`.
"""


class Refused(click.ClickException):
    """What cannot be done, in one line; exit code 2."""

    exit_code = 2


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1, max=LAYERS), default=LAYERS, show_default=True, help="Transformer blocks.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the weights.")
def make(folder: Path, layers: int, seed: int) -> None:
    """Writes a random checkpoint of SD3.5-Medium's sizes into DIR, which must be empty or not there (6.75 GB)."""
    console, start = Console(stderr=True), time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("weights", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        count, size = write_checkpoint(folder, sd35_medium(layers), seed, advance)
    seconds = time.perf_counter() - start
    click.echo(f"{folder}: {count / 1e6:,.0f} M random weights, {size / 1e9:.2f} GB, {layers} blocks, {seconds:.0f} s")


def write_checkpoint(
    folder: Path, configs: Configs, seed: int, advance: Callable[[int, int], None] = lambda done, total: None
) -> tuple[int, int]:
    """Writes the whole checkpoint; gives the number of its values and the bytes of their files. `advance` hears how many bytes
    of how many are written. Raises `Refused`, and leaves nothing behind then."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(f"{folder} is there already and not an empty folder; choose another")
    wanted = {part: split(found, STEMS[part]) for part, found in shapes(configs).items()}
    total = sum(shard.nbytes for shards in wanted.values() for shard in shards)
    beside = folder.absolute().with_name(f".{folder.absolute().name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        beside.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(beside.parent).free
        if free < total + SMALL_FILES:
            raise Refused(f"{folder} needs {(total + SMALL_FILES) / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there")
        beside.mkdir()
        _write_small_files(beside, configs, seed)
        done = 0
        for part, shards in wanted.items():
            if len(shards) > 1:
                _write_json(beside / part / f"{STEMS[part]}.safetensors.index.json", index(shards))
            for shard in shards:
                for written in _write_shard(beside / part / shard.file, shard, seed, configs.transformer):
                    done += written
                    advance(done, total)
        beside.rename(folder)
    except OSError as error:
        raise Refused(f"{folder} cannot be written ({error.strerror}); free some room or choose another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    count = sum(int(np.prod(shape)) for shards in wanted.values() for shard in shards for shape in shard.shapes.values())
    return count, total


def _write_shard(path: Path, shard: Shard, seed: int, transformer: Mapping[str, Any]) -> Iterator[int]:
    """Writes the file, and gives the bytes of each piece of it. Pieces are drawn ahead by other threads, a few at a time."""
    with path.open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
        yield file.write(shard.header)
        waiting: deque[Future[np.ndarray]] = deque()
        for piece in _pieces(shard):
            waiting.append(pool.submit(values, piece, seed, transformer))
            if len(waiting) > THREADS + 1:
                yield file.write(waiting.popleft().result().astype("<f2", copy=False).data)
        while waiting:
            yield file.write(waiting.popleft().result().astype("<f2", copy=False).data)


def _pieces(shard: Shard) -> Iterator[Piece]:
    for name, shape in shard.shapes.items():
        yield from pieces(name, shape)


def _write_small_files(folder: Path, configs: Configs, seed: int) -> None:
    """Configurations, tokenizers, sigmas, licence and card."""
    for part in STEMS:
        _write_json(folder / part / "config.json", getattr(configs, part))
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_tokenizer(folder / "tokenizer", pad=END)
    write_tokenizer(folder / "tokenizer_2", pad="!")
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    name = f"export-flash/random-sd35-medium-{configs.transformer['num_layers']}"
    _write_json(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", "_name_or_path": name, **classes})
    _write_json(folder / "flash.json", {"sigmas": SIGMAS, "prompts": PROMPTS})
    card = CARD.format(seed=seed, layers=configs.transformer["num_layers"], whole=LAYERS)
    (folder / "README.md").write_text(card, encoding="utf-8")
    licence = Path(__file__).parents[2] / "LICENSE"
    (folder / "LICENSE").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
