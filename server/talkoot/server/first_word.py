"""A call must say what it wants: those that open and stay silent are ended.

For a call with one request gRPC waits for it in a worker thread, without a limit of time or number.
So every call is handled as a stream of requests, whose first one has to come soon; on the wire the
two are the same. What comes after the first message of a real stream is not this module's business:
a slow upload may be as slow as it is.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final

import grpc

SPEAK_SECONDS: Final = 2.0
"""A peer that has said nothing for so long makes room for others, when many are silent."""
IDLE_SECONDS: Final = 5.0
"""How long the watching thread stays when there is nothing to watch."""


class SilentCalls:
    """Calls whose first message has not come. Thread-safe.

    Args:
        seconds: after so long a call is ended.
        per_peer: so many calls of one peer may be silent at once.
        now: a monotonic clock, in seconds.
        total: so many of everybody; over it somebody makes room (:meth:`_make_room`).
    """

    def __init__(
        self, seconds: float, per_peer: int, now: Callable[[], float], *, total: int
    ) -> None:
        self._seconds = seconds
        self._per_peer = per_peer
        self._total = total
        self._now = now
        self._changed = threading.Condition()
        self._waiting: dict[int, tuple[float, str, Callable[[], object]]] = {}
        self._next = 0
        self._watching = False

    @contextmanager
    def waiting(self, peer: str, cancel: Callable[[], object]) -> Iterator[bool]:
        """Watch a call while it is silent; yields False when its peer has too many of those."""
        crowded: Callable[[], object] | None = None
        with self._changed:
            if sum(name == peer for _, name, _ in self._waiting.values()) >= self._per_peer:
                number = None
            else:
                number = self._next
                self._next += 1
                if len(self._waiting) >= self._total:
                    crowded = self._make_room(peer)
                self._waiting[number] = (self._now() + self._seconds, peer, cancel)
                if not self._watching:
                    self._watching = True
                    threading.Thread(target=self._watch, name="silent-calls", daemon=True).start()
                elif len(self._waiting) == 1:
                    self._changed.notify_all()
        if crowded is not None:
            crowded()
        try:
            yield number is not None
        finally:
            if number is not None:
                with self._changed:
                    self._waiting.pop(number, None)

    def _make_room(self, newcomer: str) -> Callable[[], object] | None:
        """Take a call off the list, and say how to end it; None: let one more wait.

        It is the oldest of the peer that then has the most. When all have one, it is the oldest
        that had time to speak: an honest peer's request comes with its call.
        """
        counts = Counter([newcomer, *(peer for _, peer, _ in self._waiting.values())])
        most = max(counts.values())
        spoken_by = self._now() + self._seconds - SPEAK_SECONDS
        for number, (due, peer, cancel) in self._waiting.items():  # oldest first
            if counts[peer] == most if most > 1 else due < spoken_by:
                del self._waiting[number]
                return cancel
        return None

    def _watch(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._changed.wait(IDLE_SECONDS):
                    self._watching = False
                    return
                now = self._now()
                late = [cancel for due, _, cancel in self._waiting.values() if due <= now]
            for cancel in late:
                cancel()
            with self._changed:
                self._changed.wait(min(1.0, self._seconds / 4))


class FirstWord(grpc.ServerInterceptor):
    """Puts every call of a server under :class:`SilentCalls`.

    Args:
        calls: the watch.
        peer_of: who is calling; only a name to count by.
    """

    def __init__(self, calls: SilentCalls, peer_of: Callable[[grpc.ServicerContext], str]) -> None:
        self._calls = calls
        self._peer_of = peer_of

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method's handler, with its first request watched."""
        handler = continuation(details)
        if handler is None:
            return None
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming:
            many = handler.stream_stream or handler.stream_unary
            behaviour = lambda requests, context: many(  # noqa: E731
                self._and_the_rest(requests, context), context
            )
        else:
            one = handler.unary_stream or handler.unary_unary
            behaviour = lambda requests, context: one(  # noqa: E731
                self._first(requests, context), context
            )
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(behaviour, **codecs)
        return grpc.stream_unary_rpc_method_handler(behaviour, **codecs)

    def _first(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        first = self._wait(requests, context)
        if first is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a call without a request")
        return first

    def _and_the_rest(
        self, requests: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[Any]:
        first = self._wait(requests, context)
        return iter(()) if first is None else chain([first], requests)

    def _wait(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        with self._calls.waiting(self._peer_of(context), context.cancel) as welcome:
            if not welcome:
                context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls wait for their request"
                )
            return next(requests, None)
