"""CLIP's byte-pair tokenizer from vocab.json and merges.txt, equal to transformers' CLIPTokenizer; no other library needed.

Text to ids: special tokens are cut out first, the rest is NFC-normalized, lower-cased, split into words,
each word written as bytes in a printable alphabet with "</w>" on its last letter, and merged pair by pair by rank.
The ids stand between bos and eos, are cut to `max_length` (eos stays last) and padded: CLIP-L with eos, CLIP-G with "!".
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

END_OF_WORD = "</w>"
WHOLE_WORDS = ("<|startoftext|>", "<|endoftext|>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# Unicode's White_Space property. str.isspace() would add the separators 0x1C to 0x1F.
BLANKS = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(point) for point in range(0x2000, 0x200B)}


class TokenizerError(Exception):
    """A tokenizer folder that cannot be used; the message is the one line that the user sees."""


class SpecialToken(BaseModel):
    """A token found in the text itself before any word is split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    id: int = Field(ge=0)
    normalized: bool = Field(description="searched in the normalized (lower-cased) text, after those that are not")


class TokenizerRules(BaseModel):
    """Everything about a CLIP tokenizer that vocab.json and merges.txt do not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_length: int = Field(ge=2, description="tokens of every prompt, bos, eos and padding included")
    bos: int = Field(ge=0)
    eos: int = Field(ge=0)
    pad: int = Field(ge=0)
    unknown: int = Field(ge=0, description="id of a symbol that is not in the vocabulary")
    special: tuple[SpecialToken, ...] = ()


class Tokenizer:
    """Prompt -> ids."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], rules: TokenizerRules) -> None:
        self.vocabulary = vocabulary
        self.merges = merges
        self.rules = rules
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._exact = _finder({t.text: t.id for t in rules.special if not t.normalized})
        self._normalized = _finder({_normalize(t.text): t.id for t in rules.special if t.normalized})
        self._words: dict[str, list[int]] = {}

    @classmethod
    def from_files(cls, vocabulary: Path, merges: Path, rules: TokenizerRules) -> Tokenizer:
        """From a bundle's vocab.json and merges.txt."""
        return cls(*_read_pair(vocabulary, merges), rules)

    @classmethod
    def from_checkpoint(cls, folder: Path, max_length: int | None = None) -> Tokenizer:
        """From a checkpoint's folder (vocab.json and merges.txt, or tokenizer.json alone), rules included.

        `max_length` replaces the folder's own model_max_length.
        """
        vocabulary, merges = _read_vocabulary(folder)
        return cls(vocabulary, merges, _read_rules(folder, vocabulary, max_length))

    def save(self, folder: Path) -> None:
        """Writes vocab.json (in order of id) and merges.txt, the two files that the apps read."""
        folder.mkdir(parents=True, exist_ok=True)
        ordered = dict(sorted(self.vocabulary.items(), key=lambda entry: entry[1]))
        (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{first} {second}" for first, second in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __call__(self, text: str) -> np.ndarray:
        """int32 [1, max_length]."""
        rules = self.rules
        ids = [rules.bos, *self.encode(text)[: rules.max_length - 2], rules.eos]
        return np.array([ids + [rules.pad] * (rules.max_length - len(ids))], dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Every id of the text, without bos, eos, truncation and padding."""
        ids: list[int] = []
        for raw in self._exact(text):
            if isinstance(raw, int):
                ids.append(raw)
                continue
            for part in self._normalized(_normalize(raw)):
                if isinstance(part, int):
                    ids.append(part)
                else:
                    ids.extend(token for word in split_words(part) for token in self._word(word))
        return ids

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            alphabet = byte_alphabet()
            letters = [alphabet[byte] for byte in word.encode("utf-8", errors="surrogatepass")]
            letters[-1] += END_OF_WORD
            self._words[word] = [self.vocabulary.get(piece, self.rules.unknown) for piece in merge(letters, self._ranks)]
        return self._words[word]


def split_words(text: str) -> Iterator[str]:
    """The matches of CLIP's pattern <|startoftext|>|<|endoftext|>|'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}]+.

    A literal <|endoftext|> is then split once more, into "<|", "endoftext" and "|>", by the byte-level splitter that follows.
    """
    position = 0
    while position < len(text):
        whole = next((word for word in WHOLE_WORDS if text.startswith(word, position)), None)
        kind = _kind(text[position])
        stop = position + 1
        if whole is not None:
            stop = position + len(whole)
        elif kind in "LO":
            while stop < len(text) and _kind(text[stop]) == kind:
                stop += 1
        if whole is not None and whole.startswith("<|"):
            yield from ("<|", whole[2:-2], "|>")
        elif kind != "S":
            yield text[position:stop]
        position = stop


def merge(letters: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Joins neighbours, the pair of the lowest rank first (all its occurrences from the left), until no pair has a rank."""
    pieces = letters
    while len(pieces) > 1:
        pairs = [pair for pair in pairwise(pieces) if pair in ranks]
        if not pairs:
            break
        best = min(pairs, key=ranks.__getitem__)
        joined, index = [], 0
        while index < len(pieces):
            width = 2 if tuple(pieces[index : index + 2]) == best else 1
            joined.append("".join(pieces[index : index + width]))
            index += width
        pieces = joined
    return pieces


@cache
def byte_alphabet() -> tuple[str, ...]:
    """A printable character for each of the 256 bytes (GPT-2's): printable Latin-1 is itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def _kind(character: str) -> str:
    """L letter, N number, S blank, O any other."""
    if character in BLANKS:
        return "S"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def _normalize(text: str) -> str:
    """NFC, blanks to plain spaces, lower case letter by letter (no final sigma, which str.lower() would make)."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(" " if c in BLANKS else c.lower() for c in composed)


def _finder(tokens: dict[str, int]) -> Callable[[str], Iterator[str | int]]:
    """A function that cuts a text at the given tokens: the ids where they stand, the text between them."""
    if not tokens:
        return lambda text: iter((text,))
    pattern = re.compile("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")")

    def cut(text: str) -> Iterator[str | int]:
        for index, part in enumerate(pattern.split(text)):
            if index % 2:
                yield tokens[part]
            elif part:
                yield part

    return cut


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_pair(folder / "vocab.json", folder / "merges.txt")
    if not (folder / "tokenizer.json").is_file():
        raise TokenizerError(f"{folder} holds no tokenizer: expected vocab.json and merges.txt, or tokenizer.json")
    path = folder / "tokenizer.json"
    model = _read_json(path).get("model", {})
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        raise TokenizerError(f"{path} is no CLIP tokenizer (byte pairs ending in {END_OF_WORD})")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return model["vocab"], _checked(merges, model["vocab"], path)


def _read_pair(vocabulary: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    ids = _read_json(vocabulary)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise TokenizerError(f"{merges} cannot be read: {error}") from error
    return ids, _checked([line.split(" ") for line in lines if line and not line.startswith("#version")], ids, merges)


def _checked(merges: list[list[str]], vocabulary: dict[str, int], path: Path) -> list[tuple[str, str]]:
    for merge in merges:
        if len(merge) != 2 or "".join(merge) not in vocabulary:
            raise TokenizerError(f"{path}: merge {' '.join(merge)!r} does not fit the vocabulary")
    return [(first, second) for first, second in merges]


def _read_rules(folder: Path, vocabulary: dict[str, int], max_length: int | None) -> TokenizerRules:
    """bos, eos, pad and special tokens as transformers understands the same folder."""
    config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    whole = _read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    added = {entry["content"]: entry for entry in whole.get("added_tokens", [])}
    added |= {entry["content"]: {**entry, "id": int(key)} for key, entry in config.get("added_tokens_decoder", {}).items()}
    ids = vocabulary | {text: entry["id"] for text, entry in added.items()}

    def token(role: str, default: str) -> str:
        value = config.get(role, default)
        text = value["content"] if isinstance(value, dict) else value
        if text not in ids:
            raise TokenizerError(f"{folder}: {role} {text!r} is not in the vocabulary")
        return text

    roles = {role: token(role, default) for role, default in _ROLES.items()}
    for text, entry in added.items():
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise TokenizerError(f"{folder}: special token {text!r} uses lstrip, rstrip or single_word, which CLIP's never do")
    special = {text: added.get(text, {}).get("normalized", False) for text in (*added, *roles.values())}
    length = max_length if max_length is not None else config.get("model_max_length", 77)
    if not 2 <= length <= 4096:
        raise TokenizerError(f"{folder}: model_max_length is {length}; expected the text encoder's positions, for CLIP 77")
    return TokenizerRules(
        max_length=length,
        bos=ids[roles["bos_token"]],
        eos=ids[roles["eos_token"]],
        pad=ids[roles["pad_token"]],
        unknown=ids[roles["unk_token"]],
        special=tuple(SpecialToken(text=t, id=ids[t], normalized=special[t]) for t in sorted(special, key=lambda t: ids[t])),
    )


_ROLES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds no JSON object")
    return value
