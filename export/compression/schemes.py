"""How each weight is stored: a scheme for one tensor, a recipe for a model, and the rule that plans one from shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from export.compression.stored import packed_bytes

# Below this a tensor's bytes do not matter and its error does.
SMALL = 4096
# Modules through which everything enters or leaves, by the names they carry in diffusers and transformers.
FIRST_AND_LAST = frozenset({"pos_embed", "proj_out", "conv_in", "conv_out", "text_projection"})
# By the time a graph is converted these are no look-up and no product: positions are sliced and added, and what the conditioner
# makes of its constant timesteps is computed in advance, so that there is no weight left to compress.
FOLDED = frozenset({"position_embedding", "timestep_embedder"})


@dataclass(frozen=True)
class FloatScheme:
    """Floating point of 16 or 32 bits."""

    bits: int = 16


@dataclass(frozen=True)
class PaletteScheme:
    """A palette of 2**bits entries for the tensor, or for every `group` rows of axis 0.

    scaled: a float16 scale for every row (output channel) besides
    vector: weights an entry, in consecutive rows; 8-bit indices of 2 are 4 bits a weight
    """

    bits: int
    group: int | None = None
    scaled: bool = False
    vector: int = 1


@dataclass(frozen=True)
class IntegerScheme:
    """Symmetric integers with a scale for every `block` inputs (None: one an output channel).

    input_bits: to which a linear's inputs are rounded, 8 or 16, where a runtime rounds them
    """

    bits: int
    block: int | None = None
    bfloat16_scales: bool = False
    input_bits: int = 8


Scheme = FloatScheme | PaletteScheme | IntegerScheme
Recipe = Mapping[str, Scheme]


@dataclass(frozen=True)
class WeightInfo:
    """What a scheme is chosen from: no values. kind: "linear", "conv", "embedding" (of tokens) or "other" (norms, biases,
    and what is folded)."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Inputs of one output: all axes after the first."""
        return self.count // self.shape[0]


@dataclass(frozen=True)
class Plan:
    """The schemes that each weight may have, from few to many bytes. Where there are several, `mean_bits` is what those weights
    are going to take on average, scales and palettes included."""

    weights: tuple[WeightInfo, ...]
    candidates: Mapping[str, tuple[Scheme, ...]]
    mean_bits: float = 0.0
    settled: Recipe = field(init=False)

    def __post_init__(self) -> None:
        chosen = {name: schemes[0] for name, schemes in self.candidates.items() if len(schemes) == 1}
        object.__setattr__(self, "settled", chosen)

    @property
    def is_open(self) -> bool:
        """Whether a weight has a choice."""
        return len(self.settled) < len(self.candidates)

    @property
    def undecided(self) -> tuple[WeightInfo, ...]:
        """The weights that have a choice."""
        return tuple(info for info in self.weights if info.name not in self.settled)

    @property
    def settled_bytes(self) -> int:
        return sum(stored_bytes(self.settled[info.name], info.shape) for info in self.weights if info.name in self.settled)

    def expected_bytes(self) -> int:
        """Bytes of the stored weights, from shapes alone."""
        return self.settled_bytes + int(self.mean_bits * sum(info.count for info in self.undecided) / 8)


def weight_infos(module: nn.Module) -> tuple[WeightInfo, ...]:
    """Every parameter of a module (which may be on the meta device) in its own order."""
    kinds = {nn.Linear: "linear", nn.Conv2d: "conv", nn.Embedding: "embedding"}
    owners = {id(child.weight): kinds[type(child)] for name, child in module.named_modules()
              if type(child) in kinds and FOLDED.isdisjoint(name.split("."))}
    return tuple(WeightInfo(name, tuple(parameter.shape), owners.get(id(parameter), "other"))
                 for name, parameter in module.named_parameters())


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes of a stored weight, equal to `StoredWeight.nbytes`."""
    count = math.prod(shape)
    if isinstance(scheme, FloatScheme):
        return count * scheme.bits // 8
    if isinstance(scheme, PaletteScheme):
        groups = shape[0] // scheme.group if scheme.group else 1
        scales = 2 * shape[0] if scheme.scaled else 0
        return packed_bytes(count // scheme.vector, scheme.bits) + groups * (2 << scheme.bits) * scheme.vector + scales
    scales = count // scheme.block if scheme.block else shape[0]
    return packed_bytes(count, scheme.bits) + scales * (2 if scheme.bfloat16_scales else 4)


def plan(weights: Iterable[WeightInfo], backend: str, bits: int, input_bits: int = 8) -> Plan:
    """The plan of a component without calibration, for a format ("coreml", "onnx", "executorch") at 16, 8 or 6 bits.

    input_bits: to which XNNPACK's linears round their inputs
    """
    infos = tuple(weights)
    executorch = partial(_executorch, input_bits=input_bits)
    choose: Mapping[str, Callable[[WeightInfo, int], tuple[Scheme, ...]]]
    choose = {"coreml": _coreml, "onnx": _onnx, "executorch": executorch}
    candidates = {info.name: choose[backend](info, bits) for info in infos}
    return Plan(infos, candidates, float(bits))


def _is_kept(info: WeightInfo) -> bool:
    return info.kind == "other" or info.count < SMALL


def _is_first_or_last(info: WeightInfo) -> bool:
    return not FIRST_AND_LAST.isdisjoint(info.name.split("."))


def _coreml(info: WeightInfo, bits: int) -> tuple[Scheme, ...]:
    if bits == 16 or _is_kept(info) or (bits == 8 and _is_first_or_last(info)):
        return (FloatScheme(16),)
    return (PaletteScheme(8 if _is_first_or_last(info) else bits),)


def _onnx(info: WeightInfo, bits: int) -> tuple[Scheme, ...]:
    if info.count < SMALL:
        return (FloatScheme(32),)
    if bits == 16 or _is_kept(info) or (bits == 8 and _is_first_or_last(info)):
        return (FloatScheme(16),)
    if info.kind == "linear":
        eight = _blocks(info, 8, (128, 64, 32, 16))
        four = _blocks(info, 4, (32, 16))
        if not eight or not four:
            return (FloatScheme(16),)
        return (four, eight) if bits == 6 and not _is_first_or_last(info) else (eight,)
    return (IntegerScheme(8),)  # convolutions per output channel, embeddings per row


def _executorch(info: WeightInfo, bits: int, input_bits: int) -> tuple[Scheme, ...]:
    # XNNPACK takes no float16 weights beside float32 activations: what is not integer is stored as float32.
    if bits == 16 or _is_kept(info) or info.kind == "conv" or (bits == 8 and _is_first_or_last(info)):
        return (FloatScheme(32),)
    eight = IntegerScheme(8, input_bits=input_bits if info.kind == "linear" else 8)
    if info.kind == "linear" and bits == 6 and not _is_first_or_last(info):
        four = _blocks(info, 4, (32,), bfloat16_scales=True)
        if four:
            return (replace(four, input_bits=input_bits), eight)
    return (eight,)


def _blocks(info: WeightInfo, bits: int, sizes: tuple[int, ...], bfloat16_scales: bool = False) -> IntegerScheme | None:
    """The first block size that divides the width, or None."""
    fitting = [size for size in sizes if info.row % size == 0]
    return IntegerScheme(bits, fitting[0], bfloat16_scales) if fitting else None
