"""Files that are whole or absent: one helper for atomic writes, one for locks, used everywhere."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from talkoot.protocol.errors import CapacityError, StateError

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY_ERRNOS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def explain_os_error(err: OSError, doing: str, path: Path) -> CapacityError | StateError:
    """Turn an ``OSError`` met while ``doing`` something at ``path`` into one clear sentence.

    ``doing`` is empty where it is not known.
    """
    when = f" while {doing}" if doing else ""
    if err.errno in FULL_ERRNOS:
        return CapacityError(
            f"The disk that holds {path} is full{when}: free some space and start again; "
            "nothing that was complete is lost.",
            code="disk-full",
        )
    if err.errno in (errno.EACCES, errno.EPERM):  # reading or writing: the error doesn't say
        return StateError(
            f"This user may not use {path}{when}: run this as the user that it belongs to, "
            "change its permissions, or choose another directory.",
            code="read-only",
        )
    if err.errno in READ_ONLY_ERRNOS:
        return StateError(
            f"Cannot write {path}{when}: it is read-only for this user; "
            "change its permissions or choose another directory.",
            code="read-only",
        )
    return StateError(f"Input/output error at {path}{when}: {err.strerror or err}.", code="io")


def bytes_below(path: Path) -> int:
    """What the files below a directory take, as far as they can be seen; 0 where there is none.

    Files come and go meanwhile, so this is what was there at some moment or other.
    """
    total = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        total += bytes_below(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        return total
    return total


def fsync_dir(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_writer(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` when the block ends well, and vanishes otherwise.

    The bytes are on disk (fsync of file and directory) before the name appears.
    """
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - str source
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` to ``path``: after a crash the file is the old one or the new one, whole."""
    with atomic_writer(path, mode=mode) as file:
        file.write(data)


class DirectoryLock:
    """One process at a time in a state directory (``flock``: the kernel frees it when we die)."""

    def __init__(self, directory: Path, *, who: str) -> None:
        self._path = directory / "lock"
        self._who = who
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Take the lock, or raise :class:`StateError` that names the holder."""
        try:
            file = self._path.open("a+b", buffering=0)
        except OSError as err:
            raise explain_os_error(err, "taking the lock", self._path) from err
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            file.seek(0)
            holder = file.read(64).decode("ascii", "replace").strip() or "unknown"
            file.close()
            raise StateError(
                f"{self._path.parent} is in use by another {self._who} (process {holder}): "
                "stop that one first or choose another directory.",
                code="in-use",
            ) from err
        with suppress(OSError):  # who holds it is a courtesy: a full disk must not cost the lock
            file.truncate(0)
            file.write(str(os.getpid()).encode("ascii"))
        self._file = file

    @staticmethod
    def is_held(directory: Path) -> bool:
        """Whether a living process holds the lock of a directory."""
        import psutil

        try:
            with (directory / "lock").open("rb") as file:
                # Asking takes the lock for a moment, so nobody asks about one whose holder is dead.
                if not psutil.pid_exists(int(file.read(64))):
                    return False
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            return False
        return False

    def wait(self, seconds: float = 0.1) -> None:
        """Take the lock as soon as its holder gives it back or dies, asking every so often."""
        while True:
            try:
                return self.acquire()
            except StateError as err:
                if err.code != "in-use":
                    raise
            time.sleep(seconds)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
