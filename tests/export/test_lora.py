"""LoRAs against diffusers' own `load_lora_weights` and `fuse_lora`, and every file that does not fit refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from export import cli
from export.benchmarking import check_original
from export.checkpoint import Checkpoint, open_checkpoint
from export.components.component import check_weights
from export.describing import describe_lora
from export.errors import UserError
from export.families import read_family
from export.families.family import GraphOptions
from export.lora import Lora
from export.planning import ExportOptions, make_plan
from export.targets import TARGETS
from runtimes.bundle import LoraEntry, load_manifest
from runtimes.harness.latency import open_bundle
from runtimes.harness.parity import psnr
from runtimes.pipeline import Pipeline
from tests.export import stability
from tests.models import load_reference, write_checkpoint

BLOCK = "transformer_blocks.0"
MODULES = (
    *(f"{BLOCK}.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "to_add_out")),
    *(f"{BLOCK}.attn2.to_q", f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff_context.net.2", f"{BLOCK}.norm1.linear"),
    *("pos_embed.proj", "proj_out", "context_embedder", "time_text_embed.text_embedder.linear_1"),
)
TEXT_MODULES = tuple(f"text_model.encoder.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"))
PARTS = ("transformer", "text_encoder", "text_encoder_2")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lora") / "tiny")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def halves(plain: Checkpoint, part: str, modules: tuple[str, ...], prefix: str, rank: int = 4, seed: int = 0) -> Tensors:
    """Random A and B of these modules, so large that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in modules:
        shape = plain.shapes(part)[f"{module}.weight"]
        found[f"{prefix}{module}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=generator) * 0.3
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        found[f"{prefix}{module}.lora_B.weight"] = up * 0.3
    return found


def everywhere(plain: Checkpoint, seed: int = 0, rank: int = 4) -> Tensors:
    """A LoRA of the transformer and both text encoders in diffusers' names."""
    parts = (("transformer", MODULES), ("text_encoder", TEXT_MODULES), ("text_encoder_2", TEXT_MODULES))
    return {k: v for part, modules in parts for k, v in halves(plain, part, modules, f"{part}.", rank, seed).items()}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if metadata is not None else {})
    save_file(tensors, path, metadata=header)
    return path


def fused(folder: Path, *loras: tuple[Path, float]) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline with the files loaded, fused and let go of."""
    pipeline = load_reference(folder).pipeline()
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(names, adapter_weights=[scale for _, scale in loras])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    return pipeline


def fused_weights(folder: Path, *loras: tuple[Path, float]) -> dict[str, Tensors]:
    """What diffusers makes of the weights, by part."""
    pipeline = fused(folder, *loras)
    return {part: getattr(pipeline, part).state_dict() for part in PARTS}


def assert_as_diffusers(folder: Path, *loras: tuple[Path, float]) -> None:
    """Every tensor of every part; and that something changed in each part that the files name."""
    merged = open_checkpoint(str(folder), loras=[Lora(str(path), scale) for path, scale in loras])
    before = open_checkpoint(str(folder))
    expected = fused_weights(folder, *loras)
    for part in PARTS:
        changed = 0
        assert expected[part].keys() == merged.shapes(part).keys()
        for name, value in expected[part].items():
            found = merged.tensor(part, name)
            assert found.dtype == torch.float32
            assert torch.allclose(found, value, rtol=1e-6, atol=1e-6), (part, name, (found - value).abs().max())
            changed += not torch.equal(found, before.tensor(part, name))
        named = {key for path, _ in loras for key in load_file(path) if key.startswith(f"{part}.") and "lora_B" in key}
        assert changed == len({key.replace(".lora_B", "") for key in named})


@pytest.mark.parametrize("scale", [1.0, 0.65, -0.5])
def test_merging_equals_diffusers_fusing(folder: Path, plain: Checkpoint, tmp_path: Path, scale: float) -> None:
    assert_as_diffusers(folder, (write(tmp_path / "lora.safetensors", everywhere(plain)), scale))


def test_ranks_may_differ_by_module(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    tensors = everywhere(plain) | halves(plain, "transformer", MODULES[:3], "transformer.", rank=2)
    assert_as_diffusers(folder, (write(tmp_path / "lora.safetensors", tensors), 0.8))


def test_half_precision_files_are_merged_in_float32(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        path = write(tmp_path / f"{dtype}.safetensors", {k: v.to(dtype) for k, v in everywhere(plain).items()})
        assert_as_diffusers(folder, (path, 0.7))


def test_two_loras_add_up(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    first = write(tmp_path / "first.safetensors", everywhere(plain))
    second = write(tmp_path / "second.safetensors", halves(plain, "transformer", MODULES[2:5], "transformer.", 3, seed=1))
    assert_as_diffusers(folder, (first, 0.5), (second, 1.5))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_files_that_diffusers_wrote_with_their_metadata(folder: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    transformer = load_reference(folder).transformer
    modules = [module for module in MODULES if not (module == "context_embedder" and "lora_bias" in options)]
    patterns = {} if "use_rslora" in options else {"alpha_pattern": {"attn.to_k": 3}, "rank_pattern": {"ff.net.0.proj": 2}}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, **patterns, **options)
    transformer.add_adapter(config)
    torch.manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    assert_as_diffusers(folder, (tmp_path / "pytorch_lora_weights.safetensors", 0.9))


def test_dora_merged_after_another_lora(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    first = write(tmp_path / "first.safetensors", halves(plain, "transformer", MODULES[:2], "transformer."))
    tensors = halves(plain, "transformer", MODULES[:2], "transformer.", seed=1)
    for module in MODULES[:2]:
        out = plain.shapes("transformer")[f"{module}.weight"][0]
        tensors[f"transformer.{module}.lora_magnitude_vector"] = 1 + torch.rand(out)
    assert_as_diffusers(folder, (first, 0.5), (write(tmp_path / "second.safetensors", tensors), 1.0))


def test_older_names_that_diffusers_converts(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    modules = tuple(f"{BLOCK}.attn.{name}" for name in ("to_q", "to_v", "to_out.0"))
    old = {}
    for key, value in halves(plain, "transformer", modules, "transformer.").items():
        key = key.replace("attn.to_out.0.", "attn.processor.to_out_lora.").replace("attn.to_q.", "attn.processor.to_q_lora.")
        half = "down" if "lora_A" in key else "up"
        joined = key.replace("_lora.lora_A", "_lora.down").replace("_lora.lora_B", "_lora.up")
        old[joined.replace(".lora_A.", f".lora.{half}.").replace(".lora_B.", f".lora.{half}.")] = value
    assert sorted(old)[0] == f"transformer.{BLOCK}.attn.processor.to_out_lora.down.weight"
    assert_as_old(folder, write(tmp_path / "old.safetensors", old), 3)
    text = halves(plain, "text_encoder", TEXT_MODULES[:2], "text_encoder.")
    linear = {
        k.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"): v for k, v in text.items()
    }
    assert_as_old(folder, write(tmp_path / "text.safetensors", linear), 2)


def assert_as_old(folder: Path, path: Path, count: int) -> None:
    merged, before = open_checkpoint(str(folder), loras=[Lora(str(path))]), open_checkpoint(str(folder))
    expected = fused_weights(folder, (path, 1.0))
    changed = 0
    for part in PARTS:
        for name, value in expected[part].items():
            assert torch.allclose(merged.tensor(part, name), value, rtol=1e-6, atol=1e-6), name
            changed += not torch.equal(value, before.tensor(part, name))
    assert changed == count


def test_names_without_a_prefix_are_the_transformers(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.safetensors", halves(plain, "transformer", MODULES, ""))
    full = write(tmp_path / "full.safetensors", halves(plain, "transformer", MODULES, "transformer."))
    first, second = (open_checkpoint(str(folder), loras=[Lora(str(path), 0.3)]) for path in (bare, full))
    assert all(
        torch.equal(first.tensor("transformer", f"{m}.weight"), second.tensor("transformer", f"{m}.weight")) for m in MODULES
    )


def test_alpha_tensors_scale_by_alpha_over_rank(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    """Against float64: diffusers refuses such files for SD3."""
    tensors = halves(plain, "transformer", MODULES, "transformer.")
    path = write(tmp_path / "a.safetensors", tensors | {f"transformer.{m}.alpha": torch.tensor(2.5) for m in MODULES})
    merged = open_checkpoint(str(folder), loras=[Lora(str(path), 0.4)])
    for module in MODULES:
        down, up = (tensors[f"transformer.{module}.lora_{half}.weight"].double().flatten(1).numpy() for half in "AB")
        weight = plain.tensor("transformer", f"{module}.weight").double().numpy()
        expected = weight + (0.4 * 2.5 / 4 * up @ down).reshape(weight.shape)
        assert np.abs(merged.tensor("transformer", f"{module}.weight").numpy() - expected).max() < 1e-6


def test_float16_weights_are_merged_in_float32(plain: Checkpoint, tmp_path: Path) -> None:
    """Small changes would vanish in float16."""
    half = write_checkpoint(tmp_path / "half", dtype=torch.float16)
    tensors = {k: v * 0.01 for k, v in halves(plain, "transformer", MODULES, "transformer.").items()}
    path = write(tmp_path / "lora.safetensors", tensors)
    merged = open_checkpoint(str(half), loras=[Lora(str(path))])
    for module in MODULES:
        down, up = (tensors[f"transformer.{module}.lora_{half}.weight"].double().flatten(1) for half in "AB")
        weight = open_checkpoint(str(half)).tensor("transformer", f"{module}.weight")
        found = merged.tensor("transformer", f"{module}.weight")
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), weight.double() + (up @ down).reshape(weight.shape), rtol=1e-6, atol=1e-7)


def test_single_files_take_the_same_names(folder: Path, tmp_path: Path) -> None:
    """Theirs are others: queries, keys and values in one tensor, shift and scale the other way about."""
    save_file(stability.single_file((0, 1), head_norms=True), tmp_path / "one.safetensors")
    before = open_checkpoint(str(tmp_path / "one.safetensors"), folder)
    modules = (*MODULES, f"{BLOCK}.attn.add_v_proj", "norm_out.linear")
    tensors = halves(before, "transformer", modules, "transformer.")
    path = write(tmp_path / "lora.safetensors", tensors)
    merged = open_checkpoint(str(tmp_path / "one.safetensors"), folder, loras=[Lora(str(path), 0.5)])
    for module in modules:
        down, up = (tensors[f"transformer.{module}.lora_{half}.weight"].double().flatten(1) for half in "AB")
        weight = before.tensor("transformer", f"{module}.weight").double()
        expected = weight + (0.5 * up @ down).reshape(weight.shape)
        assert torch.allclose(merged.tensor("transformer", f"{module}.weight").double(), expected, rtol=1e-6, atol=1e-6), module


def test_fingerprint_covers_files_and_scales(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    first = write(tmp_path / "first.safetensors", everywhere(plain))
    second = write(tmp_path / "second.safetensors", everywhere(plain, seed=1))
    renamed = Path(shutil.copyfile(first, tmp_path / "renamed.safetensors"))

    def fingerprint(*loras: tuple[Path, float]) -> str:
        return open_checkpoint(str(folder), loras=[Lora(str(path), scale) for path, scale in loras]).fingerprint()

    assert plain.fingerprint() == fingerprint()
    assert fingerprint((first, 1)) == fingerprint((renamed, 1.0))
    different = [fingerprint(), fingerprint((first, 1)), fingerprint((first, 0.5)), fingerprint((second, 1))]
    different += [fingerprint((first, 1), (second, 0.5)), fingerprint((first, 0.5), (second, 1))]
    assert len(set(different)) == 6


def test_plan_and_manifest_say_what_was_merged(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "style" / "ink.safetensors", everywhere(plain))
    (tmp_path / "style" / "README.md").write_text("---\nlicense: openrail++\n---\n# Ink\n")
    plan = make_plan(TARGETS["ios"], ExportOptions(str(folder), loras=(Lora(str(path), 0.75),)))
    counts = f"3 tensors of text_encoder, 3 tensors of text_encoder_2, {len(MODULES)} tensors of transformer"
    assert f"LoRA ink.safetensors is merged into {counts}, at scale 0.75; its licence: openrail++" in plan.notes
    assert plan.checkpoint.merged == (LoraEntry(name="ink.safetensors", scale=0.75, licence="openrail++"),)
    assert describe_lora(plan.checkpoint.merged[0]) == "LoRA ink.safetensors at scale 0.75 (licence: openrail++)"
    assert plan.checkpoint.title == "tiny+ink"
    check_weights(plan.checkpoint, read_family(plan.checkpoint).components(GraphOptions(128, 128, (1.0, 0.75, 0.0))))


def test_bundle_is_of_the_merged_weights_and_can_be_verified_with_the_same_files(
    folder: Path, plain: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "ink.safetensors", {k: v * 0.3 for k, v in everywhere(plain).items()})
    lora = ("--lora", str(path), "--lora-scale", "0.5")
    bundle = tmp_path / "out" / "android"
    options = ("--target", "android", "--format", "onnx", "--bits", "16", "--resolution", "64", "--out", str(bundle.parent))
    cli.main(["export", "--model", str(folder), *lora, *options])
    manifest = load_manifest(bundle)
    assert manifest.model.loras == (LoraEntry(name="ink.safetensors", scale=0.5, licence="unstated"),)
    assert manifest.model.name == "tiny+ink" and "LoRA ink.safetensors at scale 0.5" in manifest.licence.attribution
    drawn = Pipeline.open(bundle).generate("the red circle", seed=5)
    expected = fused(folder, (path, 0.5))(
        "the red circle",
        height=64,
        width=64,
        num_inference_steps=4,
        sigmas=list(manifest.sigmas[:-1]),
        guidance_scale=1,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    assert psnr(drawn.pixels, expected.transpose(2, 0, 1)) > 50
    opened = open_bundle(bundle, "onnxruntime")
    check_original(opened, str(folder), "diffusers", (Lora(str(path), 0.5),))
    layers = ("verify", str(bundle), "--per-layer", "--component", "text_encoder", "--model", str(folder))
    cli.main([*layers, *lora])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(layers)
    assert stopped.value.code == 2 and "--lora ink.safetensors --lora-scale 0.5" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"with --lora ink\.safetensors --lora-scale 0\.5"):
        check_original(opened, str(folder), "diffusers", (Lora(str(path), 0.6),))


KEY = f"transformer.{MODULES[0]}"
Damage = Callable[[Tensors], object]


def replaced(old: str, new: str) -> Damage:
    return lambda tensors: tensors.update({key.replace(old, new): tensors.pop(key) for key in list(tensors) if old in key})


REFUSED: dict[str, tuple[Damage, str]] = {
    "no such weight": (
        replaced("blocks.0", "blocks.9"),
        "match no weight: transformer.transformer_blocks.9.attn.to_q.lora_A.weight",
    ),
    "a half missing": (lambda t: t.pop(f"{KEY}.lora_B.weight"), f"one half without the other: {KEY}.lora_A.weight"),
    "alpha alone": (lambda t: (t.clear(), t.update({f"{KEY}.alpha": torch.tensor(1.0)})), f"other: {KEY}.alpha"),
    "other inputs": (
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 7)}),
        f"of another shape: {KEY}.lora_A.weight (4, 7)",
    ),
    "other rank": (lambda t: t.update({f"{KEY}.lora_B.weight": torch.zeros(32, 3)}), "lora_B.weight (32, 3), for (32, 32)"),
    "integers": (lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}), "not float:"),
    "kohya": (replaced("transformer.transformer_blocks.0.attn.", "lora_unet_blocks_0_attn_"), "lora_unet_blocks_0_attn_to_q"),
    "kohya's halves": (replaced("lora_A", "lora_down"), "diffusers does not take for SD3 either: " + KEY + ".lora_down.weight"),
    "PEFT's own": (replaced("transformer.", "base_model.model."), "match no weight: base_model.model."),
    "LoKr": (replaced("lora_A.weight", "lokr_w1"), f"does not take for SD3 either: {KEY}.lokr_w1"),
    "dora_scale": (lambda t: t.update({f"{KEY}.dora_scale": torch.ones(32)}), f"either: {KEY}.dora_scale"),
    "UNet": (lambda t: t.update({"unet.x.lora_A.weight": torch.ones(4, 4)}), "match no weight: unet.x.lora_A.weight"),
    "two keys": (
        lambda t: t.update({f"transformer.{BLOCK}.attn.processor.to_q_lora.down.weight": torch.zeros(4, 32)}),
        f"two keys for one tensor: transformer.{BLOCK}.attn.processor.to_q_lora.down.weight and {KEY}.lora_A.weight",
    ),
    "magnitude": (lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(5)}), "lora_magnitude_vector (5,)"),
    "nothing": (lambda t: t.clear(), "holds no LoRA"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_files_that_do_not_fit_are_refused_by_name(folder: Path, plain: Checkpoint, tmp_path: Path, case: str) -> None:
    damage, said = REFUSED[case]
    tensors = halves(plain, "transformer", MODULES[:1], "transformer.")
    damage(tensors)
    path = write(tmp_path / "bad.safetensors", tensors)
    message = refusal(folder, Lora(str(path)))
    assert said in message and "bad.safetensors" in message


METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 8, "lora_alpha": 8}, f"ranks that the metadata gives otherwise: {MODULES[0]} (4, not 8)"),
    "PiSSA": ({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}, "trained with init_lora_weights = 'pissa'"),
    "biases": ({"r": 4, "lora_alpha": 4, "bias": "lora_only"}, "trained with bias = 'lora_only'"),
    "DoRA": ({"r": 4, "lora_alpha": 4, "use_dora": True}, "lora_magnitude_vector"),
    "words": ({"r": 4, "lora_alpha": "much"}, "lora_alpha as 'much'; it must be a number"),
    "broken": ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 2}}, "pattern for modules"),
}


@pytest.mark.parametrize("case", METADATA, ids=str)
def test_metadata_that_cannot_be_followed_are_refused(folder: Path, plain: Checkpoint, tmp_path: Path, case: str) -> None:
    metadata, said = METADATA[case]
    tensors = halves(plain, "transformer", MODULES[:1], "transformer.")
    path = write(tmp_path / "bad.safetensors", tensors, {f"transformer.{key}": value for key, value in metadata.items()})
    assert said in refusal(folder, Lora(str(path)))


def test_places_scales_and_kinds_of_file_are_refused(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", halves(plain, "transformer", MODULES[:1], "transformer."))
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:100])
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    assert "no file here" in refusal(folder, Lora(str(tmp_path / "none.safetensors")))
    assert "truncated" in refusal(folder, Lora(str(tmp_path / "short.safetensors")))
    assert "pickle" in refusal(folder, Lora(str(tmp_path / "lora.bin")))
    assert "--lora-scale 0" in refusal(folder, Lora(str(path), 0.0))
    assert "--lora-scale nan" in refusal(folder, Lora(str(path), float("nan")))
    assert "twice" in refusal(folder, Lora(str(path)), Lora(str(tmp_path / "." / "lora.safetensors"), 0.5))


def test_a_merge_that_overflows_is_refused_when_it_is_read(folder: Path, plain: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", halves(plain, "transformer", MODULES[:1], "transformer."))
    checkpoint = open_checkpoint(str(folder), loras=[Lora(str(path), 1e39)])
    with pytest.raises(UserError, match=r"attn\.to_q\.weight is no longer finite"):
        checkpoint.tensor("transformer", f"{MODULES[0]}.weight")


def refusal(folder: Path, *loras: Lora) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(folder), loras=loras)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "--target", "ios", "--dry-run", "--lora-scale", "1"), "--lora-scale is given 1 times and --lora 0"),
        (("export", "--target", "ios", "--dry-run", "--lora", "LORA", "--lora-scale", "0"), "--lora-scale 0"),
        (("verify", "FOLDER", "--lora", "LORA"), "belong to --per-layer"),
        (("bench", "FOLDER", "--lora", "LORA"), "are for --against"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_options_that_do_not_fit_are_one_line(
    folder: Path, plain: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    path = write(tmp_path / "lora.safetensors", halves(plain, "transformer", MODULES[:1], "transformer."))
    with pytest.raises(SystemExit) as stopped:
        cli.main([{"LORA": str(path), "FOLDER": str(folder)}.get(word, word) for word in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert said in captured.err and captured.err.count("\n") == 1
