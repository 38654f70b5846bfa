"""Real work by way of Flower's grid: so much in its hands at a time, and what each node says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.messages import Verdict
from talkoot.server.flower import GridControl

WINDOW: Final = 8
"""Messages in Flower's hands for each worker. Its in-memory state looks through all of them for
each node, ten times a second."""
PATIENCE_SECONDS: Final = 0.04
TTL_SECONDS: Final = 1e6
"""Of a message in Flower's memory: real seconds, which say nothing about virtual deadlines."""


class Work:
    """Real work by way of Flower's grid.

    Args:
        control: over the grid.
        workers: Ray's.
        stopped: why the engine stopped, when it did.
    """

    def __init__(
        self, control: GridControl, workers: int, stopped: Callable[[], str | None]
    ) -> None:
        self._control = control
        self._most = WINDOW * workers
        self._stopped = stopped
        self.seconds = 0.0

    def do(
        self, tasks: Mapping[int, str], number: int, on_reply: Callable[[], None]
    ) -> dict[int, Verdict]:
        """Have tasks done; by Flower id, what each node says.

        Raises:
            UnavailableError: a worker died or failed.
        """
        began = time.monotonic()
        waiting = list(tasks.items())[::-1]
        found: dict[int, Verdict] = {}
        out = 0
        while len(found) < len(tasks):
            while waiting and out < self._most:
                chosen = [waiting.pop() for _ in range(min(self._most - out, len(waiting)))]
                self._control.send(dict(chosen), round_number=number, ttl_seconds=TTL_SECONDS)
                out += len(chosen)
            for flower_id, text in self._control.replies():
                if text is None:
                    raise UnavailableError(
                        "A worker failed at a lease, or ran out of memory: see engine.log, and run "
                        "it again, perhaps with fewer --workers; it goes on where it was."
                    )
                found[flower_id] = Verdict.model_validate_json(text)
                out -= 1
                on_reply()
            why = self._stopped()
            if why is not None:
                raise UnavailableError(f"Flower's simulation engine stopped: {why}.")
            time.sleep(PATIENCE_SECONDS)
        self.seconds += time.monotonic() - began
        return found
