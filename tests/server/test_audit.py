"""The auditor: a whole run is whole, and every kind of broken promise is found."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from talkoot.protocol.errors import StateError
from talkoot.server import cli
from talkoot.server.audit import Audit, Auditor

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any


def sql(root: Path, *statements: str) -> None:
    with closing(sqlite3.connect(root / "ledger.db")) as raw:
        for statement in statements:
            raw.execute(statement)
        raw.commit()


def value(root: Path, query: str) -> Any:
    with closing(sqlite3.connect(root / "ledger.db")) as raw:
        (found,) = raw.execute(query).fetchone()
        return found


def artifact(root: Path, query: str) -> Path:
    digest = value(root, query)
    return Path(root, "store", digest[:2], digest[2:])


def flip(path: Path) -> None:
    """Change one bit near the end, as a disk does that ages."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def codes(found: Audit) -> set[str]:
    return {finding.code for finding in found.findings}


def test_a_run_in_the_middle_of_a_round_is_whole_to_the_last_bit(played: Path) -> None:
    found = Auditor(played).audit()
    assert found.findings == []
    assert found.chain_verified == [0, 1, 2]
    assert found.collected == []
    assert (found.contributions, found.pending, found.leases) == (5, 1, 6)
    assert found.committed_blocks == 10
    assert found.signatures == 1 + 6 + 5 + 2  # run, tasks, contributions, proofs


def test_a_second_audit_by_the_same_auditor_reads_only_what_changed(played: Path) -> None:
    auditor = Auditor(played)
    first = auditor.audit()
    second = auditor.audit()
    assert (second.findings, second.artifacts) == ([], 0)
    assert second.chain_verified == first.chain_verified
    flip(artifact(played, "SELECT update_digest FROM versions WHERE version = 2"))
    assert "damaged-artifact" in codes(auditor.audit())


TAMPERED = {
    "a contribution that no version holds": (
        "UPDATE contributions SET version = NULL WHERE round = 1",
        "lost",
    ),
    "a contribution in a version of another round": (
        "UPDATE contributions SET version = 2 WHERE round = 1",
        "wrong-version",
    ),
    "a contribution that vanished": (
        "DELETE FROM contributions WHERE round = 1",
        "lease-and-contribution",
    ),
    "a block that vanished": (
        "DELETE FROM committed_blocks WHERE rowid IN (SELECT rowid FROM committed_blocks LIMIT 1)",
        "blocks-differ",
    ),
    "a block that nobody leased": (
        "UPDATE committed_blocks SET block = 10000 "
        "WHERE rowid IN (SELECT rowid FROM committed_blocks LIMIT 1)",
        "blocks-differ",
    ),
    "a block of no lease": (
        "UPDATE committed_blocks SET lease_id = '00' "
        "WHERE rowid IN (SELECT rowid FROM committed_blocks LIMIT 1)",
        "no-lease",
    ),
    "a lease that stayed open": (
        "UPDATE leases SET state = 'open' WHERE round = 1",
        "open-too-long",
    ),
    "tokens that were changed": (
        "UPDATE contributions SET tokens = tokens + 512 WHERE round = 1",
        "claim-differs",
    ),
    "a task that was rewritten": (
        "UPDATE leases SET task = replace(task, 'round', 'rounD') WHERE round = 1",
        "bad-signature",
    ),
    "a lease of another's name": (
        "UPDATE leases SET tokens = 1 WHERE round = 1",
        "task-differs",
    ),
    "a node's key that was exchanged": (
        "UPDATE nodes SET public_key_pem = (SELECT public_key_pem FROM nodes n "
        "WHERE n.node_id <> nodes.node_id)",
        "bad-key",
    ),
    "a version that is missing": ("DELETE FROM versions WHERE version = 1", "broken-chain"),
    "weights of another digest": (
        f"UPDATE versions SET weights_digest = '{'0' * 64}' WHERE version = 1",
        "broken-chain",
    ),
    "a round that came undone": (
        "UPDATE rounds SET state = 'closing' WHERE round = 2",
        "round-and-version",
    ),
    "a round from another base": (
        "UPDATE rounds SET base_version = 0 WHERE round = 2",
        "wrong-base",
    ),
    "a run that is finished too soon": ("UPDATE runs SET finished_unix = 1", "finished-early"),
    "a payload that counts twice": (
        "UPDATE contributions SET payload_digest = (SELECT payload_digest FROM contributions "
        "WHERE round = 2 LIMIT 1) WHERE round = 1",
        "payload-twice",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_it_finds_in_the_ledger(played: Path, what: str) -> None:
    statement, code = TAMPERED[what]
    sql(played, statement)
    assert code in codes(Auditor(played).audit())


FILES = {
    "SELECT update_digest FROM versions WHERE version = 1": "update",
    "SELECT checkpoint_digest FROM versions WHERE version = 2": "checkpoint",
    "SELECT payload_digest FROM contributions WHERE version IS NULL": "contribution",
}


@pytest.mark.parametrize("query", FILES, ids=FILES.values())
def test_it_finds_a_flipped_bit_and_a_missing_file_in_the_store(played: Path, query: str) -> None:
    path = artifact(played, query)
    flip(path)
    assert "damaged-artifact" in codes(Auditor(played).audit())
    path.unlink()
    assert "missing-artifact" in codes(Auditor(played).audit())


@pytest.mark.parametrize("name", ["published", "feedback"])
def test_it_finds_a_torn_file_of_the_newest_version(played: Path, name: str) -> None:
    path = played / "versions" / "v00000002" / f"{name}.safetensors"
    whole = path.read_bytes()
    path.unlink()  # it may be a hard link to the checkpoint in the store
    path.write_bytes(whole[: len(whole) // 2])
    assert codes(Auditor(played).audit()) == {"damaged-version"}


def test_a_version_whose_update_was_collected_is_said_to_be_so_and_is_no_finding(
    played: Path,
) -> None:
    # Checkpoints are kept of versions 0 and 2; were 0 older than the kept ones, 1 could go.
    config = (played / "config.toml").read_text("utf-8")
    assert "keep_checkpoints = 2" in config
    (played / "config.toml").write_text(
        config.replace("keep_checkpoints = 2", "keep_checkpoints = 1")
    )
    artifact(played, "SELECT update_digest FROM versions WHERE version = 1").unlink()
    found = Auditor(played).audit()
    assert found.findings == []
    assert (found.chain_verified, found.collected) == ([0, 2], [1])
    assert any("collected" in line for line in found.lines())


def test_a_secret_that_others_may_read_is_found(played: Path) -> None:
    (played / "keys" / "coordinator.pem").chmod(0o644)
    assert codes(Auditor(played).audit(shallow=True)) == {"open-secret"}


def test_the_command_says_what_it_found_and_ends_accordingly(played: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(cli.app, ["verify", "--state", str(played)])
    assert (done.exit_code, "All is whole." in done.output) == (0, True)
    sql(played, TAMPERED["a run that is finished too soon"][0])
    done = runner.invoke(cli.app, ["verify", "--state", str(played), "--json", "--shallow"])
    assert done.exit_code == 1
    document = json.loads(done.output)
    assert document["whole"] is False
    assert [finding["code"] for finding in document["findings"]] == ["finished-early"]


def test_what_is_no_state_or_of_another_schema_is_one_sentence(
    played: Path, tmp_path: Path
) -> None:
    with pytest.raises(StateError, match="holds no finished state"):
        Auditor(tmp_path).audit()
    sql(played, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StateError, match="schema 9999"):
        Auditor(played).audit()
    (played / "ledger.db").unlink()
    with pytest.raises(StateError, match="There is no ledger"):
        Auditor(played).audit()


def test_the_audit_writes_nothing(played: Path, tmp_path: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {
            str(p): p.read_bytes()
            for p in played.rglob("*")
            if p.is_file() and not p.name.endswith(("-shm", "-wal"))
        }

    before = everything()
    Auditor(played).audit()
    assert everything() == before
