"""Make a backup, while the coordinator runs or not.

The ledger is copied first, at one moment; what that copy names is then held by hard links, so that
the round loop may collect what it likes while files are copied. Should something be gone before it
is held, the ledger is copied again.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from talkoot.protocol.errors import IntegrityError, StateError
from talkoot.protocol.files import DirectoryLock, explain_os_error
from talkoot.protocol.identity import read_small
from talkoot.protocol.messages import canonical_bytes
from talkoot.server.backup.records import (
    FORMAT,
    MAX_SECRETS,
    SECRETS,
    BackupRecord,
    Piece,
    SecretBundle,
    SecretFile,
    StateFile,
)
from talkoot.server.backup.rows import copy_rows, copy_sqlite, sqlite_path
from talkoot.server.backup.seal import seal
from talkoot.server.backup.vault import Vault, pieces_of
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import SCHEMA_REVISION
from talkoot.server.state import StateDir
from talkoot.server.trust import stamp

TRIES: Final = 5
_NO_LINKS: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP})

Say = Callable[[str], None]


@dataclass(frozen=True)
class Taken:
    """What a backup came to."""

    name: str
    version: int
    files: int
    total_bytes: int
    copied_bytes: int
    """Of them; the rest was there from earlier backups."""
    freed_bytes: int
    """By forgetting the oldest backups."""


@dataclass(frozen=True)
class _Held:
    """One moment of a state: nothing in here changes or goes away any more."""

    ledger: Path
    flower: Path | None
    version: int
    artifacts: dict[str, Path] = field(default_factory=dict)
    """By digest."""
    files: dict[str, Path] = field(default_factory=dict)
    """By path below the state directory."""


def take(
    root: Path, dest: Path, *, now: float, keep: int, passphrase: bytes | None = None
) -> Taken:
    """Add a backup of the state in ``root`` to those in ``dest``; keep the newest ``keep``.

    Interrupted at any moment, ``dest`` has the backups that it had before, and no half one.

    Raises:
        TalkootError: the state cannot be read, ``dest`` cannot be written or is another run's.
    """
    dest = dest.absolute()
    vault = Vault(dest)
    with closing(Coordinator.open(root)) as coordinator:
        if dest.resolve().is_relative_to(coordinator.state.root):
            raise StateError(
                f"{dest} is inside the state directory: choose a place that outlives it.",
                code="not-a-vault",
            )
        with vault.open_for_writing(), _working_folder(coordinator.state) as work:
            before = _previous(vault, coordinator.run_id)
            held = _hold(coordinator, work)
            copied: list[int] = []
            record = _copy(coordinator, vault, held, before, now, copied, passphrase)
            signed = coordinator.key.sign("BackupRecord", canonical_bytes(record))
            name = vault.finish(signed, now)
            freed = vault.prune(keep)
    pieces = list({p.digest: p for p in pieces_of(record)}.values())
    return Taken(
        name=name,
        version=held.version,
        files=len(pieces),
        total_bytes=sum(p.size_bytes for p in pieces),
        copied_bytes=sum(copied),
        freed_bytes=freed,
    )


def _previous(vault: Vault, run_id: str) -> BackupRecord | None:
    names = vault.names()
    if not names:
        return None
    _, record = vault.read(names[-1])
    if record.run_id != run_id:
        raise StateError(
            f"{vault.root} holds backups of run {record.run_id}, and this is {run_id}: choose "
            "another directory.",
            code="other-run",
        )
    return record


@contextmanager
def _working_folder(state: StateDir) -> Iterator[Path]:
    """A folder on the state's own disk, where links can be; what a killed backup left goes."""
    folder = state.run / "backup"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        with DirectoryLock(folder, who="backup"):
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(mode=0o700)
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as err:
        raise explain_os_error(err, "making a backup", folder) from err


# Holding one moment -------------------------------------------------------------------------------


def _hold(coordinator: Coordinator, work: Path) -> _Held:
    for number in range(TRIES):
        place = work / str(number)
        place.mkdir()
        try:
            return _hold_once(coordinator, place)
        except FileNotFoundError as err:  # collected in between: look at a newer ledger
            missing = err.filename
            shutil.rmtree(place)
    raise StateError(
        f"{missing} is not there, and the ledger needs it: 'talkoot-coordinator verify' tells "
        "more; nothing was backed up.",
        code="missing-artifact",
    )


def _hold_once(coordinator: Coordinator, place: Path) -> _Held:
    state = coordinator.state
    database = place / "ledger.db"
    source = sqlite_path(coordinator.ledger.url)
    if source is not None:
        copy_sqlite(source, database)
    ledger = Ledger(f"sqlite+pysqlite:///{database}")
    try:
        if source is None:
            ledger.migrate()
            copy_rows(coordinator.ledger, ledger)
        # The rules of what is kept, asked of the copy.
        book = Book(replace(coordinator, ledger=ledger))
        digests = sorted(book.kept_digests(coordinator.config.round.keep_checkpoints))
        with ledger.read() as session:
            newest = book.latest_version(session)
    finally:
        ledger.close()
    copy_sqlite(database, place / "one-file.db")  # without WAL, whoever opened it last
    held = _Held(place / "one-file.db", _flower(state, place), newest.version)
    for digest in digests:
        held.artifacts[digest] = _link(coordinator.store.path(digest), place / digest)
    folder = state.versions / newest.directory
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        name = f"versions/{newest.directory}/{path.name}"
        held.files[name] = _link(path, place / f"version-{number}")
    for fixed in (state.corpus, state.tokenizer):  # made by init, and never changed
        for path in sorted(p for p in fixed.rglob("*") if p.is_file()):
            held.files[str(path.relative_to(state.root))] = path
    needed = "feedback" if newest.version > 0 else "published"  # written last; the first has none
    if not any(name.endswith(f"/{needed}.safetensors") for name in held.files):
        raise FileNotFoundError(errno.ENOENT, "gone", str(folder / f"{needed}.safetensors"))
    return held


def _flower(state: StateDir, place: Path) -> Path | None:
    """The SuperLink's database, after the ledger: a node of the one is always in the other."""
    source = state.root / "flower.db"
    if not source.exists():
        return None
    copy_sqlite(source, place / "flower.db")
    return place / "flower.db"


def _link(path: Path, link: Path) -> Path:
    try:
        link.hardlink_to(path)
    except OSError as err:
        if err.errno not in _NO_LINKS:
            raise
        path.stat()
        return path  # then it is copied from where it is, in the hope that it stays so long
    return link


# Copying ------------------------------------------------------------------------------------------


def _copy(
    coordinator: Coordinator,
    vault: Vault,
    held: _Held,
    before: BackupRecord | None,
    now: float,
    copied: list[int],
    passphrase: bytes | None,
) -> BackupRecord:
    seen: dict[int, Piece] = {}  # by inode: a checkpoint is a version's published weights

    def put(path: Path) -> Piece:
        piece = vault.put(path)
        copied.append(piece.size_bytes)
        return piece

    artifacts = []
    for digest, path in held.artifacts.items():
        piece = Piece(digest=digest, size_bytes=path.stat().st_size)
        if not vault.has(piece) and put(path) != piece:
            raise IntegrityError(
                f"Artifact {digest} of the state is damaged: 'talkoot-coordinator verify' tells "
                "more; nothing was backed up.",
                code="damaged-artifact",
            )
        artifacts.append(piece)
        seen[path.stat().st_ino] = piece
    known = {file.path: file for file in before.files} if before is not None else {}
    files = []
    for name, path in held.files.items():
        stat, old = path.stat(), known.get(name)
        as_before = (
            old is not None
            and (old.inode, old.mtime_ns, old.size_bytes)
            == (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            and vault.has(Piece(digest=old.digest, size_bytes=old.size_bytes))
        )
        if old is None or not as_before:
            piece = seen.get(stat.st_ino) or put(path)
            old = StateFile(
                path=name,
                digest=piece.digest,
                size_bytes=piece.size_bytes,
                inode=stat.st_ino,
                mtime_ns=stat.st_mtime_ns,
            )
        files.append(old)
    bundle = canonical_bytes(_secrets(coordinator.state))
    if passphrase is not None:
        bundle = seal(bundle, passphrase, coordinator.run_id)
    return BackupRecord(
        format=FORMAT,
        run_id=coordinator.run_id,
        created_unix=now,
        schema_revision=SCHEMA_REVISION,
        version=held.version,
        ledger=put(held.ledger),
        flower=None if held.flower is None else put(held.flower),
        artifacts=tuple(artifacts),
        files=tuple(files),
        secrets=vault.put_secrets(bundle),
        encrypted=passphrase is not None,
    )


def _secrets(state: StateDir) -> SecretBundle:
    """Keys, CAs and configuration, of one moment: a rotation may come in between."""
    for _ in range(TRIES):
        before = stamp(state.ca)
        files = []
        for path in [
            state.config,
            *sorted(p for s in SECRETS for p in (state.root / s).rglob("*") if p.is_file()),
        ]:
            name = str(path.relative_to(state.root))
            try:
                data = read_small(path, "making a backup", cap=MAX_SECRETS // 4)
            except StateError as err:
                if err.code != "missing":
                    raise
                break
            files.append(SecretFile(path=name, hex=data.hex()))
        else:
            if stamp(state.ca) == before:
                return SecretBundle(files=tuple(files))
    raise StateError("The CA's folder keeps changing: try again in a minute.", code="busy")
