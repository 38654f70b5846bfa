"""The one pass over all sections that closes a round. Called by ``aggregate.py``.

A section is 2**20 elements of a tensor (ADR 13). For each, one thread reads its state, decodes all
contributions, steps the outer optimizer, encodes the update and writes the new state; a few threads
do so at once, and the caller's thread takes their results in order. A thread works in buffers that
are given from section to section, so memory follows neither tensors nor nodes.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from talkoot.protocol import codec_bits as bits
from talkoot.protocol import faults
from talkoot.protocol.codec import (
    EncodedSection,
    EncodedTensor,
    SparseTensor,
    encode_flat,
    joined,
)
from talkoot.protocol.codec_bits import section_elements, section_spans
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.manifest import ITEM_BYTES, Manifest, TensorSpec
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.parallel import in_order
from talkoot.protocol.payload import PayloadReader, TensorSections
from talkoot.protocol.weights import WeightsReader, WeightsWriter, add_sparse_
from talkoot.server.outer import OuterSpec, outer_step_
from talkoot.server.robust import AggregationSpec, sign_majority, trimmed_mean

Clock = Callable[[], float]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """One contribution that counts."""

    reader: PayloadReader
    weight: float
    factor: float
    """Of its values."""


@dataclass(frozen=True)
class OldState:
    """What the round starts from."""

    published: WeightsReader
    feedback: WeightsReader | None
    momentum: WeightsReader | None


@dataclass(frozen=True)
class NewState:
    """What it leaves."""

    published: WeightsWriter
    feedback: WeightsWriter
    momentum: WeightsWriter | None


@dataclass(frozen=True)
class How:
    """Codecs, optimizer, rule, threads, and the clock of the report."""

    uplink: CodecSpec
    downlink: CodecSpec
    outer: OuterSpec
    rule: AggregationSpec
    workers: int
    clock: Clock


@dataclass(frozen=True)
class _Job:
    spec: TensorSpec
    start: int
    """First element."""
    elements: int
    parts: Sequence[tuple[TensorSections, float, float]]
    number: int | None
    """Of the section in the parts; None is all of them."""
    last: bool
    """Of its tensor."""


@dataclass(frozen=True)
class _Done:
    job: _Job
    sections: Sequence[EncodedSection]
    gradient_squares: float
    update_squares: float
    buffers: _Buffers


class _Buffers:
    """Memory for one section: its published weights and what they lack."""

    def __init__(self, elements: int) -> None:
        self.published = np.empty(4 * elements, dtype=np.uint8)
        self.total = np.empty(elements, dtype=np.float32)


class Closing:
    """Sections in, sections out. ``seconds`` are those of all threads, by stage."""

    def __init__(
        self, manifest: Manifest, parts: Sequence[Part], old: OldState, new: NewState, how: How
    ) -> None:
        self._manifest = manifest
        self._parts = parts
        self._old = old
        self._new = new
        self._downlink = downlink = how.downlink
        self._outer = how.outer
        self._rule = how.rule
        self._workers = how.workers
        self._clock = how.clock
        self._spare: queue.SimpleQueue[_Buffers] = queue.SimpleQueue()
        self._local = threading.local()
        # Sections are 2**20 elements unless a chunk is no power of two.
        self._aligned = section_elements(how.uplink) == section_elements(downlink)
        self._elements = max(spec.numel for spec in manifest.tensors)
        if self._aligned:
            self._elements = min(self._elements, section_elements(downlink))
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.gradient_squares = 0.0
        self.update_squares = 0.0

    def tensors(self) -> Iterator[tuple[str, EncodedTensor]]:
        """Do it; the update's tensors, in manifest order."""
        for _ in range(2 * self._workers + 1):
            self._spare.put(_Buffers(self._elements))
        gradient: list[float] = []
        update: list[float] = []
        sections: list[EncodedSection] = []
        for done in in_order(self._section, self._jobs(), self._workers):
            spec, job = done.job.spec, done.job
            size = job.elements * ITEM_BYTES[spec.dtype]
            with self._stage("hash"):
                self._new.published.digest_next(spec.name, done.buffers.published[:size].data)
            self._spare.put(done.buffers)
            gradient.append(done.gradient_squares)
            update.append(done.update_squares)
            sections += done.sections
            if job.last:
                faults.place("aggregate.tensor")
                yield spec.name, EncodedTensor(spec.numel, tuple(sections))
                sections = []
        self.gradient_squares = math.fsum(gradient)
        self.update_squares = math.fsum(update)

    def _jobs(self) -> Iterator[_Job]:
        """All sections, or whole tensors where both codecs' sections are not the same elements."""
        for spec in self._manifest.tensors:
            parts = [(p.reader.sections(spec.name), p.weight, p.factor) for p in self._parts]
            if not self._aligned:
                yield _Job(spec, 0, spec.numel, parts, None, last=True)
                continue
            spans = section_spans(spec.numel, self._downlink)
            for number, (start, elements) in enumerate(spans):
                last = number == len(spans) - 1
                yield _Job(spec, start, elements, parts, number, last)

    def _section(self, job: _Job) -> _Done:
        buffers = self._spare.get()
        size = ITEM_BYTES[job.spec.dtype]
        raw = buffers.published[: job.elements * size]
        total = buffers.total[: job.elements]
        name, offset = job.spec.name, job.start * size
        with self._stage("read"):
            self._old.published.read_into(name, offset, raw)
            if self._old.feedback is None:
                total.fill(0.0)
            else:
                self._old.feedback.read_into(name, 4 * job.start, total.view(np.uint8))
        with self._stage("decode"):
            mean = self._combine(job)
        squares = _sum_of_squares(mean)
        with self._stage("outer"):
            self._step(job, total, mean)
        with self._stage("encode"):
            sections, sent = self._encode(job, total)
            self._publish(job, raw, total, sent)
        with self._stage("write"):
            self._new.published.put(name, offset, raw.data)
            self._new.feedback.put(name, 4 * job.start, total.view(np.uint8).data)
        return _Done(job, sections, squares, sent.sum_of_squares(), buffers)

    def _combine(self, job: _Job) -> bits.F32:
        """The averaged pseudo-gradient of a section."""
        decoded = (
            (part.decode_all() if job.number is None else part.decode(job.number), w, f)
            for part, w, f in job.parts
        )
        if self._rule.rule == "trimmed-mean":
            return trimmed_mean(job.elements, list(decoded), self._rule.trim).numpy()
        if self._rule.rule == "sign-majority":
            return sign_majority(job.elements, list(decoded)).numpy()
        total, weights = self._scratch(job.elements)  # geometric median: through the influences
        return mean_into(total, weights, decoded)

    def _scratch(self, elements: int) -> tuple[bits.F32, bits.F32]:
        """Two arrays of this thread's own."""
        held = getattr(self._local, "scratch", None)
        if held is None:
            held = self._local.scratch = np.empty((2, self._elements), dtype=np.float32)
        return held[0, :elements], held[1, :elements]

    def _step(self, job: _Job, total: bits.F32, mean: bits.F32) -> None:
        """Move ``total``, what the published weights lack, by one outer step."""
        name, at = job.spec.name, 4 * job.start
        momentum: Tensor | None = None
        if self._old.momentum is not None:
            held = np.empty(job.elements, dtype=np.float32)
            self._old.momentum.read_into(name, at, held.view(np.uint8))
            momentum = torch.from_numpy(held)
        momentum = outer_step_(
            self._outer, torch.from_numpy(total), torch.from_numpy(mean), momentum
        )
        if self._new.momentum is not None and momentum is not None:
            self._new.momentum.put(name, at, momentum.numpy().view(np.uint8).data)

    def _encode(self, job: _Job, total: bits.F32) -> tuple[Sequence[EncodedSection], SparseTensor]:
        flat, spans = torch.from_numpy(total), section_spans(job.elements, self._downlink)
        try:
            made = [encode_flat(flat[start : start + n], self._downlink) for start, n in spans]
        except ProtocolError as err:
            raise _not_finite(job.spec.name) from err
        return [one for one, _ in made], joined([sent for _, sent in made], [s for s, _ in spans])

    def _publish(self, job: _Job, raw: bits.U8, total: bits.F32, sent: SparseTensor) -> None:
        """Add what is sent to the published weights, as a node does, and leave in ``total`` what
        they still lack: the rounding of what was sent, and a share of what was not."""
        published = torch.from_numpy(raw).view(_DTYPES[job.spec.dtype])
        before, after = add_sparse_(published, sent)
        if not bool(torch.isfinite(after).all()):
            raise _not_finite(job.spec.name)
        lacking = torch.from_numpy(total)
        rounding = lacking[sent.indices] - (after.float() - before.float())
        if self._outer.feedback_decay < 1:
            lacking *= self._outer.feedback_decay
        lacking[sent.indices] = rounding

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = self._clock()
        yield
        self.seconds[name] += self._clock() - began


def mean_into(
    total: bits.F32, weights: bits.F32, parts: Iterator[tuple[SparseTensor, float, float]]
) -> bits.F32:
    """``sum(w * f * v) / sum(w)`` of each coordinate over those who sent it, in ``total``.

    0 where nobody did. Contributions are added up in the order given. ``weights`` is scratch.
    """
    total.fill(0.0)
    weights.fill(0.0)
    for sparse, weight, factor in parts:
        indices = sparse.indices.numpy()
        np.add.at(total, indices, sparse.values.numpy() * np.float32(weight * factor))
        np.add.at(weights, indices, np.float32(weight))
    np.maximum(weights, np.finfo(np.float32).tiny, out=weights)  # where it is 0, so is the total
    np.divide(total, weights, out=total)
    return total


def _sum_of_squares(values: bits.F32) -> float:
    """In double precision between rows, and the same for any number of threads."""
    whole = values.size // 4096 * 4096
    rows = values[:whole].reshape(-1, 4096)
    squares = np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64)
    return float(squares + np.square(values[whole:], dtype=np.float64).sum())


def _not_finite(name: str) -> ProtocolError:
    return ProtocolError(
        f"The outer step would make {name} infinite or NaN: the round is not published; lower the "
        "outer learning rate or look at its contributions.",
        code="not-finite",
    )
