"""What a plan found: figures, rounds, where the time goes, and how to say it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from talkoot.sims.scenario import Scenario

PHASES: Final = ("train", "fetch", "encode", "push", "others", "closing", "apart", "wasted")
"""Where a node's time online goes; together they are all of it."""
PHASE_WORDS: Final = {
    "train": "training that counted",
    "fetch": "fetching the update and blocks",
    "encode": "encoding",
    "push": "pushing, and waiting to be verified",
    "others": "waiting for other nodes",
    "closing": "waiting while the coordinator closes",
    "apart": "no lease: came mid-round, or behind",
    "wasted": "training that came too late",
}


@dataclass(frozen=True)
class RoundRow:
    """One published round. Seconds since the beginning."""

    round: int
    attempts: int
    opened: float
    closed: float
    published: float
    code: str
    """Why it closed."""
    members: int
    contributions: int
    lost: int
    tokens: int
    bytes_up: float
    bytes_down: float
    egress: float
    """Bytes out of the coordinator's own line."""
    train_by_class: tuple[float, ...]
    """Seconds of training that counted."""
    online_by_class: tuple[float, ...]
    """Seconds online since the round before was published."""


@dataclass(frozen=True)
class Bar:
    """One node's round, for the timeline. Seconds since the round opened; None is never."""

    node: int
    kind: int
    leased: float
    """Above 0 if the round was leased anew."""
    fetched: float | None
    trained: float | None
    encoded: float | None
    arrived: float | None
    committed: bool


@dataclass(frozen=True)
class ClassRow:
    """A class of nodes over the whole plan."""

    name: str
    device: str
    nodes: int
    recipe: str | None
    why: str
    """The verdict's sentence."""
    tokens_per_second: float
    tokens: int
    contributions: int
    utilization: float | None
    phases: dict[str, float]
    """Share of the time online, by phase."""
    kwh: float


@dataclass(frozen=True)
class PlanResult:
    """A whole plan."""

    scenario: Scenario
    figures: dict[str, float | None]
    """By the names of ``METRICS``; None has no value."""
    phases: dict[str, float]
    """Share of all nodes' time online."""
    bottleneck: str
    """A sentence."""
    classes: tuple[ClassRow, ...]
    rounds: tuple[RoundRow, ...]
    bars: tuple[tuple[int, tuple[Bar, ...]], ...]
    """(round, some of its nodes)."""
    payload: dict[str, float]
    """Bytes of a payload, an update and a checkpoint; parameters."""
    notes: tuple[str, ...] = ()
    events: list[Any] = field(default_factory=list, repr=False, compare=False)
    """(round, course, committed) of every round, when they were asked for."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json``: all but single events."""
        return {
            "scenario": self.scenario.model_dump(mode="json"),
            "figures": self.figures,
            "phases": self.phases,
            "bottleneck": self.bottleneck,
            "classes": [asdict(row) for row in self.classes],
            "rounds": [asdict(row) for row in self.rounds],
            "payload": self.payload,
            "notes": list(self.notes),
        }
