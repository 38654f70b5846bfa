"""The generation of a run: what makes going back legitimate (ADR 20).

Nodes refuse a version or a round that is older than one they have seen: a coordinator, or whoever
stands in its place, can't roll them back. A coordinator that was restored from a backup must be
able to, so everything it signs carries a generation, and nodes start anew with a higher one.
"""

from __future__ import annotations

import time

from sqlalchemy import select

from talkoot.server.config import load_config
from talkoot.server.coordinator import note
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import LeaseRecord, Run
from talkoot.server.state import StateDir


def bump_generation(state: StateDir, *, now: float | None = None) -> int:
    """Let nodes follow a state that was restored from a backup; returns the new generation.

    Call it once after a restore, before anything serves the state. The generation becomes the
    current Unix time in seconds, so that it is higher than every one before, also when the same
    backup is restored twice. Leases that were open in the backup are released: their tasks were
    signed for the generation that has ended, so no node would take them.

    Args:
        state: a finished state directory with its ledger in place.
        now: Unix seconds.

    Raises:
        TalkootError: the state or its ledger can't be used.
    """
    run_id = state.check()
    moment = time.time() if now is None else now
    ledger = Ledger(Ledger.url_at(state.root, load_config(state.config).ledger.url))
    try:
        ledger.migrate()
        with ledger.write() as session:
            run = session.get_one(Run, run_id)
            run.generation = max(run.generation + 1, int(moment))
            for lease in session.scalars(
                select(LeaseRecord).where(LeaseRecord.run_id == run_id, LeaseRecord.state == "open")
            ):
                lease.state = "released"
                lease.reason = "the coordinator was restored from a backup"
            note(session, "restored", f"Restored: the run goes on as generation {run.generation}.")
            return run.generation
    finally:
        ledger.close()
