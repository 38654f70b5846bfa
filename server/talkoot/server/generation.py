"""The generation of a run: what makes going back legitimate (ADR 21).

Nodes refuse a version or a round that is older than one they have seen: a coordinator, or whoever
stands in its place, can't roll them back. A coordinator that was restored from a backup must be
able to, so everything it signs carries a generation, and nodes start anew with a higher one.
"""

from __future__ import annotations

import time

from sqlalchemy import select

from talkoot.protocol.errors import StateError
from talkoot.server.config import load_config
from talkoot.server.coordinator import note
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import LeaseRecord, Run
from talkoot.server.state import StateDir


def bump_generation(state: StateDir, *, now: float | None = None) -> int:
    """Let nodes follow a state that was copied back by hand; returns the new generation.

    ``talkoot-coordinator restore`` does it by itself. Call it once, before anything serves the
    state.

    Args:
        state: a finished state directory with its ledger in place.
        now: Unix seconds.

    Raises:
        TalkootError: the state or its ledger can't be used.
    """
    run_id = state.check()
    ledger = Ledger(Ledger.url_at(state.root, load_config(state.config).ledger.url))
    try:
        ledger.migrate()
        return bump(ledger, run_id, time.time() if now is None else now)
    finally:
        ledger.close()


def bump(ledger: Ledger, run_id: str, now: float) -> int:
    """Begin a new generation of a run; returns it.

    It is the current Unix time in seconds, so that it is higher than every one before, also when
    the same backup is restored twice. Leases that were open in the backup are released: their tasks
    were signed for the generation that has ended, so no node would take them.

    Raises:
        StateError: the ledger can't be used, or does not know the run.
    """
    with ledger.write() as session:
        run = session.get(Run, run_id)
        if run is None:
            raise StateError(f"The ledger does not know run {run_id}.", code="run-unknown")
        run.generation = max(run.generation + 1, int(now))
        for lease in session.scalars(
            select(LeaseRecord).where(LeaseRecord.run_id == run_id, LeaseRecord.state == "open")
        ):
            lease.state = "released"
            lease.reason = "the coordinator was restored from a backup"
        note(session, "restored", f"Restored: the run goes on as generation {run.generation}.")
        return run.generation
