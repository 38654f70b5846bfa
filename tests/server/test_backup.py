"""Backups: whole or not there, complete, sealed, and a state again wherever they are restored."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError, IntegrityError, StateError, TalkootError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.messages import canonical_bytes
from talkoot.server import cli
from talkoot.server.audit import Auditor
from talkoot.server.backup import Restored, Taken, check, restore, take
from talkoot.server.backup import take as take_module  # the function shadows its module
from talkoot.server.backup.rows import copy_rows
from talkoot.server.backup.vault import Vault
from talkoot.server.config import load_config
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import Base

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any

NOW = 1_900_000_000.0
PASSPHRASE = b"correct horse battery"


def backup(root: Path, vault: Path, now: float = NOW, **options: Any) -> Taken:
    return take(root, vault, **{"now": now, "keep": 7} | options)


def rows(url: str) -> dict[str, list[str]]:
    with closing(Ledger(url)) as ledger, ledger.read() as session:
        return {
            table.name: sorted(str(tuple(row)) for row in session.execute(select(table)))
            for table in Base.metadata.sorted_tables
        }


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_restored_state_is_audited_whole_and_goes_on_as_a_new_generation(
    played: Path, tmp_path: Path
) -> None:
    before = Auditor(played).audit()
    backup(played, tmp_path / "vault")
    there = tmp_path / "elsewhere" / "state"
    shutil.move(played, tmp_path / "gone")

    done = restore(tmp_path / "vault", there, now=NOW + 5)
    found = Auditor(there).audit()
    assert found.findings == []
    assert found.chain_verified == before.chain_verified
    assert (found.contributions, found.pending) == (before.contributions, before.pending)
    with closing(Coordinator.open(there)) as coordinator:
        assert coordinator.generation == done.generation == int(NOW + 5)
        assert coordinator.run_id == done.run_id
    for name in ("ca/ca.pem", "ca/ca-key.pem", "keys/coordinator.pem", "config.toml"):
        assert (there / name).read_bytes() == (tmp_path / "gone" / name).read_bytes()
    kept = {n: b for n, b in files(tmp_path / "gone").items() if n.startswith("corpus/")}
    assert {n: b for n, b in files(there).items() if n.startswith("corpus/")} == kept
    # A second restore is newer than the first: nodes that followed that one follow this one.
    again = restore(tmp_path / "vault", tmp_path / "again", now=NOW + 6)
    assert (again.generation or 0) > (done.generation or 0)


def test_secrets_stay_with_their_owner_in_the_backup_and_after_it(
    played: Path, tmp_path: Path
) -> None:
    vault, there = tmp_path / "vault", tmp_path / "there"
    backup(played, vault)
    restore(vault, there, now=NOW)
    for root in (vault, there):
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
    secret = [*(vault / "secrets").iterdir(), *(vault / "snapshots").iterdir()]
    secret += [p for s in ("ca", "keys") for p in (there / s).rglob("*") if p.is_file()]
    secret += [there / "config.toml", there / "ledger.db"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in secret} == {0o600}
    for folder in ("ca", "keys", "store", "versions"):
        assert stat.S_IMODE((there / folder).stat().st_mode) == 0o700


def test_a_second_backup_copies_the_ledger_alone(played: Path, tmp_path: Path) -> None:
    first = backup(played, tmp_path / "vault")
    assert first.copied_bytes >= first.total_bytes
    second = backup(played, tmp_path / "vault", NOW + 1)
    assert second.files == first.files
    record = Vault(tmp_path / "vault").read(second.name)[1]
    assert second.copied_bytes == record.ledger.size_bytes
    # A checkpoint is a version's published weights, by a hard link: one file, also after a restore.
    restore(tmp_path / "vault", tmp_path / "there", now=NOW)
    anew = backup(tmp_path / "there", tmp_path / "anew")
    assert anew.copied_bytes == anew.total_bytes


def test_only_the_newest_backups_are_kept_and_nothing_that_they_do_not_need(
    played: Path, tmp_path: Path
) -> None:
    vault = Vault(tmp_path / "vault")
    names = [backup(played, vault.root, NOW + n, keep=2).name for n in range(3)]
    (vault.root / "objects" / ".1.new").write_bytes(b"of one that was killed")
    names.append(backup(played, vault.root, NOW + 4, keep=2).name)
    assert vault.names() == names[-2:]
    assert not list((vault.root / "objects").glob(".*"))
    for name in vault.names():
        check(vault.root, snapshot=name)
    with pytest.raises(StateError, match="has no backup"):
        check(vault.root, snapshot=names[0])
    with pytest.raises(StateError, match="has no backup"):
        check(vault.root, snapshot="../../etc/passwd")


def _die_at(step: int) -> None:
    """SIGKILL this process at its n-th sync or rename."""
    left = [step]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapped

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, counted(getattr(os, name)))


def _killed(work: Callable[[], object], step: int) -> bool:
    """Do it in a child that dies at a step; False when it came to its end before."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _die_at(step)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_a_backup_that_is_killed_at_any_moment_is_whole_or_not_there(
    played: Path, tmp_path: Path
) -> None:
    vault = Vault(tmp_path / "vault")
    backup(played, vault.root)
    deaths = 0
    for step in itertools.count(1):
        (played / "corpus" / "tokens.bin").touch()  # something to copy each time
        if not _killed(functools.partial(backup, played, vault.root, NOW + step), step):
            break
        deaths += 1
        for name in vault.names():
            assert check(vault.root, snapshot=name).version == 2
    assert deaths > 8
    assert not list((played / "run" / "backup" / "work").glob("*"))


def test_a_restore_that_is_killed_at_any_moment_is_no_state(played: Path, tmp_path: Path) -> None:
    backup(played, tmp_path / "vault")
    there = tmp_path / "there"
    for step in (1, 3, 10, 20, 30):
        assert _killed(lambda: restore(tmp_path / "vault", there, now=NOW), step)
        with pytest.raises(StateError) as caught:
            Coordinator.open(there)
        assert caught.value.code in ("half-made", "missing")
        shutil.rmtree(there, ignore_errors=True)


def test_every_damaged_or_missing_file_of_a_backup_is_found_and_nothing_is_restored(
    played: Path, tmp_path: Path
) -> None:
    vault, there = tmp_path / "vault", tmp_path / "there"
    backup(played, vault)
    every = [p for p in vault.rglob("*") if p.is_file() and p.parent != vault]
    assert len(every) > 10
    for path in every:
        whole = path.read_bytes()
        for damaged in (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole[:-1], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(TalkootError) as caught:
                check(vault)
            assert "Traceback" not in caught.value.sentence
        with pytest.raises(TalkootError):
            restore(vault, there, now=NOW)
        assert not there.exists()
        path.write_bytes(whole)
        path.chmod(0o600)
    check(vault)


def test_a_passphrase_hides_keys_authorities_and_configuration(
    played: Path, tmp_path: Path
) -> None:
    vault, there = tmp_path / "vault", tmp_path / "there"
    backup(played, vault, passphrase=PASSPHRASE)
    stored = b"".join(files(vault).values())
    for name in ("ca/ca-key.pem", "keys/coordinator.pem", "config.toml"):
        data = (played / name).read_bytes()
        assert data not in stored
        assert data.hex().encode() not in stored
    with pytest.raises(ConfigError, match="--passphrase-file"):
        restore(vault, there, now=NOW)
    with pytest.raises(IntegrityError, match="does not open"):
        restore(vault, there, now=NOW, passphrase=b"another horse entirely")
    assert not there.exists()
    restore(vault, there, now=NOW, passphrase=PASSPHRASE)
    assert Auditor(there).audit().findings == []


@pytest.mark.parametrize(
    "path", ["../escape", "corpus/../../escape", "/etc/escape", "keys/x", "corpus//x", "run/x"]
)
def test_a_forged_list_of_files_is_refused(played: Path, tmp_path: Path, path: str) -> None:
    vault, there = tmp_path / "vault", tmp_path / "there"
    name = backup(played, vault).name
    signed, record = Vault(vault).read(name)
    target = vault / "snapshots" / f"{name}.json"
    # By somebody without the key ...
    other = NodeKey.generate().sign("BackupRecord", canonical_bytes(record))
    target.write_bytes(canonical_bytes(other))
    with pytest.raises(IntegrityError) as caught:
        restore(vault, there, now=NOW)
    assert caught.value.code == "bad-signature"
    # ... and by somebody with it.
    evil = signed.body.replace(record.files[0].path, path)
    key = NodeKey.load(played / "keys" / "coordinator.pem")
    target.write_bytes(canonical_bytes(key.sign("BackupRecord", evil.encode())))
    with pytest.raises(TalkootError, match="Not a valid BackupRecord"):
        restore(vault, there, now=NOW)
    assert not there.exists()
    assert not (tmp_path / "escape").exists()


def test_what_is_collected_while_it_is_backed_up_is_looked_for_in_a_newer_ledger(
    played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module = importlib.import_module("talkoot.server.backup.take")
    real, first = module._link, [True]

    def once(path: Path, link: Path) -> Path:
        if first.pop() if first else False:
            raise FileNotFoundError(2, "collected", str(path))
        found: Path = real(path, link)
        return found

    monkeypatch.setattr(module, "_link", once)
    assert take_module is module.take
    backup(played, tmp_path / "vault")
    check(tmp_path / "vault")

    with closing(Coordinator.open(played)) as coordinator:
        gone = coordinator.store.path(coordinator.spec.manifest.digest)
    gone.unlink()
    with pytest.raises(StateError, match="the ledger needs it"):
        backup(played, tmp_path / "vault", NOW + 1)
    assert len(Vault(tmp_path / "vault").names()) == 1


def test_a_damaged_artifact_is_not_backed_up(played: Path, tmp_path: Path) -> None:
    with closing(Coordinator.open(played)) as coordinator:
        path = coordinator.store.path(coordinator.spec.manifest.digest)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(IntegrityError, match="is damaged"):
        backup(played, tmp_path / "vault")
    with pytest.raises(StateError, match="no whole backup"):
        check(tmp_path / "vault")


def test_a_place_that_is_something_else_is_refused(
    played: Path, tmp_path: Path, site: Site
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").touch()
    with pytest.raises(StateError, match="no place of backups"):
        backup(played, tmp_path / "photos")
    with pytest.raises(StateError, match="holds no backups"):
        check(tmp_path / "photos")
    with pytest.raises(StateError, match="inside the state directory"):
        backup(played, played / "backups")
    backup(played, tmp_path / "vault")
    other = site.coordinator.state.root
    with pytest.raises(StateError, match="state directory already"):
        restore(tmp_path / "vault", other, now=NOW)


def test_a_ledger_moves_between_sqlite_and_postgresql_with_all_its_rows(
    played: Path, tmp_path: Path, new_database: Callable[..., str]
) -> None:
    vault, url = tmp_path / "vault", new_database()
    backup(played, vault)
    there, back = tmp_path / "there", tmp_path / "back"
    first = restore(vault, there, now=NOW, ledger_url=url)
    assert load_config(there / "config.toml").ledger.url == url
    assert not list(there.glob("ledger.db*"))
    assert Auditor(there).audit().findings == []
    with closing(Coordinator.open(there)) as coordinator, coordinator.ledger.write() as session:
        from talkoot.server.coordinator import note

        note(session, "kept", "A row that comes later has a number of its own.")

    with pytest.raises(StateError, match="holds a run already"):
        restore(vault, tmp_path / "twice", now=NOW, ledger_url=url)
    assert not (tmp_path / "twice").exists()

    backup(there, vault, NOW + 1)
    second = restore(vault, back, now=NOW + 2, ledger_url="")
    assert Auditor(back).audit().findings == []
    assert isinstance(first, Restored)
    assert isinstance(second, Restored)
    mine, theirs = rows(Ledger.url_at(back)), rows(url)
    for changed in ("runs", "events", "leases"):  # the generation, and what was said of it
        mine.pop(changed), theirs.pop(changed)
    assert mine == theirs
    with (
        closing(Ledger(Ledger.url_at(back))) as full,
        closing(Ledger(url)) as held,
        pytest.raises(StateError, match="holds a run already"),
    ):
        copy_rows(full, held)


def test_the_commands_say_what_they_did_and_what_is_next(played: Path, tmp_path: Path) -> None:
    runner, vault = CliRunner(), str(tmp_path / "vault")
    done = runner.invoke(cli.app, ["backup", vault, "--state", str(played)])
    assert done.exit_code == 0, done.output
    assert "of version 2" in done.output
    assert "in clear" in done.output
    short = tmp_path / "short"
    short.write_text("tiny\n")
    with pytest.raises(ConfigError, match="under 12 characters"):
        runner.invoke(
            cli.app,
            ["backup", vault, "--state", str(played), "--passphrase-file", str(short)],
            catch_exceptions=False,
        )
    looked = runner.invoke(cli.app, ["restore", vault, "--check"])
    assert "is whole" in looked.output
    there = tmp_path / "there"
    made = runner.invoke(cli.app, ["restore", vault, "--state", str(there)])
    assert made.exit_code == 0, made.output
    assert "must never serve again" in made.output
    assert runner.invoke(cli.app, ["verify", "--state", str(there)]).exit_code == 0
