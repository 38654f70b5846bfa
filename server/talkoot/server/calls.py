"""Who has which call open, how often each node may call, and how a ban ends what is running.

A node's calls are its own affair until they cost others something: so each node has a share. Calls
that stay silent never come so far (``first_word.py``).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import TracebackType

from talkoot.protocol.errors import UnavailableError
from talkoot.server.rates import RateLimiter


class Call:
    """One open call; a context manager that takes it off the list."""

    def __init__(
        self, calls: Calls, node_id: str, *, short: bool, cancel: Callable[[], object]
    ) -> None:
        self.node_id = node_id
        self.short = short
        self.cancel = cancel
        self._calls = calls

    def close(self) -> None:
        """Take it off the list; harmless when done twice."""
        self._calls.close(self)

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Calls:
    """All open calls of a server. Thread-safe.

    Args:
        quotas: method → (calls at once, then calls a second) for each node.
        per_node: short calls that one node may have open at once.
        now: a monotonic clock, in seconds.
        streams: methods that are no short calls: their open ones are counted elsewhere.
    """

    def __init__(
        self,
        quotas: Mapping[str, tuple[float, float]],
        *,
        per_node: int,
        now: Callable[[], float],
        streams: Collection[str] = (),
    ) -> None:
        self._streams = streams
        self._rates = {method: RateLimiter(*quota) for method, quota in quotas.items()}
        self._per_node = per_node
        self.now = now
        self._lock = threading.Lock()
        self._open: set[Call] = set()
        self._short: Counter[str] = Counter()

    def admit(self, node_id: str, method: str, cancel: Callable[[], object]) -> Call:
        """Put a call on the list; ``cancel`` ends it from another thread.

        Raises:
            UnavailableError: the node calls too often, or has too much open (code ``busy``).
        """
        short = method not in self._streams
        with self._lock:
            crowded = short and self._short[node_id] >= self._per_node
            if crowded or not self._rates[method].allow(node_id, self.now()):
                raise UnavailableError(
                    f"This node calls {method} more often than it may: try again in a moment.",
                    code="busy",
                )
            if short:
                self._short[node_id] += 1
            call = Call(self, node_id, short=short, cancel=cancel)
            self._open.add(call)
            return call

    def close(self, call: Call) -> None:
        """Take a call off the list; harmless when it is not on it."""
        with self._lock:
            if call in self._open:
                self._open.remove(call)
                if call.short:
                    self._short[call.node_id] -= 1
                    if self._short[call.node_id] <= 0:
                        del self._short[call.node_id]

    def end(self, banned: Collection[str]) -> int:
        """End the calls of banned nodes; returns how many."""
        with self._lock:
            ending = [call for call in self._open if call.node_id in banned]
        for call in ending:
            call.cancel()
        return len(ending)
