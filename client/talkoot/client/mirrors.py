"""Mirrors: artifacts from any HTTP server that holds them under their digests.

The coordinator names mirrors in a signed message; nothing else about them is believed. What comes
is held against the coordinator's list of pieces while it streams, so that a mirror which lies, is
slow, never ends, sends elsewhere or dies costs time and at most one piece. Then the next mirror is
asked, and in the end the coordinator.
"""

from __future__ import annotations

import http.client
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Final
from urllib.parse import urlsplit

from talkoot.client.pace import StopSignal, Watch
from talkoot.protocol import limits
from talkoot.protocol.errors import IntegrityError
from talkoot.protocol.ingest import BAD_PIECE, Ingest
from talkoot.protocol.messages import ArtifactRef

log = logging.getLogger(__name__)

CONNECT_SECONDS: Final = 10.0
FIRST_REST_SECONDS: Final = 30.0
"""How long a mirror that failed is left alone; doubles with each failure in a row."""
LONGEST_REST_SECONDS: Final = 3600.0
"""The longest rest, and what a mirror that lied gets at once."""
READ_BYTES: Final = 256 * limits.KIB
NOT_HERE: Final = frozenset({403, 404, 410})
"""A mirror need not have everything. (An object store that may not be listed says 403.)"""

_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})")


class MirrorFaultError(Exception):
    """A mirror did not do what it should; its text says what, for the log."""


class NotHereError(Exception):
    """A mirror does not have the artifact, which is no fault."""


@dataclass(frozen=True)
class MirrorLimits:
    """When a mirror is left for the next one."""

    stall_seconds: float = 30.0
    """It sent nothing for so long."""
    window_seconds: float = 30.0
    """Its speed is judged over so long."""
    min_rate: float = 16.0 * limits.KIB
    """Bytes per second; half the volunteer's own limit if that is less."""


@dataclass
class _Standing:
    """What became of a mirror lately."""

    failures: int = 0
    rests_until: float = 0.0  # monotonic seconds


@dataclass
class MirrorSet:
    """The mirrors in the operator's order, without those that rest. Thread-safe.

    Time is an argument: monotonic seconds.
    """

    _urls: tuple[str, ...] = ()
    _standing: dict[str, _Standing] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def replace(self, urls: Sequence[str]) -> None:
        """Take a new list; a mirror that stays in it keeps its standing."""
        with self._lock:
            self._urls = tuple(url.rstrip("/") for url in urls)
            self._standing = {
                url: self._standing.get(url, _Standing()) for url in dict.fromkeys(self._urls)
            }

    def usable(self, now: float) -> list[str]:
        """Whom to ask, in order."""
        with self._lock:
            return [url for url, its in self._standing.items() if its.rests_until <= now]

    def worked(self, url: str) -> None:
        """It sent what it was asked for."""
        with self._lock:
            if url in self._standing:
                self._standing[url].failures = 0

    def failed(self, url: str, now: float, *, lied: bool = False) -> None:
        """It did not: let it rest."""
        with self._lock:
            its = self._standing.get(url)
            if its is None:
                return
            rest = FIRST_REST_SECONDS * 2.0 ** min(its.failures, 20)
            its.failures += 1
            its.rests_until = now + (
                LONGEST_REST_SECONDS if lied else min(LONGEST_REST_SECONDS, rest)
            )


def object_path(digest: str) -> str:
    """Where an artifact is below a mirror's URL, and in the coordinator's store: ``ab/cdef…``."""
    return f"{digest[:2]}/{digest[2:]}"


class MirrorFetcher:
    """Takes artifacts from mirrors. Thread-safe.

    Args:
        account: called with each number of bytes that came; may sleep, for a rate limit.
        max_rate: the volunteer's limit in bytes per second, which ``account`` keeps.
    """

    def __init__(
        self,
        account: Callable[[Watch, int], None],
        max_rate: float | None,
        bounds: MirrorLimits | None = None,
    ) -> None:
        self.mirrors = MirrorSet()
        self.bytes_received = 0
        """Bytes of artifacts that came from mirrors."""
        self._account = account
        self._bounds = bounds or MirrorLimits()
        self._min_rate = self._bounds.min_rate
        self._read_bytes = READ_BYTES
        if max_rate is not None:
            self._min_rate = min(self._min_rate, max_rate / 2)
            self._read_bytes = max(4 * limits.KIB, min(READ_BYTES, int(max_rate / 8)))

    def usable(self) -> bool:
        """Whether there is a mirror to ask."""
        return bool(self.mirrors.usable(time.monotonic()))

    def fetch(
        self,
        ref: ArtifactRef,
        ingest: Ingest,
        progress: Callable[[int], None],
        should_stop: StopSignal,
    ) -> None:
        """Append to ``ingest`` what the mirrors have; whatever is missing then, they have not.

        ``ingest`` must know the artifact's pieces. Errors of this machine (a full disk, say) and
        :class:`~talkoot.client.pace.Stopped` are raised; a mirror's faults are not.
        """
        for url in self.mirrors.usable(time.monotonic()):
            again = 2  # a piece may be wrong because of what was here before: ask once more
            while again and ingest.offset() < ref.size_bytes and not should_stop():
                again -= 1
                began = ingest.offset()
                try:
                    self._from_one(url, ref, ingest, progress, should_stop)
                    self.mirrors.worked(url)
                    break
                except NotHereError:
                    break
                except MirrorFaultError as err:
                    log.warning("mirror %s: %s", url, err)
                    self.mirrors.failed(url, time.monotonic())
                    break
                except IntegrityError as err:
                    if err.code != BAD_PIECE:
                        raise
                    progress(ingest.offset())
                    if began <= ingest.offset():  # the whole piece is this mirror's
                        log.warning("mirror %s sent wrong bytes: %s", url, err.sentence)
                        self.mirrors.failed(url, time.monotonic(), lied=True)
                        break

    def _from_one(
        self,
        url: str,
        ref: ArtifactRef,
        ingest: Ingest,
        progress: Callable[[int], None],
        should_stop: StopSignal,
    ) -> None:
        try:
            connection = _connect(url)
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as err:
            raise MirrorFaultError(f"it cannot be reached ({err})") from err
        sock = connection.sock
        watch = Watch(lambda: _shut(sock), should_stop, self._bounds.stall_seconds)
        with closing(connection), watch:
            try:
                for data in self._answer(connection, url, ref, ingest.offset()):
                    if watch.stopped:
                        return
                    progress(ingest.append(ingest.offset(), data))
                    self.bytes_received += len(data)
                    self._account(watch, len(data))
            except (OSError, http.client.HTTPException, ValueError) as err:
                if watch.stopped:
                    return
                why = "it sends nothing" if watch.stalled else f"it broke off ({err})"
                raise MirrorFaultError(why) from err
        if ingest.offset() < ref.size_bytes and not watch.stopped:
            raise MirrorFaultError("it sends nothing" if watch.stalled else "it ended early")

    def _answer(
        self, connection: http.client.HTTPConnection, url: str, ref: ArtifactRef, offset: int
    ) -> Iterator[bytes]:
        """The artifact from ``offset`` on, never a byte more than there should be."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "talkoot", "Connection": "close"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        path = f"{urlsplit(url).path}/{object_path(ref.digest)}"
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        _check(response, offset, ref.size_bytes)
        left = ref.size_bytes - offset
        window, moved = time.monotonic(), 0
        while left:
            data = response.read1(min(left, self._read_bytes))
            if not data:
                return
            left -= len(data)
            moved += len(data)
            yield data
            seconds = time.monotonic() - window
            if seconds > self._bounds.window_seconds:
                if moved < self._min_rate * seconds:
                    raise MirrorFaultError(f"it is slow ({moved / seconds:.0f} bytes a second)")
                window, moved = time.monotonic(), 0


def _check(response: http.client.HTTPResponse, offset: int, size: int) -> None:
    status = response.status
    if status in NOT_HERE:
        raise NotHereError
    if 300 <= status < 400:
        raise MirrorFaultError(f"it sends elsewhere (status {status}), where nobody follows")
    if response.getheader("content-encoding", "identity") != "identity":
        raise MirrorFaultError("it sends compressed bytes")
    if status == 206:
        stated = _RANGE.fullmatch(response.getheader("content-range") or "")
        if stated is None or tuple(map(int, stated.groups())) != (offset, size - 1, size):
            raise MirrorFaultError("it sends another range than it was asked for")
    elif status != 200:
        raise MirrorFaultError(f"it answers with status {status}")
    elif offset:
        raise MirrorFaultError("it can only send from the beginning")
    length = response.getheader("content-length")
    if length is not None and length != str(size - offset):
        raise MirrorFaultError(f"it has {length[:20]} bytes where {size - offset} are due")


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        return http.client.HTTPSConnection(
            host, parts.port, timeout=CONNECT_SECONDS, context=_tls()
        )
    return http.client.HTTPConnection(host, parts.port, timeout=CONNECT_SECONDS)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        # Not SSLSocket's own, which would let a reader go on with what is not decrypted.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
