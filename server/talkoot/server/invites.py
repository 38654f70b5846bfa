"""Invites after they were made: who came with which, and how one is made useless."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.invite import Invite
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.ledger.schema import Invite as InviteRecord
from talkoot.server.ledger.schema import Node

if TYPE_CHECKING:
    from talkoot.server.registry import Registry


def link(coordinator: Coordinator, token: str | None) -> Invite:
    """The link that leads to this coordinator."""
    network = coordinator.config.network
    return Invite(
        host=network.public_host,
        port=network.gateway_port,
        ca_fingerprint=coordinator.trust().serving.fingerprint,
        token=token,
    )


def public_link(coordinator: Coordinator) -> Invite:
    """The link for everybody. Raises :class:`ConfigError` when enrolment is not open."""
    if coordinator.config.admission.enrolment != "open":
        raise ConfigError(
            'Without an invite nobody comes in: set admission.enrolment = "open" in '
            f"{coordinator.state.config} and start the coordinator anew to change that."
        )
    return link(coordinator, None)


def list_invites(coordinator: Coordinator) -> Sequence[tuple[InviteRecord, int]]:
    """All invites in the order in which they were made, each with how many nodes came with it."""
    with coordinator.ledger.read() as session:
        rows = session.execute(
            select(Node.invite_id, func.count(Node.node_id)).group_by(Node.invite_id)
        )
        came = {invite_id: int(number) for invite_id, number in rows}
        records = session.scalars(select(InviteRecord).order_by(InviteRecord.invite_id)).all()
        return [(record, came.get(record.invite_id, 0)) for record in records]


def open_invites(coordinator: Coordinator, after_unix: float) -> int:
    """How many invites would still be good after a moment."""
    with coordinator.ledger.read() as session:
        query = (
            select(func.count())
            .select_from(InviteRecord)
            .where(
                InviteRecord.uses_left > 0,
                InviteRecord.revoked_unix.is_(None),
                InviteRecord.expires_unix > after_unix,
            )
        )
        return int(session.scalar(query) or 0)


def revoke(registry: Registry, invite_id: int, *, ban: bool, reason: str) -> list[str]:
    """Make an invite useless from now on.

    Args:
        ban: also ban the nodes that came with it, who are told the ``reason``.

    Returns:
        Ids of the nodes that were banned.

    Raises:
        ConfigError: there is no such invite.
    """
    with registry.coordinator.ledger.write() as session:
        record = session.get(InviteRecord, invite_id, with_for_update=True)
        if record is None:
            raise ConfigError(
                f"There is no invite {invite_id}: 'talkoot-coordinator invites list' shows all."
            )
        record.revoked_unix = record.revoked_unix or time.time()
        note(session, "revoked", f"Invite {invite_id} was revoked.")
        came = session.scalars(select(Node.node_id).where(Node.invite_id == invite_id)).all()
    banned = list(came) if ban else []
    for node_id in banned:
        registry.ban(node_id, reason)
    return banned
