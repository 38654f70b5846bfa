"""Artifacts are named by the SHA-256 of their bytes: where they are kept, and how one is found.

A :class:`Source` answers where the bytes of a digest are. A store of files is one source; a corpus,
which has millions of small artifacts in one large file, is another (``corpus.py``).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from talkoot.protocol.errors import StateError
from talkoot.protocol.files import explain_os_error, fsync_dir
from talkoot.protocol.ingest import (
    PART_SUFFIX,
    READ_BYTES,
    Ingest,
    PieceList,
    check_digest,
    check_size,
    remove_if_free,
    sha256_file,
    write_all,
)
from talkoot.protocol.messages import ArtifactRef

__all__ = [
    "ArtifactStore",
    "ChainSource",
    "Ingest",
    "Slice",
    "Source",
    "Swept",
    "check_digest",
    "sha256_file",
]


@dataclass(frozen=True)
class Slice:
    """Where the bytes of an artifact are: ``length`` bytes of ``path`` from ``offset`` on."""

    path: Path
    offset: int
    length: int


class Source(Protocol):
    """Anything that knows where some artifacts are."""

    def lookup(self, digest: str) -> Slice | None:
        """Where the artifact is, or None if this source does not have it."""
        ...


class ChainSource:
    """Several sources as one: the first that knows a digest answers."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = tuple(sources)

    def lookup(self, digest: str) -> Slice | None:
        """Where the artifact is, or None if no source has it."""
        for source in self._sources:
            found = source.lookup(digest)
            if found is not None:
                return found
        return None


@dataclass(frozen=True)
class Swept:
    """What a garbage collection removed."""

    artifacts: int
    temporaries: int
    freed_bytes: int


class ArtifactStore:
    """Immutable files under ``root``, named by digest: ``root/ab/cdef…``.

    A file has its name only once its bytes are whole and on disk. Several processes may use one
    store. ``root/incoming`` holds what is being received, ``root/tmp`` what is being written.

    Raises:
        StateError: ``root`` cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self._temporary = root / "tmp"
        try:
            self.incoming.mkdir(parents=True, exist_ok=True)
            self._temporary.mkdir(exist_ok=True)
        except OSError as err:
            raise explain_os_error(err, "opening the artifact store", root) from err

    def path(self, digest: str) -> Path:
        """The file's name, whether it is there or not.

        Raises:
            ProtocolError: not a digest.
        """
        check_digest(digest)
        return self.root / digest[:2] / digest[2:]

    def has(self, digest: str) -> bool:
        """Whether the artifact is here (its bytes were verified when it came)."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of an artifact that is here.

        Raises:
            StateError: it is not here (code ``missing-artifact``).
        """
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError as err:
            raise self._missing(digest) from err

    def open(self, digest: str) -> BinaryIO:
        """Open an artifact for reading. An open artifact outlives its deletion.

        Raises:
            StateError: it is not here (code ``missing-artifact``) or cannot be read.
        """
        path = self.path(digest)
        try:
            return path.open("rb")
        except FileNotFoundError as err:
            raise self._missing(digest) from err
        except OSError as err:
            raise explain_os_error(err, "reading an artifact", path) from err

    def lookup(self, digest: str) -> Slice | None:
        """The whole file as a :class:`Slice` (the store is a :class:`Source`)."""
        path = self.path(digest)
        try:
            return Slice(path, 0, path.stat().st_size)
        except FileNotFoundError:
            return None

    def verify(self, digest: str) -> bool:
        """Read the artifact again: True if it is here and its bytes still hash to its name."""
        return self.has(digest) and sha256_file(self.path(digest))[0] == digest

    def delete(self, digest: str) -> bool:
        """Delete one artifact; True if it was here."""
        path = self.path(digest)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as err:
            raise explain_os_error(err, "deleting an artifact", path) from err
        return True

    def put_bytes(self, data: bytes) -> ArtifactRef:
        """Store ``data``; storing the same bytes again changes nothing.

        Raises:
            ProtocolError: over ``limits.MAX_ARTIFACT``.
            CapacityError, StateError: the disk is full or cannot be written.
        """
        check_size(len(data))
        digest = hashlib.sha256(data).hexdigest()
        if not self._touch(digest):
            with self._writer() as (fd, temporary):
                write_all(fd, data)
                self._install(fd, temporary, digest)
        return ArtifactRef(digest=digest, size_bytes=len(data))

    def put_file(
        self, path: Path, move: bool = True, *, verified: str | None = None
    ) -> ArtifactRef:
        """Store a finished file, which nobody writes any more.

        Args:
            path: the file.
            move: take the file itself (it is gone from ``path`` afterwards); otherwise copy it.
            verified: the file's digest, when the caller has *just* verified it
                (:meth:`Ingest.finish`), which saves reading the file once more.

        Raises:
            ProtocolError: over ``limits.MAX_ARTIFACT``.
            CapacityError, StateError: the disk is full, or a file cannot be read or written.
        """
        take = move and not path.is_symlink()
        try:
            if not take:
                return self._copy(path)
            if verified is None:
                digest, size = sha256_file(path)
            else:
                digest, size = check_digest(verified), check_size(path.stat().st_size)
            if self._touch(digest):
                path.unlink()
                return ArtifactRef(digest=digest, size_bytes=size)
            if path.stat().st_dev != self._temporary.stat().st_dev:
                stored = self._copy(path)
                path.unlink()
                return stored
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._install(fd, path, digest)
            finally:
                os.close(fd)
            return ArtifactRef(digest=digest, size_bytes=size)
        except OSError as err:
            raise explain_os_error(err, "storing an artifact", path) from err

    def ingest(self, owner: str, digest: str, size: int, pieces: PieceList | None = None) -> Ingest:
        """Receive an artifact into this store; see :class:`Ingest` for what it raises."""
        return Ingest(
            self.incoming, owner, digest, size, destination=self.path(digest), pieces=pieces
        )

    def sweep(self, keep: Set[str], *, older_than_unix: float | None = None) -> Swept:
        """Delete every artifact whose digest is not in ``keep``, and what dead writers left behind.

        Temporaries and parts of a living process are locked, and stay. A part whose digest is in
        ``keep`` stays, to be resumed.

        Args:
            keep: digests that something still refers to.
            older_than_unix: delete only what was last stored before (seconds since the epoch):
                ``keep`` was computed at some moment, and an artifact may have come since. None
                deletes artifacts of any age, and leaves unfinished parts alone.

        Raises:
            StateError: something cannot be deleted.
        """
        artifacts = temporaries = freed = 0
        try:
            for path in sorted(self.root.glob("[0-9a-f][0-9a-f]/*")):
                digest = path.parent.name + path.name
                size = 0 if digest in keep else self._sweep_one(path, older_than_unix)
                if size is not None and digest not in keep:
                    artifacts += 1
                    freed += size
            leftovers = list(self._temporary.iterdir())
            if older_than_unix is not None:
                leftovers += [
                    part
                    for part in self.incoming.glob("*/*")
                    if part.name.removesuffix(PART_SUFFIX) not in keep
                ]
            for path in leftovers:
                size = self._sweep_leftover(path, older_than_unix)
                if size is not None:
                    temporaries += 1
                    freed += size
        except OSError as err:
            raise explain_os_error(err, "collecting garbage", self.root) from err
        return Swept(artifacts, temporaries, freed)

    def _sweep_one(self, path: Path, older_than_unix: float | None) -> int | None:
        # Alone with the name: a put that finds the file here must not see it vanish afterwards.
        with self._lock(fcntl.LOCK_EX):
            size = _size_if_older(path, older_than_unix)
            if size is not None:
                path.unlink()
            return size

    def _sweep_leftover(self, path: Path, older_than_unix: float | None) -> int | None:
        with self._lock(fcntl.LOCK_EX):
            size = _size_if_older(path, older_than_unix)
            return size if size is not None and remove_if_free(path) else None

    def _missing(self, digest: str) -> StateError:
        return StateError(
            f"Artifact {digest} is not in {self.root}: fetch it first.", code="missing-artifact"
        )

    @contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        """Shared by those who add a name, exclusive for the one who removes names."""
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def _touch(self, digest: str) -> bool:
        """Mark an artifact that is here as just stored, so that a running sweep leaves it."""
        path = self.path(digest)
        try:
            with self._lock(fcntl.LOCK_SH):
                os.utime(path)
        except FileNotFoundError:
            return False
        except OSError as err:
            raise explain_os_error(err, "storing an artifact", path) from err
        return True

    @contextmanager
    def _writer(self) -> Iterator[tuple[int, Path]]:
        """A locked temporary file (descriptor, path), deleted unless it was given its name."""
        fd = -1
        path = self._temporary
        try:
            # Under the lock a sweep cannot come between the file's making and its own lock.
            with self._lock(fcntl.LOCK_SH):
                fd, name = tempfile.mkstemp(dir=self._temporary)
                path = Path(name)
                fcntl.flock(fd, fcntl.LOCK_EX)
            os.fchmod(fd, 0o644)
            yield fd, path
        except OSError as err:
            raise explain_os_error(err, "storing an artifact", path) from err
        finally:
            if fd >= 0:
                path.unlink(missing_ok=True)
                os.close(fd)

    def _install(self, fd: int, path: Path, digest: str) -> None:
        """Make the open file durable and give it its name."""
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        os.fsync(fd)
        with self._lock(fcntl.LOCK_SH):
            os.utime(fd)
            path.replace(target)
        fsync_dir(target.parent)

    def _copy(self, path: Path) -> ArtifactRef:
        """Hash what is copied, not what was there before: the source may change in between."""
        hasher = hashlib.sha256()
        size = 0
        with path.open("rb", buffering=0) as source, self._writer() as (fd, temporary):
            check_size(os.fstat(source.fileno()).st_size)
            while data := source.read(READ_BYTES):
                size = check_size(size + len(data))
                hasher.update(data)
                write_all(fd, data)
            digest = hasher.hexdigest()
            if not self._touch(digest):
                self._install(fd, temporary, digest)
        return ArtifactRef(digest=digest, size_bytes=size)


def _size_if_older(path: Path, older_than_unix: float | None) -> int | None:
    """Bytes of a file that is there and was last stored before the moment; None otherwise."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if older_than_unix is not None and found.st_mtime >= older_than_unix:
        return None
    return found.st_size
