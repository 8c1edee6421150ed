"""Every scheme that a backend can store a weight with: what the integer programme chooses among.

Nothing here goes by a weight's name. What must stay high is found by what its rounding does to the final latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from calibration.layers import BLOCKS, block_of
from export.compression.schemes import SMALL, FloatScheme, IntegerScheme, PaletteScheme, Scheme, WeightInfo

Activations = Literal["float", "int8", "int16"]
"""What linears whose weights are integers multiply, where a format leaves the choice. float: the nearest to it that is not much
slower; int8: integers of 8 bits alone; int16: as far as memory and not time sets the limit, integers of 16 bits."""

GROUP = 16  # output channels that share a palette, where they do


def ladder(info: WeightInfo, backend: str, deployment_target: str, activations: Activations = "float") -> tuple[Scheme, ...]:
    """The candidates of a weight for a format ("coreml", "onnx", "executorch"), the least bytes first.

    Norms, biases and tensors of fewer than `SMALL` values have one: their bytes do not matter. An iPhone on iOS 17 knows no
    palettes of 3 bits, no groups, no scales and no vectors. With int8 activations ONNX Runtime's linears have the blocks that
    it multiplies fastest, and XNNPACK's round their inputs to 8 bits, never to 16. The integer programme hears of int16.
    """
    if backend == "coreml":
        return _coreml(info, deployment_target)
    return _onnx(info, activations) if backend == "onnx" else _executorch(info, activations)


def rounds_inputs(info: WeightInfo, scheme: Scheme) -> bool:
    """Whether a format that rounds inputs at all rounds them to 8 bits where a weight is stored by the scheme."""
    return info.kind == "linear" and isinstance(scheme, IntegerScheme) and scheme.input_bits == 8


def _coreml(info: WeightInfo, deployment_target: str) -> tuple[Scheme, ...]:
    if info.kind == "other" or info.count < SMALL:
        return (FloatScheme(16),)
    if deployment_target == "iOS17":
        return (*(PaletteScheme(bits) for bits in (4, 6, 8)), FloatScheme(16))
    groups = [None, GROUP] if info.shape[0] % GROUP == 0 and info.shape[0] > GROUP else [None]
    palettes: list[PaletteScheme] = []
    for bits in (3, 4, 6, 8):
        palettes += [PaletteScheme(bits, group) for group in groups]
        if bits < 8 and info.kind != "embedding":
            palettes.append(PaletteScheme(bits, scaled=True))
        if bits == 4 and info.kind != "embedding" and info.shape[0] % 2 == 0:
            palettes.append(PaletteScheme(8, vector=2))
    return (*palettes, FloatScheme(16))


def _onnx(info: WeightInfo, activations: Activations) -> tuple[Scheme, ...]:
    if info.kind == "other" or info.count < SMALL:
        return (FloatScheme(32 if info.count < SMALL else 16),)
    if info.kind != "linear":  # convolutions per output channel, embeddings per row
        return IntegerScheme(8), FloatScheme(16)
    sizes = (block_of(info.row),) if activations == "int8" else (128, 64, 32, 16)
    blocks = [IntegerScheme(bits, size) for bits in (4, 8) for size in sizes if size in BLOCKS and info.row % size == 0]
    return (*blocks, FloatScheme(16))


def _executorch(info: WeightInfo, activations: Activations) -> tuple[Scheme, ...]:
    # XNNPACK takes no float16 weights beside float32 activations: what is not integer is stored as float32.
    if info.kind in ("other", "conv") or info.count < SMALL:
        return (FloatScheme(32),)
    if info.kind != "linear":
        return IntegerScheme(8), FloatScheme(32)
    integers = [IntegerScheme(8)]
    if info.row % 32 == 0:
        integers.insert(0, IntegerScheme(4, 32, bfloat16_scales=True))
    if activations != "int8":
        integers = [replace(scheme, input_bits=bits) for scheme in integers for bits in (8, 16)]
    return (*integers, FloatScheme(32))
