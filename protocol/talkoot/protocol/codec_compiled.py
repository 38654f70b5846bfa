"""The codec's inner loops as machine code, by Numba. Imported by ``kernels.py`` and nobody else.

Each does in one pass what NumPy does in several, and gives the same bits: integers, comparisons,
and single operations in fp32 and fp64 in the same order, none fused (``fastmath`` is off). All
release the interpreter's lock. What is read may come from a stranger: no byte of it leads outside
an array. Everything is compiled on import, which takes some seconds.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from talkoot.protocol import codec_bits as bits

_MAGNITUDE: Final = np.int32(0x7FFFFFFF)
"""All bits of an fp32 but the sign. As integers, magnitudes are in the order of their values."""
_GATHER: Final = np.uint64(0x0102040810204080)
"""Multiplied with eight bytes that are 0 or 1, it gathers them as bits in the top byte."""
_FINE: Final = 10
"""2**10 bins narrow a threshold down."""
_TINY: Final = np.float32(bits.SMALLEST_NORMAL)
_FEW: Final = 8
"""So many edges are looked at one by one."""


def _of(dtype: Any, dimensions: int = 1) -> Any:
    """An array that is only read."""
    return types.Array(dtype, dimensions, "C", readonly=True)


_INT: Final = types.int64
_I32, _I64 = types.int32[::1], types.int64[::1]
_U8, _F32, _F64 = types.uint8[::1], types.float32[::1], types.float64[::1]
_SHAPE: Final = numba.typeof((0,) * 6)
_TWO: Final = numba.typeof((0, 0))


def _compiled(*signature: Any) -> Any:
    """Compile now, if the types are given, or else with what calls it."""
    if not signature:
        return numba.njit(nogil=True, error_model="numpy")
    returned, *arguments = signature
    return numba.njit(returned(*arguments), nogil=True, error_model="numpy")


@intrinsic
def _trailing_zeros(typing_context: Any, value: Any) -> Any:
    """Of a uint64 that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), generate


@_compiled()
def _bit_length(value: np.int32) -> int:
    length = 0
    while value > 0:
        length += 1
        value >>= 1
    return length


@_compiled()
def _threshold(
    found: bits.I32, size: int, keep: int, low: int, high: int, bins: bits.I32, once: bool
) -> tuple[int, int]:
    """A bound that ``keep`` of ``found[:size]`` reach (all lie within ``low … high``), and how many
    of those that equal it are meant: -1 for all.

    ``once``: one look is enough, and more than ``keep`` may reach the bound.
    """
    wanted = keep
    while True:
        shift = max(0, _bit_length(np.int32(high - low)) - _FINE)
        bins[:] = 0
        for i in range(size):
            value = found[i]
            if low <= value <= high:
                bins[(value - low) >> shift] += 1
        at = (high - low) >> shift
        while bins[at] < wanted:
            wanted -= bins[at]
            at -= 1
        low = low + (at << shift)
        if once or bins[at] == wanted:
            return low, -1
        if shift == 0:
            return low, wanted
        high = min(high, low + (1 << shift) - 1)


@_compiled(_TWO, _of(types.int32, 2), _INT, _INT, _I32, _F32, _I64)
def select(
    rows: bits.I32,
    keep: int,
    groups: int,
    local: bits.I32,
    values: bits.F32,
    counts: bits.I64,
) -> tuple[int, int]:
    """The ``keep`` largest magnitudes of each row, of equal ones the first, of zeros none.

    Args:
        rows: (n, length), fp32 seen as int32.
        keep: at most ``length``.
        groups: divides ``length``; at least ``keep`` of them, or ``length`` itself.
        local, values: (n * keep,) their positions in the row, row after row, ascending, and the
            elements themselves: results.
        counts: (n,) how many of each row: a result.

    Returns:
        How many in all, and the bits of the largest magnitude.
    """
    number, length = rows.shape
    coarse = np.empty(groups, dtype=np.int32)
    found = np.empty(length, dtype=np.int32)
    where = np.empty(length, dtype=np.int32)
    bins = np.empty(1 << (_FINE + 1), dtype=np.int32)
    reached = np.zeros(-(-length // 64) * 64, dtype=np.uint8)
    words = reached.view(np.uint64)
    layers = length // groups
    total = 0
    largest = np.int32(0)
    for row in range(number):
        line = rows[row]
        for g in range(groups):
            coarse[g] = line[g] & _MAGNITUDE
        for layer in range(1, layers):
            part = line[layer * groups : (layer + 1) * groups]
            for g in range(groups):
                coarse[g] = max(coarse[g], part[g] & _MAGNITUDE)
        high = np.int32(0)
        low = _MAGNITUDE
        for g in range(groups):
            high = max(high, coarse[g])
            low = min(low, coarse[g])
        largest = max(largest, high)
        bound = np.int32(1)
        if keep < groups and high > 0:
            first, _ = _threshold(coarse, groups, keep, low, high, bins, True)
            bound = np.int32(max(1, first))
        for i in range(length):
            reached[i] = (line[i] & _MAGNITUDE) >= bound
        size = 0
        for block in range(words.size // 8):
            left = np.uint64(0)
            for k in range(8):
                eight = (words[8 * block + k] * _GATHER) >> np.uint64(56)
                left |= eight << np.uint64(8 * k)
            while left != 0:
                at = 64 * block + _trailing_zeros(left)
                where[size] = at
                found[size] = line[at] & _MAGNITUDE
                size += 1
                left &= left - np.uint64(1)
        if size > keep:
            least, ties = _threshold(found, size, keep, bound, high, bins, False)
            kept = 0
            if ties < 0:
                ties = size
            for i in range(size):
                value = found[i]
                equal = value == least and ties > 0
                ties -= equal
                where[kept] = where[i]
                kept += value > least or equal
            size = kept
        for i in range(size):
            local[total + i] = where[i]
            values[total + i] = np.int32(line[where[i]]).view(np.float32)
        counts[row] = size
        total += size
    return total, int(largest)


@_compiled()
def _magnitude(scale: float, level: float) -> np.float32:
    value = np.float32(scale * level)
    return value if value >= bits.SMALLEST_NORMAL else np.float32(0)


@_compiled(
    _INT,
    _of(types.uint8),
    _of(types.uint8),
    _of(types.uint8),
    _of(types.float64),
    _of(types.float64),
    _SHAPE,
    _I64,
    _F32,
)
def place(
    raw: bits.U8,
    packed: bits.U8,
    scales: bits.U8,
    levels: bits.F64,
    grid: bits.F64,
    shape: tuple[int, int, int, int, int, int],
    indices: bits.I64,
    values: bits.F32,
) -> int:
    """Positions and values of a section's entries that were sent.

    Args:
        raw: the gaps' bytes.
        packed: the codes' bytes, ``value_bits`` bits an entry.
        scales: (chunks,) scale bytes.
        levels: (2**(value_bits - 1),) of the table.
        grid: (256,) what a scale byte stands for.
        shape: chunk, full chunks, their entries, tail, its entries, value bits: a ``Layout``.
        indices: (entries,) ascending positions in the section: the result.
        values: (entries,) the result.

    Returns:
        How many; -1 if the gaps are too few or too many, -2 if an index lies outside its chunk.
    """
    chunk, full, keep, tail, tail_keep, width = shape
    magnitudes = np.empty(levels.size, dtype=np.float32)
    mask = (1 << width) - 1
    sign = 1 << (width - 1)
    at = bit = count = 0
    for c in range(full + (tail > 0)):
        length, entries = (chunk, keep) if c < full else (tail, tail_keep)
        scale = grid[scales[c]]
        for i in range(levels.size):
            magnitudes[i] = _magnitude(scale, levels[i])
        origin = c * chunk - 1
        local = 0  # 1 more than the position
        absent = 0
        for _ in range(entries):
            local += 1
            while at < raw.size and raw[at] == bits.ESCAPE:
                local += bits.ESCAPE
                at += 1
            if at >= raw.size:
                return -1
            local += raw[at]
            at += 1
            byte = bit >> 3
            code = int(packed[byte])
            if byte + 1 < packed.size:
                code |= int(packed[byte + 1]) << 8
            code = (code >> (bit & 7)) & mask
            bit += width
            if local > length:
                absent += 1
                continue
            value = magnitudes[code & (sign - 1)]
            indices[count] = origin + local
            values[count] = -value if code & sign else value
            count += value != 0
        # Absent entries count up from the chunk's length, so the last one tells how many there are.
        if absent > 0 and local != length + absent:
            return -2
    return count if at == raw.size else -1


@_compiled(types.none, _of(types.float32), _of(_INT), _of(types.float32), _INT, _INT, _F64, _F64)
def histogram(
    values: bits.F32,
    counts: bits.I64,
    inverse: bits.F32,
    first: int,
    shift: int,
    numbers: bits.F64,
    sums: bits.F64,
) -> None:
    """How many magnitudes fall into each bin, and their sum, in order.

    Args:
        values: (n,) by chunk.
        counts: (chunks,) how many of each.
        inverse: (chunks,) what a chunk's magnitudes are multiplied with.
        first: bits of the lower edge of the first bin, without the low ``shift`` ones.
        shift: low bits that a bin does not look at.
        numbers, sums: (bins,) zeros: the results.
    """
    at = 0
    for c in range(counts.size):
        for _ in range(counts[c]):
            value = np.float32(abs(values[at])) * inverse[c]
            at += 1
            if value > 0:
                pattern = np.float32(value).view(np.int32)
                where = int(pattern >> shift) - first
                where = min(max(where, 0), numbers.size - 1)
                numbers[where] += 1
                sums[where] += value


@_compiled(
    _INT,
    _of(types.float32),
    _of(types.int32),
    _of(_INT),
    _of(types.float32),
    _of(types.uint8),
    _of(types.float32),
    _of(types.float64),
    _of(types.float64),
    _SHAPE,
    _I32,
    _U8,
    _I64,
    _F32,
)
def quantize(
    values: bits.F32,
    local: bits.I32,
    counts: bits.I64,
    inverse: bits.F32,
    scales: bits.U8,
    edges: bits.F32,
    levels: bits.F64,
    grid: bits.F64,
    shape: tuple[int, int, int, int, int, int],
    gaps: bits.I32,
    codes: bits.U8,
    indices: bits.I64,
    found: bits.F32,
) -> int:
    """Gaps and codes of chosen values, and what a reader makes of them.

    Args:
        values: (n,) chosen ones, by chunk and position.
        local: (n,) their positions in the chunk.
        counts: (chunks,) how many of each.
        inverse: (chunks,) what a chunk's magnitudes are multiplied with.
        scales: (chunks,) scale bytes.
        edges: (levels,) lower edges of the levels' cells, ascending.
        levels: (levels,) as the table has them.
        grid: (256,) what a scale byte stands for.
        shape: as of :func:`place`.
        gaps, codes: (entries,) results, those of absent entries too.
        indices, found: (n,) positions in the section, and values: results.

    Returns:
        How many were read.
    """
    chunk, full, keep, tail, tail_keep, width = shape
    magnitudes = np.empty(levels.size, dtype=np.float32)
    sign = 1 << (width - 1)
    at = slot = count = 0
    for c in range(full + (tail > 0)):
        length, most = (chunk, keep) if c < full else (tail, tail_keep)
        for i in range(levels.size):
            magnitudes[i] = _magnitude(grid[scales[c]], levels[i])
        before = -1
        begun = slot
        for _ in range(counts[c]):
            value, position = values[at], local[at]
            at += 1
            magnitude = np.float32(abs(value)) * inverse[c]
            cell = 0
            if edges.size > _FEW:
                cell = np.searchsorted(edges, magnitude, side="right")
            else:
                for i in range(edges.size):
                    cell += magnitude >= edges[i]
            if cell == 0:  # nearer to nothing
                continue
            gaps[slot] = position - before - 1
            before = position
            codes[slot] = (cell - 1) | (sign if value < 0 else 0)
            slot += 1
            magnitude = magnitudes[cell - 1]
            indices[count] = c * chunk + position
            found[count] = -magnitude if value < 0 else magnitude
            count += magnitude != 0
        absent = most - (slot - begun)
        if absent > 0:  # they count up from the chunk's length
            gaps[slot] = length - before - 1
            codes[slot] = 0
            gaps[slot + 1 : slot + absent] = 0
            codes[slot + 1 : slot + absent] = 0
            slot += absent
    return count


@_compiled(
    types.none, _F32, _F32, _of(_INT), _of(types.float32), types.float32, types.float32, _INT
)
def accumulate(
    total: bits.F32,
    weights: bits.F32,
    indices: bits.I64,
    values: bits.F32,
    factor: np.float32,
    weight: np.float32,
    start: int,
) -> None:
    """``total[indices - start] += factor * values`` and ``weights[…] += weight``, one by one."""
    size = total.size
    for i in range(indices.size):
        at = indices[i] - start
        if 0 <= at < size:
            total[at] += values[i] * factor
            weights[at] += weight


@_compiled()
def _read_f32(stored: np.float32) -> np.float32:
    return stored


@_compiled()
def _store_f32(value: np.float32) -> np.float32:
    return value


@_compiled()
def _read_bf16(stored: np.uint16) -> np.float32:
    return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@_compiled()
def _store_bf16(value: np.float32) -> np.uint16:
    """To the nearest, of two equally near the even one; what is not finite stays so."""
    pattern = np.float32(value).view(np.uint32)
    rounded = (pattern + np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))) >> 16
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


def _adder(read: Any, store: Any, dtype: Any) -> Any:
    """``weights[indices] += values`` in fp32, rounded to the weights' dtype, as
    ``weights.add_sparse_`` has it."""

    @_compiled(types.boolean, dtype, _of(_INT), _of(types.float32), _F32)
    def add(weights: Any, indices: bits.I64, values: bits.F32, moved: bits.F32) -> bool:
        """``moved``: (n,) by how much each changed, or (0,) if nobody asks: a result.

        Whether all that changed are finite, and all indices inside.
        """
        good = True
        for i in range(indices.size):
            at = indices[i]
            if not 0 <= at < weights.size:
                return False
            old = read(weights[at])
            kept = store(old + values[i])
            weights[at] = kept
            new = read(kept)
            good &= abs(new) < np.inf
            if moved.size > 0:
                moved[i] = new - old
        return good

    return add


add_f32 = _adder(_read_f32, _store_f32, _F32)
add_bf16 = _adder(_read_bf16, _store_bf16, types.uint16[::1])


@_compiled(types.none, _F32, _of(_INT), _F32, types.float32)
def leave(lacking: bits.F32, indices: bits.I64, moved: bits.F32, decay: np.float32) -> None:
    """``lacking``: less what was sent where something was, and times ``decay`` elsewhere.

    ``moved``: (n,) by how much; used up.
    """
    size = lacking.size
    for i in range(indices.size):
        at = indices[i]
        if 0 <= at < size:
            moved[i] = lacking[at] - moved[i]
    for at in range(size):
        lacking[at] *= decay
    for i in range(indices.size):
        at = indices[i]
        if 0 <= at < size:
            lacking[at] = moved[i]


@_compiled(types.none, _F32, _of(types.float32))
def divide(total: bits.F32, weights: bits.F32) -> None:
    """``total /= weights`` where a weight is above 0; elsewhere both are 0, and it stays."""
    for at in range(total.size):
        total[at] /= max(weights[at], _TINY)
