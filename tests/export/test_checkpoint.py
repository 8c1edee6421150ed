"""What a checkpoint may lie in, what is read of it, and the one clear line for everything that is wrong with it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_sd3_transformer_checkpoint_to_diffusers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint, open_checkpoint
from export.components.component import check_weights
from export.errors import UserError
from export.families import read_family
from export.families.family import GraphOptions
from export.sigmas import Sigmas, choose_sigmas
from runtimes.bundle import check_sigmas
from tests.export import stability
from tests.models import SD35, SIGMAS, TinyModel, build_modules, random_ids, write_checkpoint

OPTIONS = GraphOptions(128, 128, (1.0, 0.75, 0.0))
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny-sd3"))


def check_all(checkpoint: Checkpoint) -> None:
    check_weights(checkpoint, read_family(checkpoint).components(OPTIONS))


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_gives_every_tensor_and_configuration_by_diffusers_names(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    check_all(checkpoint)
    for part, module in build_modules(SD35).items():
        state = module.state_dict()
        assert checkpoint.shapes(part) == {name: tuple(value.shape) for name, value in state.items()}
        assert all(torch.equal(checkpoint.tensor(part, name), value) for name, value in state.items())
    assert checkpoint.name == "tiny-sd3"
    assert checkpoint.tokens == SD35.tokens
    assert checkpoint.config("vae")["shift_factor"] == SD35.vae_shift
    assert checkpoint.notes == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_and_variants_hold_the_same_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = open_checkpoint(str(write_checkpoint(tmp_path / "whole", dtype=dtype)))
    shards = open_checkpoint(str(write_checkpoint(tmp_path / "shards", dtype=dtype, shard_size="60KB")))
    variant = open_checkpoint(str(write_checkpoint(tmp_path / "variant", dtype=dtype, variant="fp16")))
    both = open_checkpoint(str(write_checkpoint(tmp_path / "both", dtype=dtype, variant="fp16", shard_size="60KB")))
    assert len(list((tmp_path / "shards/transformer").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "both/transformer").glob("*fp16*"))) > 2
    for checkpoint in (whole, shards, variant, both):
        check_all(checkpoint)
        for name in whole.shapes("transformer"):
            found = checkpoint.tensor("transformer", name)
            assert found.dtype == dtype
            assert torch.equal(found, whole.tensor("transformer", name))


def test_full_weights_come_before_a_variant(folder: Path) -> None:
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({"other": torch.zeros(1)}, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    check_all(open_checkpoint(str(folder)))
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.bf16.safetensors"))
    weights.unlink()
    assert "vae holds several variants" in one_line(lambda: open_checkpoint(str(folder)))


def test_t5_is_left_out_and_said_so(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (note,) = open_checkpoint(str(folder)).notes
    assert note.startswith("text_encoder_3 (T5) is left out")


def test_licence_and_attribution_travel(folder: Path) -> None:
    (folder / "NOTICE").write_text("notice")
    checkpoint = open_checkpoint(str(folder))
    assert [path.name for path in checkpoint.licence_files] == ["LICENSE.md", "NOTICE", "README.md"]
    assert checkpoint.licence == "tiny-licence"
    assert checkpoint.name_or_path == "tests/tiny-sd3"


def test_fingerprint_is_of_the_content_not_of_the_place(folder: Path, original: Path) -> None:
    fingerprint = open_checkpoint(str(folder)).fingerprint()
    assert fingerprint == open_checkpoint(str(original)).fingerprint()
    (folder / "README.md").write_text("other words")
    read: list[int] = []
    assert fingerprint == open_checkpoint(str(folder)).fingerprint(read.append)
    assert sum(read) > (folder / TRANSFORMER).stat().st_size
    _flip_last_byte(folder / TRANSFORMER)
    assert fingerprint != open_checkpoint(str(folder)).fingerprint()


def test_missing_unexpected_and_misshaped_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / TRANSFORMER)
    del tensors["proj_out.bias"]
    tensors["transformer_blocks.0.attn.surplus"] = torch.zeros(3)
    tensors["pos_embed.proj.bias"] = torch.zeros(31)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, folder / TRANSFORMER)
    message = one_line(lambda: check_all(open_checkpoint(str(folder))))
    assert "missing proj_out.bias;" in message
    assert "unexpected transformer_blocks.0.attn.surplus;" in message
    assert "of another shape: pos_embed.proj.bias is (31,) instead of (32,);" in message
    assert "not float: proj_out.weight is I8" in message


def test_long_lists_of_tensors_are_cut(folder: Path) -> None:
    save_file({"something": torch.zeros(1)}, folder / TRANSFORMER)
    assert "more; unexpected something" in one_line(lambda: check_all(open_checkpoint(str(folder))))


def test_encoder_weights_and_old_position_ids_are_no_fault(folder: Path) -> None:
    path = folder / "text_encoder/model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file(load_file(path) | positions, path)
    check_all(open_checkpoint(str(folder)))


def test_truncated_file_is_one_line(folder: Path) -> None:
    for size in (0, 4, 300, (folder / TRANSFORMER).stat().st_size - 1):
        (folder / TRANSFORMER).write_bytes((folder / TRANSFORMER).read_bytes()[:size] or b"")
        assert "diffusion_pytorch_model.safetensors is truncated" in one_line(lambda: open_checkpoint(str(folder)))


def test_file_that_is_no_safetensors_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"x" * 100)
    assert "is truncated or no safetensors file" in one_line(lambda: open_checkpoint(str(path)))


def test_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shard_size="60KB")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    assert one_line(lambda: open_checkpoint(str(folder))).startswith(f"{shard} is missing")


def test_pickles_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "transformer/diffusion_pytorch_model.bin")
    message = one_line(lambda: open_checkpoint(str(folder)))
    assert "transformer/diffusion_pytorch_model.bin is a pickle file" in message
    (tmp_path / "model.ckpt").touch()
    assert "model.ckpt is a pickle file" in one_line(lambda: open_checkpoint(str(tmp_path / "model.ckpt")))


def test_what_is_no_sd3_checkpoint_is_one_line(folder: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing/here")
    assert one_line(lambda: open_checkpoint(missing)).startswith(f"there is no folder or file {missing}")
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json" in one_line(lambda: open_checkpoint(str(tmp_path / "empty")))
    (tmp_path / "notes.txt").touch()
    assert "is no .safetensors file" in one_line(lambda: open_checkpoint(str(tmp_path / "notes.txt")))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "is no SD3 checkpoint" in one_line(lambda: open_checkpoint(str(tmp_path / "other.safetensors")))
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "StableDiffusionXLPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(str(folder))
    assert "is a StableDiffusionXLPipeline; export-flash takes StableDiffusion3Pipeline" in one_line(
        lambda: read_family(checkpoint)
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "transformer/config.json",
            {"qk_norm": "layer_norm"},
            "qk_norm is 'layer_norm'; export-flash builds rms_norm and null",
        ),
        ("transformer/config.json", {"pooled_projection_dim": 7}, "pooled_projection_dim is 7"),
        ("transformer/config.json", {"joint_attention_dim": 79}, "joint_attention_dim is 79"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'; export-flash builds quick_gelu and gelu"),
        ("vae/config.json", {"act_fn": "mish"}, "act_fn is 'mish'"),
        ("vae/config.json", {"latent_channels": 8}, "in_channels is 4; export-flash builds the autoencoder's 8"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 99}, "model_max_length is 99"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "model_max_length is 1000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps is 500"),
    ],
)
def test_configuration_that_cannot_be_built_is_named(folder: Path, file: str, change: dict, message: str) -> None:
    values = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(values))
    assert message in one_line(lambda: read_family(open_checkpoint(str(folder))))


def test_broken_and_missing_configurations_are_named(folder: Path) -> None:
    config = folder / "vae/config.json"
    values = json.loads(config.read_text())
    del values["scaling_factor"]
    config.write_text(json.dumps(values))
    assert "vae/config.json has no 'scaling_factor'" in one_line(lambda: read_family(open_checkpoint(str(folder))))
    config.write_text("{")
    assert "vae/config.json cannot be read as JSON" in one_line(lambda: open_checkpoint(str(folder)))
    config.unlink()
    assert "vae/config.json is missing" in one_line(lambda: open_checkpoint(str(folder)))


def test_tokenizer_without_the_files_phones_read_is_named(folder: Path) -> None:
    (folder / "tokenizer_2/merges.txt").unlink()
    message = one_line(lambda: open_checkpoint(str(folder)))
    assert "tokenizer_2/merges.txt is missing; every tokenizer needs vocab.json, merges.txt" in message


def test_defaults_of_the_original_classes_fill_what_configurations_leave_out(folder: Path) -> None:
    values = json.loads((folder / "transformer/config.json").read_text())
    for name in ("qk_norm", "dual_attention_layers"):  # SD3-Medium's file, older than both
        del values[name]
    (folder / "transformer/config.json").write_text(json.dumps(values))
    read_family(open_checkpoint(str(folder)))


# Stability's single file


@pytest.mark.parametrize(("dual", "norms"), [((0, 1), True), ((), False)], ids=["sd3.5", "sd3"])
def test_single_file_reads_as_diffusers_converts_it(tmp_path: Path, original: Path, dual: tuple[int, ...], norms: bool) -> None:
    tensors = stability.single_file(dual, norms)
    path = tmp_path / "sd3_medium.safetensors"
    save_file({name: value.half().contiguous() for name, value in tensors.items()}, path)
    tensors = {name: value.half().float() for name, value in tensors.items()}
    checkpoint = open_checkpoint(str(path), tokenizer=original)
    check_all(checkpoint)
    assert checkpoint.name == "sd3_medium"
    assert checkpoint.notes[0].startswith("text_encoders.t5xxl is left out")

    converted = convert_sd3_transformer_checkpoint_to_diffusers(
        {name: value for name, value in tensors.items() if name.startswith("model.")}
    )
    transformer = SD3Transformer2DModel(**checkpoint.config("transformer"))
    transformer.load_state_dict(converted)
    vae = AutoencoderKL(
        **checkpoint.config("vae"),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
    )
    converted_vae = convert_ldm_vae_checkpoint(tensors, vae.config)
    for folder, state in (("transformer", converted), ("vae", converted_vae)):
        for name, value in state.items():
            if not name.startswith("encoder."):
                assert torch.equal(checkpoint.tensor(folder, name).float(), value), name
    vae.load_state_dict(converted_vae, strict=False)

    parts = {part.name: part for part in read_family(checkpoint).components(OPTIONS)}
    latent = torch.randn(1, 16, 16, 16)
    image = parts["vae_decoder"].load(checkpoint)(latent)[0]
    with torch.no_grad():
        wanted = vae.decode(latent / 1.5305 + 0.0609).sample / 2 + 0.5
    assert torch.allclose(image, wanted.clamp(0, 1), atol=2e-5)


def test_single_file_s_first_text_encoder_is_not_projected(tmp_path: Path, original: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: value.contiguous() for name, value in stability.single_file((), False).items()}, path)
    checkpoint = open_checkpoint(str(path), tokenizer=original)
    part = read_family(checkpoint).components(OPTIONS)[0]
    module = part.load(checkpoint)
    assert torch.equal(checkpoint.tensor("text_encoder", "text_projection.weight"), torch.eye(stability.CLIP_L))
    assert module(random_ids(SD35, 0))[1].shape == (1, stability.CLIP_L)


def test_single_file_lacking_a_part_says_which(tmp_path: Path, original: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {name: value.contiguous() for name, value in stability.single_file((), False).items()}
    save_file(tensors, path)
    assert "holds no tokenizers: add --tokenizer FOLDER" in one_line(lambda: open_checkpoint(str(path)))
    save_file({name: value for name, value in tensors.items() if "clip_g" not in name}, path)
    assert "has no text_encoders.clip_g.transformer." in one_line(lambda: open_checkpoint(str(path), original))
    save_file({name: value for name, value in tensors.items() if "first_stage" not in name}, path)
    assert "has no first_stage_model.decoder tensors" in one_line(lambda: open_checkpoint(str(path), original))
    save_file(tensors | {"model.diffusion_model.surplus.weight": torch.zeros(2)}, path)
    assert "unexpected surplus.weight" in one_line(lambda: check_all(open_checkpoint(str(path), original)))


# Sigmas


def test_sigmas_come_from_the_checkpoint_then_from_the_option(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert choose_sigmas(checkpoint) == Sigmas(tuple(SIGMAS["4"]))
    assert choose_sigmas(checkpoint, steps=2) == Sigmas(tuple(SIGMAS["2"]))
    assert choose_sigmas(checkpoint, given=[0.8, 0.3, 0.1, 0]) == Sigmas((0.8, 0.3, 0.1, 0.0))
    assert "carries sigmas for 2, 4" in one_line(lambda: choose_sigmas(checkpoint, steps=3))
    assert "--steps 4 takes 5 sigmas" in one_line(lambda: choose_sigmas(checkpoint, steps=4, given=[1.0, 0.0]))


def test_sigmas_of_nobody_are_even_steps_at_the_scheduler_s_shift_and_noted(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, TinyModel(sigmas=None))))
    found = choose_sigmas(checkpoint, steps=5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 5 for i in range(5)])
    assert torch.allclose(torch.tensor(found.values), scheduler.sigmas)
    assert choose_sigmas(checkpoint).values == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert found.note is not None
    assert "carries no sigmas" in found.note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sigmas": {"4": [1, 0.5, 0]}}, "4 steps take 5 sigmas; it has 3"),
        ({"sigmas": {"4": ["a", "b"]}}, "sigmas must be"),
        ({"sigmas": [1, 0]}, "sigmas must be"),
        ({"sigmas": {"four": [1, 0]}}, "sigmas must be"),
    ],
)
def test_carried_sigmas_that_make_no_sense_are_one_line(folder: Path, content: dict, message: str) -> None:
    (folder / "flash.json").write_text(json.dumps(content))
    checkpoint = open_checkpoint(str(folder))
    assert message in one_line(lambda: choose_sigmas(checkpoint))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 0.5], "the last must be 0"),
        ([], "the last must be 0"),
        ([0.0], "the last must be 0"),
        ([1.5, 0.5, 0.0], "at most 1"),
        ([float("nan"), 0.5, 0.0], "at most 1"),
        ([1.0, float("nan"), 0.0], "below the one before"),
        ([1.0, -0.1, 0.0], "below the one before"),
        ([0.5, 0.7, 0.0], "below the one before"),
        ([0.5, 0.5, 0.0], "below the one before"),
    ],
)
def test_sigmas_that_do_not_fall_from_one_to_zero_are_refused(original: Path, values: list[float], message: str) -> None:
    checkpoint = open_checkpoint(str(original))
    line = one_line(lambda: choose_sigmas(checkpoint, given=values))
    assert line.startswith("--sigmas: ") and message in line


@given(st.lists(st.floats(min_value=1e-6, max_value=1.0), min_size=1, max_size=8, unique=True))
def test_any_falling_list_that_ends_in_zero_passes(values: list[float]) -> None:
    check_sigmas((*sorted(values, reverse=True), 0.0))


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
