"""The scorer against pictures whose content is known: true renderings, and those of other captions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from distill.captions import describe, held_out, is_held_out, training_scenes
from distill.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, Thing, render, sample_scene
from distill.scorer import features, frechet_distance, judge

CASES = held_out()[::4]


def test_true_renderings_adhere() -> None:
    verdicts = [judge(render(scene), caption.facts).adheres for scene, caption in CASES]
    assert np.mean(verdicts) >= 0.99


def test_renderings_of_other_captions_do_not_adhere() -> None:
    shifted = [*CASES[1:], CASES[0]]
    verdicts = [judge(render(other), caption.facts).adheres for (other, _), (_, caption) in zip(shifted, CASES, strict=True)]
    assert np.mean(verdicts) <= 0.01


def test_one_changed_trait_is_noticed() -> None:
    rng = np.random.default_rng(3)
    for scene, caption in CASES[:40]:
        first = scene.things[0]
        used = {thing.colour for thing in scene.things}
        other_colour = next(c for c in COLOURS if c not in used)
        other_shape = SHAPES[(SHAPES.index(first.shape) + 1 + int(rng.integers(4))) % len(SHAPES)]
        for changed in (dataclasses.replace(first, colour=other_colour), dataclasses.replace(first, shape=other_shape)):
            if changed.shape != first.shape or changed.colour != first.colour:
                wrong = dataclasses.replace(scene, things=(changed, *scene.things[1:]))
                assert not judge(render(wrong), caption.facts).adheres, caption.text


def test_a_missing_thing_is_noticed() -> None:
    pairs = [(scene, caption) for scene, caption in CASES if len(scene.things) == 2][:30]
    for scene, caption in pairs:
        alone = dataclasses.replace(scene, things=scene.things[:1])
        assert not judge(render(alone), caption.facts).checks["count"]


@pytest.mark.parametrize("kind", ["plain", "noise"])
def test_a_picture_of_nothing_adheres_to_nothing(kind: str) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    picture = np.full((128, 128, 3), 240, np.uint8) if kind == "plain" else noise
    assert not any(judge(picture, caption.facts).adheres for _, caption in CASES[:20])


def test_noise_within_what_a_decoder_adds_does_not_change_the_verdict() -> None:
    rng = np.random.default_rng(1)
    verdicts = []
    for scene, caption in CASES[:60]:
        noisy = np.clip(render(scene) + rng.normal(0, 4, (128, 128, 3)), 0, 255).astype(np.uint8)
        verdicts.append(judge(noisy, caption.facts).adheres)
    assert np.mean(verdicts) >= 0.95


def test_frechet_distance_is_zero_for_equal_sets_and_grows_with_a_shift() -> None:
    pictures = [render(scene) for scene, _ in CASES]
    own = features(pictures)
    assert frechet_distance(own, own) == pytest.approx(0, abs=1e-5)
    darker = features([(p * 0.8).astype(np.uint8) for p in pictures])
    darkest = features([(p * 0.5).astype(np.uint8) for p in pictures])
    assert 0.01 < frechet_distance(darker, own) < frechet_distance(darkest, own)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, (200_000, 2)), rng.normal([1, 2], [2, 3], (200_000, 2))
    expected = 1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2  # |mean|^2 + sum of (standard deviation differences)^2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)


def test_scenes_have_the_promised_variety() -> None:
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng) for _ in range(2000)]
    things: list[Thing] = [thing for scene in scenes for thing in scene.things]
    assert {t.shape for t in things} == set(SHAPES) and {t.colour for t in things} == set(COLOURS)
    assert {t.size for t in things} == {"small", "large"} and {t.outlined for t in things} == {True, False}
    assert {s.relation for s in scenes} - {None} == set(RELATIONS)
    assert {c for s in scenes for c in s.background} == set(BACKGROUNDS)
    assert {len(s.things) for s in scenes} == {1, 2}


def test_held_out_combinations_never_occur_in_training() -> None:
    kept: set[tuple[str, ...]] = {scene.combination for scene, _ in held_out()}
    assert len(held_out()) >= 500 and len({caption.text for _, caption in held_out()}) == len(held_out())
    rng = np.random.default_rng(6)
    trained: list[Scene] = [scene for _, scene in zip(range(3000), training_scenes(rng), strict=False)]
    assert kept.isdisjoint(scene.combination for scene in trained)
    assert not any(is_held_out(scene) for scene in trained)


def test_captions_state_only_facts_of_the_scene() -> None:
    rng = np.random.default_rng(7)
    for _ in range(300):
        scene = sample_scene(rng)
        facts = describe(scene, rng).facts
        true = {(t.shape, t.colour) for t in scene.things}
        assert {(t.shape, t.colour) for t in facts.things} == true
        assert facts.position in (None, scene.position)
        assert facts.background in (None, scene.background)
