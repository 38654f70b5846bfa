"""Nodes and invites: who may come in, what they proved, when they were last heard of.

Every function is one or two short transactions on the ledger; the decisions themselves are the pure
functions of ``admission.py``.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, cast, get_args

from sqlalchemy import select

from talkoot.protocol.errors import ConfigError, RefusedError, UnavailableError, VersionError
from talkoot.protocol.identity import (
    CLOCK_SKEW_SECONDS,
    load_certificate,
    load_public_key,
    node_id_of,
    public_pem,
    verify,
)
from talkoot.protocol.invite import Invite
from talkoot.protocol.limits import PROTOCOL_VERSION
from talkoot.protocol.memory import MemoryPlan
from talkoot.protocol.messages import (
    Capability,
    EnrolReply,
    EnrolRequest,
    NodeReport,
    NodeReportReply,
    Proof,
    ProofChallenge,
    RenewReply,
    RenewRequest,
    Signed,
    Verdict,
    canonical_bytes,
    parse,
)
from talkoot.protocol.planner import plans
from talkoot.protocol.planner.choose import Ratio
from talkoot.protocol.recipes import recipes_of
from talkoot.server import applicants, rounds
from talkoot.server.admission import AdmissionPolicy, judge_capability, judge_proof, stale_proof
from talkoot.server.book import Book
from talkoot.server.ca import key_of_csr
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.invites import link
from talkoot.server.ledger.schema import (
    Applicant,
    LeaseRecord,
    Node,
    NodeState,
    ProofRecord,
    Round,
    Run,
)
from talkoot.server.ledger.schema import (
    Invite as InviteRecord,
)
from talkoot.server.measured import MAX_PROOFS_READ, kind_of, parse_proof, ratios
from talkoot.server.statements import Statements

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

Role = Literal["volunteer", "validator"]
NodeStatus = Literal["pending", "proving", "admitted", "quarantined", "refused", "banned"]

PROOF_STEPS = 2


class Register(Protocol):
    """Which keys Flower lets in; ``ControlApi`` over the SuperLink in production.

    Any method may raise :class:`UnavailableError` or :class:`RefusedError`.
    """

    def register_node(self, public_key_pem: bytes, name: str) -> int | None:
        """Let a key take part; returns Flower's node id, or None if the key is known already."""
        ...

    def registered_nodes(self) -> dict[bytes, int]:
        """Flower's node ids of all registered keys."""
        ...


@dataclass(frozen=True)
class _Way:
    """How a node comes in: the invite that it shows, or the operator's approval; and as what."""

    invite: InviteRecord | None
    role: str


@dataclass(frozen=True)
class Registry:
    """The nodes of one coordinator."""

    coordinator: Coordinator
    control: Register
    clock: Callable[[], float] = time.time
    """Unix seconds."""

    @cached_property
    def statements(self) -> Statements:
        """Signs what nodes measure freshness by."""
        return Statements(self.coordinator)

    # Invites --------------------------------------------------------------------------------------

    def invite(self, *, uses: int, expires_seconds: float, role: Role = "volunteer") -> Invite:
        """A new invite; only a hash of its token is kept. ``role`` is that of who comes with it."""
        token = secrets.token_urlsafe(24)
        now = self.clock()
        with self.coordinator.ledger.write() as session:
            session.add(
                InviteRecord(
                    token_sha256=_sha256(token.encode()),
                    uses_left=uses,
                    expires_unix=now + expires_seconds,
                    created_unix=now,
                    role=role,
                )
            )
        return link(self.coordinator, token)

    # Enrolment ------------------------------------------------------------------------------------

    def enrol(self, request: EnrolRequest, peer: str) -> EnrolReply:
        """Let a node in, or say why not. Doing it again with the same key changes nothing."""
        if request.protocol != PROTOCOL_VERSION:
            raise VersionError(
                f"This coordinator speaks protocol {PROTOCOL_VERSION} and the node speaks "
                f"{request.protocol}: "
                + (
                    "upgrade talkoot on the node."
                    if request.protocol < PROTOCOL_VERSION
                    else "the operator must upgrade, or the node must use an older talkoot."
                )
            )
        public_key = key_of_csr(request.csr_pem.encode("ascii", "replace"))
        node_id = node_id_of(public_key)
        pem = public_pem(public_key)
        with self.coordinator.ledger.read() as session:
            self._way_in(session, request.token, node_id)
        fits = judge_capability(
            self.policy,
            request.capability,
            self.needs(),
            ratio=self.ratio(request.capability),
        )
        if not fits.accepted:
            raise RefusedError(fits.sentence, code=fits.code)
        if request.token is None:
            applicants.ask(self.coordinator, node_id, request, peer)

        # Flower first: a node in the ledger is always one that the SuperLink knows.
        flower_node_id = self._register(pem, request.name)
        now = self.clock()
        with self.coordinator.ledger.write() as session:
            way = self._way_in(session, request.token, node_id)
            node = session.get(Node, node_id)
            if node is None:
                if way.invite is not None:
                    way.invite.uses_left -= 1
                node = Node(
                    node_id=node_id,
                    name=request.name,
                    public_key_pem=pem.decode("ascii"),
                    public_key_sha256=_sha256(pem),
                    flower_node_id=str(flower_node_id),
                    status="proving",
                    sentence="Enrolled; has to prove that it can hold a replica.",
                    capability=canonical_bytes(request.capability).decode("ascii"),
                    invite_id=None if way.invite is None else way.invite.invite_id,
                    role=way.role,
                    enrolled_unix=now,
                    tokens_per_second=0.0,
                    nonce=None,
                )
                session.add(node)
                note(session, "enrolled", f"{request.name} ({node_id}) enrolled.")
                # Events are public on the status page; where a volunteer lives is not.
                log.info("%s (%s) enrolled from %s", request.name, node_id, peer)
            else:
                node.name = request.name
                node.flower_node_id = str(flower_node_id)
                node.capability = canonical_bytes(request.capability).decode("ascii")
            certificate = self._certify(node, request.csr_pem, now)
        network = self.coordinator.config.network
        return EnrolReply(
            run_id=self.coordinator.run_id,
            node_id=node_id,
            certificate_pem=certificate,
            trust=self.trust_statement(),
            coordinator_key_pem=public_pem(self.coordinator.key.public_key).decode("ascii"),
            transfer_port=network.transfer_port,
            poll_seconds=self.poll_seconds(),
        )

    def _register(self, pem: bytes, name: str) -> int:
        flower_node_id = self.control.register_node(pem, name)
        if flower_node_id is None:
            flower_node_id = self.control.registered_nodes().get(pem)
        if flower_node_id is None:
            raise UnavailableError("The SuperLink did not register the node: try again.")
        return flower_node_id

    def register_lost(self) -> int:
        """Register anew whom Flower's database has forgotten; returns how many those were.

        Flower does not flush each commit of its database: a power cut takes the last registrations
        with it, and a lost file takes them all. The ledger, which is flushed, knows every node.
        """
        known = self.control.registered_nodes()
        with self.coordinator.ledger.read() as session:
            query = select(Node.node_id, Node.name, Node.public_key_pem, Node.flower_node_id).where(
                Node.flower_node_id.is_not(None), Node.status != "banned"
            )
            nodes = [
                (row[0], row[1], row[2].encode("ascii"), row[3]) for row in session.execute(query)
            ]
        lost = 0
        for node_id, name, pem, noted in nodes:
            number = known.get(pem)
            if number is None:
                try:
                    number = self.control.register_node(pem, name)
                except RefusedError as err:
                    log.warning("%s could not be registered anew: %s", node_id, err.sentence)
                if number is None:
                    continue  # unregistered by hand, say: such a key is lost to Flower for ever
                lost += 1
            if str(number) != noted:
                with self.coordinator.ledger.write() as session:
                    _node(session, node_id).flower_node_id = str(number)
        return lost

    def _way_in(self, session: Session, token: str | None, node_id: str) -> _Way:
        node = session.get(Node, node_id)
        if node is not None and node.status == "banned":
            raise _banned(node)
        if token is None:
            rules = self.coordinator.config.admission
            return _Way(None, applicants.role_without_invite(session, rules, node_id))
        digest = _sha256(token.encode())
        invite = session.scalars(
            select(InviteRecord).where(InviteRecord.token_sha256 == digest)
        ).one_or_none()
        if invite is None:
            raise RefusedError(
                "This coordinator does not know that invite: check that the URL is whole, or ask "
                "the operator for a new one.",
                code="invite-unknown",
            )
        way = _Way(invite, invite.role)
        if node is not None and node.invite_id == invite.invite_id:
            return way  # the same node again: its first answer may have been lost
        if invite.revoked_unix is not None:
            raise RefusedError(
                "The invite was revoked: ask the operator for a new one.", code="invite-revoked"
            )
        if invite.expires_unix <= self.clock():
            raise RefusedError(
                "The invite has expired: ask the operator for a new one.", code="invite-expired"
            )
        if invite.uses_left < 1:
            raise RefusedError(
                "The invite has been used up: ask the operator for a new one.", code="invite-used"
            )
        return way

    # Certificates ---------------------------------------------------------------------------------

    def _certify(self, node: Node, csr_pem: str, now: float) -> str:
        days = self.coordinator.config.admission.certificate_days
        pem = self.coordinator.trust().issuing.issue_node(
            csr_pem.encode("ascii"), days, now=datetime.fromtimestamp(now, UTC)
        )
        node.certified_until_unix = load_certificate(pem).not_valid_after_utc.timestamp()
        return pem.decode("ascii")

    def trust_statement(self) -> Signed:
        """The CAs of this network, signed for nodes."""
        return self.coordinator.trust().statement(self.coordinator.key, self.coordinator.run_id)

    def renew(self, signed: Signed, *, peer_node_id: str | None, now: float) -> RenewReply:
        """A new certificate for a node that holds the key it enrolled with.

        Args:
            signed: a RenewRequest.
            peer_node_id: who asks, when mutual TLS says so; None for a node whose certificate has
                ended, or comes from a CA that has: its signature says who it is.
            now: Unix seconds.

        Raises:
            RefusedError: unknown, banned, or the request is not of now.
            IntegrityError: somebody else signed it.
        """
        claim = parse(RenewRequest, signed.body.encode("ascii", "replace"))
        if peer_node_id not in (None, claim.node_id) or claim.run_id != self.coordinator.run_id:
            raise RefusedError("The request is for another node or run.", code="wrong-node")
        with self.coordinator.ledger.write() as session:
            node = _node(session, claim.node_id)
            if node.status == "banned":
                raise _banned(node)
            key = load_public_key(node.public_key_pem.encode("ascii"))
            verify(signed, "RenewRequest", key, RenewRequest)
            if abs(claim.issued_unix - now) > CLOCK_SKEW_SECONDS:
                raise RefusedError(
                    "The request for a new certificate was signed at another time than now: set "
                    "this machine's clock.",
                    code="stale-request",
                )
            if node_id_of(key_of_csr(claim.csr_pem.encode("ascii", "replace"))) != node.node_id:
                raise RefusedError("The request is for another key.", code="wrong-key")
            certificate = self._certify(node, claim.csr_pem, now)
        return RenewReply(certificate_pem=certificate, trust=self.trust_statement())

    # Proof ----------------------------------------------------------------------------------------

    @property
    def policy(self) -> AdmissionPolicy:
        """The operator's rules of admission."""
        admission = self.coordinator.config.admission
        return AdmissionPolicy(
            memory_margin=admission.memory_margin,
            loss_tolerance=admission.proof_loss_tolerance,
            manual_approval=admission.approve == "manual",
        )

    def needs(self) -> list[MemoryPlan]:
        """What a replica of this run's model takes, under each recipe."""
        from talkoot.protocol.model import parse_config

        spec = self.coordinator.spec
        config = parse_config(self.coordinator.store.path(spec.model.digest).read_bytes())
        return plans.all_of_run(spec, config)

    def ratio(self, has: Capability) -> Ratio:
        """Measured over predicted memory on machines of this kind, from the proofs in the ledger.

        What a node's own proof said is not in it twice: each node counts with its newest.
        """
        with self.coordinator.ledger.read() as session:
            rows = session.execute(
                select(ProofRecord.node_id, ProofRecord.signed)
                .where(ProofRecord.accepted)
                .order_by(ProofRecord.proof_id.desc())
                .limit(MAX_PROOFS_READ)
            ).all()
        return ratios(((node, parse_proof(signed)) for node, signed in rows), kind_of(has))

    def challenge(self, node_id: str) -> ProofChallenge:
        """A fresh nonce for a node to prove itself on."""
        nonce = secrets.token_hex(16)
        with self.coordinator.ledger.write() as session:
            node = _node(session, node_id)
            node.nonce = nonce
        return ProofChallenge(nonce=nonce, steps=PROOF_STEPS)

    def prove(self, node_id: str, signed: Signed) -> Verdict:
        """Judge a proof and keep it with its verdict, unless it answers no open challenge."""
        with self.coordinator.ledger.read() as session:
            node = _node(session, node_id)
            nonce, pem, approved = node.nonce, node.public_key_pem, node.status == "admitted"
        proof = verify(signed, "Proof", load_public_key(pem.encode("ascii")), Proof)
        if proof.node_id != node_id or proof.run_id != self.coordinator.run_id:
            raise RefusedError("The proof is for another node or run.", code="wrong-proof")
        expected = self._expected(proof) if proof.nonce == nonce else None
        verdict = judge_proof(
            self.policy,
            proof,
            self.needs(),
            ratio=self.ratio(proof.capability),
            nonce=nonce,
            expected_loss=expected[0] if expected is not None else None,
            expected_sketch=expected[1] if expected is not None else None,
        )
        if verdict.code == "awaits-approval" and approved:
            verdict = Verdict(accepted=True, code="admitted", sentence="Admitted by the operator.")
        with self.coordinator.ledger.write() as session:
            node = _node(session, node_id)
            # Recomputing the loss took seconds: a ban or another answer may have come meanwhile.
            if node.status == "banned":
                raise _banned(node)
            if verdict.code != "stale-proof" and node.nonce != proof.nonce:
                verdict = stale_proof()
            if verdict.code == "stale-proof":
                return verdict  # not kept: it says nothing, and costs its sender nothing
            session.add(
                ProofRecord(
                    node_id=node_id,
                    signed=canonical_bytes(signed).decode("ascii"),
                    accepted=verdict.accepted,
                    code=verdict.code,
                    sentence=verdict.sentence,
                    unix=self.clock(),
                )
            )
            node.nonce = None
            node.sentence = verdict.sentence
            node.capability = canonical_bytes(proof.capability).decode("ascii")
            if verdict.accepted:
                if node.tokens_per_second <= 0:
                    node.tokens_per_second = proof.tokens_per_second
                if node.status == "quarantined":  # that it can train was not in doubt
                    raise RefusedError(node.sentence, code="quarantined")
                if node.status != "admitted":
                    note(session, "admitted", f"{node.name}: {verdict.sentence}")
                node.status = "admitted"
            else:
                node.status = "pending" if verdict.code == "awaits-approval" else "refused"
                note(session, node.status, f"{node.name}: {verdict.sentence}")
        return verdict

    def _expected(self, proof: Proof) -> tuple[float, list[float]] | None:
        """Loss and fingerprint of the same steps here; None for a model that is too large."""
        spec = self.coordinator.spec
        limit = self.coordinator.config.admission.check_proof_up_to_parameters
        if spec.model_parameters > limit:
            return None
        from talkoot.protocol.model import parse_config
        from talkoot.protocol.proof import proof_result

        # By the same recipe: what bf16 does to a loss is then no reason to doubt a node.
        recipe = recipes_of(spec.adapter is not None).get(proof.recipe)
        if recipe is None:
            raise RefusedError(
                f"This coordinator knows no recipe {proof.recipe!r}: upgrade the older of the two.",
                code="unknown-recipe",
            )
        config = parse_config(self.coordinator.store.path(spec.model.digest).read_bytes())
        return proof_result(
            config,
            proof.nonce,
            sequence_length=spec.sequence_length,
            micro_batch=spec.micro_batch,
            steps=proof.steps,
            inner=spec.inner,
            recipe=recipe,
            adapter=spec.adapter,
        )

    # Operator's decisions -------------------------------------------------------------------------

    def approve(self, node_id: str) -> None:
        """Admit a node that proved itself and waits, or lift a ban or refusal."""
        with self.coordinator.ledger.read() as session:
            node = _proved(session, node_id)
            if node.status == "quarantined":
                raise ConfigError(
                    f"{node.name} is quarantined: look at it with 'nodes show', and let it begin "
                    "anew with 'nodes pardon'."
                )
            banned, pem, name = node.status == "banned", node.public_key_pem, node.name
        # Flower first, as at enrolment: a node that is admitted is one that the SuperLink knows.
        flower_node_id = self._register(pem.encode("ascii"), name) if banned else None
        with self.coordinator.ledger.write() as session:
            node = _proved(session, node_id)
            node.status = "admitted"
            node.sentence = "Admitted by the operator."
            if flower_node_id is not None:
                node.flower_node_id = str(flower_node_id)
            note(session, "admitted", f"{name}: admitted by the operator.")

    def lift(self, node_id: str) -> str:
        """Lift a ban; returns the status that the node has now: admitted, if it had proved itself.

        One that had not has to prove itself first.
        """
        with self.coordinator.ledger.read() as session:
            node = _node(session, node_id)
            if node.status != "banned":
                raise ConfigError(f"{node.name} ({node_id}) is not banned: it is {node.status}.")
            proved = _has_proved(session, node_id)
        if proved:
            self.approve(node_id)
            return "admitted"
        with self.coordinator.ledger.write() as session:
            node = _node(session, node_id)
            node.status = "proving"
            node.sentence = "The ban was lifted; has to prove that it can hold a replica."
            note(session, "lifted", f"{node.name}: {node.sentence}")
        return "proving"

    def ban(self, node_id: str, reason: str) -> None:
        """Shut a node out of every plane, until it is approved again.

        The gateway and the transfer service refuse it, and no lease goes to it. With the SuperLink,
        which only the gateway reaches, it stays registered: Flower takes no key a second time.
        """
        with self.coordinator.ledger.write() as session:
            node = _node(session, node_id)
            node.status = "banned"
            node.sentence = reason
            for lease in session.scalars(
                select(LeaseRecord).where(
                    LeaseRecord.node_id == node.node_id, LeaseRecord.state == "open"
                )
            ):
                lease.state = "released"
                lease.reason = "banned"
            note(session, "banned", f"{node.name} was banned: {reason}")

    def banned(self, public_key_pem: bytes) -> str | None:
        """Why the owner of a key is shut out, or None when it is not."""
        with self.coordinator.ledger.read() as session:
            node = session.scalars(
                select(Node).where(Node.public_key_sha256 == _sha256(public_key_pem))
            ).one_or_none()
            if node is None or node.status != "banned":
                return None
            return f"This node is banned: {node.sentence}"

    def banned_nodes(self) -> frozenset[str]:
        """Ids of all nodes that are shut out now."""
        with self.coordinator.ledger.read() as session:
            return frozenset(
                session.scalars(select(Node.node_id).where(Node.status == "banned")).all()
            )

    def authorize(self, node_id: str) -> Verdict:
        """Whether a certificate's owner may use the data plane."""
        with self.coordinator.ledger.read() as session:
            node = session.get(Node, node_id)
            if node is None:
                return Verdict(
                    accepted=False,
                    code="unknown-node",
                    sentence="This coordinator does not know this node: enrol it with an invite.",
                )
            if node.status == "banned":
                return Verdict(
                    accepted=False,
                    code="banned",
                    sentence=f"This node is banned: {node.sentence}",
                )
            return Verdict(accepted=True, code=node.status, sentence=node.sentence)

    def public_key_pem(self, node_id: str) -> bytes:
        """The key that a node signs with."""
        with self.coordinator.ledger.read() as session:
            return _node(session, node_id).public_key_pem.encode("ascii")

    def nodes(self) -> Sequence[Node]:
        """All nodes, in the order of their enrolment."""
        with self.coordinator.ledger.read() as session:
            return session.scalars(select(Node).order_by(Node.enrolled_unix)).all()

    # Reports --------------------------------------------------------------------------------------

    def poll_seconds(self) -> float:
        """How often each node may ask the SuperLink for messages."""
        with self.coordinator.ledger.read() as session:
            return Book(self.coordinator).poll_seconds(session, self.clock())

    def report(self, node_id: str, report: NodeReport) -> NodeReportReply:
        """Note what a node does, and tell it what it should know."""
        now = self.clock()
        body = canonical_bytes(report).decode("ascii")
        with self.coordinator.ledger.write() as session:
            node = _node(session, node_id)
            state = session.get(NodeState, node_id)
            known = NodeReport.model_validate_json(state.report).falls if state is not None else 0
            if report.falls > known:
                sentence = f"memory ran out; it goes on with {report.recipe}."
                note(session, "fell", f"{node.name} ({node_id}): {sentence}")
            if state is None:
                session.add(NodeState(node_id=node_id, seen_unix=now, report=body, restarts=0))
            else:
                before = NodeReport.model_validate_json(state.report)
                # A stock SuperNode is a new process for every lease, which is nothing of note.
                if before.started_unix != report.started_unix and before.state != "leaving":
                    state.restarts += 1
                    away = now - state.seen_unix
                    note(session, "returned", f"{node.name} is back after {away:.1f} s.")
                state.seen_unix = now
                state.report = body
            run = session.get(Run, self.coordinator.run_id)
            book = Book(self.coordinator)
            session.flush()  # this node counts
            poll = book.poll_seconds(session, now)
            latest = book.latest_version(session)
            head = self.statements.head(latest.version, latest.weights_digest, now)
            behind: Signed | None = None
            if report.version != latest.version and not book.holds_lease(session, node_id):
                behind = self.statements.version(book.version_ref(session, latest), now)
            lease_open = False
            if report.lease_id is not None:
                lease = session.get(LeaseRecord, report.lease_id)
                if lease is not None and lease.node_id == node_id and lease.state == "open":
                    current = session.get(Round, (self.coordinator.run_id, lease.round))
                    lease_open = current is not None and current.state == "open"
            return NodeReportReply(
                status=_status(node.status),
                sentence=node.sentence,
                report_seconds=rounds.report_seconds(poll),
                poll_seconds=poll,
                latest_version=latest.version,
                run_finished=run is not None and run.finished_unix is not None,
                lease_open=lease_open,
                head=head,
                latest=behind,
            )


N = TypeVar("N", Node, Applicant)


def find_node(nodes: Sequence[N], wanted: str) -> N:
    """A node by its id, the beginning of its id, or its name."""
    hits = [n for n in nodes if wanted in (n.node_id, n.name)] or [
        n for n in nodes if wanted and n.node_id.startswith(wanted)
    ]
    if len(hits) != 1:
        raise ConfigError(
            f"{len(hits) or 'No'} nodes match {wanted!r}: give one node's id as "
            "'talkoot-coordinator nodes list' shows it."
        )
    return hits[0]


def _banned(node: Node) -> RefusedError:
    return RefusedError(f"This node is banned: {node.sentence}", code="banned")


def _node(session: Session, node_id: str) -> Node:
    node = session.get(Node, node_id)
    if node is None:
        raise RefusedError("This coordinator does not know this node.", code="unknown-node")
    return node


def _proved(session: Session, node_id: str) -> Node:
    """A node that may be admitted: it proved itself, and the operator's word is all it lacks."""
    node = _node(session, node_id)
    if not _has_proved(session, node_id):
        raise ConfigError(
            f"{node.name} ({node.node_id}) has not proved that it can hold a replica: "
            f"{node.sentence}"
        )
    return node


def _has_proved(session: Session, node_id: str) -> bool:
    proof = session.scalars(
        select(ProofRecord)
        .where(ProofRecord.node_id == node_id)
        .order_by(ProofRecord.proof_id.desc())
    ).first()
    return proof is not None and (proof.accepted or proof.code == "awaits-approval")


def _status(text: str) -> NodeStatus:
    for known in get_args(NodeStatus):
        if text == known:
            return cast(NodeStatus, known)
    raise ValueError(f"the ledger holds an unknown node status {text!r}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
