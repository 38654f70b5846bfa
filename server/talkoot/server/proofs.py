"""How a node holds its replica, by what it said and by what it proved: for ``nodes show``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from talkoot.protocol.messages import NodeReport, Proof, Signed, parse
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import NodeState, ProofRecord

SHOWN = 10


def memory_of(coordinator: Coordinator, node_id: str) -> dict[str, Any]:
    """``recipe`` and ``falls`` of the newest report, and ``proofs``, newest first."""
    with coordinator.ledger.read() as session:
        state = session.get(NodeState, node_id)
        records = session.scalars(
            select(ProofRecord)
            .where(ProofRecord.node_id == node_id)
            .order_by(ProofRecord.proof_id.desc())
            .limit(SHOWN)
        ).all()
        said = NodeReport.model_validate_json(state.report) if state is not None else None
        return {
            "recipe": said.recipe if said is not None else None,
            "falls": said.falls if said is not None else 0,
            "proofs": [_proof(record) for record in records],
        }


def _proof(record: ProofRecord) -> dict[str, Any]:
    signed = parse(Signed, record.signed.encode("ascii"))
    proof = parse(Proof, signed.body.encode("ascii"))
    return {
        "unix": record.unix,
        "recipe": proof.recipe,
        "peak_bytes": proof.peak_bytes,
        "predicted_bytes": proof.predicted_bytes,
        "tokens_per_second": proof.tokens_per_second,
        "accepted": record.accepted,
        "sentence": record.sentence,
    }
