"""Close a round: many payloads in, one published update and the next version's files out.

Everything runs tensor by tensor, so that peak memory is set by the largest tensor and by neither
the number of nodes nor the size of the model. The files of a version are written anew beside the
old ones and appear together, by one rename; the same inputs give the same bytes, so a coordinator
that died half-way does it again.

What is published is the compressed update. What it leaves out stays in ``master - published``: the
server's own error feedback, which needs no buffer. Everybody trains from ``published``.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from talkoot.protocol import faults, limits
from talkoot.protocol.codec import EncodedTensor, SparseTensor, decode_tensor, encode_tensor
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.files import explain_os_error, fsync_dir
from talkoot.protocol.manifest import Manifest, TensorSpec
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import PayloadReader, write_payload
from talkoot.protocol.weights import WeightsReader, WeightsWriter, add_sparse
from talkoot.server.outer import OuterSpec, outer_step
from talkoot.server.robust import AggregationSpec, sign_majority, trimmed_mean

__all__ = [
    "AggregateResult",
    "ContributionInput",
    "OuterSpec",
    "VersionDir",
    "aggregate_round",
    "average",
    "clip_factors",
    "initial_state",
    "outer_step",
]

Clock = Callable[[], float]


@dataclass(frozen=True)
class VersionDir:
    """The files of one version."""

    path: Path

    @property
    def master(self) -> Path:
        """fp32 weights that the outer optimizer moves."""
        return self.path / "master.safetensors"

    @property
    def published(self) -> Path:
        """The weights that everybody has, in the manifest's dtypes: a checkpoint."""
        return self.path / "published.safetensors"

    @property
    def update(self) -> Path:
        """The payload that leads here from the version before; absent in the first version."""
        return self.path / "update.safetensors"

    @property
    def outer_path(self) -> Path:
        """Where the outer optimizer's momentum is kept, if it has any."""
        return self.path / "outer.safetensors"

    @property
    def outer(self) -> Path | None:
        """fp32 momentum, or None before the first step and for plain SGD."""
        return self.outer_path if self.outer_path.exists() else None


@dataclass(frozen=True)
class ContributionInput:
    """One accepted contribution."""

    path: Path
    tokens: int
    """Its weight, at least 1."""
    l2_norm: float
    """Of the decoded payload, as ``verify_payload`` measured it when it was accepted."""
    key: str
    """Unique; contributions are added up in the order of their keys."""
    influence: float = 1.0
    """0 to 1. It multiplies the weight, and the values too: where nobody else sent a coordinate, a
    small weight alone would have the whole say. A contribution of 0 is not read."""


@dataclass(frozen=True)
class AggregateResult:
    """What a closed round made."""

    state: VersionDir
    update_path: Path
    update_digest: str
    """SHA-256 of the update payload."""
    update_size_bytes: int
    weights_digest: str
    """Of the new published weights."""
    bits_per_parameter: float
    """Of the update payload."""
    gradient_norm: float
    """l2 norm of the averaged pseudo-gradient."""
    update_norm: float
    """l2 norm of the published update."""
    seconds: dict[str, float]
    """By stage: decode, outer, encode, write."""


def clip_factors(norms: Sequence[float], influences: Sequence[float] | None = None) -> list[float]:
    """``min(1, median / norm)`` for each l2 norm: nobody is louder than the median contributor.

    The median is the lower one of an even number, so that with two contributors the smaller sets
    the measure and not a mean that the larger one can drag along. With ``influences`` (above 0) it
    is the median by influence: many newcomers do not set it.
    """
    if not all(math.isfinite(norm) and norm >= 0 for norm in norms):
        raise ValueError("norms must be finite and not negative")
    shares = [1.0] * len(norms) if influences is None else influences
    half, below, median = math.fsum(shares) / 2, 0.0, 0.0
    for norm, share in sorted(zip(norms, shares, strict=True)):
        below, median = below + share, norm
        if below >= half * (1 - 1e-12):
            break
    return [1.0 if norm <= median else median / norm for norm in norms]


def average(numel: int, parts: Sequence[tuple[SparseTensor, float, float]]) -> Tensor:
    """The mean of each coordinate over those who sent it; (numel,) fp32, 0 where nobody did.

    ``parts``: (values, weight, factor) of each contribution; the values are scaled by the factor
    and averaged with the weights: ``sum(w * f * v) / sum(w)``, added up in the order given.
    """
    return _average(numel, iter(parts))


def _average(numel: int, parts: Iterator[tuple[SparseTensor, float, float]]) -> Tensor:
    total = torch.zeros(numel, dtype=torch.float32)
    weights = torch.zeros(numel, dtype=torch.float32)
    for sparse, weight, factor in parts:
        sparse.add_to_(total, alpha=weight * factor)
        weights.index_add_(0, sparse.indices, torch.full_like(sparse.values, weight))
    return torch.where(weights > 0, total / weights, 0.0)


def initial_state(manifest: Manifest, get: Callable[[str], Tensor], out_dir: Path) -> str:
    """Write version 0 from initial weights and return the digest of its published weights.

    ``get`` returns a tensor in the manifest's shape and dtype. ``out_dir`` appears whole or not at
    all; one that exists is replaced.
    """
    with _fresh_directory(out_dir) as directory, ExitStack() as stack:
        version = VersionDir(directory)
        master = stack.enter_context(WeightsWriter(version.master, manifest.as_float32()))
        published = stack.enter_context(WeightsWriter(version.published, manifest))
        for spec in manifest.tensors:
            tensor = get(spec.name).detach()
            published.add(spec.name, tensor)
            master.add(spec.name, tensor.float())
    return published.weights_digest


def aggregate_round(
    manifest: Manifest,
    state: VersionDir,
    contributions: Sequence[ContributionInput],
    uplink: CodecSpec,
    downlink: CodecSpec,
    outer: OuterSpec,
    out_dir: Path,
    *,
    rule: AggregationSpec | None = None,
    clock: Clock = time.perf_counter,
) -> AggregateResult:
    """Average, step the outer optimizer, publish; write the next version into ``out_dir``.

    Args:
        manifest: of the run.
        state: the version that all contributions were trained from; not changed.
        contributions: accepted ones, in any order, at least one.
        uplink: codec of the contributions.
        downlink: codec of the update.
        outer: the outer optimizer.
        out_dir: appears whole or not at all; one that exists is replaced.
        rule: how values of a coordinate become one; the mean if not given.
        clock: seconds, for the report only.

    Raises:
        ProtocolError: a payload or a file of the state is malformed, or the new master weights
            would not be finite (code ``not-finite``).
        CapacityError: the disk is full.
    """
    if not contributions:
        raise ValueError("a round cannot be closed without a contribution")
    if len({part.key for part in contributions}) != len(contributions):
        raise ValueError("two contributions have the same key")
    if min(part.tokens for part in contributions) < 1:
        raise ValueError("a contribution must count at least one token")
    if not all(0 <= part.influence <= 1 for part in contributions):
        raise ValueError("an influence is from 0 to 1")
    if max(part.influence for part in contributions) == 0:
        raise ValueError("somebody's contribution must count")
    if out_dir.absolute() == state.path.absolute():
        raise ValueError("the next version needs a directory of its own")
    with _fresh_directory(out_dir) as directory:
        closing = _Round(
            manifest, state, contributions, uplink, downlink, outer, VersionDir(directory), clock
        )
        closing.rule = rule or AggregationSpec()
        closing.run()
        size, digest = _size_and_digest(VersionDir(directory).update)
    made = VersionDir(out_dir)
    return AggregateResult(
        state=made,
        update_path=made.update,
        update_digest=digest,
        update_size_bytes=size,
        weights_digest=closing.weights_digest,
        bits_per_parameter=8 * size / manifest.parameters,
        gradient_norm=math.sqrt(closing.gradient_squares),
        update_norm=math.sqrt(closing.update_squares),
        seconds=dict(closing.seconds),
    )


class _Round:
    """The one pass over the tensors that closes a round."""

    def __init__(
        self,
        manifest: Manifest,
        state: VersionDir,
        contributions: Sequence[ContributionInput],
        uplink: CodecSpec,
        downlink: CodecSpec,
        outer: OuterSpec,
        target: VersionDir,
        clock: Clock,
    ) -> None:
        ordered = sorted(contributions, key=lambda part: part.key)
        ordered = [part for part in ordered if part.influence > 0]
        # Relative to the largest, so that a lone contribution has weight 1 and is exact.
        heaviest = max(part.tokens * part.influence for part in ordered)
        factors = clip_factors(
            [part.l2_norm for part in ordered], [part.influence for part in ordered]
        )
        self._parts = [
            (
                PayloadReader(part.path, manifest, uplink),
                part.tokens * part.influence / heaviest,
                factor * part.influence,
            )
            for part, factor in zip(ordered, factors, strict=True)
        ]
        self._manifest = manifest
        self._manifest32 = manifest.as_float32()
        self._downlink = downlink
        self._outer = outer
        self._target = target
        self._clock = clock
        self._old_master = WeightsReader(state.master, self._manifest32)
        self._old_published = WeightsReader(state.published, manifest)
        self._old_momentum = None
        if outer.has_state and state.outer is not None:
            self._old_momentum = WeightsReader(state.outer, self._manifest32)
        self.rule = AggregationSpec()
        self.weights_digest = ""
        self.gradient_squares = 0.0
        self.update_squares = 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run(self) -> None:
        """Write master, published, momentum and update of the new version."""
        with ExitStack() as stack:
            master = stack.enter_context(WeightsWriter(self._target.master, self._manifest32))
            published = stack.enter_context(WeightsWriter(self._target.published, self._manifest))
            momentum = None
            if self._outer.has_state:
                momentum = stack.enter_context(
                    WeightsWriter(self._target.outer_path, self._manifest32)
                )
            items = (
                (spec.name, self._tensor(spec, master, published, momentum))
                for spec in self._manifest.tensors
            )
            write_payload(self._target.update, self._manifest, self._downlink, items, {})
            faults.place("aggregate.between-files")
        self.weights_digest = published.weights_digest

    def _tensor(
        self,
        spec: TensorSpec,
        master: WeightsWriter,
        published: WeightsWriter,
        momentum: WeightsWriter | None,
    ) -> EncodedTensor:
        name = spec.name
        with self._stage("decode"):
            parts = ((reader.decode(name), weight, f) for reader, weight, f in self._parts)
            gradient = self._combine(spec.numel, parts).reshape(spec.shape)
            self.gradient_squares += float(gradient.double().square().sum())
        with self._stage("outer"):
            old_momentum = self._old_momentum.get(name) if self._old_momentum else None
            new_master, new_momentum = outer_step(
                self._outer, self._old_master.get(name), gradient, old_momentum
            )
            del gradient, old_momentum
            if not bool(torch.isfinite(new_master).all()):
                raise ProtocolError(
                    f"The outer step would make {name} infinite or NaN: the round is not "
                    "published; lower the outer learning rate or look at its contributions.",
                    code="not-finite",
                )
        with self._stage("write"):
            master.add(name, new_master)
            if momentum is not None and new_momentum is not None:
                momentum.add(name, new_momentum)
        del new_momentum
        old_published = self._old_published.get(name)
        with self._stage("encode"):
            encoded = encode_tensor(new_master - old_published.float(), self._downlink)
            sent = decode_tensor(encoded, spec.numel, self._downlink)
            self.update_squares += sent.sum_of_squares()
            new_published = add_sparse(old_published, sent)
        with self._stage("write"):
            published.add(name, new_published)
        faults.place("aggregate.tensor")
        return encoded

    def _combine(self, numel: int, parts: Iterator[tuple[SparseTensor, float, float]]) -> Tensor:
        if self.rule.rule == "trimmed-mean":
            return trimmed_mean(numel, list(parts), self.rule.trim)
        if self.rule.rule == "sign-majority":
            return sign_majority(numel, list(parts))
        return _average(numel, parts)  # the geometric median acts through the influences

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = self._clock()
        yield
        self.seconds[name] += self._clock() - began


@contextmanager
def _fresh_directory(out_dir: Path) -> Iterator[Path]:
    """An empty directory that becomes ``out_dir`` when the block ends well, and vanishes if not.

    What a process that died left under the temporary name is removed first.
    """
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as err:
        raise explain_os_error(err, "starting a new version", partial) from err
    try:
        yield partial
        faults.place("aggregate.before-rename")
        if out_dir.exists():
            shutil.rmtree(out_dir)
        partial.rename(out_dir)
        fsync_dir(out_dir.parent)
    except OSError as err:
        shutil.rmtree(partial, ignore_errors=True)
        raise explain_os_error(err, "writing a new version", out_dir) from err
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _size_and_digest(path: Path) -> tuple[int, str]:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(limits.MIB):
            sha.update(piece)
        return os.fstat(file.fileno()).st_size, sha.hexdigest()
