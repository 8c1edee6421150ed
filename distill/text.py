"""The text encoders: two `CLIPTextModelWithProjection` of different widths, with tokenizers in CLIP's own format.

The vocabulary is byte-pair encoding (Sennrich et al. 2016) trained on captions and laid out as CLIP lays it out: 256 byte
symbols, the same with `</w>`, the merges, start and end. The encoders learn to tell the facts of the scene behind a
caption from what the transformer will see of them: the pooled projection and the penultimate hidden state at the end
of text. Held-out combinations never occur here either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from distill.captions import Caption, Facts, describe, training_scenes
from distill.loop import Run, cosine, set_rate, step_all, train
from distill.muon import Muon, split_parameters
from distill.scenes import BACKGROUNDS, COLOURS, INVERSE, POSITIONS, SHAPES
from distill.settings import Settings

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own split (openai/CLIP, simple_tokenizer.py)
)


@dataclass
class TextEncoders:
    """Both tokenizers and encoders; `embed` gives what diffusers gives the transformer, the 256 null tokens folded into one."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]
    joint_dim: int

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """int64 [batch, positions] of each tokenizer."""
        first, second = (
            t(texts, padding="max_length", truncation=True, max_length=t.model_max_length, return_tensors="pt").input_ids
            for t in self.tokenizers
        )
        return first, second

    def embed(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Context [batch, positions + 1, joint_dim] (last: one null token) and pooled [batch, width 1 + width 2]."""
        hidden, pooled = [], []
        for encoder, ids in zip(self.encoders, self.tokens(texts), strict=True):
            out = encoder(ids.to(encoder.device), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        context = torch.cat(hidden, -1)
        return nn.functional.pad(context, (0, self.joint_dim - context.shape[-1], 0, 1)), torch.cat(pooled, -1)


def fit(run: Run, settings: Settings) -> TextEncoders:
    """Trains tokenizers and encoders, or goes on where they stopped."""
    if run.start is not None:
        return load(run.start, settings, run.accelerator.device)
    torch.manual_seed(run.seed + 1)
    device = run.accelerator.device
    tokenizers = make_tokenizers(run, settings)
    vocabulary = len(tokenizers[0])
    encoders = tuple(
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=settings.text_layers,
                num_attention_heads=width // 64,
                max_position_embeddings=settings.text_positions,
                hidden_act=activation,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=pad,
            )
        ).to(device)
        for width, activation, pad in zip(settings.text_widths, ("quick_gelu", "gelu"), (vocabulary - 1, 0), strict=True)
    )
    heads = nn.ModuleList(
        nn.ModuleDict({place: nn.Linear(width, sum(FACT_SIZES)) for place in ("pooled", "hidden")})
        for width in settings.text_widths
    ).to(device)
    text = TextEncoders(tokenizers, encoders, settings.joint_dim)
    modules = {"text_encoder": encoders[0], "text_encoder_2": encoders[1], "heads": heads}
    everything = nn.ModuleDict(modules)
    matrices, rest = split_parameters(everything, adam=("embedding", "heads"))
    optimizers = {
        "muon": Muon(matrices, settings.text_rate),
        "adam": torch.optim.AdamW(rest, settings.text_rate, betas=(0.9, 0.95)),
    }

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizers, cosine(step, settings.text_steps, settings.text_rate, warmup=100))
        captions = list(islice(_captions(_seed(generator)), settings.text_batch))
        targets = torch.from_numpy(np.stack([fact_labels(c.facts) for c in captions])).to(device)
        loss, right = torch.zeros((), device=device), []
        for encoder, head, ids in zip(encoders, heads, text.tokens([c.text for c in captions]), strict=True):
            ids = ids.to(device)
            with run.accelerator.autocast():
                out = encoder(ids, output_hidden_states=True)
                end = (ids == vocabulary - 1).int().argmax(-1)
                seen = {"pooled": out.text_embeds, "hidden": out.hidden_states[-2][torch.arange(len(ids), device=device), end]}
                logits = {place: head.get_submodule(place)(value).float() for place, value in seen.items()}
            for value in logits.values():
                parts = value.split(FACT_SIZES, -1)
                loss = loss + sum(nn.functional.cross_entropy(p, targets[:, i]) for i, p in enumerate(parts))
                wrong = torch.stack([p.argmax(-1) != targets[:, i] for i, p in enumerate(parts)], 1).any(1)
                right.append(1 - wrong.float().mean().item())
        run.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        step_all(optimizers)
        return {"loss": loss.item(), "all_right": min(right)}

    train(run, "text", modules, optimizers, step_fn, settings.text_steps)
    for encoder in encoders:
        encoder.eval().requires_grad_(False)
    return text


# What the encoders learn to tell, and how many answers each question has (the last: "not said").
FACT_SIZES = [2, *([len(SHAPES) + 1, len(COLOURS) + 1, 3, 3] * 2), 4, len(POSITIONS) + 1, *([len(BACKGROUNDS) + 1] * 2)]


def fact_labels(facts: Facts) -> np.ndarray:
    """One label for each question of FACT_SIZES: int64. Pairs are told left, upper or front thing first."""
    things, relation = facts.things, facts.relation
    if relation in ("right of", "below"):
        things, relation = things[::-1], INVERSE[relation]
    labels = [len(things) - 1]
    for thing in (*things, None)[:2]:
        if thing is None:
            labels += [len(SHAPES), len(COLOURS), 2, 2]
            continue
        size = 2 if thing.size is None else ("small", "large").index(thing.size)
        outlined = 2 if thing.outlined is None else int(thing.outlined)
        labels += [SHAPES.index(thing.shape), tuple(COLOURS).index(thing.colour), size, outlined]
    labels.append(3 if relation is None else ("left of", "above", "in front of").index(relation))
    labels.append(len(POSITIONS) if facts.position is None else tuple(POSITIONS).index(facts.position))
    for name in facts.background or (None, None):
        labels.append(len(BACKGROUNDS) if name is None else tuple(BACKGROUNDS).index(name))
    return np.array(labels)


def make_tokenizers(run: Run, settings: Settings) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Both tokenizers of a run, trained on first use; they share a vocabulary and differ in how they pad, as SD3's do."""
    first, second = run.folder / "tokenizer", run.folder / "tokenizer_2"
    if not (second / "merges.txt").exists():
        vocabulary, merges = train_vocabulary(c.text for c in islice(_captions(run.seed), settings.vocabulary_captions))
        for folder in (first, second):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return tuple(
        CLIPTokenizer.from_pretrained(str(folder), pad_token=pad, model_max_length=settings.text_positions)
        for folder, pad in ((first, END), (second, "!"))
    )


def train_vocabulary(texts: Iterator[str], merges: int = 512) -> tuple[dict[str, int], list[str]]:
    """CLIP's vocab.json and the lines of merges.txt for these texts."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    symbols = _byte_symbols()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(symbols) + merges, initial_alphabet=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((t.lower() for t in texts), trainer)
    pairs = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(p.split(" ")) for p in pairs), START, END]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}, pairs


def _byte_symbols() -> list[str]:
    """GPT-2's printable symbol of every byte, in its order: "!" is the first, so it has id 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]


def _captions(seed: int) -> Iterator[Caption]:
    rng = np.random.default_rng(seed)
    for scene in training_scenes(rng):
        yield describe(scene, rng)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


def load(checkpoint: Path, settings: Settings, device: torch.device) -> TextEncoders:
    """The tokenizers and encoders of a finished checkpoint."""
    tokenizers, encoders = [], []
    for suffix in ("", "_2"):
        tokenizers.append(CLIPTokenizer.from_pretrained(str(checkpoint / f"tokenizer{suffix}")))
        encoder = CLIPTextModelWithProjection.from_pretrained(checkpoint / f"text_encoder{suffix}", dtype=torch.float32)
        encoders.append(encoder.to(device).eval().requires_grad_(False))
    return TextEncoders((tokenizers[0], tokenizers[1]), (encoders[0], encoders[1]), settings.joint_dim)
