"""A directory of backups that share their files.

objects/ab/cdef…        a file by the SHA-256 of its bytes
secrets/<digest>        a sealed bundle, 0600
snapshots/<time>.json   one backup: its record, signed; written last

A backup is there once its record is, and the record is written by one rename after everything that
it names is on disk. What no record names is rubbish, which the next backup collects.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from talkoot.protocol.errors import IntegrityError, StateError
from talkoot.protocol.files import (
    DirectoryLock,
    atomic_writer,
    explain_os_error,
    fsync_dir,
    write_atomic,
)
from talkoot.protocol.identity import read_small
from talkoot.protocol.messages import Signed, canonical_bytes, parse
from talkoot.server.backup.records import MAX_RECORD, MAX_SECRETS, BackupRecord, Piece

READ_BYTES: Final = 1 << 20
MARK: Final = "talkoot-backup"
_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z\.json")


class Vault:
    """Backups of one network in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._objects = root / "objects"
        self._secrets = root / "secrets"
        self._snapshots = root / "snapshots"

    # Making one -----------------------------------------------------------------------------------

    @contextmanager
    def open_for_writing(self) -> Iterator[None]:
        """Make the directory if need be, and keep other backups out.

        Raises:
            StateError: it holds something else, is in use, or cannot be written.
        """
        mark = self.root / MARK
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not mark.exists():
                if any(p.name != "lock" and p.name[0] != "." for p in self.root.iterdir()):
                    raise StateError(
                        f"{self.root} is not empty, and no place of backups: choose another "
                        "directory.",
                        code="not-a-vault",
                    )
                self.root.chmod(0o700)
                write_atomic(mark, b"1\n", mode=0o600)
            for folder in (self._objects, self._secrets, self._snapshots):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as err:
            raise explain_os_error(err, "making a backup", self.root) from err
        with DirectoryLock(self.root, who="backup"):
            try:
                yield
            except OSError as err:
                raise explain_os_error(err, "making a backup", self.root) from err

    def has(self, piece: Piece) -> bool:
        """Whether the file is here, with the size that it should have."""
        try:
            return self.path(piece.digest).stat().st_size == piece.size_bytes
        except FileNotFoundError:
            return False

    def put(self, path: Path) -> Piece:
        """Copy a file that nobody writes any more; it is hashed while it is copied."""
        hasher, size = hashlib.sha256(), 0
        self._objects.mkdir(exist_ok=True)
        # The name is known only at the end: a temporary takes the bytes first.
        temporary = self._objects / f".{os.getpid()}.new"
        with path.open("rb", buffering=0) as source, temporary.open("wb") as out:
            os.fchmod(out.fileno(), 0o600)
            while data := source.read(READ_BYTES):
                hasher.update(data)
                out.write(data)
                size += len(data)
            out.flush()
            os.fsync(out.fileno())
        piece = Piece(digest=hasher.hexdigest(), size_bytes=size)
        target = self.path(piece.digest)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        temporary.replace(target)
        fsync_dir(target.parent)
        fsync_dir(self._objects)
        return piece

    def put_secrets(self, data: bytes) -> Piece:
        """Keep a bundle, readable by its owner only."""
        digest = hashlib.sha256(data).hexdigest()
        write_atomic(self._secrets / digest, data, mode=0o600)
        return Piece(digest=digest, size_bytes=len(data))

    def finish(self, signed: Signed, now: float) -> str:
        """Give the backup its name: from here on it is one."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
        name = f"{stamp}.{int(now % 1 * 1e6):06d}Z"
        write_atomic(self._snapshots / f"{name}.json", canonical_bytes(signed), mode=0o600)
        return name

    def prune(self, keep: int) -> int:
        """Forget all but the newest ``keep`` backups and what only they needed; returns bytes."""
        names = self.names()
        for name in names[:-keep]:
            (self._snapshots / f"{name}.json").unlink()
        wanted, bundles = set[str](), set[str]()
        for name in names[-keep:]:
            _, record = self.read(name)
            bundles.add(record.secrets.digest)
            wanted |= {piece.digest for piece in pieces_of(record)}
        freed = 0
        for path in [*self._objects.glob("??/*"), *self._objects.glob(".*.new")]:
            if path.parent.name + path.name not in wanted:
                freed += path.stat().st_size
                path.unlink()
        for path in self._secrets.iterdir():
            if path.name not in bundles:
                path.unlink()
        return freed

    # Reading one ----------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where the file of this digest is."""
        return self._objects / digest[:2] / digest[2:]

    def names(self) -> list[str]:
        """All whole backups, the oldest first."""
        if not (self.root / MARK).is_file():
            raise StateError(
                f"{self.root} holds no backups: name the directory that 'talkoot-coordinator "
                "backup' was given.",
                code="not-a-vault",
            )
        return sorted(p.stem for p in self._snapshots.glob("*.json") if _NAME.fullmatch(p.name))

    def newest(self) -> str:
        """The newest whole backup. Raises :class:`StateError` when there is none."""
        names = self.names()
        if not names:
            raise StateError(
                f"{self.root} has no whole backup: the first one was interrupted. Make one again.",
                code="no-backup",
            )
        return names[-1]

    def read(self, name: str) -> tuple[Signed, BackupRecord]:
        """A backup's record, whose signature is still to be checked.

        Raises:
            StateError: there is no such backup.
            ProtocolError: it is damaged.
        """
        path = self._snapshots / f"{name}.json"
        if f"{name}.json" not in {p.name for p in self._snapshots.glob("*.json")}:
            raise StateError(
                f"{self.root} has no backup {name}: there are {', '.join(self.names()) or 'none'}.",
                code="no-backup",
            )
        signed = parse(Signed, read_small(path, "reading a backup", cap=MAX_RECORD), cap=MAX_RECORD)
        return signed, parse(BackupRecord, signed.body.encode("ascii", "replace"), cap=MAX_RECORD)

    def read_secrets(self, piece: Piece) -> bytes:
        """A bundle. Raises :class:`IntegrityError` when it is not what was kept."""
        path = self._secrets / piece.digest
        data = read_small(path, "reading a backup's secrets", cap=MAX_SECRETS)
        if hashlib.sha256(data).hexdigest() != piece.digest:
            raise _damaged(path)
        return data

    def copy_out(self, piece: Piece, target: Path, *, mode: int) -> None:
        """Copy a file from the vault, whole or not at all. Raises like :meth:`check`."""
        try:
            with atomic_writer(target, mode=mode) as out:
                self._read(piece, out)
        except OSError as err:
            raise explain_os_error(err, "restoring a backup", target) from err

    def check(self, piece: Piece) -> None:
        """Read a file of the vault.

        Raises:
            IntegrityError: it is missing, or does not have the bytes of its name.
        """
        self._read(piece, None)

    def _read(self, piece: Piece, out: BinaryIO | None) -> None:
        path = self.path(piece.digest)
        hasher, left = hashlib.sha256(), piece.size_bytes + 1
        try:
            source = path.open("rb", buffering=0)
        except FileNotFoundError as err:
            raise IntegrityError(
                f"The backup lacks {path}: take an older one (--snapshot), or another copy of it.",
                code="bad-backup",
            ) from err
        with source:
            while left and (data := source.read(min(READ_BYTES, left))):
                hasher.update(data)
                left -= len(data)
                if out is not None:
                    out.write(data)
        if left != 1 or hasher.hexdigest() != piece.digest:
            raise _damaged(path)


def pieces_of(record: BackupRecord) -> Iterator[Piece]:
    """Every file in the vault that a backup needs, secrets aside."""
    yield record.ledger
    if record.flower is not None:
        yield record.flower
    yield from record.artifacts
    for file in record.files:
        yield Piece(digest=file.digest, size_bytes=file.size_bytes)


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path} does not have the bytes of its name: the backup is damaged; take an older one "
        "(--snapshot), or another copy of it.",
        code="bad-backup",
    )
