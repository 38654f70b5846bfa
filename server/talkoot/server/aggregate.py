"""Close a round: many payloads in, one published update and the next version's files out.

Everything runs section by section (``closing.py``), so that peak memory is set neither by the
number of nodes nor by the size of the model or of a tensor. The files of a version are written anew
beside the old ones and appear together, by one rename; the same inputs give the same bytes, so a
coordinator that died half-way does it again.

What is published is the compressed update. What it leaves out is kept as the server's error
feedback: the master weights, which the outer optimizer moves, less the published ones. Nobody holds
the master weights themselves (ADR 14). Everybody trains from ``published``.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from talkoot.protocol import faults, limits
from talkoot.protocol.codec import SparseTensor
from talkoot.protocol.files import explain_os_error, fsync_dir
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import PayloadReader, write_payload
from talkoot.protocol.weights import WeightsReader, WeightsWriter, save_weights
from talkoot.server.averaging import mean_by_block
from talkoot.server.closing import Clock, Closing, How, NewState, OldState, Part
from talkoot.server.outer import OuterSpec, outer_step
from talkoot.server.robust import AggregationSpec

__all__ = [
    "AggregateResult",
    "ContributionInput",
    "OuterSpec",
    "VersionDir",
    "aggregate_round",
    "average",
    "clip_factors",
    "fair_norms",
    "initial_state",
    "outer_step",
]

_MOST_WORKERS: Final = 4


@dataclass(frozen=True)
class VersionDir:
    """The files of one version."""

    path: Path

    @property
    def published(self) -> Path:
        """The weights that everybody has, in the manifest's dtypes: a checkpoint."""
        return self.path / "published.safetensors"

    @property
    def update(self) -> Path:
        """The payload that leads here from the version before; absent in the first version."""
        return self.path / "update.safetensors"

    @property
    def feedback_path(self) -> Path:
        """Where the server's error feedback is kept."""
        return self.path / "feedback.safetensors"

    @property
    def feedback(self) -> Path | None:
        """fp32, master less published weights; None in the first version, where they are equal."""
        return self.feedback_path if self.feedback_path.exists() or self.update.exists() else None

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
    """By stage, of all threads together: read, decode, outer, encode, write, hash."""


def fair_norms(norms: Sequence[float], tokens: Sequence[float]) -> list[float]:
    """Norms as if all leases had been as long as the longest: each by the root of its tokens.

    A longer lease goes further, at least as far as a random walk does. What a node is given is what
    it has proved to be fast enough for, so nobody becomes louder by a claim. Where all leases are
    equal these are the norms, to the bit.
    """
    most = max(tokens)
    return [norm / math.sqrt(own / most) for norm, own in zip(norms, tokens, strict=True)]


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
    mean = torch.empty(numel)
    for span, block in mean_by_block(numel, iter(parts)):
        mean[span] = torch.from_numpy(block)
    return mean


def initial_state(manifest: Manifest, get: Callable[[str], Tensor], out_dir: Path) -> str:
    """Write version 0 from initial weights and return the digest of its published weights.

    ``get`` returns a tensor in the manifest's shape and dtype. ``out_dir`` appears whole or not at
    all; one that exists is replaced.
    """
    with _fresh_directory(out_dir) as directory:
        return save_weights(VersionDir(directory).published, manifest, get)


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
    workers: int | None = None,
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
        workers: threads; the machine's cores, four at most, if not given. The bytes are the same.
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
    how = How(
        uplink,
        downlink,
        outer,
        rule or AggregationSpec(),
        workers or min(_MOST_WORKERS, os.cpu_count() or 1),
        clock,
    )
    parts = _parts(manifest, contributions, uplink)
    with _fresh_directory(out_dir) as directory:
        target = VersionDir(directory)
        closing, weights_digest = _close(manifest, parts, state, target, how)
        size, digest = _size_and_digest(target.update)
    made = VersionDir(out_dir)
    return AggregateResult(
        state=made,
        update_path=made.update,
        update_digest=digest,
        update_size_bytes=size,
        weights_digest=weights_digest,
        bits_per_parameter=8 * size / manifest.parameters,
        gradient_norm=math.sqrt(closing.gradient_squares),
        update_norm=math.sqrt(closing.update_squares),
        seconds=dict(closing.seconds),
    )


def _parts(
    manifest: Manifest, contributions: Sequence[ContributionInput], uplink: CodecSpec
) -> list[Part]:
    """Those that count, in the order in which they are added up."""
    ordered = sorted(contributions, key=lambda part: part.key)
    ordered = [part for part in ordered if part.influence > 0]
    # Relative to the largest, so that a lone contribution has weight 1 and is exact.
    heaviest = max(part.tokens * part.influence for part in ordered)
    norms = fair_norms([part.l2_norm for part in ordered], [part.tokens for part in ordered])
    factors = clip_factors(norms, [part.influence for part in ordered])
    return [
        Part(
            PayloadReader(part.path, manifest, uplink),
            part.tokens * part.influence / heaviest,
            factor * part.influence,
        )
        for part, factor in zip(ordered, factors, strict=True)
    ]


def _close(
    manifest: Manifest, parts: Sequence[Part], state: VersionDir, target: VersionDir, how: How
) -> tuple[Closing, str]:
    """Write published weights, feedback, momentum and update of the new version."""
    manifest32 = manifest.as_float32()

    def held(path: Path | None) -> WeightsReader | None:
        return None if path is None else WeightsReader(path, manifest32)

    with ExitStack() as stack:
        old = OldState(
            WeightsReader(state.published, manifest),
            held(state.feedback),
            held(state.outer) if how.outer.has_state else None,
        )
        published = stack.enter_context(WeightsWriter(target.published, manifest))
        feedback = stack.enter_context(WeightsWriter(target.feedback_path, manifest32))
        momentum = None
        if how.outer.has_state:
            momentum = stack.enter_context(WeightsWriter(target.outer_path, manifest32))
        closing = Closing(manifest, parts, old, NewState(published, feedback, momentum), how)
        write_payload(target.update, manifest, how.downlink, closing.tensors(), {})
        faults.place("aggregate.between-files")
    return closing, published.weights_digest


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
