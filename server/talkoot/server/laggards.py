"""Who held up rounds to their deadlines, and for how long nobody waits for them.

A node that takes leases, reports itself alive and never delivers (a slow-loris, or a machine that
is far slower than it measured) would keep everybody else waiting until the deadline of every round.
Once is nothing: lines break. From the second time in a row on it is left out of rounds, of more and
more up to :data:`LONGEST`; a contribution, or a lease that it gave back, ends the series.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from talkoot.server.ledger.schema import LeaseRecord

MISSED: Final = "the deadline passed"
"""A lease's reason, when its node was waited for until then."""
LONGEST: Final = 15
"""Rounds that a node is left out of at most."""
REMEMBERED: Final = 80
"""Rounds that are looked at: enough for the five misses that lead to :data:`LONGEST`."""


def rounds_left_out(misses: int) -> int:
    """How many rounds a node misses next that held up so many in a row: 0, 0, 1, 3, 7, 15, 15 …"""
    return min(LONGEST, (1 << max(0, min(misses, 32) - 1)) - 1)


def is_left_out(leases: Sequence[tuple[int, str]], number: int) -> bool:
    """Whether a node gets no lease in round ``number``.

    Args:
        leases: (round, reason) of its leases so far, the newest first; "" for one it delivered.
    """
    misses = len(list(takewhile(lambda lease: lease[1] == MISSED, leases)))
    return misses > 0 and number - leases[0][0] <= rounds_left_out(misses)


def left_out(session: Session, run_id: str, number: int) -> set[str]:
    """The nodes that round ``number`` does not wait for."""
    recent = (LeaseRecord.run_id == run_id, LeaseRecord.round >= number - REMEMBERED)
    suspects = set(
        session.scalars(
            select(LeaseRecord.node_id).where(*recent, LeaseRecord.reason == MISSED).distinct()
        )
    )
    found: dict[str, list[tuple[int, str]]] = {node_id: [] for node_id in suspects}
    rows = session.execute(
        select(LeaseRecord.node_id, LeaseRecord.round, LeaseRecord.reason)
        .where(*recent, LeaseRecord.node_id.in_(suspects), LeaseRecord.round < number)
        .order_by(LeaseRecord.round.desc(), LeaseRecord.attempt.desc())
    )
    for node_id, round_number, reason in rows:
        found[node_id].append((round_number, reason))
    return {node_id for node_id, leases in found.items() if is_left_out(leases, number)}
