"""Who is believed, in the ledger: the pure rules meet what was seen. Each change is part of a
transaction.

The rules are in ``acceptance.py`` (one contribution, when it comes), ``agreement.py`` (all of a
round, when it closes) and ``standing.py`` (a node, over time).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from talkoot.protocol.messages import Contribution, RoundTask
from talkoot.server import acceptance, standing
from talkoot.server.acceptance import Claims, Finding, Policy
from talkoot.server.agreement import Member, judge
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.ledger.schema import (
    ContributionRecord,
    EvidenceRecord,
    JudgementRecord,
    LeaseRecord,
    Node,
    StandingRecord,
    ValidationRecord,
)
from talkoot.server.remembered import REMEMBERED_ROUNDS, Remembered
from talkoot.server.sketch import Examination, pack, sketch_key, unpack
from talkoot.server.standing import Standing

DOUBTS = {
    "claims-too-long": "It claims more training time than passed.",
    "claims-too-fast": "It claims ten times the speed that it has shown.",
}


@dataclass(frozen=True)
class Outcome:
    """What a validator found."""

    code: str
    """A kind of evidence (``standing.POINTS``)."""
    sentence: str
    figures: dict[str, Any]


class Belief:
    """The beliefs of one run.

    Args:
        coordinator: open state.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator

    @cached_property
    def key(self) -> bytes:
        """Of this run's sketches: derived from the coordinator's private key."""
        return sketch_key(self._c.key.private_pem(), self._c.run_id)

    @cached_property
    def _remembered(self) -> Remembered:
        return Remembered(self._c.run_id)

    def chance(self, purpose: str, *about: object) -> float:
        """A number from 0 to 1 that nobody outside can foretell, the same after a crash."""
        text = "/".join([purpose, *map(str, about)]).encode()
        digest = hmac.new(self.key, text, hashlib.sha256).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    # A lease --------------------------------------------------------------------------------------

    def begins_fresh(self, session: Session, node_id: str, number: int, attempt: int) -> bool:
        """Whether a node's lease asks for fresh optimizer state.

        A node that never contributed has none to lose.
        """
        before = session.scalars(
            select(ContributionRecord.lease_id)
            .where(ContributionRecord.node_id == node_id)
            .limit(1)
        ).first()
        share = self._c.config.belief.fresh_share
        return before is None or self.chance("fresh", number, attempt, node_id) < share

    # A contribution -------------------------------------------------------------------------------

    def check(
        self,
        session: Session,
        claim: Contribution,
        task: RoundTask,
        found: Examination,
        *,
        now: float,
    ) -> Finding:
        """Judge a contribution by itself and by what was seen; note what speaks against it."""
        node = session.get_one(Node, claim.node_id)
        spec = self._c.spec
        seen, alike = self._remembered.at(session, claim.round)
        finding = acceptance.accept(
            Policy(largest_ratio=self._c.config.belief.largest_norm_ratio),
            found,
            inner=spec.inner,
            feedback_decay=spec.feedback_decay,
            effort=acceptance.effort_of(spec, task, claim.steps),
            claims=Claims(
                steps=claim.steps,
                training_seconds=claim.training_seconds,
                tokens=claim.tokens,
                waited_seconds=max(0.0, now - task.issued_unix),
                known_speed=node.tokens_per_second,
            ),
            seen=seen,
            alike=alike,
            round_number=claim.round,
        )
        if not finding.accepted:
            self.hold_against(
                session, node, finding.code, finding.sentence, claim.round, claim.lease_id, now=now
            )
        for doubt in finding.doubts:
            self.hold_against(
                session, node, doubt, DOUBTS[doubt], claim.round, claim.lease_id, now=now
            )
        return finding

    def remember(
        self, session: Session, claim: Contribution, task: RoundTask, found: Examination, now: float
    ) -> None:
        """Keep what later contributions are compared with, and ask for validations."""
        effort = acceptance.effort_of(self._c.spec, task, claim.steps)
        session.flush()
        session.add(
            JudgementRecord(
                lease_id=claim.lease_id,
                run_id=self._c.run_id,
                round=claim.round,
                node_id=claim.node_id,
                scaled_norm=acceptance.scaled_norm(found.l2_norm, effort),
                sketch=pack(found.sketch),
                shares=pack(found.shares),
                influence=None,
                agreement=None,
                code="accepted",
                sentence="Accepted; judged when its round closes.",
            )
        )
        for kind in self._wanted(session, claim, task):
            session.add(
                ValidationRecord(
                    lease_id=claim.lease_id,
                    kind=kind,
                    run_id=self._c.run_id,
                    round=claim.round,
                    state="asked",
                    asked_unix=now,
                    done_unix=None,
                    code="asked",
                    sentence="Waits for the validator.",
                    figures="{}",
                )
            )

    def _wanted(self, session: Session, claim: Contribution, task: RoundTask) -> list[str]:
        belief = self._c.config.belief
        if self._c.spec.model_parameters > belief.validate_up_to_parameters:
            return []
        newcomer = self.standing(session, claim.node_id).state == "probation"
        kinds = []
        share = belief.gain_share_probation if newcomer else belief.gain_share
        if self.chance("gain", claim.lease_id) < share:
            kinds.append("gain")
        if task.fresh_state and self.chance("replay", claim.lease_id) < belief.replay_share:
            kinds.append("replay")
        return kinds

    # A round --------------------------------------------------------------------------------------

    def waits(self, number: int, closed_unix: float, now: float) -> bool:
        """Whether a closing round should still wait for validations of its contributions."""
        limit = self._c.config.belief.wait_seconds
        if limit == 0 or not closed_unix <= now < closed_unix + limit:
            return False
        with self._c.ledger.read() as session:
            asked = session.scalars(
                select(ValidationRecord.lease_id).where(
                    ValidationRecord.run_id == self._c.run_id,
                    ValidationRecord.round == number,
                    ValidationRecord.state == "asked",
                )
            ).first()
        return asked is not None

    def judge_round(self, number: int, *, now: float) -> None:
        """Give each contribution of a closing round its influence; harmless when done again."""
        with self._c.ledger.write() as session:
            rows = self._judged(session, number)
            if not rows or all(row.influence is not None for row, _ in rows):
                return
            standings = {row.node_id: self.standing(session, row.node_id) for row, _ in rows}
            belief = self._c.config.belief
            against = self._validated_against(session, number)
            judged = judge(
                [
                    Member(
                        node_id=row.node_id,
                        weight=float(contribution.tokens),
                        sketch=unpack(row.sketch or b""),
                        established=standings[row.node_id].state == "established",
                    )
                    for row, contribution in rows
                ],
                probation_share=belief.probation_share,
                set_aside=belief.set_aside_below,
            )
            some = any(
                one.influence > 0 and row.lease_id not in against
                for (row, _), one in zip(rows, judged, strict=True)
            )
            for (row, _), one in zip(rows, judged, strict=True):
                row.influence, row.agreement = one.influence, one.agreement
                row.code, row.sentence = one.code, one.sentence
                if some and row.lease_id in against:
                    row.influence, row.code = 0.0, "failed-validation"
                    row.sentence = against[row.lease_id]
                    continue  # the validator's evidence is on record already
                node = session.get_one(Node, row.node_id)
                self.hold_against(
                    session, node, one.code, one.sentence, number, row.lease_id, now=now
                )

    def _judged(
        self, session: Session, number: int
    ) -> list[tuple[JudgementRecord, ContributionRecord]]:
        found = session.execute(
            select(JudgementRecord, ContributionRecord)
            .join(ContributionRecord, ContributionRecord.lease_id == JudgementRecord.lease_id)
            .where(JudgementRecord.run_id == self._c.run_id, JudgementRecord.round == number)
            .order_by(JudgementRecord.node_id)
        )
        return [(row, contribution) for row, contribution in found]

    def _validated_against(self, session: Session, number: int) -> dict[str, str]:
        found = session.scalars(
            select(ValidationRecord).where(
                ValidationRecord.run_id == self._c.run_id,
                ValidationRecord.round == number,
                ValidationRecord.state == "done",
            )
        )
        return {v.lease_id: v.sentence for v in found if standing.POINTS.get(v.code, 0) > 0}

    def influences(self, number: int) -> dict[str, tuple[float, bytes | None]]:
        """By lease: the influence of each judged contribution of a round, and its sketch."""
        with self._c.ledger.read() as session:
            return {
                row.lease_id: (row.influence if row.influence is not None else 1.0, row.sketch)
                for row, _ in self._judged(session, number)
            }

    def forget(self, newest: int) -> None:
        """Drop sketches that nothing will be compared with, and validations that came too late."""
        with self._c.ledger.write() as session:
            session.execute(
                update(JudgementRecord)
                .where(
                    JudgementRecord.run_id == self._c.run_id,
                    JudgementRecord.round <= newest - REMEMBERED_ROUNDS,
                    JudgementRecord.sketch.is_not(None),
                )
                .values(sketch=None, shares=None)
            )
            session.execute(
                update(ValidationRecord)
                .where(
                    ValidationRecord.run_id == self._c.run_id,
                    ValidationRecord.round < newest,
                    ValidationRecord.state == "asked",
                )
                .values(state="dropped", sentence="The validator did not get to it in time.")
            )

    # Validations ----------------------------------------------------------------------------------

    def next_validation(self) -> tuple[str, str] | None:
        """Lease and kind of the oldest validation that is still worth doing."""
        with self._c.ledger.read() as session:
            row = session.scalars(
                select(ValidationRecord)
                .where(ValidationRecord.run_id == self._c.run_id, ValidationRecord.state == "asked")
                .order_by(ValidationRecord.round.desc(), ValidationRecord.asked_unix)
                .limit(1)
            ).first()
            return None if row is None else (row.lease_id, row.kind)

    def validated(self, lease_id: str, kind: str, outcome: Outcome | None, *, now: float) -> None:
        """Put a validator's finding on record; None: it could not be done."""
        with self._c.ledger.write() as session:
            row = session.get_one(ValidationRecord, (lease_id, kind))
            if row.state != "asked":
                return
            row.done_unix = now
            if outcome is None:
                row.state, row.sentence = "dropped", "What it needs is not there any more."
                return
            row.state, row.code, row.sentence = "done", outcome.code, outcome.sentence
            row.figures = json.dumps(outcome.figures, sort_keys=True, allow_nan=False)
            lease = session.get_one(LeaseRecord, lease_id)
            node = session.get_one(Node, lease.node_id)
            self.hold_against(
                session, node, outcome.code, outcome.sentence, lease.round, lease_id, now=now
            )

    # Nodes ----------------------------------------------------------------------------------------

    def standing(self, session: Session, node_id: str) -> Standing:
        """Where a node stands now."""
        row = session.get(StandingRecord, node_id)
        if row is None:
            return Standing()
        return Standing(
            state=row.state,  # type: ignore[arg-type]  # written by _stand alone
            suspicion=row.suspicion,
            counted=row.counted,
            since_unix=row.since_unix,
            sentence=row.sentence,
        )

    def hold_against(
        self,
        session: Session,
        node: Node,
        kind: str,
        sentence: str,
        number: int | None,
        lease_id: str | None,
        *,
        now: float,
    ) -> None:
        """Put one piece of evidence on record (for a node, too), and draw the consequences."""
        evidence = standing.Evidence(kind, sentence)
        before = self.standing(session, node.node_id)
        after = standing.advance(
            before, evidence, probation=self._c.config.belief.probation_contributions, now=now
        )
        if evidence.points > 0 or kind in ("alike", "replay-same"):
            session.add(
                EvidenceRecord(
                    node_id=node.node_id,
                    round=number,
                    lease_id=lease_id,
                    kind=kind,
                    points=evidence.points,
                    sentence=sentence,
                    unix=now,
                )
            )
        if after.state == "quarantined" and not self._c.config.belief.quarantine:
            after = Standing("probation", standing.QUARANTINE_AT, 0, before.since_unix, sentence)
        if after != before:
            self._stand(session, node, before, after)

    def _stand(self, session: Session, node: Node, before: Standing, after: Standing) -> None:
        row = session.get(StandingRecord, node.node_id)
        if row is None:
            row = StandingRecord(node_id=node.node_id)
            session.add(row)
        row.state, row.suspicion, row.counted = after.state, after.suspicion, after.counted
        row.since_unix, row.sentence = after.since_unix, after.sentence
        if after.state == before.state:
            return
        if after.state == "quarantined":
            self._shut_out(session, node, after.sentence)
        elif before.state == "quarantined":
            if node.status == "quarantined":  # a ban on top of it stays
                node.status, node.sentence = "admitted", after.sentence
            note(session, "pardoned", f"{node.name}: {after.sentence}")

    def _shut_out(self, session: Session, node: Node, why: str) -> None:
        if node.status != "banned":
            node.status = "quarantined"
            node.sentence = f"Quarantined: {why} The operator can pardon this node."
        for lease in session.scalars(
            select(LeaseRecord).where(
                LeaseRecord.node_id == node.node_id, LeaseRecord.state == "open"
            )
        ):
            lease.state, lease.reason = "released", "quarantined"
        note(session, "quarantined", f"{node.name} is quarantined: {why}")

    def quarantine(self, node_id: str, why: str, *, now: float) -> None:
        """Shut a node out of rounds by the operator's word."""
        with self._c.ledger.write() as session:
            node = session.get_one(Node, node_id)
            before = self.standing(session, node_id)
            self._stand(session, node, before, standing.quarantine(before, why, now=now))
            session.add(
                EvidenceRecord(
                    node_id=node_id,
                    round=None,
                    lease_id=None,
                    kind="operator",
                    points=0.0,
                    sentence=f"Quarantined by the operator: {why}",
                    unix=now,
                )
            )

    def pardon(self, node_id: str, *, now: float) -> None:
        """Let a node begin anew, on probation."""
        with self._c.ledger.write() as session:
            node = session.get_one(Node, node_id)
            before = self.standing(session, node_id)
            self._stand(session, node, before, standing.pardon(now=now))
            session.add(
                EvidenceRecord(
                    node_id=node_id,
                    round=None,
                    lease_id=None,
                    kind="pardon",
                    points=0.0,
                    sentence="Pardoned by the operator.",
                    unix=now,
                )
            )

    def record_of(self, node_id: str, *, last: int = 20) -> dict[str, Any]:
        """What is known of a node, newest first: for ``nodes show``."""
        with self._c.ledger.read() as session:
            now = self.standing(session, node_id)
            evidence: Sequence[EvidenceRecord] = session.scalars(
                select(EvidenceRecord)
                .where(EvidenceRecord.node_id == node_id)
                .order_by(EvidenceRecord.evidence_id.desc())
                .limit(last)
            ).all()
            judged: Sequence[JudgementRecord] = session.scalars(
                select(JudgementRecord)
                .where(JudgementRecord.node_id == node_id)
                .order_by(JudgementRecord.round.desc())
                .limit(last)
            ).all()
            validations = session.execute(
                select(ValidationRecord)
                .join(LeaseRecord, LeaseRecord.lease_id == ValidationRecord.lease_id)
                .where(LeaseRecord.node_id == node_id, ValidationRecord.state == "done")
                .order_by(ValidationRecord.round.desc())
                .limit(last)
            ).scalars()
            return {
                "standing": now.state,
                "suspicion": now.suspicion,
                "quarantine_at": standing.QUARANTINE_AT,
                "counted": now.counted,
                "since_unix": now.since_unix,
                "sentence": now.sentence,
                "evidence": [
                    {
                        "unix": e.unix,
                        "round": e.round,
                        "kind": e.kind,
                        "points": e.points,
                        "sentence": e.sentence,
                    }
                    for e in evidence
                ],
                "judgements": [
                    {
                        "round": j.round,
                        "influence": j.influence,
                        "agreement": j.agreement,
                        "code": j.code,
                        "sentence": j.sentence,
                    }
                    for j in judged
                ],
                "validations": [
                    {
                        "round": v.round,
                        "kind": v.kind,
                        "code": v.code,
                        "sentence": v.sentence,
                        "figures": json.loads(v.figures),
                    }
                    for v in validations
                ],
            }
