"""Rounds, leases, contributions and versions in the ledger: each function is one transaction.

The rules are in ``rounds.py`` and ``leases.py``; here they meet the ledger.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from talkoot.protocol import faults
from talkoot.protocol.leases import CommittedBlocks, Member, plan_leases, tokens_wanted
from talkoot.protocol.limits import MAX_UPDATE_CHAIN
from talkoot.protocol.messages import (
    ArtifactRef,
    BlockRef,
    Contribution,
    NodeReport,
    RoundTask,
    Signed,
    Verdict,
    VersionRef,
    canonical_bytes,
    parse,
)
from talkoot.protocol.refusals import printable
from talkoot.server.belief import Belief
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.laggards import MISSED, left_out
from talkoot.server.ledger.schema import (
    CommittedBlock,
    ContributionRecord,
    JudgementRecord,
    LeaseRecord,
    Node,
    NodeState,
    Round,
    Run,
    Version,
)
from talkoot.server.rounds import (
    Decision,
    LeaseView,
    RoundView,
    decide,
    patience_seconds,
    poll_seconds,
)
from talkoot.server.statements import TASK_GRACE_SECONDS

if TYPE_CHECKING:
    from talkoot.server.sketch import Examination

MAX_REASON_CHARS = 500
HEARD_SECONDS = 3600.0
"""Nodes that reported within so long share what the SuperLink bears."""
SPEED_MEMORY = 0.5
"""Weight of the newest measurement in a node's running tokens per second."""
LEASE_SHARE = 0.75
"""Of a round's time that a lease may take to train; fetching, encoding and pushing need the rest.
Leases that outlast the deadline would bring every round back without a single contribution."""
MIN_TRAINING_SECONDS = 1e-3
"""What a node says to have trained in less is counted as this: its speed stays a finite number."""
MAX_LOSS = 1e6
"""Nats per token; a model that knows nothing of 2**24 tokens has 17. A larger or negative claim is
no measurement, and would make a round's mean infinite."""


@dataclass(frozen=True)
class OpenTask:
    """A lease that is open, as it is (re)sent."""

    node_id: str
    flower_node_id: int
    signed: str
    deadline_unix: float


class Book:
    """The rounds of one run.

    Args:
        coordinator: open state.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._belief = Belief(coordinator)

    # Reading --------------------------------------------------------------------------------------

    def latest_version(self, session: Session) -> Version:
        """The newest published version."""
        return session.scalars(
            select(Version)
            .where(Version.run_id == self._c.run_id)
            .order_by(Version.version.desc())
            .limit(1)
        ).one()

    def current_round(self, session: Session) -> Round | None:
        """The round that is not published yet, if any; there is at most one."""
        return session.scalars(
            select(Round).where(Round.run_id == self._c.run_id, Round.state != "published")
        ).one_or_none()

    def version_ref(self, session: Session, version: Version) -> VersionRef:
        """A version, the newest checkpoint at or before it, and the updates since the one before.

        A node that is no further behind than the checkpoint before the newest comes by updates
        alone: a checkpoint of a 7B-class model is two hundred times their size.
        """
        newest = session.scalars(
            select(Version)
            .where(
                Version.run_id == self._c.run_id,
                Version.version <= version.version,
                Version.checkpoint_digest.is_not(None),
            )
            .order_by(Version.version.desc())
            .limit(2)
        ).all()
        checkpoint = newest[0]
        start = max(newest[-1].version, version.version - MAX_UPDATE_CHAIN)
        updates = session.scalars(
            select(Version)
            .where(
                Version.run_id == self._c.run_id,
                Version.version > start,
                Version.version <= version.version,
            )
            .order_by(Version.version)
        ).all()
        return VersionRef(
            version=version.version,
            weights_digest=version.weights_digest,
            checkpoint_version=checkpoint.version,
            checkpoint=_ref(checkpoint.checkpoint_digest, checkpoint.checkpoint_bytes),
            updates_from=start,
            updates=tuple(_ref(u.update_digest, u.update_bytes) for u in updates),
        )

    def tokens_learned(self, session: Session) -> int:
        """Tokens of all accepted contributions but those that were judged to count nothing.

        This is where the schedule is: liars would else bring the learning rate down before the
        model has seen what it is to learn from.
        """
        total = session.scalar(
            select(func.coalesce(func.sum(ContributionRecord.tokens), 0))
            .outerjoin(JudgementRecord, JudgementRecord.lease_id == ContributionRecord.lease_id)
            .where(
                ContributionRecord.run_id == self._c.run_id,
                func.coalesce(JudgementRecord.influence, 1.0) > 0,
            )
        )
        return int(total or 0)

    # Opening --------------------------------------------------------------------------------------

    def members(self, session: Session, online: frozenset[int], now: float) -> list[Node]:
        """Admitted nodes that Flower sees online, that still report, are not paused and keep up.

        A node that is far behind is told the newest version with each report and fetches it while
        it holds no lease. With one, a joiner's checkpoint (28 GB for a 7B-class model) would keep
        everybody waiting until the deadline, round after round.
        """
        # One question for all: the round loop asks this again and again, under the writers' lock.
        rows = session.execute(
            select(Node, NodeState)
            .outerjoin(NodeState, NodeState.node_id == Node.node_id)
            .where(Node.status == "admitted", Node.flower_node_id.is_not(None))
        )
        newest = self.latest_version(session).version
        patience = self._patience(session, now)
        return [
            node
            for node, state in rows
            if int(node.flower_node_id or 0) in online
            and _reachable(state, now, patience)
            and not _paused(state)
            and self._keeps_up(state, newest)
        ]

    def poll_seconds(self, session: Session, now: float) -> float:
        """How often each node may ask the SuperLink for messages: as the nodes lately heard of
        share what it bears. Those that left long ago slow down nobody."""
        network = self._c.config.network
        heard = session.scalar(
            select(func.count())
            .select_from(NodeState)
            .where(NodeState.seen_unix > now - HEARD_SECONDS)
        )
        return poll_seconds(heard or 0, network.max_pulls_per_second, network.min_poll_seconds)

    def _patience(self, session: Session, now: float) -> float:
        """How long a node may be silent, in seconds."""
        lost_after = self._c.config.round.lost_after_seconds
        return patience_seconds(lost_after, self.poll_seconds(session, now))

    def _keeps_up(self, state: NodeState | None, newest: int) -> bool:
        # A stock SuperNode catches up only within a lease: it runs for nothing else.
        if state is None or '"state":"leaving"' in state.report:
            return True
        version = NodeReport.model_validate_json(state.report).version
        return version is not None and newest - version <= self._c.config.round.max_behind

    def open_round(
        self, online: frozenset[int], poll_seconds: float, *, now: float
    ) -> Round | None:
        """Open the next round (or lease the current one anew); None if too few nodes are there."""
        config = self._c.config
        with self._c.ledger.write() as session:
            version = self.latest_version(session)
            current = self.current_round(session)
            members = self.members(session, online, now)
            already: Sequence[ContributionRecord] = []
            if current is not None:
                already = self._contributions(session, current.round)
                done = {c.node_id for c in already}
                members = [m for m in members if m.node_id not in done]
            number = version.version + 1
            slow = left_out(session, self._c.run_id, number)
            punctual = [m for m in members if m.node_id not in slow]
            if punctual and len(punctual) + len(already) >= config.round.min_nodes:
                members = punctual
            if len(members) + len(already) < config.round.min_nodes or not members:
                return None

            attempt = 0 if current is None else current.attempt + 1
            speeds = [m.tokens_per_second for m in members if m.tokens_per_second > 0]
            median = statistics.median(speeds) if speeds else 0.0
            leases = plan_leases(
                seed=self._c.spec.seed,
                run_id=self._c.run_id,
                round=number,
                attempt=attempt,
                block_tokens=self._c.corpus.block_tokens,
                committed=self._committed(session),
                members=[
                    Member(
                        m.node_id,
                        tokens_wanted(
                            m.tokens_per_second,
                            median,
                            config.round.tokens_per_node,
                            max_ratio=config.round.largest_lease,
                            longest_seconds=LEASE_SHARE * config.round.deadline_seconds,
                        ),
                    )
                    for m in members
                ],
            )
            committed_here = sum(c.tokens for c in already)
            tokens_before = self.tokens_learned(session) - committed_here
            tokens_round = committed_here + sum(lease.tokens for lease in leases)
            deadline = now + config.round.deadline_seconds
            if current is None:
                current = Round(
                    run_id=self._c.run_id,
                    round=number,
                    attempt=attempt,
                    state="open",
                    base_version=version.version,
                    opened_unix=now,
                    deadline_unix=deadline,
                    closed_unix=None,
                    published_unix=None,
                    reason="",
                    tokens_before=tokens_before,
                    tokens_round=tokens_round,
                )
                session.add(current)
            else:
                self._release(session, current.round, "leased anew")
                current.attempt = attempt
                current.deadline_unix = deadline
                current.tokens_before = tokens_before
                current.tokens_round = tokens_round
            base = self.version_ref(session, version)
            for lease in leases:
                task = RoundTask(
                    run_id=self._c.run_id,
                    generation=self._c.generation,
                    round=number,
                    lease=lease,
                    base=base,
                    tokens_before=tokens_before,
                    tokens_round=tokens_round,
                    fresh_state=self._belief.begins_fresh(session, lease.node_id, number, attempt),
                    issued_unix=now,
                    deadline_unix=deadline,
                    expires_unix=deadline + TASK_GRACE_SECONDS,
                    poll_seconds=poll_seconds,
                )
                signed = self._c.key.sign("RoundTask", canonical_bytes(task))
                session.add(
                    LeaseRecord(
                        lease_id=lease.lease_id,
                        run_id=self._c.run_id,
                        round=number,
                        attempt=attempt,
                        node_id=lease.node_id,
                        task=canonical_bytes(signed).decode("ascii"),
                        tokens=lease.tokens,
                        state="open",
                        reason="",
                    )
                )
            faults.place("open.before-commit")
            return current

    def _committed(self, session: Session) -> CommittedBlocks:
        committed = CommittedBlocks(self._c.corpus.block_count)
        rows = session.execute(
            select(CommittedBlock.epoch, CommittedBlock.block).where(
                CommittedBlock.run_id == self._c.run_id
            )
        )
        committed.add(BlockRef(epoch=epoch, block=block) for epoch, block in rows)
        return committed

    def open_tasks(self, node_id: str | None = None) -> list[OpenTask]:
        """The tasks of all open leases of the open round, word for word as they were signed."""
        with self._c.ledger.read() as session:
            current = self.current_round(session)
            if current is None or current.state != "open":
                return []
            query = (
                select(LeaseRecord, Node)
                .join(Node, Node.node_id == LeaseRecord.node_id)
                .where(
                    LeaseRecord.run_id == self._c.run_id,
                    LeaseRecord.round == current.round,
                    LeaseRecord.state == "open",
                    Node.status == "admitted",
                )
            )
            if node_id is not None:
                query = query.where(LeaseRecord.node_id == node_id)
            return [
                OpenTask(
                    node_id=lease.node_id,
                    flower_node_id=int(node.flower_node_id or 0),
                    signed=lease.task,
                    deadline_unix=current.deadline_unix,
                )
                for lease, node in session.execute(query)
            ]

    def holds_lease(self, session: Session, node_id: str) -> bool:
        """Whether a lease is open for this node."""
        current = self.current_round(session)
        if current is None or current.state != "open":
            return False
        query = select(LeaseRecord.lease_id).where(
            LeaseRecord.run_id == self._c.run_id,
            LeaseRecord.round == current.round,
            LeaseRecord.node_id == node_id,
            LeaseRecord.state == "open",
        )
        return session.scalars(query).first() is not None

    # Contributions --------------------------------------------------------------------------------

    def lease_verdict(self, session: Session, node_id: str, lease_id: str) -> Verdict:
        """Whether a lease can still be committed by this node."""
        lease = session.get(LeaseRecord, lease_id)
        if lease is None or lease.node_id != node_id or lease.run_id != self._c.run_id:
            return _no("unknown-lease", "This node holds no such lease.")
        if lease.state == "committed":
            return _no("committed", "The lease is committed already.")
        current = session.get(Round, (self._c.run_id, lease.round))
        if lease.state != "open" or current is None or current.state != "open":
            return _no(
                "late",
                f"Round {lease.round} does not wait for this lease any more "
                f"({lease.reason or 'the round was closed'}); its blocks went back to the pool.",
            )
        return Verdict(accepted=True, code="open", sentence="The lease is open.")

    def decline(self, node_id: str, lease_id: str, reason: str) -> None:
        """A node gives its lease back."""
        with self._c.ledger.write() as session:
            if self.lease_verdict(session, node_id, lease_id).accepted:
                lease = session.get_one(LeaseRecord, lease_id)
                lease.state = "released"
                reason = printable(reason)[:MAX_REASON_CHARS]
                lease.reason = reason
                name = session.get_one(Node, node_id).name
                note(session, "declined", f"{name} gave its lease back: {reason}")

    def accept(
        self,
        claim: Contribution,
        signed: Signed,
        *,
        l2_norm: float,
        now: float,
        found: Examination | None = None,
    ) -> Verdict:
        """Commit a verified contribution with its blocks; harmless when it is committed already.

        ``found``: what its payload was seen to be, by which it is held against others' work. Not
        needed when it is committed already.
        """
        with self._c.ledger.write() as session:
            before = session.get(ContributionRecord, claim.lease_id)
            if before is not None and before.node_id == claim.node_id:
                if before.payload_digest == claim.payload.digest:
                    return Verdict(
                        accepted=True, code="accepted", sentence="This contribution is committed."
                    )
                return _no("committed", "Another contribution is committed for this lease.")
            verdict = self.lease_verdict(session, claim.node_id, claim.lease_id)
            if not verdict.accepted:
                return verdict
            copied = session.scalars(
                select(ContributionRecord.lease_id).where(
                    ContributionRecord.run_id == self._c.run_id,
                    ContributionRecord.payload_digest == claim.payload.digest,
                )
            ).first()
            if copied is not None:
                return _no("copied", "This payload was contributed before, under another lease.")
            lease = session.get_one(LeaseRecord, claim.lease_id)
            task = task_of(lease)
            if claim.round != lease.round or claim.tokens != task.lease.tokens:
                return _no("not-as-leased", "Round or tokens are not those of the lease.")
            if not 0 <= claim.loss <= MAX_LOSS:
                return _no("impossible-loss", "A mean cross-entropy cannot be what was claimed.")
            if claim.base_weights_digest != task.base.weights_digest:
                return _no(
                    "wrong-base",
                    "The contribution was trained from other weights than the published ones.",
                )
            if found is not None:
                finding = self._belief.check(session, claim, task, found, now=now)
                if not finding.accepted:
                    # Nobody has to wait for what will not come.
                    lease.state, lease.reason = "released", finding.sentence
                    name = session.get_one(Node, claim.node_id).name
                    note(session, "refused", f"A contribution of {name}: {finding.sentence}")
                    return _no(finding.code, finding.sentence)
            session.add(
                ContributionRecord(
                    lease_id=claim.lease_id,
                    run_id=self._c.run_id,
                    round=claim.round,
                    node_id=claim.node_id,
                    signed=canonical_bytes(signed).decode("ascii"),
                    payload_digest=claim.payload.digest,
                    payload_bytes=claim.payload.size_bytes,
                    tokens=claim.tokens,
                    loss=claim.loss,
                    l2_norm=l2_norm,
                    training_seconds=claim.training_seconds,
                    accepted_unix=now,
                    version=None,
                )
            )
            session.add_all(
                CommittedBlock(
                    run_id=self._c.run_id,
                    epoch=ref.epoch,
                    block=ref.block,
                    lease_id=claim.lease_id,
                )
                for ref in task.lease.blocks
            )
            if found is not None:
                self._belief.remember(session, claim, task, found, now)
            lease.state = "committed"
            node = session.get_one(Node, claim.node_id)
            if claim.training_seconds > 0:
                speed = claim.tokens / max(claim.training_seconds, MIN_TRAINING_SECONDS)
                old = node.tokens_per_second or speed
                node.tokens_per_second = (1 - SPEED_MEMORY) * old + SPEED_MEMORY * speed
            faults.place("accept.in-transaction")
            return Verdict(accepted=True, code="accepted", sentence="Accepted.")

    def _contributions(self, session: Session, number: int) -> Sequence[ContributionRecord]:
        return session.scalars(
            select(ContributionRecord)
            .where(ContributionRecord.run_id == self._c.run_id, ContributionRecord.round == number)
            .order_by(ContributionRecord.node_id)
        ).all()

    def contributions(self, number: int) -> Sequence[ContributionRecord]:
        """A round's accepted contributions, in the order in which they are summed."""
        with self._c.ledger.read() as session:
            return self._contributions(session, number)

    # Closing --------------------------------------------------------------------------------------

    def decide(self, online: frozenset[int], now: float) -> Decision | None:
        """What to do with the open round; None when there is none."""
        with self._c.ledger.read() as session:
            current = self.current_round(session)
            if current is None or current.state != "open":
                return None
            views = self._views(session, current, online, now)
        view = RoundView(
            round=current.round,
            deadline_unix=current.deadline_unix,
            quorum=self._c.config.round.quorum,
            leases=views,
            close_at_share=self._c.config.round.close_at_share,
        )
        return decide(view, now)

    def _views(
        self, session: Session, current: Round, online: frozenset[int], now: float
    ) -> list[LeaseView]:
        """A round's leases but those that were given back."""
        rows = session.execute(
            select(LeaseRecord, Node, NodeState)
            .join(Node, Node.node_id == LeaseRecord.node_id)
            .outerjoin(NodeState, NodeState.node_id == LeaseRecord.node_id)
            .where(
                LeaseRecord.run_id == self._c.run_id,
                LeaseRecord.round == current.round,
                LeaseRecord.state != "released",
            )
        )
        patience = self._patience(session, now)
        return [
            LeaseView(
                node_id=lease.node_id,
                state="committed" if lease.state == "committed" else "open",
                # A paused node keeps its lease, and nobody waits for it.
                live=int(node.flower_node_id or 0) in online
                and _reachable(state, now, patience)
                and not _paused(state),
                tokens=lease.tokens,
            )
            for lease, node, state in rows
        ]

    def close_round(
        self, reason: str, *, now: float, waited_for: frozenset[int] = frozenset()
    ) -> None:
        """Fix the set of contributions; what is not committed goes back to the pool.

        ``waited_for``: who is online, when the round closes at its deadline: the nodes among them
        that hold a lease have held everybody up.
        """
        with self._c.ledger.write() as session:
            current = self.current_round(session)
            if current is None or current.state != "open":
                return
            current.state = "closing"
            current.closed_unix = now
            current.reason = reason
            views = self._views(session, current, waited_for, now)
            late = {view.node_id for view in views if view.state == "open" and view.live}
            self._release(session, current.round, "the round was closed", late)

    def _release(
        self, session: Session, number: int, reason: str, late: Collection[str] = ()
    ) -> None:
        for lease in session.scalars(
            select(LeaseRecord).where(
                LeaseRecord.run_id == self._c.run_id,
                LeaseRecord.round == number,
                LeaseRecord.state == "open",
            )
        ):
            lease.state = "released"
            lease.reason = MISSED if lease.node_id in late else reason

    def publish(
        self,
        *,
        weights_digest: str,
        directory: str,
        update: ArtifactRef,
        checkpoint: ArtifactRef | None,
        now: float,
    ) -> Version:
        """Commit the closing round: its version, its contributions and its state, in one."""
        with self._c.ledger.write() as session:
            current = self.current_round(session)
            if current is None or current.state != "closing":
                raise RuntimeError("only a closing round can be published")
            version = Version(
                run_id=self._c.run_id,
                version=current.round,
                weights_digest=weights_digest,
                update_digest=update.digest,
                update_bytes=update.size_bytes,
                checkpoint_digest=checkpoint.digest if checkpoint else None,
                checkpoint_bytes=checkpoint.size_bytes if checkpoint else None,
                directory=directory,
                published_unix=now,
            )
            session.add(version)
            contributions = self._contributions(session, current.round)
            for contribution in contributions:
                contribution.version = current.round
            current.state = "published"
            current.published_unix = now
            if current.round >= self._c.rounds_total:
                run = session.get_one(Run, self._c.run_id)
                run.finished_unix = now
                note(session, "finished", f"The run is finished after {current.round} rounds.")
            faults.place("publish.in-transaction")
            return version

    def finished(self) -> bool:
        """Whether the run has had all its rounds."""
        with self._c.ledger.read() as session:
            return session.get_one(Run, self._c.run_id).finished_unix is not None

    def note(self, kind: str, sentence: str) -> None:
        """Put an event on record."""
        with self._c.ledger.write() as session:
            note(session, kind, sentence)

    def served_digests(self, keep_checkpoints: int) -> list[str]:
        """Artifacts that a node may ask for, blocks aside; the newest first after the documents."""
        with self._c.ledger.read() as session:
            return self._served(session, keep_checkpoints)

    def _served(self, session: Session, keep_checkpoints: int) -> list[str]:
        versions = session.scalars(
            select(Version).where(Version.run_id == self._c.run_id).order_by(Version.version.desc())
        ).all()
        spec = self._c.spec
        served = [spec.model.digest, spec.manifest.digest, spec.corpus.digest]
        if spec.adapter is not None:
            served.append(spec.adapter.base.digest)
        checkpoints = 0
        for version in versions:
            if version.update_digest:
                served.append(version.update_digest)
            if version.checkpoint_digest:
                served.append(version.checkpoint_digest)
                checkpoints += 1
                if checkpoints >= keep_checkpoints:
                    break
        # However few checkpoints are kept: tasks name these updates.
        served += [update.digest for update in self.version_ref(session, versions[0]).updates]
        return list(dict.fromkeys(served))

    def kept_digests(self, keep_checkpoints: int) -> set[str]:
        """Artifacts that somebody may still ask for, or that an unpublished round still needs."""
        with self._c.ledger.read() as session:
            kept = set(self._served(session, keep_checkpoints))
            kept.update(
                session.scalars(
                    select(ContributionRecord.payload_digest).where(
                        ContributionRecord.run_id == self._c.run_id,
                        ContributionRecord.version.is_(None),
                    )
                )
            )
        return kept


def task_of(lease: LeaseRecord) -> RoundTask:
    """The task that a lease was sent with."""
    return parse(RoundTask, parse(Signed, lease.task.encode("ascii")).body.encode("ascii"))


def tasks_by_flower_id(tasks: Sequence[OpenTask]) -> Mapping[int, str]:
    """Tasks as the control plane sends them."""
    return {task.flower_node_id: task.signed for task in tasks if task.flower_node_id}


def _ref(digest: str | None, size: int | None) -> ArtifactRef:
    if digest is None or size is None:
        raise RuntimeError("the ledger names a version without its artifact")
    return ArtifactRef(digest=digest, size_bytes=size)


def _no(code: str, sentence: str) -> Verdict:
    return Verdict(accepted=False, code=code, sentence=sentence)


def _paused(state: NodeState | None) -> bool:
    return state is not None and '"state":"paused"' in state.report


def _reachable(state: NodeState | None, now: float, patience: float) -> bool:
    # A stock SuperNode reports only while it works, and says when it stops to: from then on
    # Flower's heartbeat speaks for it.
    if state is None or '"state":"leaving"' in state.report:
        return True
    return now - state.seen_unix < patience
