"""Named devices and their published peaks, each figure with its source. A new device is one entry in `DEVICES`.

A peak is what a vendor states, for the precision that it states or leaves open; no program reaches it. It serves a lower
bound on time, never a prediction. A figure that no vendor states says so in its basis, and is missing where sources disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OPERATIONS_A_MAC = 2  # vendors count a multiplication and an addition
GIB = 1 << 30

Unit = Literal["TOPS", "GB/s", "bytes"]


@dataclass(frozen=True)
class Figure:
    """A number (TOPS: 1e12 operations a second; GB/s: 1e9 bytes a second), what it is of, and where it comes from."""

    value: float
    unit: Unit
    basis: str
    source: str


@dataclass(frozen=True)
class Device:
    """A chip in one product. `peak` is of its neural processor, None where the vendor publishes none. `app_limit` is what one
    app may use of the product's memory; its basis says where that is a rule of thumb."""

    name: str
    short: str
    product: str
    peak: Figure | None
    bandwidth: Figure
    memory: Figure
    app_limit: Figure

    def compute_seconds(self, macs: int) -> float | None:
        """The least time for the multiply-accumulates; None without a published peak."""
        return None if self.peak is None else OPERATIONS_A_MAC * macs / (self.peak.value * 1e12)

    def memory_seconds(self, bytes: int) -> float:
        """The least time to move the bytes to or from memory."""
        return bytes / (self.bandwidth.value * 1e9)


def _apple_limit(memory: Figure) -> Figure:
    return Figure(
        memory.value * 3 / 8,
        "bytes",
        "rule of thumb: 3/8 of the memory, the least that developers measured on 8 GB (iPadOS 26.4; 3/4 before). Apple gives "
        "no figure: the limit depends on the device, and an app may ask for more (increased-memory-limit entitlement)",
        "https://developer.apple.com/forums/thread/826325; "
        "https://developer.apple.com/documentation/xcode/improving_your_app_s_performance/reducing_your_app_s_memory_use",
    )


def _android_limit(memory: Figure) -> Figure:
    return Figure(
        memory.value / 2,
        "bytes",
        "rule of thumb of this project: half of the memory. Android states no limit for native memory, where models lie; it "
        "ends apps by priority when the whole system runs short",
        "https://source.android.com/docs/core/perf/lmkd",
    )


_INT8 = (
    "Neural Engine. Apple does not state the precision; its coremltools guide gives this chip more throughput for int8 times "
    "int8 than before, so it is read as int8. float16, in which our packages compute, is no faster"
)
_INT8_SOURCE = "https://apple.github.io/coremltools/docs-guides/source/opt-quantization-perf.html"
_FLOAT16 = (
    "Neural Engine. Apple does not state the precision; its coremltools guide dates more throughput for int8 from later chips, "
    "so it is read as float16"
)
_NOT_STATED_BY_APPLE = "not stated by Apple"
_LPDDR5_OF_A16 = 51.2  # GB/s: 6400 million transfers a second over 64 bits
_M2_RELEASE = "Apple unveils M2, press release of 6 June 2022 (apple.com/newsroom)"
_M4_RELEASE = "Apple introduces M4 chip, press release of 7 May 2024 (apple.com/newsroom)"

_A18_REPORT = "https://www.gadgets360.com/mobiles/news/apple-iphone-16-series-a18-pro-chipset-details-6530448"

_IPHONE_15_PRO = Figure(8 * GIB, "bytes", _NOT_STATED_BY_APPLE, "https://grokipedia.com/page/Apple_A17")
_IPHONE_16_PRO = Figure(8 * GIB, "bytes", _NOT_STATED_BY_APPLE, "https://probsee.com/p/apple_a18")
_IPAD_PRO_M2 = Figure(8 * GIB, "bytes", "the smaller of two versions", "iPad Pro (2022), technical specifications, Apple")
_IPAD_PRO_M4 = Figure(8 * GIB, "bytes", "the smaller of two versions", "iPad Pro (M4), technical specifications, Apple")
_GALAXY_S24 = Figure(8 * GIB, "bytes", "stated by Samsung", "Galaxy S24, specifications, Samsung")
_GALAXY_S25 = Figure(12 * GIB, "bytes", "stated by Samsung", "Galaxy S25, specifications, Samsung")

_A17_PRO = Device(
    "A17 Pro",
    "A17",
    "iPhone 15 Pro",
    Figure(35, "TOPS", _INT8, f"Apple Event of 12 September 2023; {_INT8_SOURCE}"),
    Figure(
        _LPDDR5_OF_A16,
        "GB/s",
        f"{_NOT_STATED_BY_APPLE}; LPDDR5 as in the A16, which is listed with 51.2 GB/s (6400 MT/s over 64 bits)",
        "https://grokipedia.com/page/Apple_A17; https://www.topcpu.net/pl/cpu-c/apple-a16-bionic-vs-apple-a13-bionic",
    ),
    _IPHONE_15_PRO,
    _apple_limit(_IPHONE_15_PRO),
)
_A18_PRO = Device(
    "A18 Pro",
    "A18",
    "iPhone 16 Pro",
    Figure(35, "TOPS", _INT8, f"Apple Event of 9 September 2024, as reported by {_A18_REPORT}; {_INT8_SOURCE}"),
    Figure(
        _LPDDR5_OF_A16 * 1.17,
        "GB/s",
        "not stated by Apple as such; 17 % more than before, as Apple says, of the A17 Pro's figure",
        _A18_REPORT,
    ),
    _IPHONE_16_PRO,
    _apple_limit(_IPHONE_16_PRO),
)
_M2 = Device(
    "M2",
    "M2",
    "iPad Pro (2022)",
    Figure(15.8, "TOPS", _FLOAT16, f"{_M2_RELEASE}; {_INT8_SOURCE}"),
    Figure(100, "GB/s", "unified memory, stated by Apple", _M2_RELEASE),
    _IPAD_PRO_M2,
    _apple_limit(_IPAD_PRO_M2),
)
_M4 = Device(
    "M4",
    "M4",
    "iPad Pro (M4)",
    Figure(38, "TOPS", _INT8, f"{_M4_RELEASE}; {_INT8_SOURCE}"),
    Figure(120, "GB/s", "unified memory, stated by Apple", _M4_RELEASE),
    _IPAD_PRO_M4,
    _apple_limit(_IPAD_PRO_M4),
)
# Qualcomm says by how much each Hexagon NPU is faster than the one before (98 % and 45 %), and no operations a second. The
# int8 figures that circulate contradict each other (45 and 80 TOPS for the 8 Elite in one and the same list), so none is used.
_SNAPDRAGON_8_GEN_3 = Device(
    "Snapdragon 8 Gen 3",
    "8 Gen 3",
    "Galaxy S24",
    None,
    Figure(
        76.8,
        "GB/s",
        "LPDDR5X at 4800 MHz, stated by Qualcomm: 9600 million transfers a second over 64 bits",
        "https://liliputing.com/qualcomms-snapdragon-8-gen-3-brings-big-boost-in-cpu-graphics-and-ai-performance/",
    ),
    _GALAXY_S24,
    _android_limit(_GALAXY_S24),
)
_SNAPDRAGON_8_ELITE = Device(
    "Snapdragon 8 Elite",
    "8 Elite",
    "Galaxy S25",
    None,
    Figure(
        84.8,
        "GB/s",
        "LPDDR5X at 5300 MHz, stated by Qualcomm: 10600 million transfers a second over 64 bits",
        "https://geektopia.es/es/technology/2024/10/22/noticias/amp/qualcomm-anuncia-el-snapdragon-8-elite-para-moviles-de-gama-alta.html",
    ),
    _GALAXY_S25,
    _android_limit(_GALAXY_S25),
)

DEVICES = {each.name: each for each in (_A17_PRO, _A18_PRO, _M2, _M4, _SNAPDRAGON_8_GEN_3, _SNAPDRAGON_8_ELITE)}
