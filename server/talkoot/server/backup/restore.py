"""Make a state directory of a backup, here or on another machine.

Every file is held against its digest while it is copied, the list of files against the signature
of the coordinator's key. The run goes on under a new generation (ADR 21), which is what lets nodes
follow it back.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.errors import (
    ConfigError,
    IntegrityError,
    TalkootError,
)
from talkoot.protocol.files import DirectoryLock, explain_os_error, write_atomic
from talkoot.protocol.identity import NodeKey, verify
from talkoot.protocol.messages import parse
from talkoot.server.backup.records import MAX_RECORD, MAX_SECRETS, BackupRecord, Piece, SecretBundle
from talkoot.server.backup.rows import copy_rows, sqlite_path
from talkoot.server.backup.seal import unseal
from talkoot.server.backup.vault import Vault, pieces_of
from talkoot.server.config import Config, LedgerSection, dump_config, parse_config
from talkoot.server.generation import bump
from talkoot.server.ledger import Ledger
from talkoot.server.setup import issue_loopback_certificate
from talkoot.server.state import StateDir

KEY = "keys/coordinator.pem"


@dataclass(frozen=True)
class Restored:
    """What was restored, or looked through."""

    name: str
    run_id: str
    version: int
    created_unix: float
    files: int
    generation: int | None
    """The new one; None when nothing was restored."""


def check(
    source: Path, *, snapshot: str | None = None, passphrase: bytes | None = None
) -> Restored:
    """Read a whole backup and hold it against its digests and signature; nothing is written.

    Raises:
        TalkootError: something is missing or damaged; the sentence says what.
    """
    vault = Vault(source.absolute())
    name = snapshot or vault.newest()
    record, _, _ = _open(vault, name, passphrase)
    pieces = {piece.digest: piece for piece in pieces_of(record)}
    for piece in pieces.values():
        vault.check(piece)
    return Restored(name, record.run_id, record.version, record.created_unix, len(pieces), None)


def restore(
    source: Path,
    root: Path,
    *,
    now: float,
    snapshot: str | None = None,
    passphrase: bytes | None = None,
    ledger_url: str | None = None,
) -> Restored:
    """Make the state directory ``root`` of a backup: whole, or none.

    Args:
        source: where backups are.
        root: a directory that does not exist yet, or an empty one.
        now: Unix seconds; becomes the run's generation.
        snapshot: which backup; the newest if None.
        passphrase: of an encrypted one.
        ledger_url: the ledger's new home; None is PostgreSQL if it was there, else SQLite.

    Raises:
        TalkootError: the backup is damaged, or ``root`` or the database cannot be used.
    """
    vault = Vault(source.absolute())
    name = snapshot or vault.newest()
    record, secrets, config = _open(vault, name, passphrase)
    config = _with_ledger(config, ledger_url)
    state = StateDir(root.absolute())
    state.create()
    with DirectoryLock(state.root, who="coordinator"):
        try:
            _fill(vault, record, secrets, state)
            write_atomic(state.config, dump_config(config).encode(), mode=0o600)
            generation = _fill_ledger(vault, record, state, config.ledger.url, now)
            state.finish(record.run_id)
        except TalkootError:
            shutil.rmtree(state.root, ignore_errors=True)
            raise
        except OSError as err:
            shutil.rmtree(state.root, ignore_errors=True)
            raise explain_os_error(err, "restoring a backup", state.root) from err
    files = len({piece.digest for piece in pieces_of(record)})
    return Restored(name, record.run_id, record.version, record.created_unix, files, generation)


def _open(
    vault: Vault, name: str, passphrase: bytes | None
) -> tuple[BackupRecord, dict[str, bytes], Config]:
    """The record, believed; the secrets by path; and the configuration, which is among them."""
    signed, record = vault.read(name)
    data = vault.read_secrets(record.secrets)
    if record.encrypted:
        if passphrase is None:
            raise ConfigError(
                "The backup's secrets are encrypted: give the --passphrase-file that it was made "
                "with."
            )
        data = unseal(data, passphrase, record.run_id)
    bundle = parse(SecretBundle, data, cap=MAX_SECRETS)
    secrets = {file.path: bytes.fromhex(file.hex) for file in bundle.files}
    try:
        key = NodeKey.from_pem(secrets[KEY]).public_key
        config = secrets["config.toml"].decode("utf-8", "replace")
    except KeyError as err:
        raise IntegrityError(f"The backup lacks {err.args[0]}.", code="bad-backup") from err
    verify(signed, "BackupRecord", key, BackupRecord, cap=MAX_RECORD)
    return record, secrets, parse_config(config, where="the backup's config.toml")


def _with_ledger(config: Config, ledger_url: str | None) -> Config:
    url = config.ledger.url if ledger_url is None else ledger_url
    if ledger_url is None and sqlite_path(url) is not None:
        url = ""  # a file elsewhere on the old machine
    return config.model_copy(update={"ledger": LedgerSection(url=url)})


def _fill(vault: Vault, record: BackupRecord, secrets: dict[str, bytes], state: StateDir) -> None:
    for path, data in secrets.items():
        target = state.root / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(target, data, mode=0o600)
    store = ArtifactStore(state.store)
    for piece in record.artifacts:
        target = store.path(piece.digest)
        target.parent.mkdir(exist_ok=True)
        vault.copy_out(piece, target, mode=0o644)
    stored = {piece.digest for piece in record.artifacts}
    for file in record.files:
        target = state.root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.digest in stored:  # as it was: a checkpoint is a version's published weights
            target.hardlink_to(store.path(file.digest))
            continue
        vault.copy_out(Piece(digest=file.digest, size_bytes=file.size_bytes), target, mode=0o644)
    if record.flower is not None:
        vault.copy_out(record.flower, state.root / "flower.db", mode=0o600)
    issue_loopback_certificate(state)


def _fill_ledger(vault: Vault, record: BackupRecord, state: StateDir, url: str, now: float) -> int:
    """Put the ledger in its place and raise the generation; returns it."""
    database = state.root / "ledger.db"
    vault.copy_out(record.ledger, database, mode=0o600)
    with closing(Ledger(Ledger.url_at(state.root))) as here:
        here.migrate()
        generation = bump(here, record.run_id, now)
        if not url:
            return generation
        with closing(Ledger(url)) as there:
            there.migrate()
            copy_rows(here, there)
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (state.root / name).unlink(missing_ok=True)
    return generation
