"""Large reads and writes that go past the kernel's page cache (``O_DIRECT``), where they can.

State that is larger than memory gains nothing from the page cache and pays for it: each page is
found, copied and flushed again, which here takes more of a core than the disk takes time
(docs/LOG.md, 2026-11-26). Direct transfers want memory, offset and length at multiples of a block.
What does not meet that, the ends of a range mostly, and file systems without direct transfers take
the usual way; the bytes are the same.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]

BLOCK: Final = 4096
"""Bytes. No smaller than a page, so that a range that goes past the cache shares none with one that
doesn't."""
_WORTH_IT: Final = 64 * 1024
"""Bytes. What is shorter goes the usual way."""
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_NOT_HERE: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})


def congruent(room: U8, size: int, at: int) -> U8:
    """``size`` bytes of ``room`` that lie in memory as offset ``at`` lies in a file, modulo
    :data:`BLOCK`. ``room`` has ``size + BLOCK`` bytes at least."""
    shift = (at - room.ctypes.data) % BLOCK
    return room[shift : shift + size]


class PastCache:
    """A second look at an open file, past the page cache. Thread-safe; a context manager.

    Args:
        fd: of the open file; it stays the caller's.
        flags: ``os.O_RDONLY`` or ``os.O_WRONLY``.
    """

    def __init__(self, fd: int, flags: int) -> None:
        self._fd = fd
        self._flags = flags
        self._lock = threading.Lock()
        self._second = -1
        self._looked = _DIRECT == 0

    def write(self, data: U8, at: int) -> None:
        """Write all of ``data`` at offset ``at``."""
        self._each_part(data, at, os.pwrite)

    def read(self, data: U8, at: int) -> int:
        """Fill ``data`` from offset ``at`` on; the bytes that there were before the file's end.

        What the page cache holds comes from it.
        """
        done = 0
        if self._fits(data, at) and hasattr(os, "RWF_NOWAIT"):
            with suppress(OSError):  # nothing there yet, or not known to this file system
                done = os.preadv(self._fd, [data.data], at, os.RWF_NOWAIT)
        return done + self._each_part(data[done:], at + done, _pread_into)

    def close(self) -> None:
        """Give the second descriptor back; harmless when done twice."""
        if self._second >= 0:
            os.close(self._second)
        self._second = -1

    def _each_part(self, data: U8, at: int, move: Callable[[int, memoryview, int], int]) -> int:
        """``move`` the ends the usual way and the middle directly; bytes that were moved."""
        done = 0
        if self._fits(data, at):
            head = -at % BLOCK
            done = _all_of(self._fd, data[:head], at, move)
            if done == head:
                whole = (data.size - head) // BLOCK * BLOCK
                done += self._directly(data[head : head + whole], at + head, move)
        return done + _all_of(self._fd, data[done:], at + done, move)

    def _fits(self, data: U8, at: int) -> bool:
        if data.size < _WORTH_IT or (data.ctypes.data - at) % BLOCK:
            return False
        with self._lock:
            if not self._looked:
                self._looked = True
                with suppress(OSError):  # no /proc, or a file system without it
                    self._second = self._open_again()
            return self._second >= 0

    def _open_again(self) -> int:
        """By the file's name, if that is still its name: what a daemon writes to is watched."""
        name = Path(f"/proc/self/fd/{self._fd}").readlink()
        second = os.open(name, self._flags | _DIRECT | os.O_CLOEXEC)
        if os.path.samestat(os.fstat(second), os.fstat(self._fd)):
            return second
        os.close(second)
        return -1

    def _directly(self, data: U8, at: int, move: Callable[[int, memoryview, int], int]) -> int:
        """As much as goes directly: whole blocks."""
        try:
            return move(self._second, data.data, at) // BLOCK * BLOCK
        except OSError as err:
            if err.errno not in _NOT_HERE:
                raise
            return 0

    def __enter__(self) -> PastCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pread_into(fd: int, view: memoryview, at: int) -> int:
    return os.preadv(fd, [view], at)


def _all_of(fd: int, data: U8, at: int, move: Callable[[int, memoryview, int], int]) -> int:
    """Move until nothing is left or the file ends."""
    done = 0
    while done < data.size:
        count = move(fd, data.data[done:], at + done)
        if count == 0:
            break
        done += count
    return done
