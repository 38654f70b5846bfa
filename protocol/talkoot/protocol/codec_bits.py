"""The integer half of codec v1: gaps, bit packing, level tables and bounded decompression.

NumPy only. What is decoded here came from a stranger: every function that reads bytes is told how
many there may be, and raises :class:`ProtocolError` with the code ``payload-malformed`` before it
allocates more than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zstandard

from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.messages import CodecSpec

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

ESCAPE: Final = 255
"""A gap byte of 255 means: add 255 and read on."""
ZSTD_LEVEL: Final = 3
"""Gaps are noise with a skewed distribution: only the entropy coder gains, so levels 1 to 19 give
the same 7.44 bits an index, and low ones are fast."""
OCTAVE_STEPS: Final = 8
"""Steps of the chunk scale grid to a factor of two."""
SMALLEST_NORMAL: Final = 2.0**-126

_BINS_PER_OCTAVE: Final = 1024
_OCTAVES: Final = 16
"""The level histogram spans 2**-16 … 2**16 around the chunk scale."""
_LLOYD_STEPS: Final = 32


def malformed(what: str) -> ProtocolError:
    """The one error for bytes that are not a payload."""
    return ProtocolError(f"Malformed payload: {what}.", code="payload-malformed")


@dataclass(frozen=True)
class Layout:
    """How a flat tensor of ``numel`` elements falls into chunks under a top-k spec.

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
    def gaps_cap(self) -> int:
        """Most bytes that the gaps can take: the gaps of a chunk add up to its length at most."""
        return self.full * (self.keep + self.chunk // ESCAPE) + self.tail_keep + self.tail // ESCAPE


def compress_bound(size: int) -> int:
    """Most bytes that zstd makes of ``size`` bytes (ZSTD_compressBound, with room)."""
    return size + size // 256 + 128


def compress(raw: bytes) -> bytes:
    """One zstd frame that states its content size."""
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(raw)


def decompress(data: bytes, *, low: int, high: int, what: str) -> U8:
    """Decompress one frame whose stated content size lies in ``low … high``, and nothing after it.

    The stated size is checked before memory is taken, and zstd stops at it.
    """
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if not low <= stated <= high:
            raise malformed(f"{what} would decompress to {stated} bytes, not {low} to {high}")
        raw = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=max(1, stated), allow_extra_data=False
        )
    except zstandard.ZstdError as err:
        raise malformed(f"{what} is not a zstd frame") from err
    if len(raw) != stated:
        raise malformed(f"{what} decompressed to {len(raw)} bytes instead of {stated}")
    return np.frombuffer(raw, dtype=np.uint8)


def encode_gaps(gaps: I64) -> U8:
    """Bytes of non-negative gaps: ``gap // 255`` bytes of 255, then ``gap % 255``."""
    escapes, rest = np.divmod(gaps, ESCAPE)
    ends = np.cumsum(escapes + 1)
    out = np.full(int(ends[-1]) if ends.size else 0, ESCAPE, dtype=np.uint8)
    out[ends - 1] = rest
    return out


def decode_gaps(raw: U8, entries: int) -> I64:
    """Inverse of :func:`encode_gaps` for exactly ``entries`` gaps."""
    ends = np.flatnonzero(raw != ESCAPE)
    if ends.size != entries or (entries > 0 and int(ends[-1]) != raw.size - 1):
        raise malformed(f"the gaps do not hold {entries} indices")
    escapes = np.diff(ends, prepend=-1) - 1
    gaps: I64 = raw[ends].astype(np.int64) + ESCAPE * escapes
    return gaps


def pack_codes(codes: U8, bits: int) -> bytes:
    """Pack codes of ``bits`` bits each, the first in the lowest bits of the first byte."""
    if bits == 8:
        return codes.tobytes()
    planes = (codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack_codes(packed: bytes, entries: int, bits: int) -> U8:
    """Inverse of :func:`pack_codes`. Bits after the last code must be zero."""
    if len(packed) != (entries * bits + 7) // 8:
        raise malformed(f"{len(packed)} bytes of codes for {entries} values of {bits} bits")
    raw = np.frombuffer(packed, dtype=np.uint8)
    if bits == 8:
        return raw
    planes = np.unpackbits(raw, bitorder="little")
    if planes[entries * bits :].any():
        raise malformed("bits after the last code are not zero")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    by_code = planes[: entries * bits].reshape(entries, bits) * weights
    codes: U8 = by_code.sum(axis=1, dtype=np.uint8)
    return codes


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


def value_lookup(table: F32, bits: int) -> F32:
    """All values that a tensor can take: (256, 2**bits) fp32, by chunk scale and by code.

    The code's top bit is the sign, the rest is the level. A product below the smallest normal
    number is 0, so that a device which flushes subnormals decodes the same bits.
    """
    magnitude = (scale_grid()[:, None] * table.astype(np.float64)).astype(np.float32)
    magnitude[magnitude < SMALLEST_NORMAL] = 0.0
    return np.concatenate([magnitude, -magnitude], axis=1)


def fit_levels(normalized: F64, count: int) -> F64:
    """``count`` ascending levels for positive magnitudes, beside a fixed level 0 ("not sent").

    Lloyd-Max (S. Lloyd, "Least squares quantization in PCM", 1982) over an integer histogram of
    the logarithm: deterministic, and of the same cost for any number of magnitudes.
    """
    half = _OCTAVES * _BINS_PER_OCTAVE
    bins = np.floor(np.log2(normalized) * _BINS_PER_OCTAVE).astype(np.int64)
    histogram = np.bincount(np.clip(bins + half, 0, 2 * half - 1), minlength=2 * half)
    centres = np.exp2((np.arange(2 * half) - half + 0.5) / _BINS_PER_OCTAVE)
    # cumsum adds in order on every machine, unlike sum: the fit is the same everywhere.
    number = np.concatenate([[0.0], np.cumsum(histogram.astype(np.float64))])
    mass = np.concatenate([[0.0], np.cumsum(histogram * centres)])
    # Levels of least squared error lie about as dense as the cube root of the density (P. Panter
    # and W. Dite, "Quantization distortion in pulse-count modulation", 1951): start there.
    density = np.cumsum(np.cbrt(histogram.astype(np.float64)))
    quantiles = (np.arange(count) + 0.5) / count * density[-1]
    levels: F64 = centres[np.minimum(np.searchsorted(density, quantiles), 2 * half - 1)]
    for _ in range(_LLOYD_STEPS):
        edges = np.searchsorted(centres, cell_edges(levels))
        first, last = edges, np.append(edges[1:], 2 * half)
        members = number[last] - number[first]
        means = (mass[last] - mass[first]) / np.maximum(members, 1.0)
        # A level that nobody uses stays where it is; sorting keeps the cells well formed.
        moved = np.sort(np.where(members > 0, means, levels))
        if np.array_equal(moved, levels):
            break
        levels = moved
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
