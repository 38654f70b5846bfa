"""A node's machine, line and recipe, by what it said and what it proved: for ``nodes show``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from talkoot.protocol.messages import NodeReport, Proof, Signed, parse
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import NodeState, ProofRecord

SHOWN = 10


def memory_of(coordinator: Coordinator, node_id: str) -> dict[str, Any]:
    """``recipe``, ``falls``, ``link_down`` and ``link_up`` of the newest report, ``proofs``, newest
    first, and the ``capability`` that the newest was made with."""
    with coordinator.ledger.read() as session:
        state = session.get(NodeState, node_id)
        records = session.scalars(
            select(ProofRecord)
            .where(ProofRecord.node_id == node_id)
            .order_by(ProofRecord.proof_id.desc())
            .limit(SHOWN)
        ).all()
        said = NodeReport.model_validate_json(state.report) if state is not None else None
        proofs = [(record, _claim(record)) for record in records]
        return {
            "recipe": said.recipe if said is not None else None,
            "falls": said.falls if said is not None else 0,
            "link_down": said.link_down if said is not None else None,
            "link_up": said.link_up if said is not None else None,
            "capability": proofs[0][1].capability.model_dump(mode="json") if proofs else None,
            "proofs": [_shown(record, proof) for record, proof in proofs],
        }


def _claim(record: ProofRecord) -> Proof:
    signed = parse(Signed, record.signed.encode("ascii"))
    return parse(Proof, signed.body.encode("ascii"))


def _shown(record: ProofRecord, proof: Proof) -> dict[str, Any]:
    return {
        "unix": record.unix,
        "recipe": proof.recipe,
        "peak_bytes": proof.peak_bytes,
        "predicted_bytes": proof.predicted_bytes,
        "tokens_per_second": proof.tokens_per_second,
        "accepted": record.accepted,
        "sentence": record.sentence,
    }
