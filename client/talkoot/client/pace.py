"""How fast and how stubbornly a transfer goes: byte counters, rate limits, patience, a watchdog."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from talkoot.protocol.errors import ConfigError, UnavailableError

POLL_SECONDS = 0.2
"""How soon a wish to stop is noticed."""

StopSignal = Callable[[], bool]


class Meter:
    """Data-plane bytes in both directions. Thread-safe; its owner keeps it across restarts."""

    def __init__(self, bytes_up: int = 0, bytes_down: int = 0) -> None:
        self._lock = threading.Lock()
        self._up = bytes_up
        self._down = bytes_down

    @property
    def bytes_up(self) -> int:
        """Bytes of artifacts and messages sent."""
        return self._up

    @property
    def bytes_down(self) -> int:
        """Bytes of artifacts and messages received."""
        return self._down

    def add(self, *, up: int = 0, down: int = 0) -> None:
        """Count bytes."""
        with self._lock:
            self._up += up
            self._down += down


@dataclass(frozen=True)
class TransferOptions:
    """How a client behaves on the line.

    Raises:
        ConfigError: a value is impossible.
    """

    max_rate_up: float | None = None  # bytes per second; None is no limit
    max_rate_down: float | None = None  # bytes per second
    attempts: int = 10  # in a row that move nothing, before giving up
    first_delay_seconds: float = 0.5  # after the first; doubles
    max_delay_seconds: float = 30.0
    stall_seconds: float = 120.0  # a stream that moves nothing for so long is begun anew; a slow
    # one that moves is never cut off, however long it takes
    call_seconds: float = 60.0  # deadline of a short call
    judge_seconds: float = 600.0  # of a call that has the coordinator check a payload

    def __post_init__(self) -> None:
        positive = (
            self.max_rate_up,
            self.max_rate_down,
            self.attempts,
            self.stall_seconds,
            self.call_seconds,
            self.judge_seconds,
        )
        if any(value is not None and value <= 0 for value in positive):
            raise ConfigError("Transfer rates, attempts and time limits must be above 0.")
        if not 0 <= self.first_delay_seconds <= self.max_delay_seconds:
            raise ConfigError("A transfer's first delay must be between 0 and its longest delay.")


class RateLimit:
    """A token bucket that holds one second of traffic. Pure: time is an argument. Thread-safe.

    Args:
        rate: bytes per second; None is no limit.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._paid_until = 0.0  # seconds on the caller's clock

    @property
    def rate(self) -> float | None:
        """Bytes per second; None is no limit."""
        return self._rate

    def take(self, amount: int, now: float) -> float:
        """Account for ``amount`` bytes at ``now`` (seconds); return the seconds to wait after."""
        if self._rate is None:
            return 0.0
        with self._lock:
            self._paid_until = max(self._paid_until, now - 1.0) + amount / self._rate
            return max(0.0, self._paid_until - now)


class Patience:
    """Decides whether to try again: attempts in a row without progress count, time does not."""

    def __init__(self, options: TransferOptions) -> None:
        self._options = options
        self._best = -1
        self._wasted = 0

    def delay(self, reached: int, err: UnavailableError) -> float:
        """Seconds to wait before the next attempt, when one that reached byte ``reached`` failed.

        Raises:
            UnavailableError: ``err`` itself, when nothing moved for too many attempts.
        """
        if reached > self._best:
            self._best = reached
            self._wasted = 0
        self._wasted += 1
        if self._wasted >= self._options.attempts:
            raise err
        # Doubling stops early: 2.0**n overflows long before patience can be that long.
        doubled = self._options.first_delay_seconds * 2.0 ** min(self._wasted - 1, 30)
        return min(self._options.max_delay_seconds, doubled)

    def restart(self) -> None:
        """What was reached was thrown away: begin to measure progress from 0 again."""
        self._best = -1


class Stopped(UnavailableError):
    """The caller asked to stop; what was transferred is kept."""

    default_code = "stopped"

    def __init__(self) -> None:
        super().__init__("The transfer was stopped on request; it will go on where it stopped.")


def wait(seconds: float, should_stop: StopSignal) -> None:
    """Sleep, but no longer than until ``should_stop``. Raises :class:`Stopped`."""
    end = time.monotonic() + seconds
    while True:
        if should_stop():
            raise Stopped
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, POLL_SECONDS))


class Watch:
    """Ends a blocked call when its caller wants to stop, or when it stalls. A context manager.

    gRPC's iterators block without a timeout, so another thread has to look.

    Args:
        cancel: ends the call.
        should_stop: whether the caller wants it to end.
        stall_seconds: without a move for so long it ends, too.
        reached: asked when nothing has moved here for a while: how far the *other* side is, or
            None when that cannot be told; and how far it was at the beginning. Megabytes wait in
            buffers on their way up, and on a slow line the receiver goes on for minutes while the
            sender sees nothing happen.
    """

    def __init__(
        self,
        cancel: Callable[[], object],
        should_stop: StopSignal,
        stall_seconds: float,
        reached: tuple[Callable[[], int | None], int] | None = None,
    ) -> None:
        self._reached: Callable[[], int | None] | None
        self._reached, self._seen = reached or (None, 0)
        self._asking: threading.Thread | None = None
        self._cancel = cancel
        self._should_stop = should_stop
        self._stall_seconds = stall_seconds
        self._moved = time.monotonic()
        self._done = threading.Event()
        self.stopped = False
        self.stalled = False
        self._thread = threading.Thread(target=self._look, name="transfer-watch", daemon=True)

    def touch(self) -> None:
        """Bytes moved."""
        self._moved = time.monotonic()

    def pay(self, seconds: float) -> None:
        """Sleep for a rate limit: a pause of our own making is no stall."""
        end = time.monotonic() + seconds
        while not self.stopped and (left := end - time.monotonic()) > 0:
            self.touch()
            time.sleep(min(left, POLL_SECONDS))

    def _ask(self) -> None:
        """Count what the other side received as a move."""
        assert self._reached is not None
        now_at = self._reached()
        if now_at is not None and now_at > self._seen:
            self.touch()
            self._seen = now_at

    def _look(self) -> None:
        asked = time.monotonic()
        while not self._done.wait(POLL_SECONDS):
            self.stopped = self._should_stop()
            now = time.monotonic()
            self.stalled = now - self._moved > self._stall_seconds
            if self.stopped or self.stalled:
                self._cancel()
                return
            silent = now - max(asked, self._moved) > self._stall_seconds / 4
            if self._reached is not None and silent:
                asked = now
                if self._asking is None or not self._asking.is_alive():
                    # The answer may be slow itself; it must not keep us from looking.
                    self._asking = threading.Thread(
                        target=self._ask, name="transfer-ask", daemon=True
                    )
                    self._asking.start()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
