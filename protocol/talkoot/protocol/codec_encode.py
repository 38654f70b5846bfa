"""The encoder of codec v2: which elements of a section are sent, and as what.

Two kinds of device select in two ways and choose the same: the ``keep`` largest magnitudes of each
chunk, of equal ones those that come first, of zeros none. What follows is 1/64 of the data and runs
on the host. The arrays of one section are all the memory that it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from talkoot.protocol import codec_bits as bits
from talkoot.protocol.codec_bits import Layout
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.kernels import KERNELS

MAX_MAGNITUDE: Final = 2.0**64
"""Largest value that travels. A pseudo-gradient near it is no longer training."""
_NEGLIGIBLE: Final = 2.0**-100
"""A section whose largest chunk is smaller than this is sent as nothing; the feedback keeps it."""
_GROUPS: Final = 512
"""Groups of elements that a chunk is looked at in first. ``np.partition`` sorts rows that short
within registers; more of them are taken only where ``keep`` needs them."""


@dataclass(frozen=True)
class Coded:
    """The four parts of a section, and what a reader will make of them."""

    gaps: bytes
    codes: bytes
    scales: bytes
    table: bytes
    indices: bits.I64  # (n,) ascending, inside the section
    values: bits.F32  # (n,) none of them 0


@dataclass(frozen=True)
class _Chosen:
    """Selected elements of ``rows`` chunks of one length, by row and then by position."""

    length: int
    keep: int
    local: bits.I32  # (n,) position in the chunk
    values: bits.F32  # (n,)
    counts: bits.I64  # (rows,) how many of each chunk


def require_sane(largest: bits.F32) -> None:
    """Raise :class:`ProtocolError` for NaN, infinity and magnitudes over ``MAX_MAGNITUDE``."""
    if not (largest <= MAX_MAGNITUDE).all():  # False for NaN too
        raise ProtocolError(
            "An update holds NaN, infinity or a value over 2**64: training has diverged, so start "
            "again from the last published weights with a smaller learning rate.",
            code="not-finite",
        )


def encode_section(flat: Tensor, layout: Layout) -> Coded:
    """Code one section. ``flat``: (numel,), contiguous, floating, on any device."""
    body = layout.full * layout.chunk
    chosen = []
    if layout.full:
        chosen.append(_select(flat[:body].view(layout.full, layout.chunk), layout.keep))
    if layout.tail:
        chosen.append(_select(flat[body:].view(1, layout.tail), layout.tail_keep))
    return quantize(chosen, layout)


# Which elements --------------------------------------------------------------------------------


def _select(rows: Tensor, keep: int) -> _Chosen:
    """``rows``: (n, length), n chunks of one length."""
    if rows.device.type == "cpu":
        return select_on_host(rows.float().numpy(), keep)
    return select_on_device(rows, keep)


def select_on_host(rows: bits.F32, keep: int) -> _Chosen:
    """A first look at the maxima of groups gives a bound that the kept ones reach: of ``keep``
    groups each has an element as large as the ``keep``-th largest maximum, so ``keep`` elements of
    the chunk are. Few others reach it; only those are sorted out exactly. Four times as fast as
    ``torch.topk``, which looks at every element several times."""
    number, length = rows.shape
    groups = length
    while groups % 2 == 0 and groups // 2 >= (2 if groups > _GROUPS else 4) * keep:
        groups //= 2
    if compiled := KERNELS.after(rows.size):
        return _select_compiled(compiled, rows, keep, groups)
    magnitude = np.abs(rows)
    # Neighbours, which are often of one size, fall into different groups.
    coarse = magnitude.reshape(number, length // groups, groups).max(axis=1)  # (number, groups)
    require_sane(coarse)
    if keep < groups:
        bound = np.partition(coarse, groups - keep, axis=1)[:, groups - keep]
        np.maximum(bound, np.finfo(np.float32).smallest_subnormal, out=bound)
        mask = magnitude >= bound[:, None]
    else:
        mask = magnitude > 0
    flat = np.flatnonzero(mask)
    ends = np.searchsorted(flat, np.arange(number + 1) * length)
    counts = np.diff(ends)
    if int(counts.max(initial=0)) > keep:
        found = np.take(magnitude.reshape(-1), flat)
        flat = np.take(flat, _largest(found, ends, keep))
        counts = np.minimum(counts, keep)
    local = flat - np.repeat(np.arange(number) * length, counts)
    return _Chosen(length, keep, local.astype(np.int32), np.take(rows.reshape(-1), flat), counts)


def _select_compiled(compiled: ModuleType, rows: bits.F32, keep: int, groups: int) -> _Chosen:
    """The same, compiled."""
    number, length = rows.shape
    local = np.empty(number * keep, dtype=np.int32)
    values = np.empty(number * keep, dtype=np.float32)
    counts = np.empty(number, dtype=np.int64)
    size, largest = compiled.select(rows.view(np.int32), keep, groups, local, values, counts)
    require_sane(np.int32(largest).reshape(1).view(np.float32))
    return _Chosen(length, keep, local[:size], values[:size], counts)


def _largest(found: bits.F32, ends: bits.I64, keep: int) -> bits.I64:
    """Which of the candidates are the ``keep`` largest of their row, the first of equal ones.

    ``found``: (n,) magnitudes by row; ``ends``: (rows + 1,) where the rows begin and the last ends.
    """
    counts = np.diff(ends)
    table = np.zeros((counts.size, int(counts.max())), dtype=np.float32)
    table[np.arange(table.shape[1]) < counts[:, None]] = found
    cut = table.shape[1] - keep
    table.partition(cut, axis=1)
    least = np.repeat(table[:, cut], counts)  # 0 in rows with fewer than keep
    mask = found >= least
    kept = np.flatnonzero(mask)
    surplus = np.diff(np.searchsorted(kept, ends)) - np.minimum(counts, keep)  # none below 0
    if not surplus.any():
        return kept
    ties = np.flatnonzero(found == least)
    first = np.searchsorted(ties, ends[1:]) - surplus  # of a row's ties that are too many
    inside = np.arange(surplus.sum()) - np.repeat(np.cumsum(surplus) - surplus, surplus)
    mask[ties[np.repeat(first, surplus) + inside]] = False
    return np.flatnonzero(mask)


def select_on_device(rows: Tensor, keep: int) -> _Chosen:
    """The same choice with torch's operations, where the tensor is."""
    number, length = rows.shape
    values = rows.float()
    magnitude = values.abs()
    require_sane(magnitude.amax(dim=1).cpu().numpy())
    threshold = torch.topk(magnitude, min(keep, length), dim=1, sorted=False).values.amin(dim=1)
    above = magnitude > threshold[:, None]
    ties = (magnitude == threshold[:, None]) & (magnitude > 0)
    wanted = keep - above.sum(dim=1, keepdim=True)
    mask = above | (ties & (ties.cumsum(dim=1) <= wanted))
    positions = mask.reshape(-1).nonzero().view(-1)
    flat = positions.cpu().numpy()
    row = flat // length
    return _Chosen(
        length,
        keep,
        (flat - row * length).astype(np.int32),
        values.reshape(-1)[positions].cpu().numpy(),
        np.bincount(row, minlength=number),
    )


# As what ---------------------------------------------------------------------------------------


def quantize(parts: list[_Chosen], layout: Layout) -> Coded:
    """Scales, levels, gaps and codes of the selected values, one part per chunk length."""
    if compiled := KERNELS.after(0):
        return _quantize_compiled(compiled, parts, layout)
    values, local, counts = _whole(parts)
    scales, scale, base = _scales(values, counts)
    magnitude = np.abs(values)
    magnitude *= np.repeat((1 / scale).astype(np.float32), counts)
    count = 1 << (layout.bits - 1)
    fit = magnitude if magnitude.all() else magnitude[magnitude > 0]
    levels, edges = _levels(*bits.histogram_of(fit), count)
    cells = _cells(magnitude, edges)  # 0: nearer to nothing
    table = np.minimum(levels * base, MAX_MAGNITUDE).astype(np.float32)
    if not cells.all():
        sent = np.flatnonzero(cells)
        values, local, cells = values[sent], local[sent], cells[sent]
        counts = np.bincount(np.repeat(np.arange(counts.size), counts)[sent], minlength=counts.size)
    codes = (cells - np.uint8(1)) | (np.signbit(values).view(np.uint8) << np.uint8(layout.bits - 1))
    gaps, slots = [], []
    first, taken = 0, 0
    for part in parts:
        rows = counts[first : first + part.counts.size]
        size = int(rows.sum())
        here = slice(taken, taken + size)
        made = _fill(local[here], codes[here], rows, part.keep, part.length)
        gaps.append(made[0])
        slots.append(made[1])
        first, taken = first + rows.size, taken + size
    indices, read = _as_read(local, codes, counts, scales, table, layout)
    return Coded(
        gaps=bits.compress(bits.encode_gaps(np.concatenate(gaps)).tobytes()),
        codes=bits.pack_codes(np.concatenate(slots), layout.bits),
        scales=bits.compress(scales.tobytes()),
        table=table.astype("<f4").tobytes(),
        indices=indices,
        values=read,
    )


def _quantize_compiled(compiled: ModuleType, parts: list[_Chosen], layout: Layout) -> Coded:
    """The same, compiled."""
    values, local, counts = _whole(parts)
    scales, scale, base = _scales(values, counts)
    inverse = (1 / scale).astype(np.float32)
    numbers, sums = np.zeros((2, bits.BINS))
    compiled.histogram(values, counts, inverse, bits.FIRST_BIN, bits.BIN_SHIFT, numbers, sums)
    levels, edges = _levels(numbers, sums, 1 << (layout.bits - 1))
    table = np.minimum(levels * base, MAX_MAGNITUDE).astype(np.float32)
    gaps = np.empty(layout.entries, dtype=np.int32)
    codes = np.empty(layout.entries, dtype=np.uint8)
    indices = np.empty(values.size, dtype=np.int64)
    read = np.empty(values.size, dtype=np.float32)
    count = compiled.quantize(
        values,
        local,
        counts,
        inverse,
        scales,
        edges,
        table.astype(np.float64),
        bits.scale_grid(),
        layout.shape,
        gaps,
        codes,
        indices,
        read,
    )
    return Coded(
        gaps=bits.compress(bits.encode_gaps(gaps).tobytes()),
        codes=bits.pack_codes(codes, layout.bits),
        scales=bits.compress(scales.tobytes()),
        table=table.astype("<f4").tobytes(),
        indices=indices[:count],
        values=read[:count],
    )


def _whole(parts: list[_Chosen]) -> tuple[bits.F32, bits.I32, bits.I64]:
    """Values, positions in their chunk, and how many of each chunk, of all parts."""
    if len(parts) == 1:
        return parts[0].values, parts[0].local, parts[0].counts
    return (
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.local for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )


def _levels(numbers: bits.F64, sums: bits.F64, count: int) -> tuple[bits.F64, bits.F32]:
    """Levels relative to the chunk's scale, and the lower edges of their cells."""
    if not numbers.any():
        return np.zeros(count), np.full(count, np.inf, dtype=np.float32)
    levels = bits.fit_levels(numbers, sums, count)
    return levels, bits.cell_edges(levels).astype(np.float32)


def _scales(values: bits.F32, counts: bits.I64) -> tuple[bits.U8, bits.F64, float]:
    """Each chunk's scale byte, the number it stands for (infinite for 0), and the largest chunk's
    root mean square, which all are relative to."""
    squares = np.zeros(counts.size, dtype=np.float64)
    used = np.flatnonzero(counts)
    if used.size:
        starts = (np.cumsum(counts) - counts)[used]
        squares[used] = np.add.reduceat(np.square(values, dtype=np.float64), starts)
    sizes = np.sqrt(squares / np.maximum(counts, 1))
    base = float(sizes.max(initial=0.0))
    scales = np.zeros(counts.size, dtype=np.uint8)
    if base < _NEGLIGIBLE:
        return scales, np.full(counts.size, np.inf), 0.0
    with np.errstate(divide="ignore"):
        steps = np.rint(np.log2(sizes / base) * bits.OCTAVE_STEPS) + 255
    scales = np.clip(steps, 0, 255).astype(np.uint8)  # 2**-32 of the largest chunk: nothing
    scale = bits.scale_grid()[scales] * base
    scale[scale == 0] = np.inf
    return scales, scale, base


def _cells(magnitude: bits.F32, edges: bits.F32) -> bits.U8:
    """How many edges each magnitude reaches."""
    if edges.size > 8:
        return np.searchsorted(edges, magnitude, side="right").astype(np.uint8)
    cells = np.zeros(magnitude.size, dtype=np.uint8)
    for edge in edges:
        cells += magnitude >= edge
    return cells


def _fill(
    local: bits.I32, codes: bits.U8, counts: bits.I64, keep: int, length: int
) -> tuple[bits.I32, bits.U8]:
    """Gaps and codes of all entries: those that are not sent count up from the chunk's length."""
    if local.size == counts.size * keep:
        table = local.reshape(counts.size, keep)
        slots = codes
    else:
        column = np.arange(keep, dtype=np.int32)
        present = column < counts[:, None]
        table = (length + column - counts[:, None]).astype(np.int32)
        table[present] = local
        filled = np.zeros((counts.size, keep), dtype=np.uint8)
        filled[present] = codes
        slots = filled.reshape(-1)
    gaps = np.empty_like(table)
    gaps[:, 0] = table[:, 0]
    np.subtract(table[:, 1:], table[:, :-1], out=gaps[:, 1:])
    gaps[:, 1:] -= 1
    return gaps.reshape(-1), slots


def _as_read(
    local: bits.I32,
    codes: bits.U8,
    counts: bits.I64,
    scales: bits.U8,
    table: bits.F32,
    layout: Layout,
) -> tuple[bits.I64, bits.F32]:
    """Positions and values as ``decode_section`` finds them."""
    if codes.size == counts.size * layout.keep:  # every chunk is full
        shaped = codes.reshape(-1, layout.keep)
        values = bits.values_of(scales, table, shaped, layout.bits).reshape(-1)
    else:
        each = np.repeat(scales, counts)
        values = bits.values_of(each, table, codes[:, None], layout.bits).reshape(-1)
    indices = np.repeat(np.arange(counts.size) * layout.chunk, counts)
    indices += local
    if not values.all():
        sent = np.flatnonzero(values)
        indices, values = indices[sent], values[sent]
    return indices, values
