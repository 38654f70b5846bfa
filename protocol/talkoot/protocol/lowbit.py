"""Optimizer states in few bits: blocks with a scale of their own and a table of levels.

A torch module. 8 bits: blocks of 256 and the dynamic tree of levels (arXiv 2110.02861, sections 2
and 4). 4 bits: blocks of 128; the first moment as a dynamic tree of 3 exponent bits, the second
linear without a zero, which would make the update divide by epsilon (arXiv 2309.01507, section 4).
The levels and the rounding are those of torchao 0.18 (``tests/protocol/test_lowbit.py``); why its
optimizers are not used themselves is in ADR 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = {8: 256, 4: 128}
SMALL: Final = 4096
"""Tensors of fewer elements keep fp32 states, which cost little and matter much (norm gains)."""
_LEAST_SCALE: Final = 1e-12


def dynamic_levels(bits: int, exponents: int, *, signed: bool) -> list[float]:
    """``2**bits`` levels in [-1, 1] (or [0, 1]): a tree of ``exponents`` decades.

    Decade ``i`` of 0 … exponents-1 holds the midpoints of equal parts of (0.1, 1], scaled by
    ``10**(i + 1 - exponents)``; each decade has twice the parts of the one below it. 0 and 1 are
    levels of their own.
    """
    levels = [0.0, 1.0]
    for decade in range(exponents):
        parts = 2 ** (bits - 1 - exponents + decade) * (1 if signed else 2)
        for part in range(parts):
            low, high = 0.1 + 0.9 * part / parts, 0.1 + 0.9 * (part + 1) / parts
            level = 10.0 ** (decade + 1 - exponents) * (low + high) / 2
            levels += [level, -level] if signed else [level]
    return sorted(levels)


def levels_of(bits: int, *, signed: bool) -> list[float]:
    """The levels of a moment: the first is signed, the second is not."""
    if bits == 8:
        return dynamic_levels(8, 7, signed=signed)
    if signed:
        return dynamic_levels(4, 3, signed=True)
    return [(step + 1) / 16 for step in range(16)]


@dataclass(frozen=True)
class Table:
    """The levels of one kind of state, ascending."""

    bits: int
    levels: Tensor  # (2**bits,) fp32
    edges: Tensor  # (2**bits - 1,) fp32: halfway between neighbours

    @staticmethod
    def make(bits: int, *, signed: bool, device: torch.device) -> Table:
        """On ``device``."""
        values = levels_of(bits, signed=signed)
        levels = torch.tensor(values, dtype=torch.float32, device=device)
        edges = (levels[1:] + levels[:-1]) / 2
        return Table(bits, levels, edges)

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return BLOCK[self.bits]

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) fp32, n a multiple of the block: uint8 codes (packed in pairs for 4 bits), scales.

        A value halfway between two levels takes the upper one.
        """
        blocks = values.view(-1, self.block)
        scales = blocks.abs().amax(1).clamp_(min=_LEAST_SCALE)
        scaled = (blocks / scales[:, None]).view(-1)
        codes = torch.bucketize(scaled, self.edges, right=True, out_int32=True).to(torch.uint8)
        if self.bits == 4:
            codes = (codes[::2] << 4) | codes[1::2]
        return codes, scales

    def restore(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What :meth:`quantise` gave, as (n,) fp32."""
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)
        # `levels[codes]` would make indices of 64 bits on its way: twice the result's memory.
        values = self.levels.index_select(0, codes.int()).view(-1, self.block)
        return values.mul_(scales[:, None]).view(-1)

    def empty(self, numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Codes and scales of ``numel`` zeros (rounded up to whole blocks)."""
        blocks = -(-numel // self.block)
        # Codes of 0 times a scale of 0 are 0, whatever level 0 stands for.
        codes = torch.zeros(blocks * self.block * self.bits // 8, dtype=torch.uint8, device=device)
        return codes, torch.zeros(blocks, dtype=torch.float32, device=device)
