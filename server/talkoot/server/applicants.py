"""Open enrolment: who has no invite asks to be let in, and waits for the operator.

A stranger gets a row in a queue and nothing else: no certificate, no entry in Flower's register.
How many may wait is capped, in all, for each address and for each hour.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sqlalchemy import ColumnElement, delete, func, select

from talkoot.protocol.errors import ConfigError, RefusedError
from talkoot.protocol.messages import EnrolRequest, canonical_bytes
from talkoot.protocol.refusals import APPLICATION_REFUSED, AWAITS_APPROVAL
from talkoot.server.config import AdmissionSection
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.ledger.schema import Applicant
from talkoot.server.rates import rate_key

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

FORGET_SECONDS: Final = 7 * 86400.0
"""A waiting node that has not asked again for so long is not there any more."""


def role_without_invite(session: Session, rules: AdmissionSection, node_id: str) -> str:
    """As what a node without an invite would come in.

    Raises:
        RefusedError: it was refused, or nobody comes in that way.
    """
    applicant = session.get(Applicant, node_id)
    if applicant is None:
        if rules.enrolment != "open":
            raise RefusedError(
                "This coordinator lets nobody in without an invite: ask its operator for one.",
                code="invite-needed",
            )
        return "volunteer"
    if applicant.state == "refused":
        raise RefusedError(applicant.sentence, code=APPLICATION_REFUSED)
    return applicant.role


def ask(coordinator: Coordinator, node_id: str, request: EnrolRequest, peer: str) -> None:
    """Put a node into the queue, or find it there; returns when it was approved.

    Raises:
        RefusedError: it waits (code ``awaits-approval``), or the queue is full.
    """
    now = time.time()
    with coordinator.ledger.write() as session:
        applicant = session.get(Applicant, node_id, with_for_update=True)
        if applicant is None:
            _check_queue(session, coordinator.config.admission, rate_key(peer), now)
            applicant = Applicant(
                node_id=node_id,
                name=request.name,
                capability=canonical_bytes(request.capability).decode("ascii"),
                address=rate_key(peer),
                state="waiting",
                sentence="Waits for the operator's approval.",
                role="volunteer",
                applied_unix=now,
                seen_unix=now,
            )
            session.add(applicant)
            note(session, "asked", f"{request.name} ({node_id}) asks to be let in.")
        applicant.seen_unix = now
        approved = applicant.state == "approved"
    if not approved:
        raise RefusedError(
            "The operator has to approve this node; it waits in the queue and needs nothing more.",
            code=AWAITS_APPROVAL,
        )


def _check_queue(session: Session, rules: AdmissionSection, address: str, now: float) -> None:
    session.execute(
        delete(Applicant).where(
            Applicant.state == "waiting", Applicant.seen_unix < now - FORGET_SECONDS
        )
    )

    def number(*where: ColumnElement[bool]) -> int:
        return int(session.scalar(select(func.count(Applicant.node_id)).where(*where)) or 0)

    waiting = Applicant.state == "waiting"
    lately = number(Applicant.applied_unix > now - 3600)
    if number(waiting) >= rules.queue or lately >= rules.applications_per_hour:
        raise RefusedError(
            "Too many nodes wait to be let in: try again tomorrow, or ask the operator for an "
            "invite.",
            code="queue-full",
        )
    if number(waiting, Applicant.address == address) >= rules.queue_per_address:
        raise RefusedError(
            f"{rules.queue_per_address} nodes of this address wait already: the operator has to "
            "decide on those first.",
            code="queue-full",
        )


def waiting(coordinator: Coordinator) -> Sequence[Applicant]:
    """Who waits, first come first."""
    with coordinator.ledger.read() as session:
        return session.scalars(
            select(Applicant).where(Applicant.state == "waiting").order_by(Applicant.applied_unix)
        ).all()


def decide(
    coordinator: Coordinator,
    node_id: str,
    *,
    approve: bool,
    role: str = "volunteer",
    reason: str = "",
) -> None:
    """Let a waiting node in (it hears of it when it asks again), or refuse it.

    Raises:
        ConfigError: it does not wait.
    """
    with coordinator.ledger.write() as session:
        applicant = session.get(Applicant, node_id, with_for_update=True)
        if applicant is None:
            raise ConfigError(f"{node_id} does not wait to be let in.")
        applicant.state = "approved" if approve else "refused"
        applicant.role = role
        applicant.sentence = (
            "Approved." if approve else f"The operator does not let this node in: {reason}"
        )
        applicant.address = ""
        note(session, applicant.state, f"{applicant.name}: {applicant.sentence}")
