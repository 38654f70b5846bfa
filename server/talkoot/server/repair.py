"""Put damaged or missing files of a state right again, from wherever a whole copy is.

Everything that is needed has a digest, so that any copy will do: a backup, the object store, a
mirror, or the same bytes elsewhere in the state. Files are replaced by a rename; the coordinator
may be running.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from talkoot.protocol.errors import TalkootError, UnavailableError
from talkoot.protocol.files import atomic_writer, explain_os_error
from talkoot.protocol.identity import verify
from talkoot.protocol.ingest import check_size, sha256_file
from talkoot.server.backup.records import MAX_RECORD, BackupRecord
from talkoot.server.backup.vault import Vault
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.objects import ObjectStore

if TYPE_CHECKING:
    from talkoot.server.ledger.schema import Version

READ_BYTES = 1 << 20
Copy = Callable[[Callable[[bytes], object]], None]
"""Gives the bytes of a copy, piece by piece, to whoever takes them."""
Whence = tuple[str, Copy]
"""A name for people, and the copy."""


@dataclass
class Repaired:
    """What was found and done."""

    looked: int = 0
    repaired: list[str] = field(default_factory=list)
    """A sentence each."""
    lost: list[str] = field(default_factory=list)
    """What no copy was found of, a sentence each."""


def repair(
    coordinator: Coordinator, *, vault: Path | None = None, stores: tuple[ObjectStore, ...] = ()
) -> Repaired:
    """Read all that the ledger needs, and replace what does not have the bytes of its name.

    Args:
        coordinator: open state.
        vault: a directory of backups; the newest one's corpus and tokenizer are held against ours.
        stores: object stores or mirrors, asked in this order.

    Raises:
        TalkootError: a file cannot be written, or the vault cannot be read.
    """
    work = _Repair(coordinator, None if vault is None else Vault(vault.absolute()), stores)
    book = Book(coordinator)
    for digest in sorted(book.kept_digests(coordinator.config.round.keep_checkpoints)):
        path = coordinator.store.path(digest)
        work.hold(path, digest, f"artifact {digest[:12]}", work.artifact(digest))
    with coordinator.ledger.read() as session:
        newest = book.latest_version(session)
    work.published(newest)
    work.fixed_files()
    if work.done.repaired:
        with coordinator.ledger.write() as session:
            note(session, "repaired", f"{len(work.done.repaired)} damaged files were replaced.")
    return work.done


class _Repair:
    def __init__(
        self, coordinator: Coordinator, vault: Vault | None, stores: tuple[ObjectStore, ...]
    ) -> None:
        self._c = coordinator
        self._vault = vault
        self._stores = stores
        self.done = Repaired()

    def hold(self, path: Path, digest: str, what: str, copies: Iterator[Whence]) -> None:
        """Replace a file that is not ``digest`` by the first copy that is."""
        self.done.looked += 1
        if _is(path, digest):
            return
        for whence, copy in copies:
            try:
                _replace(path, digest, copy)
            except (TalkootError, FileNotFoundError):
                continue
            except OSError as err:
                raise explain_os_error(err, "repairing a file", path) from err
            self.done.repaired.append(f"{what}: replaced from {whence}.")
            return
        self.done.lost.append(f"{what}: {path} is damaged or missing, and no whole copy was found.")

    def artifact(self, digest: str) -> Iterator[Whence]:
        """Where a copy of an artifact may be."""
        for twin in sorted(self._c.state.versions.glob("*/*.safetensors")):
            if _is(twin, digest):
                yield str(twin), _from_file(twin)
        if self._vault is not None and (held := self._vault.path(digest)).exists():
            yield "the backup", _from_file(held)
        for store in self._stores:
            yield store.url, _from_store(store, digest)

    def published(self, newest: Version) -> None:
        """The newest version's own copy of its checkpoint, if it is one."""
        if newest.checkpoint_digest is None:
            return
        path = self._c.state.versions / newest.directory / "published.safetensors"
        twin = self._c.store.path(newest.checkpoint_digest)
        copies = iter([(str(twin), _from_file(twin))])
        self.hold(path, newest.checkpoint_digest, f"weights of version {newest.version}", copies)

    def fixed_files(self) -> None:
        """Corpus and tokenizer, which nothing but a backup has a digest of."""
        if self._vault is None:
            return
        for file in self._record(self._vault).files:
            if file.path.startswith("versions/"):
                continue
            held = self._vault.path(file.digest)
            copies = iter([("the backup", _from_file(held))])
            self.hold(self._c.state.root / file.path, file.digest, file.path, copies)

    def _record(self, vault: Vault) -> BackupRecord:
        signed, _ = vault.read(vault.newest())
        return verify(signed, "BackupRecord", self._c.key.public_key, BackupRecord, cap=MAX_RECORD)


def _is(path: Path, digest: str) -> bool:
    try:
        return sha256_file(path)[0] == digest
    except (OSError, TalkootError):
        return False


def _replace(path: Path, digest: str, copy: Copy) -> None:
    """Make ``path`` of a copy if that has the right bytes; else leave it as it is."""
    path.parent.mkdir(exist_ok=True)
    hasher, size = hashlib.sha256(), 0
    with atomic_writer(path) as out:

        def take(data: bytes) -> None:
            nonlocal size
            size = check_size(size + len(data))
            hasher.update(data)
            out.write(data)

        copy(take)
        if hasher.hexdigest() != digest:
            raise UnavailableError("That copy is damaged, too.")


def _from_file(source: Path) -> Copy:
    def copy(take: Callable[[bytes], object]) -> None:
        with source.open("rb", buffering=0) as file:
            while data := file.read(READ_BYTES):
                take(data)

    return copy


def _from_store(store: ObjectStore, digest: str) -> Copy:
    return lambda take: store.read(digest, take)
