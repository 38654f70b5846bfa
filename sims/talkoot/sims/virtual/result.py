"""What a simulation found, read from the ledger that the real coordinator kept."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from sqlalchemy import select

from talkoot.protocol.files import write_atomic
from talkoot.server.heldout import mean_loss
from talkoot.server.ledger.schema import (
    ContributionRecord,
    Evaluation,
    EvidenceRecord,
    JudgementRecord,
    LeaseRecord,
    Node,
    Round,
    StandingRecord,
    Version,
)
from talkoot.sims.planning.fleet import Fleet
from talkoot.sims.scenario import Scenario
from talkoot.sims.tables import Columns, rows_of, write_table
from talkoot.sims.virtual.layout import Profile
from talkoot.sims.virtual.site import EPOCH, Messages, Site
from talkoot.sims.virtual.world import DAY, World

LEASE_COLUMNS: Final[Columns] = {
    **{"round": int, "attempt": int, "node": str, "population": str, "attack": str, "tokens": int},
    **dict.fromkeys(("sent", "fetched", "trained", "encoded", "arrived", "answered"), float),
    **{"bytes_down": int, "bytes_up": int, "answer": str},
    **{"loss": float, "influence": float, "judged": str, "lease": str},
}
"""Of one lease; times are virtual seconds since the beginning. ``loss`` is the node's own word,
``influence`` and ``judged`` what was believed of it when its round closed."""
EVIDENCE_COLUMNS: Final[Columns] = {
    **{"at": float, "round": int, "node": str, "attack": str, "kind": str, "points": float},
    **{"sentence": str, "lease": str},
}
PRESENCE_COLUMNS: Final[Columns] = {"node": str, "population": str, "came": float, "went": float}
ROUND_COLUMNS: Final[Columns] = {
    **dict.fromkeys(("round", "attempts"), int),
    **dict.fromkeys(("opened", "closed", "published"), float),
    "reason": str,
    **dict.fromkeys(("leases", "contributions", "tokens", "tokens_so_far", "bytes_up"), int),
    **{"loss": float, "heldout": float, "weights_digest": str},
}
NODE_COLUMNS: Final[Columns] = {
    **dict.fromkeys(("name", "population", "attack", "status"), str),
    **dict.fromkeys(("contributions", "tokens"), int),
    **dict.fromkeys(("train_seconds", "online_seconds"), float),
    **dict.fromkeys(("bytes_up", "bytes_down", "message_bytes_up", "message_bytes_down"), int),
    "quarantined": float,
}


@dataclass(frozen=True)
class RoundFound:
    """One published round. Times are virtual seconds since the beginning."""

    round: int
    attempts: int
    opened: float
    closed: float
    published: float
    reason: str
    leases: int
    contributions: int
    tokens: int
    tokens_so_far: int
    bytes_up: int
    """Of accepted payloads."""
    loss: float
    """Mean training loss, as nodes say, weighted by tokens."""
    heldout: float | None
    weights_digest: str


@dataclass(frozen=True)
class NodeFound:
    """One node."""

    name: str
    population: str
    attack: str
    status: str
    contributions: int
    tokens: int
    train_seconds: float
    online_seconds: float
    bytes_up: int
    bytes_down: int
    message_bytes_up: int = 0
    """Reports and claims; ``bytes_up`` and ``bytes_down`` are artifacts."""
    message_bytes_down: int = 0
    quarantined: float | None = None
    """Since when, if it is at the end; virtual seconds since the beginning."""


def write_result(
    path: Path,
    scenario: Scenario,
    world: World,
    site: Site,
    profiles: Sequence[Profile],
    refused: Mapping[int, str],
    machine: Mapping[str, Any],
) -> None:
    """Write ``run.json``: all that the report and ``--json`` say."""
    rounds = _rounds(site)
    messages = site.messages(world.now)
    nodes = _nodes(world, site, profiles, messages)
    fleet = world.fleet
    for index in refused:
        nodes.append(_never_in(profiles[index]))
    found = figures(scenario, fleet, rounds, nodes, len(profiles))
    found["first_loss"] = _heldout(site, 0)
    document = {
        "scenario": scenario.model_dump(mode="json"),
        "figures": found,
        "rounds": [asdict(row) for row in rounds],
        "nodes": [asdict(row) for row in nodes],
        "messages": asdict(messages),
        "presence": presence(world, profiles),
        "evidence": _evidence(world, site, profiles),
        "beliefs": _beliefs(site),
        "refused": Counter(refused.values()).most_common(20),
        "first_loss": found["first_loss"],
        "weights_digest": _newest_digest(site),
        "machine": machine,
    }
    write_atomic(path, json.dumps(document, indent=1).encode())


def _rounds(site: Site) -> list[RoundFound]:
    found: list[RoundFound] = []
    total = 0
    with site.coordinator.ledger.read() as session:
        for one in session.scalars(
            select(Round).where(Round.state == "published").order_by(Round.round)
        ).all():
            accepted = session.scalars(
                select(ContributionRecord).where(ContributionRecord.round == one.round)
            ).all()
            leases = session.scalars(
                select(LeaseRecord.lease_id).where(LeaseRecord.round == one.round)
            ).all()
            version = session.get_one(Version, (one.run_id, one.round))
            tokens = sum(c.tokens for c in accepted)
            total += tokens
            found.append(
                RoundFound(
                    round=one.round,
                    attempts=one.attempt + 1,
                    opened=one.opened_unix - EPOCH,
                    closed=(one.closed_unix or 0.0) - EPOCH,
                    published=(one.published_unix or 0.0) - EPOCH,
                    reason=one.reason,
                    leases=len(leases),
                    contributions=len(accepted),
                    tokens=tokens,
                    tokens_so_far=total,
                    bytes_up=sum(c.payload_bytes for c in accepted),
                    loss=sum(c.loss * c.tokens for c in accepted) / max(tokens, 1),
                    heldout=None,
                    weights_digest=version.weights_digest,
                )
            )
    return [RoundFound(**{**asdict(row), "heldout": _heldout(site, row.round)}) for row in found]


def presence(world: World, profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """When each node that was let in was there, up to now: rows of ``presence.csv``."""
    lines, end = world.fleet.timelines, world.now - EPOCH
    found = []
    for index in sorted(world.nodes):
        mine = slice(int(lines.first[index]), int(lines.first[index + 1]))
        for came, went in zip(lines.starts[mine], lines.ends[mine], strict=True):
            if came < end:
                profile = profiles[index]
                spans = (round(float(came), 3), round(min(float(went), end), 3))
                row = (profile.name, profile.population, *spans)
                found.append(dict(zip(PRESENCE_COLUMNS, row, strict=True)))
    return found


def _evidence(world: World, site: Site, profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """What was held against whom, and when: rows of ``evidence.csv``."""
    names = {site.node_ids[index]: profiles[index] for index in world.nodes}
    with site.coordinator.ledger.read() as session:
        rows = session.scalars(select(EvidenceRecord).order_by(EvidenceRecord.evidence_id)).all()
    return [
        {
            "at": round(row.unix - EPOCH, 3),
            "round": row.round,
            "node": names[row.node_id].name,
            "attack": names[row.node_id].attack or "",
            "kind": row.kind,
            "points": row.points,
            "sentence": row.sentence,
            "lease": row.lease_id,
        }
        for row in rows
    ]


def _beliefs(site: Site) -> dict[str, list[Any]]:
    """By lease of an accepted contribution: the node's loss, its influence, and why."""
    with site.coordinator.ledger.read() as session:
        rows = session.execute(
            select(
                ContributionRecord.lease_id,
                ContributionRecord.loss,
                JudgementRecord.influence,
                JudgementRecord.code,
            ).outerjoin(JudgementRecord, JudgementRecord.lease_id == ContributionRecord.lease_id)
        ).all()
    return {lease: [loss, influence, code or ""] for lease, loss, influence, code in rows}


def _heldout(site: Site, version: int) -> float | None:
    with site.coordinator.ledger.read() as session:
        rows = session.scalars(select(Evaluation).where(Evaluation.version == version)).all()
    if not rows:
        return None
    return mean_loss([row.loss for row in rows], [row.weight for row in rows])


def _newest_digest(site: Site) -> str:
    with site.coordinator.ledger.read() as session:
        return site.book.latest_version(session).weights_digest


def _nodes(
    world: World, site: Site, profiles: Sequence[Profile], messages: Messages
) -> list[NodeFound]:
    lines = world.fleet.timelines
    indices = sorted(world.nodes)
    online = lines.online_seconds(np.array(indices, dtype=np.int64), world.now - EPOCH)
    found = []
    with site.coordinator.ledger.read() as session:
        for index, seconds in zip(indices, online.tolist(), strict=True):
            node, profile = world.nodes[index], profiles[index]
            record = session.get_one(Node, site.node_ids[index])
            standing = session.get(StandingRecord, record.node_id)
            out = standing is not None and standing.state == "quarantined"
            tokens = session.scalars(
                select(ContributionRecord.tokens).where(
                    ContributionRecord.node_id == record.node_id
                )
            ).all()
            said, heard = messages.of(seconds, len(tokens))
            found.append(
                NodeFound(
                    name=profile.name,
                    population=profile.population,
                    attack=profile.attack or "",
                    status=record.status,
                    contributions=len(tokens),
                    tokens=sum(tokens),
                    train_seconds=node.train_seconds,
                    online_seconds=seconds,
                    bytes_up=node.bytes_up,
                    bytes_down=node.bytes_down,
                    message_bytes_up=round(said),
                    message_bytes_down=round(heard),
                    quarantined=standing.since_unix - EPOCH if standing and out else None,
                )
            )
    return found


def _never_in(profile: Profile) -> NodeFound:
    return NodeFound(
        profile.name, profile.population, profile.attack or "", "refused", 0, 0, 0.0, 0.0, 0, 0
    )


def figures(
    scenario: Scenario,
    fleet: Fleet,
    rounds: Sequence[RoundFound],
    nodes: Sequence[NodeFound],
    asked: int,
) -> dict[str, float | None]:
    """By the names of ``METRICS``; None has no value."""
    days = rounds[-1].published / DAY if rounds else 0.0
    tokens = rounds[-1].tokens_so_far if rounds else 0
    online = sum(node.online_seconds for node in nodes)
    up, down = sum(node.bytes_up for node in nodes), sum(node.bytes_down for node in nodes)
    pace = tokens / days if days else None
    target = scenario.target_tokens
    kwh, energy = _energy(scenario, fleet, nodes)
    spans = [row.published - row.opened for row in rounds]
    out = [node.status == "quarantined" for node in nodes]
    lied = [bool(node.attack) for node in nodes]
    losses = [row.heldout for row in rounds if row.heldout is not None]
    return {
        "rounds": len(rounds),
        "virtual_days": days,
        "round_seconds": statistics.fmean(spans) if spans else None,
        "reopened": sum(row.attempts - 1 for row in rounds),
        "tokens": tokens,
        "tokens_per_day": pace,
        "utilization": sum(n.train_seconds for n in nodes) / online if online else None,
        "nodes": asked,
        "nodes_that_fit": sum(node.status != "refused" for node in nodes),
        "contributions_per_round": (
            statistics.fmean([row.contributions for row in rounds]) if rounds else None
        ),
        "bytes_up": up,
        "bytes_down": down,
        "coordinator_egress_gb_per_day": down / 1e9 / days if days else None,
        "coordinator_ingress_gb_per_day": up / 1e9 / days if days else None,
        "kwh": kwh,
        "cost": energy + scenario.coordinator.price_per_egress_gb * down / 1e9,
        "days_to_target": target / pace if target is not None and pace else None,
        "loss": losses[-1] if losses else None,
        "attackers_quarantined": sum(a and b for a, b in zip(lied, out, strict=True)),
        "honest_quarantined": sum(b and not a for a, b in zip(lied, out, strict=True)),
    }


def _energy(scenario: Scenario, fleet: Fleet, nodes: Sequence[NodeFound]) -> tuple[float, float]:
    """Kilowatt-hours, and what they cost."""
    watts = {fit.node_class.name: fit.node_class.watts for fit in fleet.fits}
    entries = {entry.name: entry for entry in scenario.population}
    kwh = cost = 0.0
    for node in nodes:
        entry = entries[node.population]
        idle = max(0.0, node.online_seconds - node.train_seconds)
        used = (node.train_seconds * watts[node.population] + idle * entry.idle_watts) / 3.6e6
        kwh += used
        cost += used * entry.price_per_kwh
    return kwh, cost


def read_leases(events: Path, beliefs: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every lease that was answered, as the engine kept them, and what was believed of it."""
    with events.open(encoding="ascii") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    for row in rows:
        loss, influence, judged = beliefs.get(row.get("lease", ""), (None, None, ""))
        row |= {"loss": loss, "influence": influence, "judged": judged}
    return rows


def write_tables(
    document: Mapping[str, Any],
    leases: Sequence[Mapping[str, Any]],
    present: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    parquet: bool = False,
) -> None:
    """``rounds``, ``nodes``, ``leases``, ``presence`` and ``evidence``, for pandas."""
    for name, columns, rows in (
        ("rounds", ROUND_COLUMNS, document["rounds"]),
        ("nodes", NODE_COLUMNS, document["nodes"]),
        ("leases", LEASE_COLUMNS, leases),
        ("presence", PRESENCE_COLUMNS, present),
        ("evidence", EVIDENCE_COLUMNS, document.get("evidence", ())),
    ):
        write_table(out / name, columns, rows_of(columns, rows), parquet=parquet)
