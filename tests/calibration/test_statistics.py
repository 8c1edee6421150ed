"""Statistics of a tiny checkpoint against unmodified diffusers: moments, gradients, and the damage that they foretell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import Tensor, nn

from calibration import layers
from calibration.layers import SKETCHES, block_of, signs
from calibration.statistics import InputRounding, LayerStatistics, Statistics, load_statistics
from export.calibrating import statistics_of
from export.checkpoint import Checkpoint
from export.compression.schemes import weight_infos
from export.families import read_family
from export.families.family import GraphOptions
from export.formats.executorch_inputs import round_per_token
from export.formats.onnx import round_per_block
from export.rewrites import rewrites_of
from tests.calibration.conftest import GRAPH, PROMPTS, Calibrate
from tests.calibration.original import Original


def gradients(
    original: Original, statistics: Statistics, component: str, prompt: int, target: Tensor, variance: float, name: str
) -> dict[str, np.ndarray]:
    """Of <probe, target> by autograd through the unmodified modules, by weight [out, in], scaled as sensitivities are."""
    probe = signs(name, prompt, target.numel(), 1).reshape(target.shape)
    wanted = {weight: original.weight(component, weight) for weight in statistics.places[component]}
    found = torch.autograd.grad((probe * target).sum(), list(wanted.values()), retain_graph=True)
    scale = (target.numel() * variance) ** 0.5
    flat = {weight: gradient.numpy() / scale for weight, gradient in zip(wanted, found, strict=True)}
    return {weight: g.T if "embedding" in weight else g.reshape(len(g), -1) for weight, g in flat.items()}


def expected_sensitivities(
    original: Original, statistics: Statistics, images: Sequence[np.ndarray | None]
) -> dict[tuple[str, str], np.ndarray]:
    """Mean squared sketches of the whole gradients, [out] by component and weight; not yet divided by the trace."""
    for component in statistics.places:
        for weight in statistics.places[component]:
            original.weight(component, weight).requires_grad_()
    latents = [original.latent(PROMPTS[p], p, image) for p, image in enumerate(images)]
    pictures = [original.picture(latent.detach()) for latent in latents]
    squares: dict[tuple[str, str], list[np.ndarray]] = {}
    for component in statistics.places:
        targets, name = (pictures, "image") if component == "vae_decoder" else (latents, "latent.2")
        variance = float(torch.cat(targets).detach().double().var(correction=0))
        for p, target in enumerate(targets):
            for weight, gradient in gradients(original, statistics, component, p, target, variance, name).items():
                width = len(statistics.layer(component, weight).mean)  # of context_embedder, the columns that are read
                sketch = gradient[:, :width] @ signs(weight, p, width, SKETCHES).numpy()
                squares.setdefault((component, weight), []).append(np.square(sketch).mean(axis=1))
    for component in statistics.places:
        for weight in statistics.places[component]:
            original.weight(component, weight).requires_grad_(False)
    return {key: np.mean(values, axis=0) for key, values in squares.items()}


def trace(layer: LayerStatistics) -> float:
    return float(np.trace(layer.moments) if layer.moments.ndim == 2 else layer.moments.sum())


def assert_sensitivities(statistics: Statistics, expected: dict[tuple[str, str], np.ndarray]) -> None:
    for (component, weight), wanted in expected.items():
        layer = statistics.layer(component, weight)
        np.testing.assert_allclose(
            layer.sensitivity * trace(layer), wanted, rtol=2e-3, atol=1e-4 * wanted.max(), err_msg=f"{component} {weight}"
        )


def test_sensitivities_come_of_the_gradients_that_autograd_finds_in_one_graph_of_unmodified_diffusers(
    original: Original, two: Statistics
) -> None:
    expected = expected_sensitivities(original, two, [None, None])
    assert len(expected) == sum(len(weights) for weights in two.places.values()) > 100
    assert_sensitivities(two, expected)


def test_with_images_every_step_sees_noised_latents_and_errors_travel_by_the_euler_steps_alone(
    original: Original, run: Calibrate, tmp_path: Path
) -> None:
    images = np.random.default_rng(3).standard_normal((2, 4, 8, 12)).astype(np.float32)
    save_file({"latents": images}, tmp_path / "latents.safetensors")
    statistics = run(2, tmp_path, images=tmp_path / "latents.safetensors")
    assert_sensitivities(statistics, expected_sensitivities(original, statistics, list(images)))


def test_block_by_block_gives_what_the_whole_transformer_gives(run: Calibrate, two: Statistics, tmp_path: Path) -> None:
    whole = run(2, tmp_path, chunks=1)
    assert {place.file for place in whole.places["transformer"].values()} == {"transformer.safetensors"}
    assert len({place.file for place in two.places["transformer"].values()}) == 3
    assert {c: set(weights) for c, weights in whole.places.items()} == {c: set(weights) for c, weights in two.places.items()}
    for component, weights in two.places.items():
        for weight in weights:
            one, other = two.layer(component, weight), whole.layer(component, weight)
            assert one.samples == other.samples
            for kind in ("moments", "mean", "sensitivity"):
                wanted = getattr(other, kind)
                np.testing.assert_allclose(getattr(one, kind), wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())


SEEN = {
    "text_encoder": "text_model.encoder.layers.1.mlp.fc1",
    "text_encoder_2": "text_projection",
    "conditioner": "transformer_blocks.1.norm1.linear",
    "transformer": "transformer_blocks.1.ff.net.2",
}


def test_moments_are_means_over_what_enters_the_layer_in_unmodified_diffusers(original: Original, two: Statistics) -> None:
    seen: dict[str, list[Tensor]] = {name: [] for name in [*SEEN, "patches", "pixels"]}
    reference = original.reference

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, args: seen[name].append(args[0]))

    parts = {"conditioner": reference.transformer}
    for component, layer in SEEN.items():
        watch(parts.get(component, getattr(reference, component, None)).get_submodule(layer), component)
    watch(reference.transformer.pos_embed.proj, "patches")
    watch(reference.vae.decoder.conv_in, "pixels")
    original.pictures(PROMPTS[:2])
    rows = {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[name]]) for name in SEEN}
    rows["patches"] = torch.cat([F.unfold(x, 2, stride=2)[0].T for x in seen["patches"]])
    rows["pixels"] = torch.cat([F.unfold(x, 3, padding=1)[0].T for x in seen["pixels"]])
    places = {name: (name, f"{layer}.weight") for name, layer in SEEN.items()}
    places |= {"patches": ("transformer", "pos_embed.proj.weight"), "pixels": ("vae_decoder", "decoder.conv_in.weight")}
    for name, (component, weight) in places.items():
        found, x = two.layer(component, weight), rows[name].double()
        assert found.samples == len(x)
        np.testing.assert_allclose(found.mean, x.mean(dim=0), atol=2e-5)
        np.testing.assert_allclose(found.moments, x.T @ x / len(x), atol=1e-4, rtol=1e-4)


def test_an_embeddings_moments_are_the_shares_of_its_rows(original: Original, two: Statistics) -> None:
    ids = [original.reference.tokenizer(p, padding="max_length", truncation=True).input_ids for p in PROMPTS[:2]]
    found = two.layer("text_encoder", "text_model.embeddings.token_embedding.weight")
    assert found.samples == np.size(ids)
    np.testing.assert_allclose(found.moments, np.bincount(np.ravel(ids), minlength=len(found.moments)) / np.size(ids))


def test_many_pixels_are_sampled(monkeypatch: pytest.MonkeyPatch, run: Calibrate, two: Statistics, tmp_path: Path) -> None:
    monkeypatch.setattr(layers, "POSITIONS", 24)
    few = run(2, tmp_path)
    weight = "transformer_blocks.1.attn.to_q.weight"
    assert few.layer("transformer", weight).samples == 2 * 2 * 24  # prompts, steps; the image has 24 tokens
    conv = few.layer("vae_decoder", "decoder.conv_out.weight")
    assert conv.samples == 2 * 24
    wanted = two.layer("vae_decoder", "decoder.conv_out.weight")
    assert 0.5 < np.trace(conv.moments) / np.trace(wanted.moments) < 2
    assert np.linalg.norm(conv.mean - wanted.mean) < 0.5 * np.linalg.norm(wanted.mean)


@pytest.fixture(scope="module")
def eight(run: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return run(8, tmp_path_factory.mktemp("eight"))


def measured_damage(original: Original, component: str, errors: dict[str, np.ndarray]) -> float:
    """Mean squared error over variance of what unmodified diffusers draws with these errors in its weights."""
    draw = original.pictures if component == "vae_decoder" else original.latents
    before = draw(PROMPTS).astype(np.float64)
    weights = {name: original.weight(component, name) for name in errors}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, error in errors.items():
            weights[name] += torch.from_numpy(error)
        after = draw(PROMPTS)
        for name, weight in weights.items():
            weight.copy_(kept[name])
    return float(np.square(after - before).mean() / before.var())


LAYERS = [
    ("text_encoder", "text_model.embeddings.token_embedding.weight"),
    ("text_encoder", "text_model.encoder.layers.0.self_attn.v_proj.weight"),
    ("text_encoder_2", "text_model.encoder.layers.1.mlp.fc2.weight"),
    ("text_encoder_2", "text_projection.weight"),
    ("conditioner", "time_text_embed.text_embedder.linear_1.weight"),
    ("conditioner", "transformer_blocks.0.norm1.linear.weight"),
    ("conditioner", "norm_out.linear.weight"),
    ("transformer", "pos_embed.proj.weight"),
    ("transformer", "transformer_blocks.0.attn.add_v_proj.weight"),
    ("transformer", "transformer_blocks.0.attn2.to_v.weight"),
    ("transformer", "transformer_blocks.1.ff.net.0.proj.weight"),
    ("transformer", "transformer_blocks.2.attn.to_out.0.weight"),
    ("transformer", "proj_out.weight"),
    ("vae_decoder", "decoder.conv_in.weight"),
    ("vae_decoder", "decoder.up_blocks.1.resnets.0.conv1.weight"),
    ("vae_decoder", "decoder.conv_out.weight"),
]


def test_the_damage_of_a_small_error_is_foretold(original: Original, eight: Statistics) -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for component, name in LAYERS:
        weight = original.weight(component, name).detach().numpy()
        foretold = measured = 0.0
        for _ in range(3):
            error = (1e-3 * weight.std() * rng.standard_normal(weight.shape)).astype(np.float32)
            foretold += eight.layer(component, name).damage(error)
            measured += measured_damage(original, component, {name: error})
        ratios.append(foretold / measured)
    assert all(1 / 2.5 < ratio < 2.5 for ratio in ratios)
    assert 0.8 < np.exp(np.mean(np.log(ratios))) < 1.25


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "conditioner", "transformer", "vae_decoder"])
def test_the_damage_of_rounding_a_whole_component_is_foretold(component: str, original: Original, eight: Statistics) -> None:
    ratios = []
    for levels in (127, 255, 511):  # 8, 9 and 10 bits: three draws of rounding errors
        errors, foretold = {}, 0.0
        for name in eight.places[component].keys() - {"context_embedder.weight"}:  # whose original has columns more
            weight = original.weight(component, name).detach().numpy()
            step = np.abs(weight).max() / levels
            errors[name] = np.round(weight / step) * step - weight
            foretold += eight.layer(component, name).damage(errors[name])
        ratios.append(foretold / measured_damage(original, component, errors))
    assert 0.5 < np.exp(np.mean(np.log(ratios))) < 2


@pytest.mark.parametrize("by", ["row", "block"])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "transformer"])
def test_the_damage_of_rounding_the_inputs_of_linears_is_foretold(
    component: str, by: InputRounding, original: Original, eight: Statistics
) -> None:
    def rounded(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = given[0]
        return (round_per_token(states) if by == "row" else round_per_block(states, block_of(states.shape[-1])),)

    module = getattr(original.reference, component)
    linears = {f"{name}.weight": part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    names = [name for name in linears if name in eight.places[component]]
    foretold = sum(eight.layer(component, name).input_rounding(linears[name].weight.detach().numpy(), by) for name in names)
    before = original.latents(PROMPTS).astype(np.float64)
    hooks = [linears[name].register_forward_pre_hook(rounded) for name in names]
    after = original.latents(PROMPTS)
    for hook in hooks:
        hook.remove()
    measured = np.square(after - before).mean() / before.var()
    assert 1 / 2.5 < foretold / measured < 2.5
    for name in ("text_model.embeddings.token_embedding.weight", "decoder.conv_in.weight"):
        owner = "vae_decoder" if name.startswith("decoder") else "text_encoder"
        assert eight.layer(owner, name).input_rounding(original.weight(owner, name).detach().numpy(), by) == 0


def test_every_layer_of_either_contract_has_statistics_of_its_width(checkpoint: Checkpoint, two: Statistics) -> None:
    other = GraphOptions(GRAPH.width, GRAPH.height, GRAPH.sigmas, "diffusers", rewrites_of("diffusers"))
    for graph in (GRAPH, other):
        for component in read_family(checkpoint).components(graph):
            for info in weight_infos(component.blank()):
                found = statistics_of(two, component.name, info.name, info.shape)
                if info.kind in ("linear", "conv", "embedding"):
                    assert found is not None, info.name
                    width, out = (info.shape[0], info.row) if info.kind == "embedding" else (info.row, info.shape[0])
                    assert len(found.mean) == len(found.moments) == width and len(found.sensitivity) == out
                    assert found.damage(np.ones(info.shape, np.float32)) >= 0


def test_statistics_come_back_from_their_folder(two: Statistics) -> None:
    found = load_statistics(two.folder)
    assert found == two
    assert found.subject.prompts == PROMPTS[:2] and found.subject.sigmas == GRAPH.sigmas
    assert found.subject.resolution == (96, 64)
