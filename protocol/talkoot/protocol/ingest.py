"""Reception of an artifact whose digest and size a peer claims, resumable after any crash.

The bytes gather in ``<directory>/<owner>/<digest>.part``. The part's length is the only state, so a
process may die at any moment: the next one goes on where the file ends. Nothing counts as received
before the whole file hashes to its name; it is hashed as it comes, and only what an earlier process
left is read again. With a list of pieces (``pieces.py``) wrong bytes are noticed, and dropped, as
soon as their piece is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Protocol

from talkoot.protocol import limits
from talkoot.protocol.errors import (
    CapacityError,
    IntegrityError,
    ProtocolError,
    TalkootError,
    UnavailableError,
)
from talkoot.protocol.files import explain_os_error, fsync_dir

READ_BYTES = 4 * limits.MIB
"""One read of a file that is hashed or copied."""
PART_SUFFIX = ".part"

BAD_PIECE = "bad-piece"
"""Code of the :class:`IntegrityError` for a piece that is not what the list says."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWNER = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def check_digest(digest: str) -> str:
    """Return ``digest`` if it is 64 lower-case hex digits; only those may become a file name.

    Raises:
        ProtocolError: it is anything else (code ``malformed``).
    """
    if not _DIGEST.fullmatch(digest):
        raise ProtocolError(
            "An artifact's digest is 64 lower-case hexadecimal digits; this one is not.",
            code="malformed",
        )
    return digest


def check_size(size: int) -> int:
    """Return ``size`` (bytes) if an artifact may have it.

    Raises:
        ProtocolError: it is negative or over ``limits.MAX_ARTIFACT`` (code ``too-large``).
    """
    if not 0 <= size <= limits.MAX_ARTIFACT:
        raise ProtocolError(
            f"An artifact of {size} bytes is outside what is allowed, 0 to {limits.MAX_ARTIFACT}.",
            code="too-large",
        )
    return size


def sha256_file(path: Path) -> tuple[str, int]:
    """Hash a file in constant memory: (lower-case hex SHA-256, size in bytes).

    Raises:
        ProtocolError: the file is over ``limits.MAX_ARTIFACT``.
        TalkootError: the file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            check_size(os.fstat(file.fileno()).st_size)
            return _sha256_fd(file.fileno())
    except OSError as err:
        raise explain_os_error(err, "reading an artifact", path) from err


def _sha256_fd(fd: int) -> tuple[str, int]:
    hasher = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, READ_BYTES, offset):
        hasher.update(data)
        offset += len(data)
    return hasher.hexdigest(), offset


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of ``data`` at the file's position; ``os.write`` alone may stop short."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def owner_directory(directory: Path, owner: str) -> Path:
    """``directory/owner``, where the parts of one owner are (not made here).

    Raises:
        ProtocolError: ``owner`` is not a plain lower-case name (code ``malformed``).
    """
    if not _OWNER.fullmatch(owner):
        raise ProtocolError(
            "The owner of an upload is named by 1 to 64 of a-z, 0-9 and '-'.", code="malformed"
        )
    return directory / owner


def received_bytes(directory: Path, owner: str, digest: str, size: int) -> int:
    """How much of an artifact has arrived, without touching it: where a sender should go on."""
    base = owner_directory(directory, owner)
    for path in (base / f"{check_digest(digest)}{PART_SUFFIX}", base / digest):
        try:
            have = path.stat().st_size
        except FileNotFoundError:
            continue
        except OSError as err:
            raise explain_os_error(err, "looking for a part", path) from err
        # A part that outgrew the claim is not a part of this artifact; Ingest starts it anew.
        return have if have <= size else 0
    return 0


def trim_parts(directory: Path, owner: str, keep: int, *, spare: str | None = None) -> list[str]:
    """Delete an owner's oldest unfinished parts until ``keep`` are left; return their digests.

    Without this a peer that starts one upload after another fills the disk with beginnings. Parts
    that are being received right now, and the part of ``spare``, are left alone.
    """
    base = owner_directory(directory, owner)
    parts: list[tuple[float, Path]] = []
    for path in base.glob(f"*{PART_SUFFIX}"):
        try:
            parts.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue
    others = [path for _, path in sorted(parts) if path.stem != spare]
    return [path.stem for path in others[: max(0, len(others) - keep)] if remove_if_free(path)]


def remove_if_free(path: Path) -> bool:
    """Delete a temporary file unless a living process holds its lock. True if it was deleted."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as err:
        raise explain_os_error(err, "collecting garbage", path) from err
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


class PieceList(Protocol):
    """What is known of an artifact's pieces (``pieces.Pieces``)."""

    def digest(self, number: int) -> bytes:
        """The SHA-256 (32 bytes) of a piece."""

    def end(self, number: int) -> int:
        """The offset at which a piece ends."""


class Ingest:
    """Receive one artifact of claimed digest and size (bytes), from any offset that it reached.

    Usable as a context manager; leaving it keeps the part for the next attempt. While one is open,
    a second for the same owner and digest is refused, in any process: the lock is a ``flock`` on
    the part, which the kernel frees when its holder dies.

    Raises:
        ProtocolError: owner, digest or size is not allowed.
        UnavailableError: the same artifact is being received already (code ``in-progress``).
        CapacityError: the disk has no room for the rest (code ``disk-full``).
        StateError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        owner: str,
        digest: str,
        size: int,
        *,
        destination: Path | None = None,
        pieces: PieceList | None = None,
    ) -> None:
        base = owner_directory(directory, owner)
        self.digest = check_digest(digest)
        self.size = check_size(size)
        self._part = base / f"{digest}{PART_SUFFIX}"
        self._whole = base / digest
        self._destination = destination or self._whole
        self._fd = -1
        try:
            base.mkdir(parents=True, exist_ok=True)
            self._fd = self._open_locked()
            self._offset = 0
            self._pieces = pieces
            self._whole_hash = hashlib.sha256()
            self._rewind = self._whole_hash.copy()  # as of the beginning of the piece under way
            self._piece_hash = hashlib.sha256()
            self._take_up(os.fstat(self._fd).st_size)
            self._check_room()
        except OSError as err:
            self.close()
            raise explain_os_error(err, "receiving an artifact", self._part) from err
        except TalkootError:
            self.close()
            raise

    def _open_locked(self) -> int:
        """Open the part under its lock. Another process may finish or delete it in between."""
        while True:
            try:
                # A crash between the rename of a whole file and its delivery leaves it here.
                fd = os.open(self._whole, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                path = self._whole
            except FileNotFoundError:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(self._part, flags, 0o644)
                path = self._part
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                here, there = os.fstat(fd), path.stat()
            except BlockingIOError as err:
                os.close(fd)
                raise UnavailableError(
                    "This artifact is being received already; try again in a moment.",
                    code="in-progress",
                ) from err
            except FileNotFoundError:
                os.close(fd)
                continue
            except BaseException:
                os.close(fd)
                raise
            if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
                os.close(fd)
                continue
            if path == self._whole:
                path.replace(self._part)
            return fd

    def _take_up(self, have: int) -> None:
        """Hash what an earlier process left; what is known to be wrong is dropped."""
        if have > self.size:
            os.ftruncate(self._fd, 0)
            return
        while self._offset < have:
            data = os.pread(self._fd, min(READ_BYTES, have - self._offset), self._offset)
            if not data:
                return
            try:
                self._absorb(data)
            except IntegrityError:
                return

    def _absorb(self, data: bytes | memoryview) -> None:
        """Hash bytes that are in the file, from ``self._offset`` on, and move on behind them."""
        if self._pieces is None:
            self._whole_hash.update(data)
            self._offset += len(data)
            return
        view = memoryview(data)
        while view:
            number = self._offset // limits.PIECE
            end = self._pieces.end(number)
            part = view[: end - self._offset]
            self._whole_hash.update(part)
            self._piece_hash.update(part)
            self._offset += len(part)
            view = view[len(part) :]
            if self._offset < end:
                return
            wrong = self._piece_hash.digest() != self._pieces.digest(number)
            self._piece_hash = hashlib.sha256()
            if wrong:
                self._offset = number * limits.PIECE
                self._whole_hash = self._rewind.copy()
                os.ftruncate(self._fd, self._offset)
                raise IntegrityError(
                    f"Bytes {self._offset} to {end} of {self.digest} are not what they should be: "
                    "they were dropped, and have to be transferred again.",
                    code=BAD_PIECE,
                )
            self._rewind = self._whole_hash.copy()

    def _check_room(self) -> None:
        disk = os.fstatvfs(self._fd)
        free = disk.f_bavail * disk.f_frsize
        need = self.size - self._offset
        if need > free:
            raise CapacityError(
                f"The disk that holds {self._part.parent} has {free} bytes free and this artifact "
                f"needs {need} more: free some space and start again.",
                code="disk-full",
            )

    def offset(self) -> int:
        """Bytes received so far: the one offset at which :meth:`append` goes on."""
        return self._offset

    def append(self, offset: int, data: bytes | memoryview) -> int:
        """Write ``data`` at ``offset`` and return the new offset.

        On any error the part is what it was before the call.

        Raises:
            ProtocolError: ``offset`` is not :meth:`offset` (code ``wrong-offset``), or ``data``
                would pass the claimed size (code ``too-large``).
            IntegrityError: a piece is complete and wrong (code ``bad-piece``); the part ends before
                it now.
            CapacityError: the disk is full.
            StateError: the part cannot be written.
        """
        if offset != self._offset:
            raise ProtocolError(
                f"Bytes came for offset {offset} where {self._offset} is next.", code="wrong-offset"
            )
        if len(data) > self.size - self._offset:
            raise ProtocolError(
                f"More bytes came than the {self.size} that were announced.", code="too-large"
            )
        try:
            os.lseek(self._fd, offset, os.SEEK_SET)
            write_all(self._fd, data)
        except OSError as err:
            os.ftruncate(self._fd, offset)
            raise explain_os_error(err, "receiving an artifact", self._part) from err
        self._absorb(data)
        return self._offset

    def finish(self) -> Path:
        """Verify the whole file, make it durable and give it its name. Returns that path.

        The default name is ``<directory>/<owner>/<digest>``. The lock stays until :meth:`close`, so
        that a whole file can be delivered before anybody else may touch it.

        Raises:
            ProtocolError: bytes are missing (code ``incomplete``); the part is kept.
            IntegrityError: the bytes are not what the digest names; the part is deleted.
            CapacityError, StateError: the file cannot be made durable.
        """
        if self._offset != self.size:
            raise ProtocolError(
                f"{self._offset} of {self.size} bytes have arrived: send the rest first.",
                code="incomplete",
            )
        try:
            digest = self._whole_hash.hexdigest()
            if digest != self.digest or os.fstat(self._fd).st_size != self.size:
                self.discard()
                raise IntegrityError(
                    f"The {self.size} bytes that arrived as {self.digest} hash to {digest}: they "
                    "were damaged or are something else, and were deleted; transfer them again."
                )
            os.fsync(self._fd)
            self._destination.parent.mkdir(parents=True, exist_ok=True)
            os.utime(self._fd)
            self._part.replace(self._destination)
            fsync_dir(self._destination.parent)
        except OSError as err:
            raise explain_os_error(err, "finishing an artifact", self._destination) from err
        return self._destination

    def discard(self) -> None:
        """Delete the part: the next attempt starts at 0."""
        self._part.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give up the lock and keep the part; harmless when done twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Ingest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
