"""The ledger's tables: the one source of truth about a run.

Times are Unix seconds (float). Messages that were signed are kept as they came, so that an auditor
can verify them again. What is on disk and not in here is rubbish to collect.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_REVISION = "0004"
"""The newest Alembic revision that this code understands."""


class Base(DeclarativeBase):
    """Root of the mapped classes."""

    type_annotation_map = {str: Text, float: Float(53), int: BigInteger, bytes: LargeBinary}  # noqa: RUF012


class Run(Base):
    """One training run; a state directory holds one."""

    __tablename__ = "runs"
    run_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    spec: Mapped[str]
    """Signed RunSpec, JSON."""
    rounds_total: Mapped[int]
    created_unix: Mapped[float]
    finished_unix: Mapped[float | None]
    generation: Mapped[int] = mapped_column(default=0, server_default="0")
    """Raised when the ledger was restored from a backup: only then may a run go back."""


class Invite(Base):
    """An invite's token is kept as its SHA-256 only."""

    __tablename__ = "invites"
    invite_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    uses_left: Mapped[int]
    expires_unix: Mapped[float]
    created_unix: Mapped[float]
    role: Mapped[str] = mapped_column(String(16), default="volunteer", server_default="volunteer")
    """Of the nodes that come with it."""
    revoked_unix: Mapped[float | None] = mapped_column(default=None)


class Applicant(Base):
    """A node that asked to be let in without an invite. States: waiting, approved, refused."""

    __tablename__ = "applicants"
    node_id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str]
    capability: Mapped[str]
    address: Mapped[str]
    """Where it asked from, for the operator to judge by; forgotten once it was decided."""
    state: Mapped[str] = mapped_column(String(16))
    sentence: Mapped[str]
    role: Mapped[str] = mapped_column(String(16))
    """Given when it is approved."""
    applied_unix: Mapped[float]
    seen_unix: Mapped[float]
    """When it last asked: one that does not come back is forgotten."""


class Node(Base):
    """A volunteer's machine."""

    __tablename__ = "nodes"
    node_id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str]
    public_key_pem: Mapped[str]
    """As Flower's SuperLink knows it, too."""
    public_key_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    flower_node_id: Mapped[str | None] = mapped_column(String(20), unique=True)
    """A uint64, kept as text: SQL integers are signed."""
    status: Mapped[str] = mapped_column(String(16))
    """proving, pending, admitted, quarantined, refused, banned."""
    sentence: Mapped[str]
    """Why it has that status."""
    capability: Mapped[str]
    invite_id: Mapped[int | None] = mapped_column(Integer, ForeignKey("invites.invite_id"))
    enrolled_unix: Mapped[float]
    tokens_per_second: Mapped[float]
    nonce: Mapped[str | None] = mapped_column(String(32))
    """The open challenge."""
    role: Mapped[str] = mapped_column(String(16), default="volunteer", server_default="volunteer")
    """volunteer, or validator: a node whose word on others' work the operator trusts."""
    certified_until_unix: Mapped[float | None] = mapped_column(default=None)
    """When its newest certificate ends."""


class NodeState(Base):
    """What a node last said of itself; written often, and nothing depends on it but liveness."""

    __tablename__ = "node_states"
    node_id: Mapped[str] = mapped_column(String(16), ForeignKey("nodes.node_id"), primary_key=True)
    seen_unix: Mapped[float]
    report: Mapped[str]
    restarts: Mapped[int]


class ProofRecord(Base):
    """A proof and what was decided on it."""

    __tablename__ = "proofs"
    proof_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    node_id: Mapped[str] = mapped_column(String(16), ForeignKey("nodes.node_id"), index=True)
    signed: Mapped[str]
    accepted: Mapped[bool]
    code: Mapped[str] = mapped_column(String(64))
    sentence: Mapped[str]
    unix: Mapped[float]


class Round(Base):
    """One round. States: open, closing, published."""

    __tablename__ = "rounds"
    run_id: Mapped[str] = mapped_column(String(63), ForeignKey("runs.run_id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    base_version: Mapped[int]
    opened_unix: Mapped[float]
    deadline_unix: Mapped[float]
    closed_unix: Mapped[float | None]
    published_unix: Mapped[float | None]
    reason: Mapped[str]
    """Why it closed, for people."""
    tokens_before: Mapped[int]
    tokens_round: Mapped[int]


class LeaseRecord(Base):
    """A lease. States: open, committed, released."""

    __tablename__ = "leases"
    lease_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(63))
    round: Mapped[int]
    attempt: Mapped[int]
    node_id: Mapped[str] = mapped_column(String(16), ForeignKey("nodes.node_id"), index=True)
    task: Mapped[str]
    """Signed RoundTask, JSON: sent again word for word after a restart."""
    tokens: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str]
    __table_args__ = (Index("ix_leases_round", "run_id", "round"),)


class CommittedBlock(Base):
    """A block that an accepted contribution was trained on. The key is the promise."""

    __tablename__ = "committed_blocks"
    run_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    block: Mapped[int] = mapped_column(primary_key=True)
    lease_id: Mapped[str] = mapped_column(String(32), ForeignKey("leases.lease_id"))


class ContributionRecord(Base):
    """An accepted contribution; ``version`` is set when it is in a published one."""

    __tablename__ = "contributions"
    lease_id: Mapped[str] = mapped_column(
        String(32), ForeignKey("leases.lease_id"), primary_key=True
    )
    run_id: Mapped[str] = mapped_column(String(63))
    round: Mapped[int]
    node_id: Mapped[str] = mapped_column(String(16), ForeignKey("nodes.node_id"), index=True)
    signed: Mapped[str]
    payload_digest: Mapped[str] = mapped_column(String(64))
    payload_bytes: Mapped[int]
    tokens: Mapped[int]
    loss: Mapped[float]
    l2_norm: Mapped[float]
    training_seconds: Mapped[float]
    accepted_unix: Mapped[float]
    version: Mapped[int | None]
    __table_args__ = (Index("ix_contributions_round", "run_id", "round"),)


class JudgementRecord(Base):
    """What is believed of an accepted contribution; ``influence`` is set when its round is judged.

    Sketch and shares are dropped once no later contribution can be compared with them.
    """

    __tablename__ = "judgements"
    lease_id: Mapped[str] = mapped_column(
        String(32), ForeignKey("contributions.lease_id"), primary_key=True
    )
    run_id: Mapped[str] = mapped_column(String(63))
    round: Mapped[int]
    node_id: Mapped[str] = mapped_column(String(16), ForeignKey("nodes.node_id"), index=True)
    scaled_norm: Mapped[float]
    sketch: Mapped[bytes | None]
    """fp16, little-endian; see ``sketch.py``."""
    shares: Mapped[bytes | None]
    """fp16: each tensor's share of the squared norm."""
    influence: Mapped[float | None]
    """0 to 1."""
    agreement: Mapped[float | None]
    code: Mapped[str] = mapped_column(String(64))
    sentence: Mapped[str]
    __table_args__ = (Index("ix_judgements_round", "run_id", "round"),)


class StandingRecord(Base):
    """Where a node stands; see ``standing.py``. A node without a row is on probation."""

    __tablename__ = "standings"
    node_id: Mapped[str] = mapped_column(String(16), ForeignKey("nodes.node_id"), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    """probation, established, quarantined."""
    suspicion: Mapped[float]
    counted: Mapped[int]
    since_unix: Mapped[float]
    sentence: Mapped[str]


class EvidenceRecord(Base):
    """Why a node stands where it does: append only."""

    __tablename__ = "evidence"
    evidence_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    node_id: Mapped[str] = mapped_column(String(16), ForeignKey("nodes.node_id"), index=True)
    round: Mapped[int | None]
    lease_id: Mapped[str | None] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(String(64))
    points: Mapped[float]
    sentence: Mapped[str]
    unix: Mapped[float]


class ValidationRecord(Base):
    """A look at a contribution by the coordinator's own device. States: asked, done, dropped."""

    __tablename__ = "validations"
    lease_id: Mapped[str] = mapped_column(
        String(32), ForeignKey("contributions.lease_id"), primary_key=True
    )
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    """gain, replay."""
    run_id: Mapped[str] = mapped_column(String(63))
    round: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), index=True)
    asked_unix: Mapped[float]
    done_unix: Mapped[float | None]
    code: Mapped[str] = mapped_column(String(64))
    sentence: Mapped[str]
    figures: Mapped[str]
    """JSON: what was measured."""


class Version(Base):
    """A published version: one chain from 0."""

    __tablename__ = "versions"
    run_id: Mapped[str] = mapped_column(String(63), ForeignKey("runs.run_id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    weights_digest: Mapped[str] = mapped_column(String(64))
    update_digest: Mapped[str | None] = mapped_column(String(64))
    update_bytes: Mapped[int | None]
    checkpoint_digest: Mapped[str | None] = mapped_column(String(64))
    checkpoint_bytes: Mapped[int | None]
    directory: Mapped[str]
    """Master and published weights, below the state directory's ``versions/``."""
    published_unix: Mapped[float]
    __table_args__ = (UniqueConstraint("run_id", "directory"),)


class Event(Base):
    """What happened, for people: append only."""

    __tablename__ = "events"
    event_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    unix: Mapped[float]
    kind: Mapped[str] = mapped_column(String(32))
    sentence: Mapped[str]


class Evaluation(Base):
    """The held-out loss of a published version on one source of the corpus."""

    __tablename__ = "evaluations"
    run_id: Mapped[str] = mapped_column(String(63), ForeignKey("runs.run_id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(String(256), primary_key=True)
    loss: Mapped[float]
    """Mean cross-entropy, nats per token."""
    tokens: Mapped[int]
    """That were looked at."""
    weight: Mapped[float]
    """The source's share of the held-out text."""
    unix: Mapped[float]
