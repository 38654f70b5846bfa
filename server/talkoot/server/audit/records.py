"""The ledger held against itself: rounds, leases, contributions, blocks, versions, signatures."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.identity import load_public_key, node_id_of, verify
from talkoot.protocol.messages import Contribution, Message, Proof, RoundTask, Signed, parse
from talkoot.server.audit.findings import Audit
from talkoot.server.audit.reading import Row, View

M = TypeVar("M", bound=Message)

ROUND_STATES = ("open", "closing", "published")
LEASE_STATES = ("open", "committed", "released")


@dataclass
class Signatures:
    """Verifies signed bodies; what was verified once is known by its hash."""

    known: set[bytes] = field(default_factory=set)

    def read(
        self, audit: Audit, where: str, text: str, kind: type[M], key: ec.EllipticCurvePublicKey
    ) -> M | None:
        """The message, or None with a finding when its signature or content does not hold."""
        try:
            signed = parse(Signed, text.encode("ascii"))
            mark = hashlib.sha256(text.encode("ascii") + kind.__name__.encode()).digest()
            if mark in self.known:
                message = parse(kind, signed.body.encode("ascii"))
            else:
                message = verify(signed, kind.__name__, key, kind)
                self.known.add(mark)
        except (ProtocolError, UnicodeEncodeError) as err:
            said = err.sentence if isinstance(err, ProtocolError) else str(err)
            audit.find("bad-signature", where, said)
            return None
        audit.signatures += 1
        return message


@dataclass
class Facts:
    """What the smaller tables say, for holding the larger ones against."""

    versions: dict[int, Row]
    rounds: dict[int, Row]
    nodes: dict[str, ec.EllipticCurvePublicKey]
    block_tokens: int
    block_count: int


def check_versions_and_rounds(audit: Audit, view: View, run: Row) -> Facts:
    """One chain of versions, and one round for each."""
    run_id = run["run_id"]
    versions = view.all("SELECT * FROM versions WHERE run_id = :r ORDER BY version", r=run_id)
    rounds = view.all("SELECT * FROM rounds WHERE run_id = :r ORDER BY round", r=run_id)
    audit.versions, audit.rounds = len(versions), len(rounds)
    if [v["version"] for v in versions] != list(range(len(versions))) or not versions:
        audit.find("broken-chain", "versions", "The versions are not numbered 0, 1, 2 and so on.")
    for version in versions:
        where = f"version {version['version']}"
        if version["version"] == 0:
            if version["checkpoint_digest"] is None or version["update_digest"] is not None:
                audit.find("bad-version", where, "The first version must be a checkpoint alone.")
        elif version["update_digest"] is None:
            audit.find("bad-version", where, "No update leads there.")
    newest = versions[-1]["version"] if versions else 0
    for number, row in enumerate(rounds, start=1):
        where = f"round {row['round']}"
        if row["round"] != number:
            audit.find("round-gap", where, f"Round {number} should come here.")
        if row["state"] not in ROUND_STATES:
            audit.find("bad-state", where, f"There is no state {row['state']!r}.")
        if row["base_version"] != row["round"] - 1:
            audit.find("wrong-base", where, f"It starts from version {row['base_version']}.")
        if (row["state"] == "published") != (row["round"] <= newest):
            audit.find(
                "round-and-version", where, f"It is {row['state']}, and version {newest} is newest."
            )
        if row["state"] != "published" and row["round"] != newest + 1:
            audit.find("round-and-version", where, f"Version {newest} is not the one before.")
    if newest > len(rounds):
        audit.find("round-and-version", f"version {newest}", "It has no round.")
    if run["finished_unix"] is not None and newest < run["rounds_total"]:
        audit.find("finished-early", f"run {run_id}", f"It is finished at version {newest}.")
    return Facts(
        versions={v["version"]: v for v in versions},
        rounds={r["round"]: r for r in rounds},
        nodes=_nodes(audit, view),
        block_tokens=0,
        block_count=0,
    )


def _nodes(audit: Audit, view: View) -> dict[str, ec.EllipticCurvePublicKey]:
    keys = {}
    for row in view.rows("SELECT node_id, public_key_pem FROM nodes"):
        where = f"node {row['node_id']}"
        try:
            key = load_public_key(row["public_key_pem"].encode("ascii"))
        except (ProtocolError, UnicodeEncodeError):
            audit.find("bad-key", where, "Its public key cannot be read.")
            continue
        if node_id_of(key) != row["node_id"]:
            audit.find("bad-key", where, "Its id is not that of its key.")
        keys[row["node_id"]] = key
    return keys


def check_leases(
    audit: Audit,
    view: View,
    run_id: str,
    facts: Facts,
    coordinator: ec.EllipticCurvePublicKey,
    signatures: Signatures,
) -> None:
    """Leases, contributions and committed blocks, which must tell one story."""
    contributions = _Merge(
        view.rows("SELECT * FROM contributions WHERE run_id = :r ORDER BY lease_id", r=run_id)
    )
    blocks = _Merge(
        view.rows(
            "SELECT lease_id, epoch, block FROM committed_blocks WHERE run_id = :r "
            "ORDER BY lease_id, epoch, block",
            r=run_id,
        )
    )
    for lease in view.rows("SELECT * FROM leases WHERE run_id = :r ORDER BY lease_id", r=run_id):
        audit.leases += 1
        where = f"lease {lease['lease_id']}"
        given = contributions.take(lease["lease_id"])
        committed = [(b["epoch"], b["block"]) for b in blocks.take(lease["lease_id"])]
        audit.contributions += len(given)
        audit.committed_blocks += len(committed)
        task = signatures.read(audit, where, lease["task"], RoundTask, coordinator)
        if task is not None:
            _check_task(audit, where, lease, task, facts)
        _check_state(audit, where, lease, given, committed, facts)
        if task is not None and given:
            wanted = sorted((ref.epoch, ref.block) for ref in task.lease.blocks)
            if committed != wanted:
                audit.find(
                    "blocks-differ", where, "The blocks that it committed are not those it leased."
                )
        for row in given:
            _check_contribution(audit, row, lease, task, facts, signatures)
    for orphan in contributions.rest():
        audit.find("no-lease", f"contribution {orphan['lease_id']}", "Its lease is not there.")
    for orphan in blocks.rest():
        audit.find("no-lease", f"block {orphan['block']}", "It is committed by no lease.")
    _check_twice(audit, view, run_id)


def _check_task(audit: Audit, where: str, lease: Row, task: RoundTask, facts: Facts) -> None:
    signed = task.lease
    told = (signed.lease_id, signed.run_id, signed.round, signed.attempt, signed.node_id)
    kept = tuple(lease[k] for k in ("lease_id", "run_id", "round", "attempt", "node_id"))
    if told != kept or signed.tokens != lease["tokens"] or task.round != lease["round"]:
        audit.find("task-differs", where, "The task that was signed is not the lease on record.")
    base = facts.versions.get(task.base.version)
    if task.base.version != lease["round"] - 1 or base is None:
        audit.find("wrong-base", where, f"It starts from version {task.base.version}.")
    elif base["weights_digest"] != task.base.weights_digest:
        audit.find("wrong-base", where, "It starts from weights that were never published.")
    if facts.block_tokens and (
        signed.tokens != len(signed.blocks) * facts.block_tokens
        or any(ref.block >= facts.block_count for ref in signed.blocks)
    ):
        audit.find("bad-blocks", where, "Its blocks are not those of the corpus.")


def _check_state(
    audit: Audit,
    where: str,
    lease: Row,
    given: list[Row],
    committed: list[tuple[int, int]],
    facts: Facts,
) -> None:
    state, in_round = lease["state"], facts.rounds.get(lease["round"])
    if state not in LEASE_STATES:
        audit.find("bad-state", where, f"There is no state {state!r}.")
    if in_round is None:
        audit.find("no-round", where, f"Round {lease['round']} is not there.")
    elif state == "open" and in_round["state"] != "open":
        audit.find("open-too-long", where, f"It is open, and its round is {in_round['state']}.")
    elif state == "open" and lease["attempt"] != in_round["attempt"]:
        audit.find("open-too-long", where, "It is open, and its round was leased anew since.")
    if (state == "committed") != (len(given) == 1):
        audit.find(
            "lease-and-contribution", where, f"It is {state} and has {len(given)} contributions."
        )
    if bool(committed) != (state == "committed"):
        audit.find("lease-and-blocks", where, f"It is {state} and holds {len(committed)} blocks.")
    if lease["node_id"] not in facts.nodes:
        audit.find("no-node", where, f"Node {lease['node_id']} is not there.")


def _check_contribution(
    audit: Audit,
    row: Row,
    lease: Row,
    task: RoundTask | None,
    facts: Facts,
    signatures: Signatures,
) -> None:
    where = f"contribution {row['lease_id']}"
    in_round = facts.rounds.get(row["round"])
    published = in_round is not None and in_round["state"] == "published"
    if row["version"] is None:
        audit.pending += 1
        if published:
            audit.find("lost", where, f"Round {row['round']} is published without it.")
    elif not published or row["version"] != row["round"] or row["version"] not in facts.versions:
        audit.find(
            "wrong-version",
            where,
            f"It is counted in version {row['version']}, and belongs to round {row['round']}.",
        )
    if (row["round"], row["node_id"], row["tokens"]) != (
        lease["round"],
        lease["node_id"],
        lease["tokens"],
    ):
        audit.find("not-as-leased", where, "Round, node or tokens are not those of its lease.")
    key = facts.nodes.get(row["node_id"])
    if key is None:
        return
    claim = signatures.read(audit, where, row["signed"], Contribution, key)
    if claim is None:
        return
    told = (claim.lease_id, claim.run_id, claim.round, claim.node_id, claim.payload.digest)
    kept = tuple(row[k] for k in ("lease_id", "run_id", "round", "node_id", "payload_digest"))
    if told != kept or (claim.payload.size_bytes, claim.tokens) != (
        row["payload_bytes"],
        row["tokens"],
    ):
        audit.find("claim-differs", where, "What the node signed is not what is on record.")
    if task is not None and claim.base_weights_digest != task.base.weights_digest:
        audit.find("wrong-base", where, "It was trained from other weights than its lease says.")


def _check_twice(audit: Audit, view: View, run_id: str) -> None:
    """What a damaged index could hide: keys that are there twice."""
    for row in view.rows(
        "SELECT epoch, block, COUNT(*) AS n FROM committed_blocks WHERE run_id = :r "
        "GROUP BY epoch, block HAVING COUNT(*) > 1",
        r=run_id,
    ):
        audit.find("block-twice", f"block {row['block']}", f"It is committed {row['n']} times.")
    for row in view.rows(
        "SELECT payload_digest, COUNT(*) AS n FROM contributions WHERE run_id = :r "
        "GROUP BY payload_digest HAVING COUNT(*) > 1",
        r=run_id,
    ):
        where = f"payload {row['payload_digest'][:12]}"
        audit.find("payload-twice", where, f"It was accepted {row['n']} times.")


def check_proofs(audit: Audit, view: View, facts: Facts, signatures: Signatures) -> None:
    """Every proof is its node's."""
    for row in view.rows("SELECT proof_id, node_id, signed FROM proofs ORDER BY proof_id"):
        where, key = f"proof {row['proof_id']}", facts.nodes.get(row["node_id"])
        if key is None:
            audit.find("no-node", where, f"Node {row['node_id']} is not there.")
            continue
        proof = signatures.read(audit, where, row["signed"], Proof, key)
        if proof is not None and proof.node_id != row["node_id"]:
            audit.find("claim-differs", where, "It was signed for another node.")


def check_database(audit: Audit, view: View) -> None:
    """What the database itself thinks of its pages and references (SQLite)."""
    if not view.sqlite:
        return
    for row in itertools.islice(view.rows("PRAGMA integrity_check"), 10):
        (said,) = row.values()
        if said != "ok":
            audit.find("damaged-ledger", "ledger", str(said))
    for row in itertools.islice(view.rows("PRAGMA foreign_key_check"), 10):
        where = f"{row['table']} row {row['rowid']}"
        audit.find("dangling", where, f"It refers to a row of {row['parent']} that is not there.")


class _Merge:
    """Rows in the order of their lease, taken lease by lease."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._next = next(rows, None)
        self._strays: list[Row] = []

    def take(self, lease_id: str) -> list[Row]:
        """The rows of one lease; rows of leases that were passed over are strays."""
        taken: list[Row] = []
        while self._next is not None and self._next["lease_id"] <= lease_id:
            (taken if self._next["lease_id"] == lease_id else self._strays).append(self._next)
            self._next = next(self._rows, None)
        return taken

    def rest(self) -> list[Row]:
        """All rows of leases that are not there."""
        left = [] if self._next is None else [self._next]
        return [*self._strays, *left, *self._rows]
