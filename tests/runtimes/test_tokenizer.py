"""The tokenizer against transformers' CLIPTokenizer, on text of every kind and on every folder layout."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from runtimes.tokenizer import SpecialToken, Tokenizer, TokenizerError, TokenizerRules, byte_alphabet

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32
MERGES = [
    *("t h", "th e</w>", "c a", "ca t</w>", "r e", "r e</w>", "re d</w>", "s q", "sq u", "squ a", "squa re</w>", "a n", "i n"),
    *("n g</w>", "i ng</w>", "' s</w>", "' r", "! !</w>", "! !", "!! !</w>", "o n", "Ã ©", "ã ģ", "ð Ł", "ðŁ ĺ", "< |", "<| e"),
]
TEXTS = [
    "",
    "   ",
    "the cat",
    "A red SQUARE  on\ta\nblue circle!!!",
    "it's they're I'M we'd'd ''s '' 's",
    "<|endoftext|> x<|EndOfText|>!! <|startoftext|>!",
    "<|StartOfText|>s<|endoftext|",
    "Ärger e\u0301 É İ ΑΣ ς ß ﬁ",
    "2024½ ³ Ⅷ 四 ٣",
    "😀👩‍🚀 ☂️ naïve — “quoted”…",
    "\x1c\x1d\x85\u2003\u200b\ufeff\x00x",
    "e" * 300 + " " + "the " * 100,
]
TEXT = st.one_of(
    st.text(st.characters(blacklist_categories=("Cs", "Cn")), max_size=60),
    st.text("tHecasqurdin'!<|>é😀 \t2", max_size=80),
    st.lists(st.sampled_from([*TEXTS, *(m.replace(" ", "").replace("</w>", " ") for m in MERGES)]), max_size=8).map("".join),
)


def vocabulary() -> dict[str, int]:
    """ "!" is id 0, as in CLIP, because the byte alphabet is ordered with the printable characters first."""

    letters = sorted(byte_alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in MERGES), BOS, EOS]
    return {piece: index for index, piece in enumerate(pieces)}


@pytest.fixture(scope="module", params=[EOS, "!"], ids=["pads with eos", "pads with !"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Stable Diffusion 3's: vocab.json, merges.txt, and normalized bos and eos in tokenizer_config.json."""
    path = tmp_path_factory.mktemp("tokenizer")
    ids = vocabulary()

    def added(text: str, normalized: bool) -> dict:
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
        return {"content": text, "normalized": normalized, **flags}

    tokens = {str(ids[t]): added(t, normalized=True) for t in (BOS, EOS)}
    if request.param == "!":
        tokens["0"] = added("!", normalized=False)
    config = {
        "added_tokens_decoder": tokens,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": request.param,
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    (path / "vocab.json").write_text(json.dumps(ids))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(m for m in MERGES) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Tokenizer, CLIPTokenizer]:
    return Tokenizer.from_checkpoint(folder), CLIPTokenizer.from_pretrained(str(folder))


def theirs(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, padding="max_length", max_length=LENGTH, truncation=True).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_chosen_texts_tokenize_as_in_transformers(both: tuple[Tokenizer, CLIPTokenizer], text: str) -> None:
    ours, reference = both
    ids = ours(text)
    assert ids.dtype == np.int32 and ids.shape == (1, LENGTH)
    assert ids[0].tolist() == theirs(reference, text)
    assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_any_text_tokenizes_as_in_transformers(both: tuple[Tokenizer, CLIPTokenizer], text: str) -> None:
    ours, reference = both
    assert ours(text)[0].tolist() == theirs(reference, text)


def test_every_assigned_character_tokenizes_as_in_transformers(both: tuple[Tokenizer, CLIPTokenizer]) -> None:
    """Alone, between letters and after punctuation; ideographs and Hangul, all alike, are sampled."""
    ours, reference = both
    points = [p for p in range(sys.maxunicode) if unicodedata.category(chr(p)) not in ("Cn", "Cs", "Co")]
    points = [p for p in points if p < 0x3400 or p > 0x2FFFF or p % 16 == 0 or 0xA000 <= p < 0xAC00 or 0xD7A4 <= p < 0x1B000]
    texts = ["".join(f"a{chr(p)}b!{chr(p)}" for p in points[start : start + 50]) for start in range(0, len(points), 50)]
    for text, ids in zip(texts, reference(texts, add_special_tokens=False).input_ids, strict=True):
        if ours.encode(text) != ids:
            single = [f"a{c}b!{c}" for c in text]
            wrong = [t for t in single if ours.encode(t) != reference(t, add_special_tokens=False).input_ids]
            pytest.fail(f"differs on {[hex(ord(t[1])) for t in wrong]}")


def test_folder_saved_by_transformers_gives_the_same_ids(both: tuple[Tokenizer, CLIPTokenizer], tmp_path: Path) -> None:
    """transformers 5 saves tokenizer.json and no vocab.json."""
    both[1].save_pretrained(str(tmp_path))
    ours, reference = Tokenizer.from_checkpoint(tmp_path), CLIPTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert ours(text)[0].tolist() == theirs(reference, text)


def test_tokenizer_built_without_a_folder_finds_special_tokens_only_as_written(tmp_path: Path) -> None:
    merges = [tuple(m.split()) for m in MERGES]
    reference = CLIPTokenizer(vocab=vocabulary(), merges=merges, pad_token="!", model_max_length=LENGTH)
    reference.save_pretrained(str(tmp_path))
    ours = Tokenizer.from_checkpoint(tmp_path)
    for text in TEXTS:
        assert ours(text)[0].tolist() == theirs(reference, text)


def test_saved_vocabulary_and_merges_load_again_with_the_rules(both: tuple[Tokenizer, CLIPTokenizer], tmp_path: Path) -> None:
    ours = both[0]
    ours.save(tmp_path)
    rules = TokenizerRules.model_validate_json(ours.rules.model_dump_json())
    again = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", rules)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text)


def test_symbol_outside_the_vocabulary_becomes_the_unknown_token() -> None:
    small = {"a": 0, "a</w>": 1, "b": 2, BOS: 3, EOS: 4}
    reference = CLIPTokenizer(vocab=small, merges=[], model_max_length=8)
    special = tuple(SpecialToken(text=t, id=small[t], normalized=False) for t in (BOS, EOS))
    ours = Tokenizer(small, [], TokenizerRules(max_length=8, bos=3, eos=4, pad=4, unknown=4, special=special))
    for text in ("aab", "ab a", "xyz"):
        assert ours(text)[0].tolist() == reference(text, padding="max_length", max_length=8).input_ids


def test_unusable_folders_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na zzz\n")
    (tmp_path / "vocab.json").write_text("{broken")
    with pytest.raises(TokenizerError, match=r"vocab\.json cannot be read"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "vocab.json").write_text((folder / "vocab.json").read_text())
    with pytest.raises(TokenizerError, match="merge 'a zzz' does not fit"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))
    with pytest.raises(TokenizerError, match="bos_token '<bos>' is not in the vocabulary"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    with pytest.raises(TokenizerError, match="model_max_length"):
        Tokenizer.from_checkpoint(tmp_path)
