"""The coordinator behind its two public faces, the gateway and the transfer service."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from talkoot.protocol import faults
from talkoot.protocol.artifacts import Slice, Source
from talkoot.protocol.errors import ProtocolError, RefusedError
from talkoot.protocol.files import explain_os_error
from talkoot.protocol.identity import load_public_key, verify
from talkoot.protocol.limits import PROTOCOL_VERSION
from talkoot.protocol.messages import (
    Contribution,
    CoordinatorInfo,
    EnrolReply,
    EnrolRequest,
    MirrorList,
    NodeReport,
    NodeReportReply,
    RenewReply,
    Signed,
    Verdict,
    canonical_bytes,
    parse,
)
from talkoot.protocol.pieces import Pieces, PieceShelf
from talkoot.protocol.version import VERSION
from talkoot.server.belief import Belief
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.ledger.schema import Node
from talkoot.server.registry import Registry
from talkoot.server.status import status_json

if TYPE_CHECKING:
    from talkoot.server.sketch import Examination

log = logging.getLogger(__name__)


class Desk:
    """Serves ``gateway.Backend`` and ``transfer.Backend`` over one open coordinator.

    Called from many threads; what it shares between calls is the ledger and the store, which bear
    that. It tells the registry's time.
    """

    def __init__(self, coordinator: Coordinator, registry: Registry) -> None:
        self._c = coordinator
        self._registry = registry
        self._clock = registry.clock
        self._book = Book(coordinator)
        self._belief = Belief(coordinator)
        self._uploads = coordinator.state.incoming / "whole"
        self._uploads.mkdir(parents=True, exist_ok=True)
        self._pieces = PieceShelf(coordinator.state.pieces)
        # Decoding a payload takes memory in proportion to the largest tensor: one at a time.
        self._verifying = threading.Lock()

    # Gateway --------------------------------------------------------------------------------------

    def info(self) -> CoordinatorInfo:
        """What anybody may know."""
        return CoordinatorInfo(
            protocol=PROTOCOL_VERSION,
            talkoot_version=VERSION,
            ca_fingerprint=self._c.trust().serving.fingerprint,
        )

    def ca_pem(self) -> bytes:
        """The certificate of the CA that the servers' certificates come from."""
        return self._c.trust().serving.certificate_pem

    def trust(self) -> Signed:
        """All CAs of this network, signed."""
        return self._registry.trust_statement()

    def enrol(self, request: EnrolRequest, peer: str) -> EnrolReply:
        """Let a node in, or say why not."""
        return self._registry.enrol(request, peer)

    def renew(self, signed: Signed, peer_node_id: str | None) -> RenewReply:
        """A new certificate for a node."""
        return self._registry.renew(signed, peer_node_id=peer_node_id, now=self._clock())

    def is_banned(self, public_key: bytes) -> str | None:
        """Why the owner of a public key (PEM) is shut out."""
        return self._registry.banned(public_key)

    def status(self) -> bytes:
        """The run as the dashboard shows it."""
        return status_json(self._c)

    # Transfer -------------------------------------------------------------------------------------

    def authorize(self, node_id: str) -> Verdict:
        """Whether a certificate's owner may use the data plane."""
        return self._registry.authorize(node_id)

    def banned_nodes(self) -> frozenset[str]:
        """Ids of all nodes that are shut out now."""
        return self._registry.banned_nodes()

    def source(self) -> Source:
        """What nodes may fetch."""
        return self._c.source

    def pieces(self, digest: str, found: Slice) -> Pieces:
        """The piece list of an artifact."""
        return self._pieces.get(digest, found)

    def mirrors(self, node_id: str) -> Signed:
        """Where else artifacts are, signed."""
        told = MirrorList(
            run_id=self._c.run_id, urls=self._c.config.mirrors.urls, issued_unix=self._clock()
        )
        return self._c.key.sign("MirrorList", canonical_bytes(told))

    def incoming_root(self) -> Path:
        """Where uploads grow."""
        return self._c.state.incoming / "parts"

    def may_push(self, node_id: str, lease_id: str, digest: str, size: int) -> Verdict:
        """Asked before a byte is taken."""
        from talkoot.protocol.payload import max_payload_bytes

        most = max_payload_bytes(self._c.manifest, self._c.spec.uplink)
        if size > most:
            return Verdict(
                accepted=False,
                code="too-large",
                sentence=f"{size} bytes is more than a contribution to this run can have ({most}).",
            )
        with self._c.ledger.read() as session:
            verdict = self._book.lease_verdict(session, node_id, lease_id)
        if verdict.code == "committed":  # an acknowledgement was lost; submitting again will say so
            return Verdict(accepted=True, code="committed", sentence=verdict.sentence)
        return verdict

    def pushed(self, node_id: str, lease_id: str, digest: str, path: Path) -> None:
        """A whole file has arrived. A node's newest is kept, so that it cannot fill the disk."""
        target = self._upload(node_id, lease_id, digest)
        try:
            for earlier in self._uploads.glob(f"{node_id}-*"):
                if earlier != target:
                    earlier.unlink(missing_ok=True)
            os.replace(path, target)  # noqa: PTH105 - one name for both halves
            faults.place("push.whole")
        except OSError as err:
            raise explain_os_error(err, "keeping an upload", target) from err

    def has_pushed(self, node_id: str, lease_id: str, digest: str) -> bool:
        """Whether a whole file is here already."""
        return self._upload(node_id, lease_id, digest).exists() or self._c.store.has(digest)

    def _upload(self, node_id: str, lease_id: str, digest: str) -> Path:
        return self._uploads / f"{node_id}-{lease_id}-{digest}"

    def submit(self, node_id: str, signed: Signed) -> Verdict:
        """Check a contribution from end to end, then commit it."""
        pem = self._registry.public_key_pem(node_id)
        claim = verify(signed, "Contribution", load_public_key(pem), Contribution)
        if claim.node_id != node_id or claim.run_id != self._c.run_id:
            return Verdict(
                accepted=False, code="wrong-node", sentence="Signed for another node or run."
            )
        with self._c.ledger.read() as session:
            verdict = self._book.lease_verdict(session, node_id, claim.lease_id)
        found = None  # not needed for what is committed: the ledger has it, and knows the answer
        if verdict.accepted:
            try:
                with self._verifying:
                    found = self._keep_payload(claim)
            except ProtocolError as err:
                self._refused(claim, err)
                self._drop_upload(claim)
                return Verdict(accepted=False, code=err.code, sentence=err.sentence)
        if verdict.accepted or verdict.code == "committed":
            norm = found.l2_norm if found is not None else 0.0
            verdict = self._book.accept(claim, signed, l2_norm=norm, now=self._clock(), found=found)
            faults.place("accept.after-commit")
        self._drop_upload(claim)
        return verdict

    def _refused(self, claim: Contribution, err: ProtocolError) -> None:
        with self._c.ledger.write() as session:
            node = session.get_one(Node, claim.node_id)
            said = f"A payload of node {claim.node_id} was refused: {err.sentence}"
            note(session, "refused", said)
            self._belief.hold_against(
                session,
                node,
                err.code,
                err.sentence,
                claim.round,
                claim.lease_id,
                now=self._clock(),
            )

    def _keep_payload(self, claim: Contribution) -> Examination:
        """Verify a payload and put it into the store; returns what it was seen to be."""
        from talkoot.server.sketch import examine

        upload = self._upload(claim.node_id, claim.lease_id, claim.payload.digest)
        # It is in the store already when an earlier try died before the ledger had it.
        path = upload if upload.exists() else self._c.store.path(claim.payload.digest)
        if not path.exists():
            raise RefusedError("The payload was never pushed: push it first.", code="not-pushed")
        if path.stat().st_size != claim.payload.size_bytes:
            raise ProtocolError("The payload's size is not as signed.", code="wrong-size")
        found = examine(path, self._c.manifest, self._c.spec.uplink, self._belief.key)
        if path == upload:
            self._c.store.put_file(upload)
            faults.place("accept.payload-stored")
        return found

    def _drop_upload(self, claim: Contribution) -> None:
        self._upload(claim.node_id, claim.lease_id, claim.payload.digest).unlink(missing_ok=True)

    def prove(self, node_id: str, signed: Signed) -> Verdict:
        """Judge a proof."""
        return self._registry.prove(node_id, signed)

    def challenge(self, node_id: str) -> bytes:
        """A fresh nonce."""
        return canonical_bytes(self._registry.challenge(node_id))

    def report(self, node_id: str, report: NodeReport) -> NodeReportReply:
        """Note what a node does."""
        return self._registry.report(node_id, report)

    def run_spec(self, node_id: str) -> Signed:
        """What is trained, signed."""
        return self._c.signed_spec

    def task(self, node_id: str) -> Signed | None:
        """The node's open task, word for word as it was sent."""
        tasks = self._book.open_tasks(node_id)
        return parse(Signed, tasks[0].signed.encode("ascii")) if tasks else None
