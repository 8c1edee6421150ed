"""A byte-pair vocabulary of CLIP's size and layout, made by rule: 512 byte symbols, 48,894 merges, two specials.

First what byte-pair training learns of `WORDS`, so that a word of an ordinary caption is about one token, as with CLIP's own;
then every pair of letters, within a word and at its end; then pairs of those pairs in the order of English letter frequency,
until the vocabulary is full. A merge comes after both of its parts and makes a piece that no earlier one made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from pathlib import Path

from benchmarks.full_size.models import POSITIONS, VOCABULARY
from runtimes.tokenizer import END_OF_WORD, byte_alphabet, merge

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = VOCABULARY - 512 - 2
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
WORDS = tuple(
    """
a an the and or of in on at to by with from over under behind beside near into through between above below against
is are has one two three four five many some no its his her their this that very
photo photograph picture painting drawing illustration portrait watercolor oil sketch render film poster close up
wide angle shot red orange yellow green blue purple pink brown black white grey gold silver dark light bright pale warm cold
soft small large big tiny huge tall long old young new ancient modern empty quiet busy wooden glass stone metal paper golden
man woman child girl boy person people face hand hands eyes hair hat coat dress suit crowd
cat dog horse bird fish fox owl lion tiger bear rabbit elephant butterfly dragon whale
house city street road bridge tower castle village garden park forest mountain river lake sea ocean beach desert island sky
cloud clouds sun moon star stars night day morning evening sunset sunrise rain snow fog mist storm winter summer autumn spring
tree trees flower flowers grass leaf leaves rock water fire smoke ice sand wind
wagon train boat ship bicycle airplane rocket robot astronaut table chair window door lamp book cup bowl bottle bread fruit
apple detailed realistic cinematic dramatic colorful minimal vintage style lighting background foreground reflection shadow
texture standing sitting running walking flying floating reading looking holding wearing covered filled surrounded glowing
""".split()  # noqa: SIM905 (a list of them would be 200 lines)
)


@cache
def merges() -> tuple[tuple[str, str], ...]:
    """The pairs by rank."""
    symbols = byte_alphabet()
    made = {*symbols, *(symbol + END_OF_WORD for symbol in symbols)}
    found: list[tuple[str, str]] = []
    for pair in _candidates():
        joined = "".join(pair)
        if joined not in made:
            made.add(joined)
            found.append(pair)
            if len(found) == MERGES:
                return tuple(found)
    raise AssertionError("too few pairs")


def _candidates() -> Iterator[tuple[str, str]]:
    words = [[*word[:-1], word[-1] + END_OF_WORD] for word in WORDS]
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        yield best
        words = [merge(word, {best: 0}) for word in words]
    pairs = ["".join(pair) for pair in product(LETTERS, repeat=2)]
    for pair in pairs:
        yield pair[0], pair[1]
        yield pair[0], pair[1] + END_OF_WORD
    for first, second in product(pairs, repeat=2):
        yield first, second
        yield first, second + END_OF_WORD


def vocabulary() -> dict[str, int]:
    """Piece to id: "!" is 0, the end of text the highest, as in CLIP."""
    symbols = sorted(byte_alphabet())
    pieces = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *("".join(pair) for pair in merges()), START, END]
    return {piece: number for number, piece in enumerate(pieces)}


def write_tokenizer(folder: Path, pad: str) -> None:
    """vocab.json, merges.txt and tokenizer_config.json, with SD3's rules; `pad` is the end of text, or "!"."""
    ids = vocabulary()
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(ids[text]): {"content": text, "normalized": True, **flags} for text in (START, END)}
    if pad not in (START, END):
        added[str(ids[pad])] = {"content": pad, "normalized": False, **flags}
    config = {
        "added_tokens_decoder": added,
        "bos_token": START,
        "eos_token": END,
        "model_max_length": POSITIONS,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
