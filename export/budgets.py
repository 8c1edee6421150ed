"""How many bytes the weights of a format may take: mean bits, a size in bytes, or a preset of the target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from export.compression.schemes import Plan, stored_bytes
from export.errors import UserError
from export.targets import Target

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNCALIBRATED_BITS = (16, 8, 6)


@dataclass(frozen=True)
class Budget:
    """bits: the mean of every weight that has a choice, scales and palettes included; or nbytes: of all weights of a format.

    asked: by the user; the target's own gives way where the weights of a small model take more at the least.
    """

    name: str
    bits: float | None = None
    nbytes: int | None = None
    asked: bool = True

    @property
    def compresses(self) -> bool:
        return self.bits is None or self.bits < 16

    def spend(self, plans: Sequence[Plan], format: str) -> int:
        """Bytes for the weights that have a choice. Raises `UserError` where they take more at the least."""
        undecided = [(info, plan.candidates[info.name]) for plan in plans for info in plan.undecided]
        count = sum(info.count for info, _ in undecided)
        least = sum(min(stored_bytes(scheme, info.shape) for scheme in schemes) for info, schemes in undecided)
        fixed = sum(plan.settled_bytes for plan in plans)
        spent = int((self.bits or 0) * count / 8) if self.nbytes is None else self.nbytes - fixed
        if spent < least and not self.asked:
            return least
        if spent < least:
            needs = f"{least + fixed:,} bytes" if self.nbytes is not None else f"{_up(8 * least / count):g} bits"
            raise UserError(f"{self.name} is too small for {format}, whose weights take at least {needs}")
        return spent


def choose_budget(target: Target, bits: float | None, size: int | None, preset: str | None) -> Budget:
    """What was asked for, or the target's own. Raises `UserError` where it cannot be, or where two things were asked for."""
    given = [name for name, value in (("--bits", bits), ("--size-budget", size), ("--preset", preset)) if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} say the same thing in two ways; give one of them")
    if size is not None:
        return Budget(f"--size-budget {size:,} bytes", nbytes=size)
    if preset is not None:
        if preset not in target.presets:
            raise UserError(f"--preset {preset} is not known; choose from {', '.join(target.presets)}")
        return Budget(f"--preset {preset}", bits=target.presets[preset])
    wanted = target.default_bits if bits is None else bits
    if not 1 <= wanted <= 16:
        raise UserError(f"--bits {wanted:g} are no mean bits of a weight; give a number from 1 to 16")
    return Budget(f"--bits {wanted:g}", bits=wanted, asked=bits is not None)


def parse_size(text: str) -> int:
    """Bytes of "1.2GB", "900 MB" or "512MiB" (KB, MB and GB are powers of 1000)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UserError(f"--size-budget {text} is no size; write it as 1.2GB, 900MB or 512MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def check_uncalibrated(budget: Budget) -> None:
    """Without calibration all weights of a kind get the same scheme. Raises `UserError` for any other budget."""
    if budget.bits not in UNCALIBRATED_BITS:
        choices = ", ".join(f"--bits {bits}" for bits in UNCALIBRATED_BITS)
        raise UserError(f"{budget.name} takes calibration to choose by; leave out --no-calibration, or choose from {choices}")


def _up(bits: float) -> float:
    return -(-bits * 100 // 1) / 100
