"""What each target is: its formats, how many bits it stores by default, and on what units its components run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from export.compression.ladders import Activations
from export.errors import UserError
from export.formats.format import Format


@dataclass(frozen=True)
class Target:
    """One value of --target.

    presets: mean bits of a weight by name; compute_units: advice for Core ML by component, "ALL" where it says nothing.

    chunk_bytes: the transformer is cut into pieces until each is expected to be at most this large.
    """

    name: str
    formats: tuple[str, ...]
    default_bits: float
    presets: Mapping[str, float]
    chunk_bytes: int
    compute_units: Mapping[str, str] = field(default_factory=dict)


TARGETS = {
    target.name: target
    for target in (
        # On A17 and later the Neural Engine runs fp16 transformers fastest and with least power; the decoder's large
        # full-resolution convolutions exceed what it takes, so Core ML may place them itself.
        Target(
            "ios",
            ("coreml",),
            default_bits=6,
            presets={"best": 8, "balanced": 6, "small": 4.5},
            chunk_bytes=1_000_000_000,
            compute_units={
                "text_encoder": "CPU_AND_NE",
                "text_encoder_2": "CPU_AND_NE",
                "conditioner": "CPU_AND_NE",
                "transformer": "CPU_AND_NE",
            },
        ),
        Target(
            "android",
            ("onnx", "executorch"),
            default_bits=8,
            presets={"best": 8.5, "balanced": 6.5, "small": 5},
            chunk_bytes=1_000_000_000,
        ),
    )
}


ROUNDING_FORMATS = frozenset({"onnx", "executorch"})
"""Those with linears that can multiply integers of 8 bits: --activations is a choice of theirs."""

ROUNDING_TWICE = frozenset({"executorch"})
"""Those with linears that can multiply inputs of 16 bits as two of 8: they hear --activations int16."""


def load_format(name: str, activations: Activations = "float") -> Format:
    """The format of a name; `activations` are for those whose graphs differ by them (ONNX).

    Its libraries are imported only when it is wanted, for they are slow to import.
    """
    if name == "coreml":
        from export.formats.coreml import CoreMLFormat

        return CoreMLFormat()
    if name == "onnx":
        from export.formats.onnx import OnnxFormat

        return OnnxFormat(activations="int8" if activations == "int8" else "float")
    from export.formats.executorch import ExecuTorchFormat

    return ExecuTorchFormat()


def choose_formats(target: Target, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The target's formats, or those of them that --format names. Raises `UserError` for one it does not have."""
    for name in wanted:
        if name not in target.formats:
            raise UserError(f"--format {name} is none of --target {target.name}; choose from {', '.join(target.formats)}")
    return tuple(name for name in target.formats if not wanted or name in wanted)
