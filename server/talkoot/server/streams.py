"""Who may hold a transfer open: a few streams a node, and never so many that calls starve.

A gRPC stream holds one worker thread for as long as its peer pleases. A node over its share loses
its own oldest stream (most likely one whose connection died unnoticed), and when all are taken, the
streams that stand still make room, and then whoever has the most of them gives one to a node that
has at least two fewer: a few that move just enough can't hold all places. No stream is ended while
nobody needs its place; one that is goes on later from where it was.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from types import TracebackType
from typing import Any, Final

import grpc

from talkoot.protocol.chunks import FETCH, as_it_is
from talkoot.protocol.errors import UnavailableError

MIN_PROGRESS: Final = 64 * 1024
"""Bytes that count as movement: in ``stall_seconds`` less than a modem carries."""


class Stream:
    """One open transfer; a context manager that gives its place back."""

    def __init__(self, table: StreamTable, node_id: str, cancel: Callable[[], object]) -> None:
        self.node_id = node_id
        self.cancel = cancel
        self.key: Hashable = None
        self.moved = table.now()
        self._bytes = 0
        self._table = table

    def touch(self, length: int) -> None:
        """So many bytes moved. A trickle is no movement: it would hold a place for ever."""
        self._bytes += length
        if self._bytes >= MIN_PROGRESS:
            self._bytes = 0
            self.moved = self._table.now()

    def claim(self, key: Hashable) -> None:
        """Work on ``key`` alone: this node's earlier stream on the same key is ended first.

        Raises:
            UnavailableError: the earlier one is not to be interrupted now (code ``in-progress``).
        """
        self._table.claim(self, key)

    def release(self) -> None:
        """Give the place back; harmless when done twice."""
        self._table.release(self)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class StreamTable:
    """All open transfers of a server. Thread-safe.

    Args:
        total: streams at once.
        per_node: streams of one node at once.
        stall_seconds: a stream that moved less than :data:`MIN_PROGRESS` in so long may lose its
            place.
        patience_seconds: how long a newcomer waits for a place that is being freed.
        now: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        *,
        total: int,
        per_node: int,
        stall_seconds: float,
        patience_seconds: float,
        now: Callable[[], float],
    ) -> None:
        self._total = total
        self._per_node = per_node
        self._stall_seconds = stall_seconds
        self._patience_seconds = patience_seconds
        self.now = now
        self._changed = threading.Condition()
        self._open: list[Stream] = []  # oldest first

    def admit(self, node_id: str, cancel: Callable[[], object]) -> Stream:
        """Take a place for ``node_id``; ``cancel`` ends the transfer from another thread.

        Raises:
            UnavailableError: every place is in use (code ``busy``).
        """
        with self._changed:
            own = [stream for stream in self._open if stream.node_id == node_id]
            if len(own) >= self._per_node:
                self._end(own[: len(own) - self._per_node + 1])
            if len(self._open) >= self._total:
                oldest_move = self.now() - self._stall_seconds
                self._end([stream for stream in self._open if stream.moved < oldest_move])
            if len(self._open) >= self._total:
                self._end(self._surplus(self._count(node_id)))
            if len(self._open) >= self._total or self._count(node_id) >= self._per_node:
                raise UnavailableError(
                    "The coordinator has as many transfers open as it can serve: "
                    "try again in a moment.",
                    code="busy",
                )
            stream = Stream(self, node_id, cancel)
            self._open.append(stream)
            return stream

    def claim(self, stream: Stream, key: Hashable) -> None:
        """See :meth:`Stream.claim`."""
        with self._changed:
            stream.key = key
            earlier = [
                other
                for other in self._open
                if other is not stream and (other.node_id, other.key) == (stream.node_id, key)
            ]
            self._end(earlier)
            if any(other in self._open for other in earlier):
                raise UnavailableError(
                    "This artifact is being received already; try again in a moment.",
                    code="in-progress",
                )

    def release(self, stream: Stream) -> None:
        """See :meth:`Stream.release`."""
        with self._changed:
            if stream in self._open:
                self._open.remove(stream)
                self._changed.notify_all()

    def by_node(self) -> Counter[str]:
        """How many streams each node has open now."""
        with self._changed:
            return Counter(stream.node_id for stream in self._open)

    def _surplus(self, held: int) -> list[Stream]:
        """The stream that has been still for longest, of the node with the most; none if that node
        would then have fewer than the newcomer, who holds ``held``."""
        counts = Counter(stream.node_id for stream in self._open)
        most = max(counts.values(), default=0)
        if most < held + 2:
            return []
        crowd = [stream for stream in self._open if counts[stream.node_id] == most]
        return [min(crowd, key=lambda stream: stream.moved)]

    def _count(self, node_id: str) -> int:
        return sum(stream.node_id == node_id for stream in self._open)

    def _end(self, streams: Iterable[Stream]) -> None:
        """Cancel streams and wait a little for their threads to let go (the lock is released)."""
        ending = list(streams)
        for stream in ending:
            stream.cancel()
        if ending:
            self._changed.wait_for(
                lambda: not any(stream in self._open for stream in ending),
                timeout=self._patience_seconds,
            )


class FetchAsBytes(grpc.ServerInterceptor):
    """Lets ``Fetch`` give serialized chunks (``protocol/chunks.py``)."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method's handler; that of ``Fetch`` serializes nothing."""
        handler = continuation(details)
        if handler is None or details.method != FETCH:
            return handler
        return grpc.unary_stream_rpc_method_handler(
            handler.unary_stream, handler.request_deserializer, as_it_is
        )
