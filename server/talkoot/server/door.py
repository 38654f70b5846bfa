"""How many connections a public port bears, in all and from one address.

Counted where they are accepted, before TLS: a peer that connects and says nothing costs a file
descriptor, and only so many of those.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import Counter
from typing import Any, Final

import psutil

from talkoot.server.rates import rate_key

LOOK_SECONDS: Final = 0.5


class Doorkeeper:
    """Counts who is inside. Thread-safe."""

    def __init__(self, total: int, per_address: int) -> None:
        self._total = total
        self._per_address = per_address
        self._inside: Counter[str] = Counter()
        self._lock = threading.Lock()

    def enter(self, key: str) -> bool:
        """Whether one more from ``key`` may come in; if so it counts until :meth:`leave`."""
        with self._lock:
            if self._inside.total() >= self._total or self._inside[key] >= self._per_address:
                return False
            self._inside[key] += 1
            return True

    def leave(self, key: str) -> None:
        """One of ``key`` has gone."""
        with self._lock:
            self._inside[key] -= 1
            if self._inside[key] <= 0:
                del self._inside[key]


class GuardedSocket(socket.socket):
    """A listening socket that hangs up on those whom its doorkeeper does not let in.

    asyncio accepts with :meth:`accept` and closes with :meth:`close`; nothing else is needed.
    """

    def __init__(self, listening: socket.socket, door: Doorkeeper) -> None:
        super().__init__(listening.family, listening.type, listening.proto, listening.detach())
        self._door = door

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that may come in; raises ``BlockingIOError`` when there is none."""
        while True:
            connection, address = super().accept()
            key = rate_key(str(address[0]))
            if self._door.enter(key):
                return _Guest(connection, self._door, key), address
            connection.close()


class _Guest(socket.socket):
    """A connection that tells the doorkeeper when it ends."""

    def __init__(self, connection: socket.socket, door: Doorkeeper, key: str) -> None:
        super().__init__(connection.family, connection.type, connection.proto, connection.detach())
        self._door = door
        self._key: str | None = key

    def close(self) -> None:
        """Close, and count one less."""
        key, self._key = self._key, None
        if key is not None:
            self._door.leave(key)
        super().close()


class PortGuard:
    """Keeps the connections of a port of this process under a cap for each address.

    gRPC accepts by itself and knows a cap for all together only. So its sockets are looked at twice
    a second, and those that one address holds over its share are shut down: the newest first, and
    gRPC sees them end as if the peer had.

    Args:
        port: TCP, listened on by this process.
        per_address: connections that one address may hold.
    """

    def __init__(self, port: int, per_address: int) -> None:
        self._port = port
        self._per_address = per_address
        self._stop = threading.Event()
        self._since: dict[tuple[str, int], int] = {}
        self._looks = 0
        self._thread = threading.Thread(target=self._run, name="port-guard", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            with contextlib.suppress(psutil.Error, OSError):
                self.look()

    def look(self) -> int:
        """Shut down what is too much; returns how many connections that were."""
        self._looks += 1
        inside: dict[str, list[tuple[int, tuple[str, int], int]]] = {}
        seen: dict[tuple[str, int], int] = {}
        for found in psutil.Process().net_connections("tcp"):
            if not found.raddr or found.laddr.port != self._port or found.fd < 0:
                continue
            peer = (found.raddr.ip, found.raddr.port)
            seen[peer] = self._since.get(peer, self._looks)
            inside.setdefault(rate_key(peer[0]), []).append((seen[peer], peer, found.fd))
        self._since = seen
        ended = 0
        for guests in inside.values():
            for _, peer, descriptor in sorted(guests)[self._per_address :]:
                ended += _shut_down(descriptor, peer)
        return ended


def _shut_down(descriptor: int, peer: tuple[str, int]) -> int:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as twin:
        # The number may belong to another connection by now.
        if twin.getpeername()[:2] == peer:
            twin.shutdown(socket.SHUT_RDWR)
            return 1
    return 0
