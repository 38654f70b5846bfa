"""What volunteers have: devices and lines by name, each with where its numbers come from. Pure.

Tokens a second are derived, not measured: a decoder of P parameters takes 6 P floating-point
operations a token (arXiv 2001.08361, section 2.1), and a device reaches ``efficiency`` of the dense
matrix throughput of its sheet. 0.40 is what published runs of 7B-class models reach: 36 to 42 % on
INTELLECT-1's H100s (arXiv 2412.01152), 46 % on PaLM's TPUs (arXiv 2204.02311). Whoever knows
better writes ``tokens_per_second`` into the scenario.

GeForce sheets give twice the figure for accumulation in fp16; what counts for training is fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from talkoot.protocol.limits import GIB

EFFICIENCY: Final = 0.40
FLOPS_PER_PARAMETER: Final = 6.0


@dataclass(frozen=True)
class Device:
    """One kind of accelerator or CPU and the machine around it."""

    kind: str
    """As torch names it: ``cuda``, ``cpu``, ``mps`` or ``xpu``."""
    memory_bytes: int
    """On the device; of a CPU or of unified memory all that a volunteer may give."""
    host_bytes: int
    teraflops: float
    """Dense matrix products with bf16 (or the next best) inputs and fp32 sums, 1e12 a second."""
    watts: float
    """At full load, by its sheet."""
    source: str
    efficiency: float = EFFICIENCY

    def tokens_per_second(self, parameters: int) -> float:
        """Of the fastest recipe, for a model of so many parameters."""
        return self.teraflops * 1e12 * self.efficiency / (FLOPS_PER_PARAMETER * parameters)


def _device(
    kind: str, gib: int, host_gib: int, tflops: float, watts: float, src: str, eff: float = 0.4
) -> Device:
    return Device(kind, gib * GIB, host_gib * GIB, tflops, watts, src, eff)


_GA: Final = "NVIDIA Ampere GA102 whitepaper, table of specifications"
_ADA: Final = "NVIDIA Ada whitepaper, appendix A"
_SHEET: Final = "NVIDIA data sheet"

DEVICES: Final[Mapping[str, Device]] = {
    "rtx-3060": _device("cuda", 12, 32, 25.6, 170, f"{_SHEET}; half of 51.2 with fp16 sums"),
    "rtx-3090": _device("cuda", 24, 64, 71.0, 350, _GA),
    "rtx-4060-ti-16": _device("cuda", 16, 32, 44.0, 165, f"{_SHEET}; half of 88 with fp16 sums"),
    "rtx-4070": _device("cuda", 12, 32, 58.3, 200, f"{_SHEET}; half of 116.6 with fp16 sums"),
    "rtx-4080": _device("cuda", 16, 32, 97.5, 320, _ADA),
    "rtx-4090": _device("cuda", 24, 64, 165.2, 450, _ADA),
    "rtx-5090": _device("cuda", 32, 64, 209.5, 575, "NVIDIA RTX Blackwell whitepaper, appendix A"),
    "rtx-a6000": _device("cuda", 48, 128, 154.8, 300, _GA),
    "t4": _device("cuda", 16, 32, 65.0, 70, f"{_SHEET}; fp16, as it has no bf16 units"),
    "l4": _device("cuda", 24, 64, 121.0, 72, f"{_SHEET}; power keeps it below", 0.3),
    "a100-40": _device("cuda", 40, 128, 312.0, 400, _SHEET),
    "a100-80": _device("cuda", 80, 256, 312.0, 400, _SHEET),
    "h100": _device("cuda", 80, 256, 989.0, 700, f"{_SHEET} (SXM, without sparsity)"),
    "b200": _device("cuda", 180, 512, 2250.0, 1000, f"{_SHEET} (HGX, without sparsity)"),
    "rx-7900-xtx": _device("cuda", 24, 64, 122.8, 355, "AMD product page, fp16 matrix", 0.25),
    "m1-ultra": _device(
        "mps", 96, 24, 21.0, 200, "Apple newsroom of 2022-03-08: 21 teraflops, 128 GB unified", 0.3
    ),
    "cpu-8": _device(
        "cpu", 24, 24, 0.77, 65, "8 cores, 3 GHz, two 8-wide fp32 fused multiply-adds a cycle"
    ),
}
"""By the name that a scenario uses. A ``cuda`` of AMD is ROCm's."""


@dataclass(frozen=True)
class Link:
    """A line to the internet."""

    up_mbit: float
    down_mbit: float
    latency_ms: float
    """There and back, to the coordinator."""
    source: str


LINKS: Final[Mapping[str, Link]] = {
    "datacenter": Link(10_000, 10_000, 5, "a 10 Gbit/s port"),
    "campus": Link(1000, 1000, 2, "a switched gigabit port"),
    "fibre-1000": Link(500, 1000, 12, "a common FTTH tariff (GPON, ITU-T G.984)"),
    "fibre-300": Link(100, 300, 12, "a common FTTH tariff (GPON, ITU-T G.984)"),
    "cable": Link(50, 500, 20, "a common DOCSIS 3.1 tariff"),
    "vdsl": Link(20, 50, 25, "VDSL2 profile 17a at medium length (ITU-T G.993.2)"),
    "adsl": Link(1, 16, 35, "ADSL2+ (ITU-T G.992.5)"),
    "mobile-5g": Link(20, 150, 35, "a common tariff below 6 GHz"),
}
"""By the name that a scenario uses. Tariffs differ: write ``up_mbit`` where you know yours."""
