"""The virtual clock, what happens next, and what the world knows of each node."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from talkoot.protocol.files import write_atomic
from talkoot.sims.planning.fleet import Fleet
from talkoot.sims.scenario import Scenario
from talkoot.sims.scenario.model import Event
from talkoot.sims.virtual.site import EPOCH

DAY: Final = 86_400.0

# Of several things at one moment, in this order.
HAPPENS, ARRIVES, TRAINED, NEWS, CAUGHT_UP, NOTICED, DEADLINE = range(7)


@dataclass
class Held:
    """A lease in a node's hands. Times are Unix seconds, virtual; inf is never."""

    lease_id: str
    round: int
    attempt: int
    tokens: int
    sent: float
    fetched: float
    trained: float
    deadline: float
    steady: bool
    together: int
    """Leases that were sent with it."""
    bytes_down: int
    text: str = field(repr=False, default="")
    """The signed task."""
    stepped: float = math.inf
    """Its last inner step is done; what is left until ``trained`` is encoding."""
    made: bool = False
    """Its payload exists."""
    arrives: float = math.inf
    bytes_up: int = 0
    answer: str = ""
    """Code of the coordinator's verdict, or of the node's own; empty while there is none."""


@dataclass
class NodeNow:
    """What the world knows of a node."""

    version: int | None = None
    """That it holds; None before its first."""
    behind_until: float = 0.0
    """Until then it fetches what it lacks."""
    bytes_up: int = 0
    bytes_down: int = 0
    train_seconds: float = 0.0
    """Of contributions that counted."""
    contributions: int = 0
    held: Held | None = None


@dataclass(frozen=True)
class Absent:
    """Nodes that an event took away."""

    nodes: tuple[int, ...]
    begin: float
    end: float | None


class Agenda:
    """What will happen, in the order in which it does; ties go by kind, then node."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, str]] = []

    def add(self, moment: float, kind: int, index: int = -1, about: str = "") -> None:
        """Something about node ``index`` (or nobody) at ``moment``; inf is never."""
        if math.isfinite(moment):
            heapq.heappush(self._heap, (moment, kind, index, about))

    def next(self) -> float:
        """When something happens next; inf if nothing does."""
        return self._heap[0][0] if self._heap else math.inf

    def pop(self) -> tuple[float, int, int, str]:
        """Take the next."""
        return heapq.heappop(self._heap)


class World:
    """Clock, presence and nodes of one simulated network.

    Args:
        scenario: validated.
        fleet: its nodes, as of the beginning.
        path: where :meth:`save` keeps it.
    """

    def __init__(self, scenario: Scenario, fleet: Fleet, path: Path) -> None:
        self.scenario, self.fleet = scenario, fleet
        self._path = path
        self.now = EPOCH
        self.nodes: dict[int, NodeNow] = {}
        """By index: those that were let in."""
        self.agenda = Agenda()
        self.outages: list[tuple[float, float]] = []
        self._log: list[tuple[str, Any]] = []
        """Changes of the fleet, to be made again by :meth:`load`."""
        self._done: set[int] = set()
        """Places of the scenario's events that have happened."""
        self.heard_until = EPOCH

    def clock(self) -> float:
        """Unix seconds, virtual."""
        return self.now

    # Presence -------------------------------------------------------------------------------------

    def online(self, indices: Sequence[int], moment: float | None = None) -> list[bool]:
        """Whether each node is there."""
        when = (self.now if moment is None else moment) - EPOCH
        found = self.fleet.timelines.is_online(np.array(indices, dtype=np.int64), when)
        return [bool(one) for one in found]

    def last_seen(self, index: int) -> float:
        """When a node was last there: now, or the end of its last time online."""
        lines = self.fleet.timelines
        place = int(lines.place(np.array([index]), self.now - EPOCH)[0])
        if place < int(lines.first[index]):
            return 0.0
        return min(self.now, EPOCH + float(lines.ends[place]))

    def absences(self, index: int, begin: float, end: float) -> list[tuple[float, float]]:
        """(gone, back) of a node that is there at ``begin``; back is inf for never."""
        found = self.fleet.timelines.absences(np.array([index]), begin - EPOCH, end - EPOCH)
        return [
            (EPOCH + float(gone), EPOCH + float(back))
            for gone, back in zip(found[1], found[2], strict=True)
        ]

    # Events of the scenario -----------------------------------------------------------------------

    def expect_days(self) -> None:
        """Put events that have a day on the agenda."""
        for place, event in enumerate(self.scenario.events):
            if event.day is not None and place not in self._done:
                self.agenda.add(EPOCH + event.day * DAY, HAPPENS, place)

    def of_round(self, number: int) -> list[int]:
        """Places of the events that happen when round ``number`` opens and have not happened."""
        return [
            place
            for place, event in enumerate(self.scenario.events)
            if event.round == number and place not in self._done
        ]

    def happen(self, place: int) -> list[int]:
        """Let an event happen now; who has come by it."""
        if place in self._done:
            return []
        self._done.add(place)
        event = self.scenario.events[place]
        if event.outage_minutes is not None:
            self.outages.append((self.now, self.now + event.outage_minutes * 60))
            return []
        if event.join is not None:
            return self._apply("join", (event.population, event.join, self.now - EPOCH))
        gone = self._who_leaves(event, place)
        hours = event.back_after_hours
        end = None if hours is None else self.now - EPOCH + hours * 3600
        return self._apply("leave", (gone, self.now - EPOCH, end))

    def _who_leaves(self, event: Event, place: int) -> list[int]:
        there = np.array(sorted(self.nodes), dtype=np.int64)
        if event.population is not None:
            names = [fit.node_class.name for fit in self.fleet.fits]
            there = there[self.fleet.kind[there] == names.index(event.population)]
        rng = np.random.default_rng([self.scenario.seed, 0x1EA5, place])
        count = round((event.leave or 0.0) * len(there))
        return sorted(rng.choice(there, count, replace=False).tolist())

    def _apply(self, what: str, how: Any) -> list[int]:
        self._log.append((what, how))
        if what == "join":
            return sorted(int(n) for n in self.fleet.join(*how))
        gone, begin, end = how
        self.fleet.leave(np.array(gone, dtype=np.int64), begin, math.inf if end is None else end)
        return []

    def outage(self, moment: float) -> float:
        """The end of the outage that ``moment`` falls into, or ``moment``."""
        for begin, end in sorted(self.outages):
            if begin <= moment < end:
                moment = end
        return moment

    # Files ----------------------------------------------------------------------------------------

    def save(self, number: int, attempt: int, extra: dict[str, Any]) -> None:
        """Keep the world as it is now: ``number`` is the round that opens, or was published.

        ``attempt`` is -1 for a published one.
        """
        document: dict[str, Any] = {
            "round": number,
            "attempt": attempt,
            "now": self.now,
            "heard_until": self.heard_until,
            "outages": self.outages,
            "log": self._log,
            "done": sorted(self._done),
            "nodes": {str(index): asdict(node) for index, node in self.nodes.items()},
            **extra,
        }
        for node in document["nodes"].values():
            if node["held"] is not None:
                node["held"]["text"] = ""  # what was not made by now is given up
        write_atomic(self._path, json.dumps(document).encode())

    def load(self) -> dict[str, Any] | None:
        """Take up what was saved, with all of it as the answer; None if nothing was."""
        try:
            document: dict[str, Any] = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return None
        self.now = float(document["now"])
        self.heard_until = float(document["heard_until"])
        self.outages = [(float(begin), float(end)) for begin, end in document["outages"]]
        self._done = set(document["done"])
        for what, how in document["log"]:
            self._apply(what, how)
        for index, node in document["nodes"].items():
            held = node.pop("held")
            self.nodes[int(index)] = NodeNow(**node, held=None if held is None else Held(**held))
        for index, now in self.nodes.items():
            if now.held is not None and not now.held.answer and now.held.made:
                self.agenda.add(now.held.arrives, ARRIVES, index, now.held.lease_id)
            if now.behind_until > self.now:
                self.agenda.add(now.behind_until, CAUGHT_UP, index)
        return document


Say = Callable[[dict[str, Any]], None]
