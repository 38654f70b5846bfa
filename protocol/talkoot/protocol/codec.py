"""Codec v1: a tensor as the few largest elements of each chunk, with a few bits a value.

SparseLoCo (arXiv 2508.15706, section 3) keeps the ``keep`` largest of every ``chunk`` elements and
corrects the rest by error feedback (its algorithm 1). Here a tensor becomes four byte strings:

``gaps``    zstd of one byte per index: the distance to the index before it in the chunk, minus 1
            (the first: the index itself); 255 means "add 255 and read on".
``codes``   ``value_bits`` bits per entry, little-endian bitwise: the sign on top, the level below.
``scales``  zstd of one byte ``b`` per chunk: 2**((b - 255) / 8), or 0 for ``b == 0``.
``table``   2**(value_bits - 1) fp32 levels of the tensor. A value is sign * table[level] * scale.

Chunks of small magnitude (rows of rare tokens) would be overshot by a table alone: hence the scale.
A chunk may send fewer values than it has entries: its entries from index L (its length) on are
absent, and count up from L. The encoder leaves out what 0 is nearer to than any level, so that an
encoded tensor is never further from its source than nothing at all.

``dense`` writes every element as fp32 in ``codes``, exactly.

Only the selection runs on the tensor's device; the rest is 1/64 of the data and runs on the host in
the same way everywhere, so that a payload decodes to the same bits on any machine.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from talkoot.protocol import codec_bits as bits
from talkoot.protocol.codec_bits import Layout, malformed
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.messages import CodecSpec

MAX_MAGNITUDE: Final = 2.0**64
"""Largest value that travels. A pseudo-gradient near it is no longer training."""
_NEGLIGIBLE: Final = 2.0**-100
"""A tensor whose largest chunk is smaller than this is sent as nothing; the feedback keeps it."""
_SLAB_ELEMENTS: Final = 2**24
"""Elements looked at in one go: it bounds what the selection needs beside the tensor itself."""
_LENGTHS: Final = struct.Struct("<QQ")


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor on the wire; see the module's docstring for the four parts."""

    numel: int
    gaps: bytes
    codes: bytes
    scales: bytes
    table: bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of :meth:`to_bytes` for a top-k tensor; 16 fewer for a dense one."""
        return _LENGTHS.size + len(self.gaps) + len(self.codes) + len(self.scales) + len(self.table)

    def to_bytes(self) -> bytes:
        """The one byte string that a payload holds for this tensor."""
        if not self.table:
            return self.codes
        lengths = _LENGTHS.pack(len(self.scales), len(self.gaps))
        return b"".join((lengths, self.table, self.scales, self.gaps, self.codes))

    @classmethod
    def from_bytes(cls, blob: bytes, numel: int, spec: CodecSpec) -> EncodedTensor:
        """Inverse of :meth:`to_bytes`. Raises :class:`ProtocolError` when the lengths disagree."""
        if spec.kind == "dense":
            if len(blob) != 4 * numel:
                raise malformed(f"{len(blob)} bytes for {numel} dense elements")
            return cls(numel, b"", blob, b"", b"")
        layout = Layout.of(numel, spec)
        fixed = _LENGTHS.size + layout.table_size
        if len(blob) < fixed + layout.codes_size:
            raise malformed(f"{len(blob)} bytes are too few for {numel} elements")
        scales, gaps = _LENGTHS.unpack_from(blob)
        if fixed + scales + gaps + layout.codes_size != len(blob):
            raise malformed("the lengths of its parts do not add up")
        cuts = (fixed, fixed + scales, fixed + scales + gaps)
        return cls(
            numel,
            gaps=blob[cuts[1] : cuts[2]],
            codes=blob[cuts[2] :],
            scales=blob[cuts[0] : cuts[1]],
            table=blob[_LENGTHS.size : cuts[0]],
        )


@dataclass(frozen=True)
class SparseTensor:
    """The values that were sent, at ascending row-major positions."""

    indices: Tensor  # (n,) int64, strictly ascending
    values: Tensor  # (n,) fp32

    def add_to_(self, flat: Tensor, alpha: float = 1.0) -> Tensor:
        """``flat[indices] += alpha * values`` in place; ``flat``: (numel,) fp32. Returns it."""
        # The product is rounded on its own: a fused multiply-add would differ between devices.
        return flat.index_add_(0, self.indices, self.values * alpha)

    def to_dense(self, numel: int) -> Tensor:
        """(numel,) fp32 with zeros where nothing was sent."""
        flat = torch.zeros(numel, dtype=torch.float32, device=self.values.device)
        return self.add_to_(flat)

    def sum_of_squares(self) -> float:
        """Sum of squared values, in double precision."""
        return float(torch.dot(self.values.double(), self.values.double()))


def max_encoded_bytes(numel: int, spec: CodecSpec) -> int:
    """Most bytes that :meth:`EncodedTensor.to_bytes` can have for ``numel`` elements."""
    if spec.kind == "dense":
        return 4 * numel
    layout = Layout.of(numel, spec)
    return (
        _LENGTHS.size
        + layout.table_size
        + bits.compress_bound(layout.chunks)
        + bits.compress_bound(layout.gaps_cap)
        + layout.codes_size
    )


def encode_tensor(x: Tensor, spec: CodecSpec) -> EncodedTensor:
    """Encode ``x`` (any shape, floating, any device).

    The same device gives the same bytes; two kinds of device may choose differently among elements
    of equal magnitude. Raises :class:`ProtocolError` (code ``not-finite``) when ``x`` holds NaN,
    infinity or a magnitude over 2**64.
    """
    flat = x.detach().reshape(-1)  # (numel,)
    if flat.numel() == 0:
        raise ValueError("an empty tensor cannot be encoded")
    if spec.kind == "dense":
        dense = flat.float().cpu().numpy()
        _require_sane(dense)
        return EncodedTensor(flat.numel(), b"", dense.astype("<f4").tobytes(), b"", b"")
    layout = Layout.of(flat.numel(), spec)
    body = layout.full * layout.chunk
    parts = []
    if layout.full:
        parts.append(_select(flat[:body].view(layout.full, layout.chunk), layout.keep))
    if layout.tail:
        parts.append(_select(flat[body:].view(1, layout.tail), layout.tail_keep))
    return _quantize(parts, layout, flat.numel())


def decode_tensor(
    encoded: EncodedTensor, numel: int, spec: CodecSpec, device: torch.device | str = "cpu"
) -> SparseTensor:
    """The values that ``encoded`` carries for a tensor of ``numel`` elements.

    Bit-identical on every device. Nothing is allocated that ``numel`` and ``spec`` do not allow.
    Raises :class:`ProtocolError` (code ``payload-malformed`` or ``not-finite``).
    """
    if encoded.numel != numel:
        raise malformed(f"{encoded.numel} elements where the manifest has {numel}")
    if spec.kind == "dense":
        return _decode_dense(encoded, numel, device)
    layout = Layout.of(numel, spec)
    table = bits.read_table(encoded.table, layout, MAX_MAGNITUDE)
    codes = bits.unpack_codes(encoded.codes, layout.entries, layout.bits)
    chunks = layout.chunks
    scales = bits.decompress(encoded.scales, low=chunks, high=chunks, what="the scales")
    raw = bits.decompress(encoded.gaps, low=layout.entries, high=layout.gaps_cap, what="the gaps")
    gaps = bits.decode_gaps(raw, layout.entries)
    body = layout.full * layout.keep
    positions, present = [], []
    for number, keep, length, start, part in (
        (layout.full, layout.keep, layout.chunk, 0, gaps[:body]),
        (int(layout.tail > 0), layout.tail_keep, layout.tail, layout.full, gaps[body:]),
    ):
        if number == 0:
            continue
        local = np.cumsum(part.reshape(number, keep) + 1, axis=1) - 1  # (number, keep)
        here = local < length
        # Absent entries count up from the chunk's length, so the last one tells how many there are.
        absent = keep - here.sum(axis=1)
        if ((absent > 0) & (local[:, -1] != length + absent - 1)).any():
            raise malformed("an index lies outside its chunk")
        origin = (np.arange(number, dtype=np.int64) + start) * layout.chunk
        positions.append((local + origin[:, None]).reshape(-1))
        present.append(here.reshape(-1))
    owner = np.repeat(scales[: layout.full], layout.keep)
    owner = np.concatenate([owner, np.repeat(scales[layout.full :], layout.tail_keep)])
    values = bits.value_lookup(table, layout.bits)[owner, codes]
    sent = np.concatenate(present) & (values != 0)
    return SparseTensor(
        torch.from_numpy(np.concatenate(positions)[sent]).to(device),
        torch.from_numpy(values[sent]).to(device),
    )


def encode_with_feedback(
    delta: Tensor, feedback: Tensor | None, spec: CodecSpec, decay: float
) -> tuple[EncodedTensor, Tensor]:
    """Encode ``decay * feedback + delta`` and return what was not sent as the new feedback.

    SparseLoCo, arXiv 2508.15706, algorithm 1. The quantization error stays in the feedback too.

    Args:
        delta: the pseudo-gradient, any shape, on any device.
        feedback: fp32, flat or shaped like ``delta``; None is zeros.
        spec: the uplink's codec.
        decay: of the feedback, 0 to 1.

    Returns:
        The encoded tensor and the new feedback, fp32, shaped like ``delta``. The arguments are
        not changed.
    """
    if feedback is None:
        total = delta.detach().float().clone(memory_format=torch.contiguous_format)
    else:
        total = feedback.detach().reshape(delta.shape).float() * decay
        total = (total + delta.detach()).contiguous()
    encoded = encode_tensor(total, spec)
    sent = decode_tensor(encoded, total.numel(), spec, total.device)
    sent.add_to_(total.view(-1), alpha=-1.0)
    return encoded, total


def _require_sane(values: bits.F32) -> None:
    if not (np.abs(values) <= MAX_MAGNITUDE).all():  # False for NaN too
        raise ProtocolError(
            "An update holds NaN, infinity or a value over 2**64: training has diverged, so start "
            "again from the last published weights with a smaller learning rate.",
            code="not-finite",
        )


def _select(rows: Tensor, keep: int) -> tuple[bits.I64, bits.F32]:
    """The ``keep`` largest by magnitude of each row: local indices (ascending) and values.

    ``rows``: (n, length). Returns two (n, keep) arrays. ``topk`` ranks NaN above all numbers, so a
    row with a NaN or an infinity shows it among its kept values.
    """
    number, length = rows.shape
    indices = np.empty((number, keep), dtype=np.int64)
    values = np.empty((number, keep), dtype=np.float32)
    step = max(1, _SLAB_ELEMENTS // length)
    for start in range(0, number, step):
        slab = rows[start : start + step].float()
        if keep == length:
            chosen = torch.arange(length, device=slab.device).expand(slab.shape)
        else:
            largest = torch.topk(slab.abs(), keep, dim=1, sorted=False).indices
            chosen = largest.sort(dim=1).values
        indices[start : start + step] = chosen.cpu().numpy()
        values[start : start + step] = slab.gather(1, chosen).cpu().numpy()
    _require_sane(values)
    return indices, values


def _quantize(parts: list[tuple[bits.I64, bits.F32]], layout: Layout, numel: int) -> EncodedTensor:
    """Scales, levels, gaps and codes of the selected values, one part per chunk length."""
    grid = bits.scale_grid()
    sizes = np.concatenate([_chunk_size(values) for _, values in parts])  # (chunks,)
    base = float(sizes.max())
    if base < _NEGLIGIBLE:
        base = 0.0
    scales = np.zeros(sizes.shape, dtype=np.uint8)
    if base > 0:
        with np.errstate(divide="ignore"):
            steps = np.rint(np.log2(sizes / base) * bits.OCTAVE_STEPS) + 255
        scales = np.clip(steps, 0, 255).astype(np.uint8)  # 2**-32 of the largest chunk: nothing
    magnitudes, first = [], 0
    for _, values in parts:
        scale = grid[scales[first : first + len(values)]] * base
        first += len(values)
        scale[scale == 0] = np.inf
        magnitudes.append(np.abs(values.astype(np.float64)) / scale[:, None])
    positive = np.concatenate([part[part > 0] for part in magnitudes])
    count = 1 << (layout.bits - 1)
    levels = bits.fit_levels(positive, count) if positive.size else np.zeros(count)
    edges = bits.cell_edges(levels) if positive.size else np.full(count, np.inf)
    gaps, codes = [], []
    lengths = [layout.chunk] * (layout.full > 0) + [layout.tail] * (layout.tail > 0)
    for (indices, values), magnitude, length in zip(parts, magnitudes, lengths, strict=True):
        cells = np.searchsorted(edges, magnitude, side="right")  # 0: nearer to nothing
        code = np.maximum(cells - 1, 0) | (np.signbit(values).astype(np.int64) << layout.bits - 1)
        indices, code = _absent_last(indices, np.where(cells > 0, code, 0), cells == 0, length)
        gaps.append((np.diff(indices, axis=1, prepend=-1) - 1).reshape(-1))
        codes.append(code.reshape(-1).astype(np.uint8))
    return EncodedTensor(
        numel,
        gaps=bits.compress(bits.encode_gaps(np.concatenate(gaps)).tobytes()),
        codes=bits.pack_codes(np.concatenate(codes), layout.bits),
        scales=bits.compress(scales.tobytes()),
        table=np.minimum(levels * base, MAX_MAGNITUDE).astype("<f4").tobytes(),
    )


def _chunk_size(values: bits.F32) -> bits.F64:
    """Root mean square of each row's non-zero values, 0 for a row of zeros; (n,) float64."""
    squares = np.square(values.astype(np.float64)).sum(axis=1)
    sizes: bits.F64 = np.sqrt(squares / np.maximum((values != 0).sum(axis=1), 1))
    return sizes


def _absent_last(
    indices: bits.I64, codes: bits.I64, absent: npt.NDArray[np.bool_], length: int
) -> tuple[bits.I64, bits.I64]:
    """Move the entries that are not sent to the end of their row, counting up from ``length``."""
    rows = np.flatnonzero(absent.any(axis=1))
    if rows.size == 0:
        return indices, codes
    order = np.argsort(absent[rows], axis=1, kind="stable")
    indices, codes = indices.copy(), codes.copy()
    present = absent.shape[1] - absent[rows].sum(axis=1, keepdims=True)
    column = np.arange(absent.shape[1])
    moved = np.take_along_axis(indices[rows], order, axis=1)
    indices[rows] = np.where(column < present, moved, length + column - present)
    codes[rows] = np.take_along_axis(codes[rows], order, axis=1)
    return indices, codes


def _decode_dense(encoded: EncodedTensor, numel: int, device: torch.device | str) -> SparseTensor:
    if len(encoded.codes) != 4 * numel:
        raise malformed(f"{len(encoded.codes)} bytes for {numel} dense elements")
    values = np.frombuffer(encoded.codes, dtype="<f4").astype(np.float32)
    _require_sane(values)
    return SparseTensor(
        torch.arange(numel, dtype=torch.int64).to(device), torch.from_numpy(values).to(device)
    )
