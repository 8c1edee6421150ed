"""What lets a large model be exported by a small computer gives the same as having it all in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.full_size.models import sd35_medium
from export import planning
from export.checkpoint import open_checkpoint
from export.components.config import read_config
from export.components.mmdit import TransformerConfig
from export.components.text_encoder import TextEncoderConfig
from export.components.vae_decoder import VaeConfig
from export.compressing import Compressed
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, PaletteScheme
from export.effort import macs
from export.families.family import GraphOptions
from export.families.sd3 import Sd3
from export.planning import ExportOptions, make_plan
from export.recording import run_all
from export.reference import draw, reference_pipeline
from export.targets import TARGETS
from export.tensors import TORCH, SafetensorsReader
from tests.models import SD35, load_reference, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", SD35, dtype=torch.float16, shard_size="50KB")


def test_original_that_reads_weights_on_use_draws_as_the_one_in_memory(checkpoint: Path) -> None:
    """The other side is loaded by diffusers and transformers themselves."""
    options = GraphOptions(128, 128, (1.0, 0.75, 0.0))
    streamed = draw(reference_pipeline(open_checkpoint(str(checkpoint))), options, "the red circle", 3)
    whole = draw(load_reference(checkpoint).pipeline(), options, "the red circle", 3)
    np.testing.assert_array_equal(streamed.latents, whole.latents)
    np.testing.assert_array_equal(streamed.image, whole.image)


def test_original_holds_no_weights_between_runs(checkpoint: Path) -> None:
    pipeline = reference_pipeline(open_checkpoint(str(checkpoint)))
    draw(pipeline, GraphOptions(128, 128, (1.0, 0.0)), "the red circle", 0)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert all(parameter.is_meta for parameter in module.parameters())


def test_component_in_stretches_computes_what_it_does_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "STRETCH_BYTES", 1)
    plan = make_plan(TARGETS["ios"], ExportOptions(str(checkpoint), bits=6, calibrate=False))
    part = next(part for part in plan.parts if part.name == "transformer")
    assert len(part.pieces) == 1 and len(part.stretches) == SD35.layers
    recipe = {
        info.name: PaletteScheme(6) if info.kind == "linear" else FloatScheme(16) for info in part.plans["coreml"][0].weights
    }
    stored = round_weights(part.pieces[0].weights(plan.checkpoint), recipe)
    fine = Compressed(part, plan.checkpoint, {"coreml": stored})
    whole = Compressed(dataclasses.replace(part, stretches=part.pieces), plan.checkpoint, {"coreml": stored})
    generator = np.random.default_rng(0)
    given = [
        {spec.name: generator.standard_normal(spec.shape).astype(np.float32) for spec in part.pieces[0].inputs}
        for _ in range(2)
    ]
    (format,) = plan.formats
    for stretches, pieces in ((fine.original, whole.original), (fine.references(format), whole.references(format))):
        assert stretches is not None and pieces is not None
        for made, expected in zip(run_all(stretches, given), run_all(pieces, given), strict=True):
            np.testing.assert_array_equal(made["velocity"], expected["velocity"])


@pytest.mark.parametrize("kind", [*TORCH])
def test_tensors_and_their_rows_are_read_as_safetensors_reads_them(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = {"matrix": (6, 5), "cube": (3, 2, 4), "one": (), "none": (0, 7)}
    tensors = {name: (torch.rand(shape, generator=generator) * 3).to(TORCH[kind]) for name, shape in names.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    reader = SafetensorsReader([tmp_path / "file.safetensors"])
    for name, expected in load_file(tmp_path / "file.safetensors").items():
        assert reader.kind(name) == kind
        assert torch.equal(reader.tensor(name), expected)
        if expected.ndim and len(expected):
            assert torch.equal(reader.rows(name, 1, len(expected)), expected[1:])


def test_multiply_accumulates_are_those_counted_of_unmodified_diffusers() -> None:
    """At 512 px in SD3.5-Medium's shape 1,221 G a step with 333 context tokens and 1,257 G for the decoder, counted on
    diffusers' own modules; the fold of null tokens takes 255 tokens out, the hoist the modulation of a single vector."""
    configs = sd35_medium()
    model = Sd3(
        transformer=read_config(TransformerConfig, configs.transformer, "config.json"),
        text_encoder=read_config(TextEncoderConfig, configs.text_encoder, "config.json"),
        text_encoder_2=read_config(TextEncoderConfig, configs.text_encoder_2, "config.json"),
        vae=read_config(VaeConfig, configs.vae, "config.json"),
        tokens=77,
    )
    plain = dataclasses.replace(GraphOptions(512, 512, (1.0, 0.0)).rewrites, fold_null_tokens=False)
    unfolded = {c.name: macs([c]) for c in model.components(GraphOptions(512, 512, (1.0, 0.0), rewrites=plain))}
    assert unfolded["transformer"] + 768e6 == pytest.approx(1.221e12, rel=0.01)
    assert unfolded["vae_decoder"] == pytest.approx(1.257e12, rel=0.01)
    folded = {c.name: macs([c]) for c in model.components(GraphOptions(512, 512, (1.0, 0.0)))}
    assert folded["transformer"] < 0.87 * unfolded["transformer"]

