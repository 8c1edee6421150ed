"""Figures that are made of verdicts: here of verdicts that are known."""

from __future__ import annotations

from distill.captions import held_out
from distill.evaluation import KINDS, adherence_by_kind
from distill.scorer import Verdict

CAPTIONS = [caption for _, caption in held_out()]


def test_adherence_by_kind_is_of_that_kind_alone() -> None:
    """Every second picture above another adheres, and every picture of another kind."""
    above = [caption for caption in CAPTIONS if caption.facts.relation == "above"]
    wrong = {caption.text for caption in above[::2]}
    kinds = adherence_by_kind(CAPTIONS, [Verdict({"count": True, "shape": c.text not in wrong}) for c in CAPTIONS])
    assert tuple(kinds) == KINDS and sum(kind.captions for kind in kinds.values()) == len(CAPTIONS)
    assert kinds["above"].captions == len(above)
    assert kinds["above"].adherence == (len(above) - len(wrong)) / len(above)
    assert all(kind.adherence == 1 for name, kind in kinds.items() if name != "above")


def test_a_kind_without_captions_has_no_entry() -> None:
    below = [caption for caption in CAPTIONS if caption.facts.relation == "below"]
    assert list(adherence_by_kind(below, [Verdict({"count": True})] * len(below))) == ["below"]
