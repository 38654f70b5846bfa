"""Damage to the operator's files, and where whole copies of them are."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from talkoot.protocol.errors import IntegrityError
from talkoot.server import cli
from talkoot.server.audit import Auditor
from talkoot.server.backup import take
from talkoot.server.coordinator import Coordinator
from talkoot.server.copier import Copier
from talkoot.server.objects import ObjectStore
from talkoot.server.repair import Repaired, repair

NOW = 1_900_000_000.0


def needed(root: Path) -> list[Path]:
    """Files of artifacts that the ledger needs."""
    with closing(sqlite3.connect(root / "ledger.db")) as raw:
        digests = [
            row[0]
            for query in (
                "SELECT update_digest FROM versions WHERE update_digest IS NOT NULL",
                "SELECT checkpoint_digest FROM versions WHERE checkpoint_digest IS NOT NULL",
                "SELECT payload_digest FROM contributions WHERE version IS NULL",
            )
            for row in raw.execute(query)
        ]
    return [root / "store" / digest[:2] / digest[2:] for digest in digests]


def damage(path: Path) -> None:
    """As disks and power cuts do, each file another way."""
    data = path.read_bytes()
    kind = len(data) % 3
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def mend(root: Path, **sources: Any) -> Repaired:
    with closing(Coordinator.open(root)) as coordinator:
        return repair(coordinator, **sources)


def test_what_a_backup_has_is_repaired_from_it(played: Path, tmp_path: Path) -> None:
    take(played, tmp_path / "vault", now=NOW, keep=1)
    files = [*needed(played), played / "corpus" / "tokens.bin", played / "corpus" / "blocks.idx"]
    for path in files:
        damage(path)
    assert not Auditor(played).audit().whole
    done = mend(played, vault=tmp_path / "vault")
    assert len(done.repaired) == len(files)
    assert done.lost == []
    assert Auditor(played).audit().findings == []
    assert mend(played, vault=tmp_path / "vault").repaired == []


def test_what_an_object_store_or_mirror_has_is_repaired_from_it_unless_it_lies(
    played: Path, tmp_path: Path
) -> None:
    pytest.importorskip("obstore")
    stores = {}
    for name in ("liar", "honest"):
        (tmp_path / name).mkdir()
        stores[name] = ObjectStore((tmp_path / name).as_uri())
        with closing(Coordinator.open(played)) as coordinator:
            Copier(coordinator, stores[name]).turn()
    for path in (tmp_path / "liar").rglob("*"):
        if path.is_file():
            path.write_bytes(b"x" * path.stat().st_size)
    served = [p for p in needed(played) if (tmp_path / "honest" / p.parent.name / p.name).exists()]
    assert served
    for path in served:
        damage(path)
    done = mend(played, stores=(stores["liar"], stores["honest"]))
    assert done.lost == []
    assert all("honest" in line or "versions" in line for line in done.repaired)
    assert Auditor(played).audit().findings == []


def test_a_checkpoint_is_repaired_from_the_versions_own_weights_and_back(played: Path) -> None:
    with closing(sqlite3.connect(played / "ledger.db")) as raw:
        ((digest, directory),) = raw.execute(
            "SELECT checkpoint_digest, directory FROM versions WHERE version = 2"
        )
    checkpoint = played / "store" / digest[:2] / digest[2:]
    weights = played / "versions" / directory / "published.safetensors"
    for path in (checkpoint, weights):
        path.write_bytes(path.read_bytes()[:-1])
        assert len(mend(played).repaired) == 1
        assert Auditor(played).audit().findings == []


def test_what_has_no_whole_copy_is_named_and_the_command_fails(
    played: Path, tmp_path: Path
) -> None:
    (path, *_) = needed(played)
    damage(path)
    runner = CliRunner()
    with pytest.raises(IntegrityError, match="--from-backup") as refused:
        runner.invoke(cli.app, ["repair", "--state", str(played)], catch_exceptions=False)
    assert refused.value.code == "not-repaired"
    assert not Auditor(played).audit().whole
