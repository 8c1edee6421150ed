"""Plans, the choice under a budget, and carrying a recipe out, on real components."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.components.component import Component
from export.compression import allocation, schemes
from export.compression.compress import mean_bits, store, with_stored
from export.compression.rounding import round_weights
from export.compression.schemes import FloatScheme, IntegerScheme, PaletteScheme, Scheme
from export.describing import describe_scheme, scheme_uses
from export.errors import UserError
from tests.export.small_components import conditioner, decoder, encoder, seeded, stored_by, stored_by_plan

BACKENDS = ("coreml", "onnx", "executorch")


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("bits", [16, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_expected_bytes_from_shapes_bound_what_is_stored(backend: str, bits: int, make: Callable[[], Component]) -> None:
    component = make()
    module = seeded(component)
    plan = schemes.plan(schemes.weight_infos(component.blank()), backend, bits)
    stored = stored_by(plan, module, backend)
    total = sum(weight.nbytes for weight in stored.values())
    assert set(stored) == {name for name, _ in module.named_parameters()}
    assert total <= plan.expected_bytes()
    if len(plan.settled) == len(plan.candidates):
        assert total == plan.expected_bytes()


@pytest.mark.parametrize("backend", ("onnx", "executorch"))
def test_six_bits_on_android_mix_four_and_eight_within_the_mean(backend: str) -> None:
    component = encoder()
    module = seeded(component)
    plan = schemes.plan(schemes.weight_infos(component.blank()), backend, 6)
    stored = stored_by(plan, module, backend)
    assert mean_bits({info.name: stored[info.name] for info in plan.undecided}) <= 6.0
    assert len({stored[info.name].bits for info in plan.undecided}) == 2


def test_small_first_and_last_tensors_stay_at_higher_precision() -> None:
    infos = schemes.weight_infos(decoder().blank())
    eight = schemes.plan(infos, "coreml", 8).settled
    six = schemes.plan(infos, "coreml", 6).settled
    assert eight["decoder.up_blocks.0.resnets.0.conv1.weight"] == PaletteScheme(8)
    assert six["decoder.up_blocks.0.resnets.0.conv1.weight"] == PaletteScheme(6)
    for name in ("decoder.conv_out.weight", "decoder.conv_norm_out.weight", "decoder.conv_in.bias"):
        assert eight[name] == six[name] == FloatScheme(16)
    text = schemes.weight_infos(encoder().blank())
    assert schemes.plan(text, "coreml", 8).settled["text_projection.weight"] == FloatScheme(16)
    assert schemes.plan(text, "coreml", 6).settled["text_projection.weight"] == PaletteScheme(8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_conversion_folds_into_constants_stay_floating_point(backend: str) -> None:
    settled = schemes.plan(schemes.weight_infos(conditioner().blank()), backend, 6).settled
    assert isinstance(settled["time_text_embed.timestep_embedder.linear_1.weight"], FloatScheme)
    positions = schemes.plan(schemes.weight_infos(encoder().blank()), backend, 6).settled
    assert isinstance(positions["text_model.embeddings.position_embedding.weight"], FloatScheme)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([FloatScheme(16), FloatScheme(32), PaletteScheme(3), PaletteScheme(6, 4), PaletteScheme(4, scaled=True),
                        PaletteScheme(8, vector=2), PaletteScheme(6, 2, True, 2), IntegerScheme(8),
                        IntegerScheme(4, 16), IntegerScheme(4, 16, True)]),
       st.integers(1, 4), st.integers(1, 4))
def test_bytes_by_shape_equal_bytes_of_the_stored_weight(scheme: Scheme, rows: int, columns: int) -> None:
    values = np.random.default_rng(0).standard_normal((4 * rows, 16 * columns)).astype(np.float32)
    assert schemes.stored_bytes(scheme, values.shape) == store("w", values, scheme).nbytes


ladders = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 100), st.integers(0, 9)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=60)
@given(ladders, st.integers(0, 200), st.integers(0, 20))
def test_allocation_is_the_best_of_all_within_the_budgets(
    given_ladders: list[list[tuple[int, float, int]]], spare: int, work: int
) -> None:
    choices = [[*ladder, (min(nbytes for nbytes, _, _ in ladder), 200.0, 0)] for ladder in given_ladders]  # one of no work
    scheme = IntegerScheme(8)
    candidates = {n: [allocation.Candidate(scheme, *option) for option in ladder] for n, ladder in enumerate(choices)}
    budget = sum(min(nbytes for nbytes, _, _ in ladder) for ladder in choices) + spare
    chosen = allocation.allocate(candidates, budget, work)
    assert sum(option.nbytes for option in chosen.values()) <= budget
    assert sum(option.work for option in chosen.values()) <= work
    within = [c for c in itertools.product(*choices) if sum(o[0] for o in c) <= budget and sum(o[2] for o in c) <= work]
    best = min(sum(loss for _, loss, _ in c) for c in within)
    assert sum(option.loss for option in chosen.values()) <= best + 1e-3 * (best + 1)


def test_allocation_refuses_a_budget_that_not_even_the_least_fit() -> None:
    with pytest.raises(UserError, match="a budget of 99 bytes is too small: the least these weights take is 100"):
        allocation.allocate({"w": [allocation.Candidate(IntegerScheme(8), 100, 1.0)]}, 99)


def test_compressed_reference_holds_the_decompressed_weights_and_shares_the_rest() -> None:
    module = seeded(encoder())
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    stored = round_weights(dict(module.named_parameters()), {name: PaletteScheme(2)})
    reference = with_stored(module, stored)
    np.testing.assert_array_equal(reference.get_parameter(name).numpy(), stored[name].dequantize())
    assert len(torch.unique(reference.get_parameter(name))) == 4
    assert len(torch.unique(module.get_parameter(name))) > 4
    other = "text_model.encoder.layers.1.mlp.fc1.weight"
    assert reference.get_parameter(other).data_ptr() == module.get_parameter(other).data_ptr()
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_every_form_of_palette_has_words_of_its_own() -> None:
    values = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    words = {describe_scheme(PaletteScheme(4, group, scaled, vector)) for group in (None, 8) for scaled in (False, True)
             for vector in (1, 2)}
    assert len(words) == 8
    assert describe_scheme(PaletteScheme(8, 16, True, 2)) == "palette 8 bit, 2 weights an entry, groups of 16, a scale a row"
    (use,) = scheme_uses("transformer", "coreml", {"w": store("w", values, PaletteScheme(8, 8, True, 2))})
    assert use.scheme == "palette 8 bit, 2 weights an entry, 2 groups, a scale a row"


def test_damaged_weights_and_foreign_recipes_are_refused_by_name() -> None:
    module = seeded(encoder())
    with pytest.raises(UserError, match=r"the recipe names blocks\.9\.weight, which the model does not have"):
        round_weights(dict(module.named_parameters()), {"blocks.9.weight": FloatScheme(16)})
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(UserError, match=f"{name}.*blocks of 48 do not divide 64 inputs"):
        round_weights(dict(module.named_parameters()), {name: IntegerScheme(4, 48)})
    module.get_parameter(name)[0, 0] = 1e6
    with pytest.raises(UserError, match=rf"{name} holds 1e\+06, more than float16 can"):
        round_weights(dict(module.named_parameters()), {name: PaletteScheme(6)})
    module.get_parameter(name)[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        round_weights(dict(module.named_parameters()), {name: PaletteScheme(6)})


def test_six_bit_palettes_keep_thirty_decibels_of_a_weight() -> None:
    component = encoder()
    module = seeded(component)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    weight = stored_by_plan(component, module, "coreml", 6)[name]
    original = module.get_parameter(name).numpy()
    assert np.square(weight.dequantize() - original).sum() <= 1e-3 * np.square(original).sum()
