"""What a contribution is compared with, kept unpacked from one to the next.

The ledger says which contributions these are; what was once seen of one does not change. To read
and unpack 512 sketches, and to compare each with each, for every contribution takes longer than a
small model's training.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from talkoot.server.acceptance import Seen
from talkoot.server.ledger.schema import JudgementRecord
from talkoot.server.sketch import F32, unpack

REMEMBERED_ROUNDS = 4
"""Sketches are kept so long: what was sent in this round and the three before it is known again."""
MAX_SEEN = 512
"""Contributions that one is compared with, the newest: 512 sketches are 8 MiB in the ledger."""


class Remembered:
    """Of one run; one is shared by all that judge. Takes up to some 64 MiB.

    Args:
        run_id: of the run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._lock = threading.Lock()
        self._kept: dict[str, Seen] = {}
        self._alike = Alike()

    def at(self, session: Session, number: int) -> tuple[list[Seen], F32]:
        """What a contribution to round ``number`` is compared with, as the ledger is now.

        Returns:
            The newest accepted contributions, and (pairs,) the cosine of each two of the newest
            round among them.
        """
        leases = self._leases(session, number)
        with self._lock:
            self._fetch(session, leases)
            seen = [self._kept[lease] for lease in leases]
            latest = max((one.round for one in seen), default=0)
            newest = [lease for lease in leases if self._kept[lease].round == latest]
            pairs = self._alike.pairs(
                latest, newest, [self._kept[lease].sketch for lease in newest]
            )
            return seen, pairs

    def _leases(self, session: Session, number: int) -> list[str]:
        return list(
            session.scalars(
                select(JudgementRecord.lease_id)
                .where(
                    JudgementRecord.run_id == self._run_id,
                    JudgementRecord.round > number - REMEMBERED_ROUNDS,
                    JudgementRecord.sketch.is_not(None),
                    # What was set aside says nothing about what is usual.
                    JudgementRecord.influence.is_(None) | (JudgementRecord.influence > 0),
                )
                .order_by(JudgementRecord.round.desc(), JudgementRecord.lease_id)
                .limit(MAX_SEEN)
            )
        )

    def _fetch(self, session: Session, leases: Sequence[str]) -> None:
        if len(self._kept) > 2 * MAX_SEEN:
            wanted = set(leases)
            self._kept = {lease: one for lease, one in self._kept.items() if lease in wanted}
        missing = [lease for lease in leases if lease not in self._kept]
        if not missing:
            return
        for row in session.scalars(
            select(JudgementRecord).where(JudgementRecord.lease_id.in_(missing))
        ):
            self._kept[row.lease_id] = Seen(
                node_id=row.node_id,
                round=row.round,
                scaled_norm=row.scaled_norm,
                shares=unpack(row.shares or b""),
                sketch=unpack(row.sketch or b""),
            )


class Alike:
    """Cosines of all pairs of one round's sketches, which grow by a row a contribution."""

    def __init__(self) -> None:
        self._round = -1
        self._places: dict[str, int] = {}
        self._sketches: F32 = np.zeros((0, 0), dtype=np.float32)  # (room, SIZE)
        self._cosines: F32 = np.zeros((0, 0), dtype=np.float32)  # (room, room)

    def pairs(self, number: int, leases: Sequence[str], sketches: Sequence[F32]) -> F32:
        """(pairs,) the cosine of each two of ``leases``, all of round ``number``."""
        if number != self._round or len(self._places) > 2 * MAX_SEEN:
            self._round, self._places = number, {}
        for lease, sketch in zip(leases, sketches, strict=True):
            if lease not in self._places:
                self._add(lease, sketch)
        places = [self._places[lease] for lease in leases]
        among = self._cosines[np.ix_(places, places)]
        return np.asarray(among[np.triu_indices(len(places), k=1)])

    def _add(self, lease: str, sketch: F32) -> None:
        place = len(self._places)
        if place == len(self._sketches) or self._sketches.shape[1] != len(sketch):
            room = max(64, 2 * place)
            wider = np.zeros((room, len(sketch)), dtype=np.float32)
            square = np.zeros((room, room), dtype=np.float32)
            if place:
                wider[:place] = self._sketches[:place]
                square[:place, :place] = self._cosines[:place, :place]
            self._sketches, self._cosines = wider, square
        self._places[lease] = place
        self._sketches[place] = sketch
        row = self._sketches[: place + 1] @ sketch
        self._cosines[place, : place + 1] = self._cosines[: place + 1, place] = row
