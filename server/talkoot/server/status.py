"""The run as people see it: one JSON document for the dashboard, the command line and scripts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import (
    ContributionRecord,
    Evaluation,
    Event,
    Node,
    NodeState,
    Round,
    Run,
    StandingRecord,
    Version,
)

HISTORY_ROUNDS = 200
"""Rounds that the document carries; the command line's ``rounds --last`` asks for more."""
EVENTS = 30
ONLINE_SECONDS = 15.0
"""A node that reported within this is shown as online."""


def status(
    coordinator: Coordinator, *, history_rounds: int | None = HISTORY_ROUNDS
) -> dict[str, Any]:
    """Everything about the run; see :func:`status_json` for its encoding."""
    with coordinator.ledger.read() as session:
        run = session.get_one(Run, coordinator.run_id)
        current = session.scalars(
            select(Round).where(Round.run_id == run.run_id, Round.state != "published")
        ).one_or_none()
        version = session.scalars(
            select(Version)
            .where(Version.run_id == run.run_id)
            .order_by(Version.version.desc())
            .limit(1)
        ).one()
        history = _history(session, run.run_id, history_rounds)
        tokens = session.scalar(
            select(func.coalesce(func.sum(ContributionRecord.tokens), 0)).where(
                ContributionRecord.run_id == run.run_id
            )
        )
        if run.finished_unix is not None:
            phase = "finished"
        elif current is None:
            phase = "waiting"
        else:
            phase = "closing" if current.state == "closing" else "training"
        return {
            "run_id": run.run_id,
            "phase": phase,
            "round": current.round if current is not None else version.version,
            "rounds_total": run.rounds_total,
            "version": version.version,
            "weights_digest": version.weights_digest,
            "deadline_unix": current.deadline_unix if current is not None else None,
            "tokens_committed": int(tokens or 0),
            "parameters": coordinator.spec.parameters,
            "loss": history[-1]["loss"] if history else None,
            "heldout": _heldout(session, run.run_id),
            "history": history,
            "nodes": _nodes(session),
            "events": [
                {"unix": e.unix, "kind": e.kind, "sentence": e.sentence}
                for e in reversed(
                    session.scalars(
                        select(Event).order_by(Event.event_id.desc()).limit(EVENTS)
                    ).all()
                )
            ],
        }


def status_json(coordinator: Coordinator) -> bytes:
    """The status document as JSON."""
    return json.dumps(status(coordinator), separators=(",", ":"), allow_nan=False).encode()


def _history(session: Session, run_id: str, limit: int | None) -> list[dict[str, Any]]:
    query = (
        select(Round, Version)
        .join(Version, (Version.run_id == Round.run_id) & (Version.version == Round.round))
        .where(Round.run_id == run_id)
        .order_by(Round.round.desc())
    )
    if limit is not None:
        query = query.limit(limit)
    published = list(reversed(session.execute(query).all()))
    if not published:
        return []
    first = published[0][0].round
    by_round: dict[int, list[ContributionRecord]] = {}
    for contribution in session.scalars(
        select(ContributionRecord).where(
            ContributionRecord.run_id == run_id, ContributionRecord.round >= first
        )
    ):
        by_round.setdefault(contribution.round, []).append(contribution)
    losses = heldout_losses(session, run_id, first)
    return [
        {**_row(r, v, by_round.get(r.round, [])), "heldout_loss": losses.get(v.version)}
        for r, v in published
    ]


def heldout_losses(session: Session, run_id: str, first: int = 0) -> dict[int, float]:
    """Held-out loss over all sources, by version, from version ``first`` on."""
    rows = session.execute(
        select(
            Evaluation.version,
            func.sum(Evaluation.loss * Evaluation.weight) / func.sum(Evaluation.weight),
        )
        .where(Evaluation.run_id == run_id, Evaluation.version >= first)
        .group_by(Evaluation.version)
    )
    return {version: float(loss) for version, loss in rows}


def evaluation_of(session: Session, run_id: str, version: int) -> dict[str, Any] | None:
    """What was measured of a version: loss and perplexity, in all and by source."""
    rows = session.scalars(
        select(Evaluation)
        .where(Evaluation.run_id == run_id, Evaluation.version == version)
        .order_by(Evaluation.source)
    ).all()
    if not rows:
        return None
    loss = sum(row.loss * row.weight for row in rows) / sum(row.weight for row in rows)
    return {
        "version": version,
        "loss": loss,
        "perplexity": perplexity(loss),
        "tokens": sum(row.tokens for row in rows),
        "unix": max(row.unix for row in rows),
        "sources": [
            {
                "source": row.source,
                "loss": row.loss,
                "perplexity": perplexity(row.loss),
                "tokens": row.tokens,
                "weight": row.weight,
            }
            for row in rows
        ],
    }


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is no number that anybody would read."""
    return math.exp(loss) if 0 <= loss < 50 else None


def _heldout(session: Session, run_id: str) -> dict[str, Any] | None:
    newest = session.scalar(select(func.max(Evaluation.version)).where(Evaluation.run_id == run_id))
    return None if newest is None else evaluation_of(session, run_id, newest)


def _row(
    record: Round, version: Version, contributions: Sequence[ContributionRecord]
) -> dict[str, Any]:
    tokens = sum(c.tokens for c in contributions)
    return {
        "round": record.round,
        "version": version.version,
        "loss": sum(c.loss * c.tokens for c in contributions) / tokens if tokens else None,
        "tokens": tokens,
        "contributions": len(contributions),
        "bytes_up": sum(c.payload_bytes for c in contributions),
        "update_bytes": version.update_bytes,
        "opened_unix": record.opened_unix,
        "closed_unix": record.closed_unix,
        "published_unix": record.published_unix,
        "seconds": (record.published_unix or record.opened_unix) - record.opened_unix,
        "training_seconds": max((c.training_seconds for c in contributions), default=0.0),
        "attempt": record.attempt,
        "reason": record.reason,
        "weights_digest": version.weights_digest,
    }


def _nodes(session: Session) -> list[dict[str, Any]]:
    now = time.time()
    by_node = select(ContributionRecord.node_id, func.count()).group_by(ContributionRecord.node_id)
    counts: dict[str, int] = dict(session.execute(by_node).all())
    out = []
    rows = session.execute(
        select(Node, NodeState, StandingRecord)
        .outerjoin(NodeState, NodeState.node_id == Node.node_id)
        .outerjoin(StandingRecord, StandingRecord.node_id == Node.node_id)
        .order_by(Node.enrolled_unix)
    )
    for node, state, standing in rows:
        said: dict[str, Any] = json.loads(state.report) if state is not None else {}
        seen = state.seen_unix if state is not None else None
        online = seen is not None and now - seen < ONLINE_SECONDS
        out.append(
            {
                "node_id": node.node_id,
                "name": node.name,
                "status": node.status,
                "sentence": node.sentence,
                "standing": standing.state if standing is not None else "probation",
                "suspicion": standing.suspicion if standing is not None else 0.0,
                "state": said.get("state") if online else "offline",
                "online": online,
                "step": said.get("step", 0),
                "steps": said.get("steps", 0),
                "loss": said.get("loss"),
                "tokens_per_second": node.tokens_per_second,
                "bytes_up": said.get("bytes_up", 0),
                "bytes_down": said.get("bytes_down", 0),
                "version": said.get("version"),
                "weights_digest": said.get("weights_digest"),
                "contributions": counts.get(node.node_id, 0),
                "last_seen_unix": seen,
                "restarts": state.restarts if state is not None else 0,
                "healed": said.get("healed", 0),
            }
        )
    return out
