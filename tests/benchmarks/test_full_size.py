"""`python -m benchmarks.full_size make`: the exact sizes, files that the libraries open, and nothing half-made."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from scipy import stats
from transformers import CLIPTokenizer

from benchmarks.full_size import make as making
from benchmarks.full_size.__main__ import main
from benchmarks.full_size.make import Refused, write_checkpoint
from benchmarks.full_size.models import Configs, Shapes, sd35_medium, shapes
from benchmarks.full_size.shards import SHARD_BYTES, index, nbytes, split
from benchmarks.full_size.vocabulary import END, WORDS, write_tokenizer
from benchmarks.full_size.weights import Piece, pieces, values
from export.planning import ExportOptions, make_plan
from export.targets import TARGETS
from runtimes.tokenizer import Tokenizer

DiskUsage = namedtuple("DiskUsage", "total used free")


def tiny() -> Configs:
    """The same families of layers with few channels; the vocabulary stays whole."""
    whole = sd35_medium(layers=2)
    transformer = {
        **whole.transformer,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 48,
        "pos_embed_max_size": 24,
        "sample_size": 16,
    }
    text = {"num_hidden_layers": 2, "num_attention_heads": 2}
    first = {**whole.text_encoder, **text, "hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    second = {**whole.text_encoder_2, **text, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    vae = {**whole.vae, "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 128}
    return Configs(transformer, first, second, vae)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(folder, tiny(), seed=3)
    return folder


@pytest.fixture(scope="module")
def whole() -> dict[str, Shapes]:
    return shapes(sd35_medium())


def count(found: Shapes, prefix: str = "") -> int:
    return sum(math.prod(shape) for name, shape in found.items() if name.startswith(prefix))


def test_sizes_are_those_published_for_sd35_medium(whole: dict[str, Shapes]) -> None:
    table = count(whole["transformer"], "pos_embed.pos_embed")
    assert table == 226_492_416
    assert count(whole["transformer"]) - table == 2_243_171_520
    assert count(whole["text_encoder"]) == 123_650_304
    assert count(whole["text_encoder_2"]) == 694_659_840
    assert count(whole["vae"], "decoder.") == 49_545_475


@pytest.mark.parametrize(("layers", "dual"), [(1, 1), (3, 3), (13, 13), (14, 13), (24, 13)])
def test_fewer_layers_leave_every_other_size_as_it_is(layers: int, dual: int, whole: dict[str, Shapes]) -> None:
    found = shapes(sd35_medium(layers))
    assert all(found[part] == whole[part] for part in ("text_encoder", "text_encoder_2", "vae"))
    blocks = {name.split(".")[1] for name in found["transformer"] if name.startswith("transformer_blocks.")}
    twice = {name.split(".")[1] for name in found["transformer"] if ".attn2." in name}
    assert blocks == {str(i) for i in range(layers)} and twice == {str(i) for i in range(dual)}
    others = {name: shape for name, shape in found["transformer"].items() if "transformer_blocks." not in name}
    assert others == {name: shape for name, shape in whole["transformer"].items() if "transformer_blocks." not in name}


def test_full_size_shards_open_as_safetensors_and_hold_every_tensor_once(whole: dict[str, Shapes], tmp_path: Path) -> None:
    """Of the files only the headers are written: the rest is a hole."""
    shards = split(whole["transformer"], "diffusion_pytorch_model")
    found = {}
    for shard in shards:
        path = tmp_path / shard.file
        path.write_bytes(shard.header)
        with path.open("r+b") as file:
            file.truncate(shard.nbytes)
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                piece = opened.get_slice(name)
                assert piece.get_dtype() == "F16" and name not in found
                found[name] = tuple(piece.get_shape())
        assert nbytes(shard.shapes) <= SHARD_BYTES
    assert found == whole["transformer"]
    assert index(shards)["weight_map"] == {name: shard.file for shard in shards for name in shard.shapes}
    assert index(shards)["metadata"]["total_size"] == 2 * count(found)


def test_unmodified_diffusers_draws_noise_with_it(checkpoint: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        checkpoint, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    flash = json.loads((checkpoint / "flash.json").read_text())
    for sigmas in flash["sigmas"].values():
        image = pipeline(
            flash["prompts"][0],
            guidance_scale=1,
            num_inference_steps=len(sigmas) - 1,
            sigmas=sigmas[:-1],
            height=128,
            width=128,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
        assert image.shape == (128, 128, 3) and np.isfinite(image).all()
        assert 0.05 < image.std() < 0.45
        assert np.mean((image <= 0) | (image >= 1)) < 0.2


def test_it_exports(checkpoint: Path) -> None:
    for target in TARGETS.values():
        plan = make_plan(target, ExportOptions(str(checkpoint)))
        assert plan.checkpoint.licence == "apache-2.0" and plan.tokenizers["tokenizer"].rules.max_length == 77


def test_tensors_are_what_weights_py_draws(checkpoint: Path) -> None:
    configs = tiny()
    for path in checkpoint.glob("*/*.safetensors"):
        for name, stored in load_file(path).items():
            drawn = np.concatenate([values(piece, 3, configs.transformer) for piece in pieces(name, stored.shape)])
            assert stored.dtype == np.float16 and np.array_equal(stored.reshape(-1), drawn), name


def test_positions_are_those_that_diffusers_builds(checkpoint: Path) -> None:
    expected = SD3Transformer2DModel.from_config(dict(tiny().transformer)).pos_embed.pos_embed.numpy()
    stored = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")["pos_embed.pos_embed"]
    assert np.abs(stored - expected).max() < 2**-10  # float16 at 1


def test_the_same_seed_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    write_checkpoint(tmp_path / "again", tiny(), seed=3)
    assert digests(tmp_path / "again") == digests(checkpoint)
    write_checkpoint(tmp_path / "other", tiny(), seed=4)
    differing = {name for name, digest in digests(tmp_path / "other").items() if digest != digests(checkpoint)[name]}
    assert differing == {"README.md", *(name for name in digests(checkpoint) if name.endswith(".safetensors"))}


def test_weights_are_independent_and_heavy_tailed() -> None:
    name, shape = "transformer_blocks.0.attn.to_q.weight", (512, 1536)
    (piece,) = pieces(name, shape)
    weight = values(piece, 0, {}).astype(np.float64).reshape(shape)
    assert len({row.tobytes() for row in weight}) == shape[0] and len({column.tobytes() for column in weight.T}) == shape[1]
    scales = np.sqrt(np.mean(weight**2, axis=1, keepdims=True))
    assert 2 < (scales > 2 * np.median(scales)).sum() < 20  # one channel in 64 is three times as large
    spread = np.median(np.abs(weight), axis=1, keepdims=True) / stats.t(4).ppf(0.75)
    assert stats.kstest((weight / spread).reshape(-1), stats.t(4).cdf).statistic < 0.005
    assert abs(np.mean(weight**2) * shape[1] - 1) < 0.1
    correlations = np.corrcoef(weight[:64])
    assert np.abs(correlations - np.eye(64)).max() < 0.15
    other = values(dataclasses.replace(piece, name=name.replace("to_q", "to_k")), 0, {}).astype(np.float64)
    assert abs(np.corrcoef(other, weight.reshape(-1))[0, 1]) < 0.01


@pytest.mark.parametrize("shape", [(49_408, 768), (13_824, 1536), (512, 512, 3, 3), (5,), (1, 147_456, 1536)])
def test_pieces_are_whole_rows_in_order(shape: tuple[int, ...]) -> None:
    name = "pos_embed.pos_embed" if shape[0] == 1 else "some.weight"
    found: list[Piece] = list(pieces(name, shape))
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])] and found[-1].stop == math.prod(shape)
    assert max(piece.stop - piece.start for piece in found) <= 1 << 20


@pytest.fixture(scope="module", params=[END, "!"], ids=["pads with eos", "pads with !"])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPTokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    write_tokenizer(folder, request.param)
    return CLIPTokenizer.from_pretrained(folder), Tokenizer.from_checkpoint(folder)


def test_vocabulary_has_clips_size_and_layout(tokenizers: tuple[CLIPTokenizer, Tokenizer]) -> None:
    original, ours = tokenizers
    assert len(original) == len(ours.vocabulary) == 49_408 and len(ours.merges) == 48_894
    assert original("a red fox").input_ids[0] == 49_406 and original("a red fox").input_ids[-1] == 49_407
    assert len(set(ours.vocabulary.values())) == 49_408 and ours.vocabulary["!"] == 0
    assert len(ours.encode(" ".join(WORDS))) < 1.2 * len(WORDS)


TEXT = st.one_of(
    st.text(st.characters(blacklist_categories=("Cs", "Cn")), max_size=60),
    st.lists(st.sampled_from([*WORDS, "it's", "2024", "naïve", "😀", "<|endoftext|>", "!!"]), max_size=40).map(" ".join),
    st.text("etaoinshrdlu '!", max_size=60),
)


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_transformers_and_ours_give_the_same_ids(tokenizers: tuple[CLIPTokenizer, Tokenizer], text: str) -> None:
    original, ours = tokenizers
    expected = original(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert ours(text)[0].tolist() == expected


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = CliRunner().invoke(main, ["make", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output == f"Error: {tmp_path} is there already and not an empty folder; choose another\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**10, 10**10 - 10**9, 10**9))
    result = CliRunner().invoke(main, ["make", str(tmp_path / "model"), "--layers", "24"])
    assert result.exit_code == 2
    assert result.output == f"Error: {tmp_path / 'model'} needs 6.75 GB, and 1.00 GB are free there\n"
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(piece: Piece, seed: int, transformer: object) -> np.ndarray:
        if "pos_embed" in piece.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return np.zeros(piece.stop - piece.start, np.float16)

    monkeypatch.setattr(making, "values", full)
    with pytest.raises(Refused, match="No space left on device"):
        write_checkpoint(tmp_path / "model", tiny(), seed=0)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_not_taken_for_a_checkpoint_and_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".model.part"
    (left / "transformer").mkdir(parents=True)
    (tmp_path / "model").mkdir()  # empty: may be written into
    write_checkpoint(tmp_path / "model", tiny(), seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "model_index.json").is_file()
