"""Real work by way of Flower's grid: so much in its hands at a time, and what each node says.

Workers train while the coordinator verifies, as in a real network. A lease whose training is over
at some moment of virtual time can change nothing before it, so the world may go on up to the
earliest of those that are still at work (:attr:`Work.earliest`), and no further.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.messages import Verdict
from talkoot.server.flower import GridControl

WINDOW: Final = 8
"""Messages in Flower's hands for each worker. Its in-memory state looks through all of them for
each node, ten times a second."""
PATIENCE_SECONDS: Final = (0.02, 0.25)
"""Between two looks for replies: at first, and when none has come for long. Each look costs the
workers some of a processor, since Flower looks through all messages."""
TTL_SECONDS: Final = 1e6
"""Of a message in Flower's memory: real seconds, which say nothing about virtual deadlines."""


@dataclass(frozen=True, order=True)
class Task:
    """A lease to be trained."""

    trained: float
    """Virtual seconds: before that it changes nothing. The earliest are done first."""
    index: int
    """Of the node."""
    flower_id: int = field(compare=False)
    round: int = field(compare=False)
    text: str = field(compare=False, repr=False)
    """The signed task."""


class Work:
    """Real work by way of Flower's grid.

    Args:
        control: over the grid.
        workers: Ray's.
        stopped: why the engine stopped, when it did.
        on_done: is given a node and what it says, inside a call of :meth:`wait` or another that
            waits.
    """

    def __init__(
        self, control: GridControl, workers: int, stopped: Callable[[], str | None]
    ) -> None:
        self._control = control
        self._most = WINDOW * workers
        self._stopped = stopped
        self.on_done: Callable[[int, Verdict], None] = lambda index, verdict: None
        self._waiting: list[Task] = []
        self._out: dict[int, Task] = {}
        self._moments: list[tuple[float, int]] = []
        self._at_work: set[int] = set()
        self._begun = 0.0
        self.seconds = 0.0
        """Real ones, in which somebody was at work."""

    def begin(self, tasks: Iterable[Task]) -> None:
        """Have tasks done, beside what goes on here. A node has one at a time."""
        if not self._at_work:
            self._begun = time.monotonic()
        for task in tasks:
            heapq.heappush(self._waiting, task)
            heapq.heappush(self._moments, (task.trained, task.index))
            self._at_work.add(task.index)
        self._hand_out()

    @property
    def earliest(self) -> float:
        """When the first of those at work is trained, in virtual seconds; inf if none is."""
        while self._moments and self._moments[0][1] not in self._at_work:
            heapq.heappop(self._moments)
        return self._moments[0][0] if self._moments else math.inf

    def __contains__(self, index: object) -> bool:
        return index in self._at_work

    def __len__(self) -> int:
        return len(self._at_work)

    def wait(self) -> None:
        """Until somebody is done, if anybody is at work.

        Raises:
            UnavailableError: a worker died or failed.
        """
        pause, longest = PATIENCE_SECONDS
        while self._at_work and not self._look():
            time.sleep(pause)
            pause = min(1.5 * pause, longest)

    def wait_for(self, index: int) -> None:
        """Until a node is done. Raises as :meth:`wait` does."""
        while index in self._at_work:
            self.wait()

    def finish(self) -> None:
        """Until nobody is at work. Raises as :meth:`wait` does."""
        while self._at_work:
            self.wait()

    def _look(self) -> bool:
        """Take what is there; whether anything was."""
        done = []
        for flower_id, text in self._control.replies():
            if text is None:
                raise UnavailableError(
                    "A worker failed at a lease, or ran out of memory: see engine.log, and run "
                    "it again, perhaps with fewer --workers; it goes on where it was."
                )
            task = self._out.pop(flower_id)
            self._at_work.discard(task.index)
            done.append((task.index, Verdict.model_validate_json(text)))
        self._hand_out()
        if done and not self._at_work:
            self.seconds += time.monotonic() - self._begun
        for index, verdict in done:
            self.on_done(index, verdict)
        why = self._stopped()
        if why is not None:
            raise UnavailableError(f"Flower's simulation engine stopped: {why}.")
        return bool(done)

    def _hand_out(self) -> None:
        chosen = []
        while self._waiting and len(self._out) < self._most:
            task = heapq.heappop(self._waiting)
            self._out[task.flower_id] = task
            chosen.append(task)
        for number in sorted({task.round for task in chosen}):
            mine = {task.flower_id: task.text for task in chosen if task.round == number}
            self._control.send(mine, round_number=number, ttl_seconds=TTL_SECONDS)
