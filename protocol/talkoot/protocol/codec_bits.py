"""The integer half of codec v2: sections, gaps, bit packing, level tables, bounded decompression.

NumPy only. What is decoded here came from a stranger: every function that reads bytes is told how
many there may be, and raises :class:`ProtocolError` with the code ``payload-malformed`` before it
allocates more than that.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zstandard

from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.messages import CodecSpec

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SECTION: Final = 2**20
"""Elements that are coded together, rounded down to whole chunks: a tensor of any size is coded in
memory for one section (ADR 13)."""
ESCAPE: Final = 255
"""A gap byte of 255 means: add 255 and read on."""
ZSTD_LEVEL: Final = 1
"""Gaps are noise with a skewed distribution: only the entropy coder gains, so levels 1 to 19 give
the same 7.44 bits an index, and the first is the fastest."""
OCTAVE_STEPS: Final = 8
"""Steps of the chunk scale grid to a factor of two."""
SMALLEST_NORMAL: Final = 2.0**-126

BIN_SHIFT: Final = 17
"""The level histogram has 2**(23 - 17) bins an octave: the top bits of an fp32 are the bin."""
_OCTAVES: Final = 16
"""It spans 2**-16 … 2**16 around the chunk scale."""
FIRST_BIN: Final = (127 - _OCTAVES) << (23 - BIN_SHIFT)
"""What the top bits of the smallest magnitudes are."""
BINS: Final = 2 * _OCTAVES << (23 - BIN_SHIFT)
_LLOYD_STEPS: Final = 16
_LOCAL = threading.local()


def malformed(what: str) -> ProtocolError:
    """The one error for bytes that are not a payload."""
    return ProtocolError(f"Malformed payload: {what}.", code="payload-malformed")


def bad_gaps(entries: int) -> ProtocolError:
    """Too few of them, or too many."""
    return malformed(f"the gaps do not hold {entries} indices")


def bad_index() -> ProtocolError:
    """One that is too large."""
    return malformed("an index lies outside its chunk")


def section_elements(spec: CodecSpec) -> int:
    """Elements of every section but a tensor's last."""
    if spec.kind == "dense":
        return SECTION
    return spec.chunk * max(1, SECTION // spec.chunk)


def section_spans(numel: int, spec: CodecSpec) -> list[tuple[int, int]]:
    """(start, elements) of each section of a flat tensor."""
    step = section_elements(spec)
    return [(start, min(step, numel - start)) for start in range(0, numel, step)]


@dataclass(frozen=True)
class Layout:
    """How a section of ``numel`` elements falls into chunks under a top-k spec.

    ``full`` chunks have ``chunk`` elements and ``keep`` entries each; when ``tail`` is not 0 one
    last chunk has ``tail`` elements and ``tail_keep`` entries.
    """

    chunk: int
    full: int
    keep: int
    tail: int
    tail_keep: int
    bits: int

    @classmethod
    def of(cls, numel: int, spec: CodecSpec) -> Layout:
        """Layout of ``numel`` >= 1 elements."""
        full, tail = divmod(numel, spec.chunk)
        tail_keep = min(tail, math.ceil(spec.keep * tail / spec.chunk))
        return cls(spec.chunk, full, min(spec.keep, spec.chunk), tail, tail_keep, spec.value_bits)

    @property
    def chunks(self) -> int:
        """Number of chunks, the short one included."""
        return self.full + (self.tail > 0)

    @property
    def entries(self) -> int:
        """Number of entries (an index and a value) of all chunks."""
        return self.full * self.keep + self.tail_keep

    @property
    def codes_size(self) -> int:
        """Bytes of the packed value codes."""
        return (self.entries * self.bits + 7) // 8

    @property
    def table_size(self) -> int:
        """Bytes of the level table."""
        return 4 << (self.bits - 1)

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """As ``codec_compiled`` is told it."""
        return self.chunk, self.full, self.keep, self.tail, self.tail_keep, self.bits

    @property
    def gaps_cap(self) -> int:
        """Most bytes that the gaps can take: the gaps of a chunk add up to its length at most."""
        return self.full * (self.keep + self.chunk // ESCAPE) + self.tail_keep + self.tail // ESCAPE


def compress_bound(size: int) -> int:
    """Most bytes that zstd makes of ``size`` bytes (ZSTD_compressBound, with room)."""
    return size + size // 256 + 128


def compress(raw: bytes) -> bytes:
    """One zstd frame that states its content size."""
    context = getattr(_LOCAL, "compressor", None)
    if context is None:  # one a thread: a context is not to be shared
        context = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
        _LOCAL.compressor = context
    made: bytes = context.compress(raw)
    return made


def decompress(data: bytes, *, low: int, high: int, what: str) -> U8:
    """Decompress one frame whose stated content size lies in ``low … high``, and nothing after it.

    The stated size is checked before memory is taken, and zstd stops at it.
    """
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if not low <= stated <= high:
            raise malformed(f"{what} would decompress to {stated} bytes, not {low} to {high}")
        context = getattr(_LOCAL, "decompressor", None)
        if context is None:
            context = _LOCAL.decompressor = zstandard.ZstdDecompressor()
        raw = context.decompress(data, max_output_size=max(1, stated), allow_extra_data=False)
    except zstandard.ZstdError as err:
        raise malformed(f"{what} is not a zstd frame") from err
    if len(raw) != stated:
        raise malformed(f"{what} decompressed to {len(raw)} bytes instead of {stated}")
    return np.frombuffer(raw, dtype=np.uint8)


def encode_gaps(gaps: I32) -> U8:
    """Bytes of non-negative gaps: ``gap // 255`` bytes of 255, then ``gap % 255``."""
    if gaps.size == 0 or int(gaps.max()) < ESCAPE:
        return gaps.astype(np.uint8)
    escapes, rest = np.divmod(gaps, ESCAPE)
    ends = np.cumsum(escapes + 1)
    out = np.full(int(ends[-1]), ESCAPE, dtype=np.uint8)
    out[ends - 1] = rest
    return out


def sums_of_gaps(raw: U8, entries: int) -> I64:
    """(entries,) for each of exactly ``entries`` gaps: the sum of all up to it, each with 1 added.

    The inverse of :func:`encode_gaps`, and the first step from gaps to positions.
    """
    sums: I64 = np.cumsum(raw, dtype=np.int64)
    if raw.size != entries or (entries > 0 and int(raw.max()) == ESCAPE):
        ends = np.flatnonzero(raw != ESCAPE)
        if ends.size != entries or (entries > 0 and int(ends[-1]) != raw.size - 1):
            raise bad_gaps(entries)
        sums = np.take(sums, ends)
    sums += np.arange(1, entries + 1)
    return sums


def pack_codes(codes: U8, bits: int) -> bytes:
    """Pack codes of ``bits`` bits each, the first in the lowest bits of the first byte."""
    if bits == 8:
        return codes.tobytes()
    per_byte, odd = divmod(8, bits)
    if odd == 0:
        if codes.size % per_byte:
            codes = np.concatenate([codes, np.zeros(-codes.size % per_byte, np.uint8)])
        lanes = codes.reshape(-1, per_byte)
        packed = lanes[:, 0].copy()
        for lane in range(1, per_byte):
            packed |= lanes[:, lane] << np.uint8(bits * lane)
        return packed.tobytes()
    planes = (codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def read_codes(packed: bytes, entries: int, bits: int) -> U8:
    """The bytes that hold so many codes. Bits after the last code must be zero."""
    if len(packed) != (entries * bits + 7) // 8:
        raise malformed(f"{len(packed)} bytes of codes for {entries} values of {bits} bits")
    raw = np.frombuffer(packed, dtype=np.uint8)
    spare = 8 * len(packed) - entries * bits
    if spare and raw[-1] >> (8 - spare):
        raise malformed("bits after the last code are not zero")
    return raw


def unpack_codes(raw: U8, entries: int, bits: int) -> U8:
    """Inverse of :func:`pack_codes`, after :func:`read_codes`."""
    if bits == 8:
        return raw
    if 8 % bits == 0:
        return np.take(_lanes(bits), raw).view(np.uint8)[:entries]
    planes = np.unpackbits(raw, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    by_code = planes[: entries * bits].reshape(entries, bits) * weights
    codes: U8 = by_code.sum(axis=1, dtype=np.uint8)
    return codes


@cache
def _lanes(bits: int) -> npt.NDArray[Any]:
    """(256,) the codes in each byte, a byte a code, as one integer."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.view(f"u{shifts.size}").reshape(-1)


@cache
def scale_grid() -> F64:
    """The 256 chunk scales: ``2 ** ((b - 255) / 8)``, and 0 for ``b == 0``.

    Built from IEEE square roots and powers of two, so that every machine has the same 256 doubles
    (``pow`` may differ in the last bit from one libm to another).
    """
    root = math.sqrt(math.sqrt(math.sqrt(2.0)))
    steps = [1.0]
    for _ in range(OCTAVE_STEPS - 1):
        steps.append(steps[-1] * root)
    grid = np.zeros(256, dtype=np.float64)
    for b in range(1, 256):
        octave, step = divmod(b - 255, OCTAVE_STEPS)
        grid[b] = math.ldexp(steps[step], octave)
    return grid


def values_of(scales: U8, table: F32, codes: U8, bits: int) -> F32:
    """The fp32 values of (chunks, keep) codes, given each chunk's scale byte and the levels.

    A code's top bit is the sign, the rest is the level. A product below the smallest normal number
    is 0, so that a device which flushes subnormals decodes the same bits.
    """
    scale = scale_grid()[scales][:, None]
    levels = table.astype(np.float64)
    chunks, keep = codes.shape
    if 2 * levels.size > keep:  # few entries a chunk: one product an entry
        level = codes & np.uint8(levels.size - 1)
        magnitude = (scale * levels[level]).astype(np.float32)
        magnitude[magnitude < SMALLEST_NORMAL] = 0.0
        signed: F32 = np.where(codes >> np.uint8(bits - 1), -magnitude, magnitude)
        return signed
    magnitude = (scale * levels).astype(np.float32)  # (chunks, levels)
    magnitude[magnitude < SMALLEST_NORMAL] = 0.0
    each = np.concatenate([magnitude, -magnitude], axis=1).reshape(-1)
    rows = np.arange(0, chunks << bits, 1 << bits)[:, None]
    return np.take(each, rows + codes)


@cache
def _bin_centres() -> F64:
    """The middle of each bin of the level histogram, ascending."""
    edges = np.arange(FIRST_BIN, FIRST_BIN + BINS + 1, dtype=np.uint32)
    bounds = (edges << np.uint32(BIN_SHIFT)).view(np.float32).astype(np.float64)
    return (bounds[:-1] + bounds[1:]) / 2


def histogram_of(normalized: F32) -> tuple[F64, F64]:
    """How many positive magnitudes lie in each bin, and their sums: added up in order."""
    bins = (normalized.view(np.uint32) >> np.uint32(BIN_SHIFT)).astype(np.int64)
    bins = np.clip(bins - FIRST_BIN, 0, BINS - 1)
    numbers = np.bincount(bins, minlength=BINS).astype(np.float64)
    sums: F64 = np.bincount(bins, weights=normalized, minlength=BINS).astype(np.float64)
    return numbers, sums


def fit_levels(numbers: F64, sums: F64, count: int) -> F64:
    """``count`` ascending levels for positive magnitudes, beside a fixed level 0 ("not sent").

    Lloyd-Max (S. Lloyd, "Least squares quantization in PCM", 1982) over a histogram of the top
    bits of the magnitudes (:func:`histogram_of`; not an empty one): deterministic, and of the same
    cost for any number of them.
    """
    used = np.flatnonzero(numbers)
    centres, histogram, sums = _bin_centres()[used], numbers[used], sums[used]
    # cumsum adds in order on every machine, unlike sum: the fit is the same everywhere.
    number = np.concatenate([[0.0], np.cumsum(histogram)])
    mass = np.concatenate([[0.0], np.cumsum(sums)])
    # Levels of least squared error lie about as dense as the cube root of the density (P. Panter
    # and W. Dite, "Quantization distortion in pulse-count modulation", 1951): start there.
    density = np.cumsum(np.cbrt(histogram))
    quantiles = (np.arange(count) + 0.5) / count * density[-1]
    levels: F64 = centres[np.minimum(np.searchsorted(density, quantiles), centres.size - 1)]
    before = None
    for _ in range(_LLOYD_STEPS):
        cuts = np.append(np.searchsorted(centres, cell_edges(levels)), centres.size)
        if before is not None and np.array_equal(cuts, before):
            break
        before = cuts
        members = np.diff(number[cuts])
        means = np.diff(mass[cuts]) / np.maximum(members, 1.0)
        # A level that nobody uses stays where it is; sorting keeps the cells well formed.
        levels = np.sort(np.where(members > 0, means, levels))
    return levels


def cell_edges(levels: F64) -> F64:
    """Lower edge of each level's cell; below the first edge, 0 is nearer than any level."""
    edges: F64 = (levels + np.concatenate([[0.0], levels[:-1]])) / 2
    return edges


def read_table(data: bytes, layout: Layout, largest: float) -> F32:
    """The level table of a tensor: finite, not negative, ``largest`` at most."""
    if len(data) != layout.table_size:
        raise malformed(f"a level table of {len(data)} bytes instead of {layout.table_size}")
    table: F32 = np.frombuffer(data, dtype="<f4").astype(np.float32)
    good: Any = (table >= 0) & (table <= largest)  # False for NaN
    if not good.all():
        raise malformed("a level is negative, not finite or absurdly large")
    return table
