"""A node's data plane over files: the same artifacts, digests, sizes and caps, and no line.

What a line would have taken is the world's business (``timing.py``). A contribution that is
submitted is on its way from then on: the worker is stopped as by its owner, and learns with its
next lease what became of it, as a daemon does that was stopped between push and verdict.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from talkoot.client.mirrors import MirrorFetcher
from talkoot.client.pace import Meter
from talkoot.protocol.artifacts import ArtifactStore, ChainSource, Source
from talkoot.protocol.corpus import CorpusSource
from talkoot.protocol.errors import IntegrityError, RefusedError, UnavailableError
from talkoot.protocol.messages import (
    ArtifactRef,
    Contribution,
    NodeReport,
    NodeReportReply,
    RenewReply,
    Signed,
    Verdict,
    parse,
)
from talkoot.server.state import StateDir
from talkoot.sims.virtual.layout import ON_ITS_WAY, Layout, Profile


def open_source(layout: Layout) -> Source:
    """All that nodes may fetch. Raises :class:`CorpusError` when the run's corpus is damaged."""
    state = StateDir(layout.state)
    return ChainSource([ArtifactStore(state.store), CorpusSource(state.corpus)])


class FilePlane:
    """One node's.

    Args:
        layout: of the run.
        source: see :func:`open_source`.
        profile: of the node.
        number: of the round that is worked at.
        meter: counts what a line would have carried.
    """

    def __init__(
        self, layout: Layout, source: Source, profile: Profile, number: int, meter: Meter
    ) -> None:
        self._layout = layout
        self._source = source
        self._profile = profile
        self._number = number
        self._meter = meter
        self._blocks = ArtifactStore(layout.blocks)
        self._mirrors = MirrorFetcher(lambda _watch, _amount: None, None)
        self.stop: Callable[[], None] = lambda: None
        """Stops the worker that this plane serves."""

    @property
    def mirrors(self) -> MirrorFetcher:
        """None are listed."""
        return self._mirrors

    def use_certificate(self, ca_pem: bytes, cert_pem: bytes) -> None:
        """Nothing: there is no connection to open."""

    def close(self) -> None:
        """Nothing: there is no connection to close."""

    def fetch(
        self,
        ref: ArtifactRef,
        store: ArtifactStore,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> Path:
        """Where the artifact is; nothing is copied but the blocks, which are cut out once."""
        found = self._source.lookup(ref.digest)
        if found is None:
            raise RefusedError("The coordinator does not offer that.", code="not-offered")
        if found.length != ref.size_bytes:
            raise IntegrityError(f"An artifact has {found.length} bytes, not {ref.size_bytes}.")
        self._meter.add(down=ref.size_bytes)
        if found.offset == 0 and found.path.stat().st_size == found.length:
            return found.path
        if not self._blocks.has(ref.digest):
            with found.path.open("rb") as file:
                file.seek(found.offset)
                made = self._blocks.put_bytes(file.read(found.length))
            if made.digest != ref.digest:
                raise IntegrityError("A block is not what its digest names.", code="bad-block")
        return self._blocks.path(ref.digest)

    def push(
        self,
        lease_id: str,
        ref: ArtifactRef,
        path: Path,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Put the payload where the world takes it from when its line has carried it."""
        if path.stat().st_size != ref.size_bytes:
            raise IntegrityError("The payload is not what was signed.")
        target = self._layout.payload(self._number, lease_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(path, target)
        if self._profile.attack is None or self._number < self._profile.attack_from:
            _link(path, target.with_suffix(".honest"))  # what colluders get to see
        self._meter.add(up=ref.size_bytes)

    def submit(self, signed: Signed) -> Verdict:
        """The verdict, if the world has come to it; else the contribution is on its way.

        Raises:
            UnavailableError: it is on its way; the worker has been stopped.
        """
        claim = parse(Contribution, signed.body.encode("ascii"))
        verdict = self._layout.read_verdict(claim.lease_id)
        if verdict is not None:
            return verdict
        self._layout.write(self._layout.claim(claim.round, claim.lease_id), signed)
        self.stop()
        raise UnavailableError("The contribution is on its way.", code=ON_ITS_WAY)

    def run_spec(self) -> Signed:
        """As the coordinator signed it."""
        return parse(Signed, self._layout.spec.read_bytes())

    def mirror_list(self) -> Signed:
        """As the coordinator signed it."""
        return parse(Signed, self._layout.mirrors.read_bytes())

    def task(self) -> Signed | None:
        """None: tasks come over Flower."""
        return None

    # What the world does for all nodes (site.py) ------------------------------------------------

    def challenge(self) -> bytes:
        """Not asked here."""
        raise self._elsewhere()

    def prove(self, signed: Signed) -> Verdict:
        """Not asked here."""
        raise self._elsewhere()

    def report(self, report: NodeReport) -> NodeReportReply:
        """Not asked here."""
        raise self._elsewhere()

    def renew(self, signed: Signed) -> RenewReply:
        """Not asked here."""
        raise self._elsewhere()

    def _elsewhere(self) -> RefusedError:
        return RefusedError("A simulated node leaves this to its world.", code="not-here")


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is not written to any more; harmless to do again."""
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    os.link(source, part)
    part.replace(target)
    part.unlink(missing_ok=True)  # one name replaced by another of the same file stays
