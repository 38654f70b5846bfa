"""The one pass over all sections that closes a round. Called by ``aggregate.py``.

A section is 2**20 elements of a tensor (ADR 13). One of a few threads reads its state; another
decodes all contributions, steps the outer optimizer and encodes the update; the caller's thread
takes the results in order and hashes them; a third writes the new state. So the disk and all cores
work at once. A section's buffers are given on to a later one, so memory follows neither tensors nor
nodes.
"""

from __future__ import annotations

import math
import queue
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

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
from talkoot.protocol.direct import BLOCK, congruent
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.kernels import KERNELS
from talkoot.protocol.manifest import ITEM_BYTES, Manifest, TensorSpec
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.parallel import in_order
from talkoot.protocol.payload import PayloadReader, TensorSections
from talkoot.protocol.weights import WeightsReader, WeightsWriter, add_sparse_, add_sparse_compiled_
from talkoot.server.averaging import mean_by_block
from talkoot.server.outer import OuterSpec, outer_step_
from talkoot.server.robust import AggregationSpec, sign_majority, trimmed_mean

Clock = Callable[[], float]
_AHEAD = 2
"""Threads that read, and as many that write, where there are threads at all."""
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
class _Work:
    """A section and its state: read at first, then what it becomes."""

    job: _Job
    buffers: _Buffers
    published: bits.U8
    """In the manifest's dtype."""
    lacking: bits.F32
    """What the published weights lack: the server's error feedback."""
    momentum: bits.F32 | None


@dataclass(frozen=True)
class _Done:
    work: _Work
    momentum: bits.F32 | None
    sections: Sequence[EncodedSection]
    gradient_squares: float
    update_squares: float


class _Buffers:
    """Memory for one section: its published weights and what they lack."""

    def __init__(self, elements: int) -> None:
        self._published = np.empty(4 * elements + BLOCK, dtype=np.uint8)
        self._lacking = np.empty(4 * elements + BLOCK, dtype=np.uint8)

    def of(self, job: _Job, new: NewState) -> tuple[bits.U8, bits.F32]:
        """Both, in memory that lies as the new files want it."""
        size, name = ITEM_BYTES[job.spec.dtype], job.spec.name
        at = new.published.place(name) + size * job.start
        published = congruent(self._published, size * job.elements, at)
        at = new.feedback.place(name) + 4 * job.start
        return published, congruent(self._lacking, 4 * job.elements, at).view(np.float32)


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
        gradient: list[float] = []
        update: list[float] = []
        sections: list[EncodedSection] = []
        ahead = _AHEAD if self._workers > 1 else 1
        read = in_order(self._read, self._jobs(), ahead)
        closed = in_order(self._section, read, self._workers)
        for done in in_order(self._write, self._hashed(closed), ahead):
            job = done.work.job
            gradient.append(done.gradient_squares)
            update.append(done.update_squares)
            sections += done.sections
            if job.last:
                faults.place("aggregate.tensor")
                yield job.spec.name, EncodedTensor(job.spec.numel, tuple(sections))
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

    def _read(self, job: _Job) -> _Work:
        try:
            buffers = self._spare.get_nowait()
        except queue.Empty:
            buffers = _Buffers(self._elements)  # as many as are under way at once
        published, lacking = buffers.of(job, self._new)
        momentum = None
        name, old = job.spec.name, self._old
        with self._stage("read"):
            old.published.read_into(name, ITEM_BYTES[job.spec.dtype] * job.start, published)
            if old.feedback is None:
                lacking.fill(0.0)
            else:
                old.feedback.read_into(name, 4 * job.start, lacking.view(np.uint8))
            if old.momentum is not None:
                momentum = np.empty(job.elements, dtype=np.float32)
                old.momentum.read_into(name, 4 * job.start, momentum.view(np.uint8))
        return _Work(job, buffers, published, lacking, momentum)

    def _section(self, work: _Work) -> _Done:
        momentum, squares = self._move(work)
        with self._stage("encode"):
            sections, sent = self._encode(work.job, work.lacking)
            self._publish(work, sent)
        return _Done(work, momentum, sections, squares, sent.sum_of_squares())

    def _hashed(self, closed: Iterable[_Done]) -> Iterator[_Done]:
        for done in closed:
            with self._stage("hash"):
                self._new.published.digest_next(done.work.job.spec.name, done.work.published.data)
            yield done

    def _write(self, done: _Done) -> _Done:
        job, work, new = done.work.job, done.work, self._new
        with self._stage("write"):
            name = job.spec.name
            new.published.put(name, ITEM_BYTES[job.spec.dtype] * job.start, work.published.data)
            new.feedback.put(name, 4 * job.start, work.lacking.view(np.uint8).data)
            if new.momentum is not None and done.momentum is not None:
                new.momentum.put(name, 4 * job.start, done.momentum.view(np.uint8).data)
        self._spare.put(work.buffers)
        return done

    def _means(self, job: _Job) -> Iterator[tuple[slice, bits.F32]]:
        """The averaged pseudo-gradient of a section, block by block."""
        decoded = (
            (part.decode_all() if job.number is None else part.decode(job.number), w, f)
            for part, w, f in job.parts
        )
        whole = slice(0, job.elements)
        if self._rule.rule == "trimmed-mean":
            yield whole, trimmed_mean(job.elements, list(decoded), self._rule.trim).numpy()
        elif self._rule.rule == "sign-majority":
            yield whole, sign_majority(job.elements, list(decoded)).numpy()
        else:  # geometric median: through the influences
            yield from mean_by_block(job.elements, decoded)

    def _move(self, work: _Work) -> tuple[bits.F32 | None, float]:
        """Move what the published weights lack by one outer step; the new momentum, and the
        averaged pseudo-gradient's sum of squares."""
        means, old = self._means(work.job), work.momentum
        squares: list[float] = []
        new = np.empty(work.job.elements, np.float32) if self._outer.has_state else None
        while True:
            with self._stage("decode"):
                found = next(means, None)
            if found is None:
                return new, math.fsum(squares)
            span, mean = found
            squares.append(_sum_of_squares(mean))
            with self._stage("outer"):
                momentum = self._step(work.lacking[span], mean, None if old is None else old[span])
            if new is not None and momentum is not None:
                new[span] = momentum

    def _step(
        self, lacking: bits.F32, mean: bits.F32, momentum: bits.F32 | None
    ) -> bits.F32 | None:
        if self._outer.optimizer == "sgd" and self._outer.learning_rate == 1:
            np.subtract(lacking, mean, out=lacking)  # torch's bits, without its threads
            return None
        old = None if momentum is None else torch.from_numpy(momentum)
        made = outer_step_(self._outer, torch.from_numpy(lacking), torch.from_numpy(mean), old)
        return None if made is None else made.numpy()

    def _encode(self, job: _Job, total: bits.F32) -> tuple[Sequence[EncodedSection], SparseTensor]:
        flat, spans = torch.from_numpy(total), section_spans(job.elements, self._downlink)
        try:
            made = [encode_flat(flat[start : start + n], self._downlink) for start, n in spans]
        except ProtocolError as err:
            raise _not_finite(job.spec.name) from err
        return [one for one, _ in made], joined([sent for _, sent in made], [s for s, _ in spans])

    def _publish(self, work: _Work, sent: SparseTensor) -> None:
        """Add what is sent to the published weights, as a node does, and leave what they still
        lack: the rounding of what was sent, and a share of what was not."""
        spec, decay = work.job.spec, self._outer.feedback_decay
        if compiled := KERNELS.after(0):
            moved = np.empty(sent.values.numel(), dtype=np.float32)
            if not add_sparse_compiled_(compiled, work.published, spec.dtype, sent, moved):
                raise _not_finite(spec.name)
            compiled.leave(work.lacking, sent.indices.numpy(), moved, decay)
            return
        published = torch.from_numpy(work.published).view(_DTYPES[spec.dtype])
        old, new = (some.float() for some in add_sparse_(published, sent))
        if not np.isfinite(new.numpy()).all():
            raise _not_finite(spec.name)
        lacking = torch.from_numpy(work.lacking)
        rounding = lacking.index_select(0, sent.indices) - (new - old)
        if decay < 1:
            lacking *= decay
        lacking.scatter_(0, sent.indices, rounding)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = self._clock()
        yield
        self.seconds[name] += self._clock() - began


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
