"""Codec v2: a tensor as the few largest elements of each chunk, with a few bits a value.

SparseLoCo (arXiv 2508.15706, section 3) keeps the ``keep`` largest of every ``chunk`` elements and
corrects the rest by error feedback (its algorithm 1). A tensor is coded in sections of 2**20
elements (whole chunks), none of which needs another: memory is that of a section, and sections can
be given to threads (ADR 13). A section becomes four byte strings:

``gaps``    zstd of one byte per index: the distance to the index before it in the chunk, minus 1
            (the first: the index itself); 255 means "add 255 and read on".
``codes``   ``value_bits`` bits per entry, little-endian bitwise: the sign on top, the level below.
``scales``  zstd of one byte ``b`` per chunk: 2**((b - 255) / 8), or 0 for ``b == 0``.
``table``   2**(value_bits - 1) fp32 levels. A value is sign * table[level] * scale.

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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from talkoot.protocol import codec_bits as bits
from talkoot.protocol.codec_bits import Layout, malformed, section_spans
from talkoot.protocol.codec_encode import MAX_MAGNITUDE, encode_section, require_sane
from talkoot.protocol.kernels import KERNELS
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.parallel import in_order

_LENGTHS: Final = struct.Struct("<II")
"""Bytes of a section's scales and of its gaps."""


@dataclass(frozen=True)
class EncodedSection:
    """One section on the wire; see the module's docstring for the four parts."""

    gaps: bytes
    codes: bytes
    scales: bytes
    table: bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of the four parts."""
        return len(self.gaps) + len(self.codes) + len(self.scales) + len(self.table)

    def to_bytes(self) -> bytes:
        """The parts in the order in which they travel."""
        return b"".join((self.table, self.scales, self.gaps, self.codes))


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor on the wire: its sections, in order."""

    numel: int
    sections: tuple[EncodedSection, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of :meth:`to_bytes`."""
        lengths = _LENGTHS.size * len(self.sections) if self.sections[0].table else 0
        return lengths + sum(section.size_bytes for section in self.sections)

    def to_bytes(self) -> bytes:
        """The one byte string that a payload holds for this tensor: the lengths of all sections'
        scales and gaps, then the sections."""
        lengths = [
            _LENGTHS.pack(len(section.scales), len(section.gaps))
            for section in self.sections
            if section.table
        ]
        return b"".join(lengths + [section.to_bytes() for section in self.sections])

    @classmethod
    def from_bytes(cls, blob: bytes, numel: int, spec: CodecSpec) -> EncodedTensor:
        """Inverse of :meth:`to_bytes`. Raises :class:`ProtocolError` when the lengths disagree."""
        plan = SectionPlan(blob[: index_bytes(numel, spec)], len(blob), numel, spec)
        sections = (plan.section(i, blob[slice(*plan.span(i))]) for i in range(len(plan)))
        return cls(numel, tuple(sections))


def index_bytes(numel: int, spec: CodecSpec) -> int:
    """Bytes in front of a tensor's first section: 0 for a dense one."""
    if spec.kind == "dense":
        return 0
    return _LENGTHS.size * -(-numel // bits.section_elements(spec))


class SectionPlan:
    """Where each section of an encoded tensor lies, checked.

    Args:
        index: the first :func:`index_bytes` bytes of the encoded tensor.
        size: bytes of all of it.
        numel: elements of the tensor.
        spec: its codec.

    Raises:
        ProtocolError: the lengths do not add up to ``size`` (code ``payload-malformed``).
    """

    def __init__(self, index: bytes, size: int, numel: int, spec: CodecSpec) -> None:
        self.spans: Final = section_spans(numel, spec)  # (start, elements)
        self._spec = spec
        if spec.kind == "dense":
            if size != 4 * numel:
                raise malformed(f"{size} bytes for {numel} dense elements")
            self._lengths = [(0, 0)] * len(self.spans)
            self._cuts = [4 * start for start, _ in self.spans] + [size]
            return
        if len(index) != _LENGTHS.size * len(self.spans):
            raise malformed(f"{size} bytes are too few for {numel} elements")
        self._lengths = list(_LENGTHS.iter_unpack(index))
        self._cuts = [len(index)]
        for (_, elements), (scales, gaps) in zip(self.spans, self._lengths, strict=True):
            layout = Layout.of(elements, spec)
            if scales > bits.compress_bound(layout.chunks):
                raise malformed("the scales are longer than they can be")
            if gaps > bits.compress_bound(layout.gaps_cap):
                raise malformed("the gaps are longer than they can be")
            length = layout.table_size + scales + gaps + layout.codes_size
            self._cuts.append(self._cuts[-1] + length)
        if self._cuts[-1] != size:
            raise malformed("the lengths of its parts do not add up")

    def __len__(self) -> int:
        return len(self.spans)

    def span(self, number: int) -> tuple[int, int]:
        """First byte of a section and the one after its last, inside the encoded tensor."""
        return self._cuts[number], self._cuts[number + 1]

    def section(self, number: int, body: bytes) -> EncodedSection:
        """The parts of a section, given the bytes of its :meth:`span`."""
        if self._spec.kind == "dense":
            return EncodedSection(b"", body, b"", b"")
        scales, gaps = self._lengths[number]
        layout = Layout.of(self.spans[number][1], self._spec)
        cuts = accumulate([0, layout.table_size, scales, gaps, layout.codes_size])
        table, scale, gap, codes = (body[a:b] for a, b in pairwise(cuts))
        return EncodedSection(gaps=gap, codes=codes, scales=scale, table=table)


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

    def to(self, device: torch.device | str) -> SparseTensor:
        """The same on another device."""
        return SparseTensor(self.indices.to(device), self.values.to(device))

    def sum_of_squares(self) -> float:
        """Sum of squared values, in double precision."""
        return float(torch.dot(self.values.double(), self.values.double()))


def max_encoded_bytes(numel: int, spec: CodecSpec) -> int:
    """Most bytes that :meth:`EncodedTensor.to_bytes` can have for ``numel`` elements."""
    if spec.kind == "dense":
        return 4 * numel
    whole, rest = divmod(numel, bits.section_elements(spec))
    most = whole * _max_section_bytes(bits.section_elements(spec), spec) if whole else 0
    return most + (_max_section_bytes(rest, spec) if rest else 0)


def _max_section_bytes(elements: int, spec: CodecSpec) -> int:
    layout = Layout.of(elements, spec)
    return (
        _LENGTHS.size
        + layout.table_size
        + bits.compress_bound(layout.chunks)
        + bits.compress_bound(layout.gaps_cap)
        + layout.codes_size
    )


def encode_flat(flat: Tensor, spec: CodecSpec) -> tuple[EncodedSection, SparseTensor]:
    """Encode one section, and what a reader will make of it (on the host).

    ``flat``: at most ``section_elements(spec)`` elements, contiguous. Raises as
    :func:`encode_tensor` does.
    """
    if spec.kind == "dense":
        dense = flat.float().cpu().numpy()
        require_sane(np.abs(dense))
        section = EncodedSection(b"", dense.astype("<f4").tobytes(), b"", b"")
        return section, SparseTensor(torch.arange(dense.size), torch.from_numpy(dense.copy()))
    coded = encode_section(flat, Layout.of(flat.numel(), spec))
    section = EncodedSection(coded.gaps, coded.codes, coded.scales, coded.table)
    return section, SparseTensor(torch.from_numpy(coded.indices), torch.from_numpy(coded.values))


def encode_tensor(x: Tensor, spec: CodecSpec, *, workers: int | None = None) -> EncodedTensor:
    """Encode ``x`` (any shape, floating, any device).

    The same elements are chosen on every device, of equal ones the first. ``workers``: threads
    (torch's number if not given); however many, the bytes are the same. Raises
    :class:`ProtocolError` (code ``not-finite``) when ``x`` holds NaN, infinity or a magnitude over
    2**64.
    """
    flat = x.detach().reshape(-1)  # (numel,)
    if flat.numel() == 0:
        raise ValueError("an empty tensor cannot be encoded")

    def encode(span: tuple[int, int]) -> EncodedSection:
        return encode_flat(flat[span[0] : sum(span)], spec)[0]

    sections = in_order(encode, section_spans(flat.numel(), spec), _workers(flat, workers))
    return EncodedTensor(flat.numel(), tuple(sections))


def _workers(flat: Tensor, asked: int | None) -> int:
    if flat.device.type != "cpu":
        return 1  # a device does one thing after the other
    return torch.get_num_threads() if asked is None else asked


def decode_section(section: EncodedSection, elements: int, spec: CodecSpec) -> SparseTensor:
    """The values of one section, at positions inside it, on the host.

    Bit-identical everywhere. Nothing is allocated that ``elements`` and ``spec`` do not allow.
    Raises :class:`ProtocolError` (code ``payload-malformed`` or ``not-finite``).
    """
    if spec.kind == "dense":
        return _decode_dense(section, elements)
    layout = Layout.of(elements, spec)
    table = bits.read_table(section.table, layout, MAX_MAGNITUDE)
    packed = bits.read_codes(section.codes, layout.entries, layout.bits)
    chunks = layout.chunks
    scales = bits.decompress(section.scales, low=chunks, high=chunks, what="the scales")
    raw = bits.decompress(section.gaps, low=layout.entries, high=layout.gaps_cap, what="the gaps")
    if compiled := KERNELS.after(layout.entries):
        return _placed_by(compiled, raw, packed, scales, table, layout)
    codes = bits.unpack_codes(packed, layout.entries, layout.bits)
    sums = bits.sums_of_gaps(raw, layout.entries)
    body, full = layout.full * layout.keep, layout.full
    parts = []
    if full:
        rows = (full, layout.keep)
        values = bits.values_of(scales[:full], table, codes[:body].reshape(rows), layout.bits)
        parts.append(_placed(sums[:body].reshape(rows), values, layout.chunk, 0, 0))
    if layout.tail:
        rows = (1, layout.tail_keep)
        values = bits.values_of(scales[full:], table, codes[body:].reshape(rows), layout.bits)
        before = int(sums[body - 1]) if full else 0
        origin = full * layout.chunk
        parts.append(_placed(sums[body:].reshape(rows), values, layout.tail, origin, before))
    if len(parts) == 1:
        indices, found = parts[0]
    else:
        indices = np.concatenate([part[0] for part in parts])
        found = np.concatenate([part[1] for part in parts])
    return SparseTensor(torch.from_numpy(indices), torch.from_numpy(found))


def _placed_by(
    compiled: ModuleType,
    raw: bits.U8,
    packed: bits.U8,
    scales: bits.U8,
    table: bits.F32,
    layout: Layout,
) -> SparseTensor:
    """The same, compiled."""
    indices = np.empty(layout.entries, dtype=np.int64)
    values = np.empty(layout.entries, dtype=np.float32)
    levels, grid = table.astype(np.float64), bits.scale_grid()
    count = compiled.place(raw, packed, scales, levels, grid, layout.shape, indices, values)
    if count < 0:
        raise bits.bad_gaps(layout.entries) if count == -1 else bits.bad_index()
    return SparseTensor(torch.from_numpy(indices[:count]), torch.from_numpy(values[:count]))


def _placed(
    sums: bits.I64, values: bits.F32, length: int, origin: int, before: int
) -> tuple[bits.I64, bits.F32]:
    """(n,) positions and values of those entries that were sent.

    ``sums``, ``values``: (chunks, keep), of chunks of ``length`` elements from ``origin`` on;
    ``before``: the sum that stands in front of the first.
    """
    chunks, keep = sums.shape
    starts = np.concatenate([[before], sums[:-1, -1]])
    local = sums - starts[:, None]  # 1 more than the position
    sent = values != 0
    if int(local[:, -1].max()) > length:
        here = local <= length
        # Absent entries count up from the chunk's length, so the last one tells how many there are.
        absent = keep - here.sum(axis=1)
        if ((absent > 0) & (local[:, -1] != length + absent)).any():
            raise bits.bad_index()
        sent &= here
    local += (np.arange(chunks, dtype=np.int64) * length + (origin - 1))[:, None]
    if sent.all():
        return local.reshape(-1), values.reshape(-1)
    return local[sent], values[sent]


def decode_tensor(
    encoded: EncodedTensor, numel: int, spec: CodecSpec, device: torch.device | str = "cpu"
) -> SparseTensor:
    """The values that ``encoded`` carries for a tensor of ``numel`` elements.

    Bit-identical on every device. Raises as :func:`decode_section` does.
    """
    spans = section_spans(numel, spec)
    if encoded.numel != numel or len(encoded.sections) != len(spans):
        raise malformed(f"{encoded.numel} elements where the manifest has {numel}")
    parts = [
        decode_section(section, elements, spec)
        for section, (_, elements) in zip(encoded.sections, spans, strict=True)
    ]
    return joined(parts, [start for start, _ in spans], device)


def joined(
    parts: Sequence[SparseTensor], starts: Sequence[int], device: torch.device | str = "cpu"
) -> SparseTensor:
    """Sections as one tensor, on ``device``; ``starts``: each one's first element."""
    if len(parts) == 1 and starts[0] == 0:
        return parts[0].to(device)
    indices = torch.cat([part.indices + start for part, start in zip(parts, starts, strict=True)])
    values = torch.cat([part.values for part in parts])
    return SparseTensor(indices.to(device), values.to(device))


def encode_with_feedback(
    delta: Tensor,
    feedback: Tensor | None,
    spec: CodecSpec,
    decay: float,
    *,
    workers: int | None = None,
) -> tuple[EncodedTensor, Tensor]:
    """Encode ``decay * feedback + delta`` and return what was not sent as the new feedback.

    SparseLoCo, arXiv 2508.15706, algorithm 1. The quantization error stays in the feedback too.
    Beside arguments and results it takes the memory of one section a worker.

    Args:
        delta: the pseudo-gradient, any shape, on any device.
        feedback: fp32, flat or shaped like ``delta``; None is zeros.
        spec: the uplink's codec.
        decay: of the feedback, 0 to 1.
        workers: as of :func:`encode_tensor`.

    Returns:
        The encoded tensor and the new feedback, fp32, shaped like ``delta``. The arguments are
        not changed.
    """
    if delta.numel() == 0:
        raise ValueError("an empty tensor cannot be encoded")
    change = delta.detach().reshape(-1)
    held = None if feedback is None else feedback.detach().reshape(-1)
    rest = torch.empty(change.shape, dtype=torch.float32, device=change.device)

    def encode(span: tuple[int, int]) -> EncodedSection:
        part = slice(span[0], sum(span))
        total = rest[part]
        if held is None:
            total.copy_(change[part])
        else:
            torch.mul(held[part], decay, out=total)
            total += change[part]
        section, sent = encode_flat(total, spec)
        sent.to(total.device).add_to_(total, alpha=-1.0)
        return section

    sections = in_order(encode, section_spans(change.numel(), spec), _workers(change, workers))
    return EncodedTensor(change.numel(), tuple(sections)), rest.reshape(delta.shape)


def _decode_dense(section: EncodedSection, elements: int) -> SparseTensor:
    if len(section.codes) != 4 * elements:
        raise malformed(f"{len(section.codes)} bytes for {elements} dense elements")
    values = np.frombuffer(section.codes, dtype="<f4").astype(np.float32)
    require_sane(np.abs(values))
    return SparseTensor(torch.arange(elements, dtype=torch.int64), torch.from_numpy(values))
