"""Who dies when: a pure function of a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from talkoot.protocol.faults import PLACES

ARTISANS = {
    "open": "round loop",
    "close": "round loop",
    "aggregate": "round loop",
    "publish": "round loop",
    "push": "transfer",
    "accept": "transfer",
    "node": "daemon",
    "trainer": "trainer",
}
"""Which process comes by at places that begin so."""
COORDINATOR = (
    "coordinator",
    "superlink",
    "superexec",
    "round loop",
    "transfer",
    "gateway",
    "ledger",
)
"""Components of the operator's machine. ``coordinator`` is the whole tree; ``ledger`` is whoever
writes to it: a lock held and its holder killed on SQLite, all connections cut on PostgreSQL."""
VOLUNTEER = ("trainer", "daemon", "node")
"""Components of a volunteer's machine. ``node`` is daemon and trainer together: a power cut."""
COMPONENTS = (*COORDINATOR, *VOLUNTEER)
MAX_DELAY_SECONDS = 2.5
SHARE_OF_PLACES = 0.4
SHARE_OF_MULTIPLE = 0.25


@dataclass(frozen=True)
class Kill:
    """One death."""

    component: str
    node: int | None = None
    """Which volunteer, for a volunteer's components."""
    place: str | None = None
    """Where in a round (``faults.py``); None is wherever it is."""

    def __str__(self) -> str:
        whose = f" of node {self.node}" if self.node is not None else ""
        return f"{self.component}{whose}" + (f" at {self.place}" if self.place else "")


@dataclass(frozen=True)
class Strike:
    """One or more deaths at one moment."""

    number: int
    delay_seconds: float
    """After the network had recovered from the strike before."""
    kills: tuple[Kill, ...]


def component_at(place: str) -> str:
    """Which component comes by at a place."""
    return ARTISANS[place.partition(".")[0]]


def strikes(
    seed: int, nodes: int, places: Sequence[str] = tuple(sorted(PLACES))
) -> Iterator[Strike]:
    """The strikes of a soak, without end.

    Every component and every place comes up equally often: each is drawn from a shuffled deck that
    is dealt to its end before it is shuffled again.
    """
    rng = random.Random(seed)
    components = _deck(rng, COMPONENTS)
    at = _deck(rng, places)
    number = 0
    while True:
        delay = rng.uniform(0.0, MAX_DELAY_SECONDS)
        if places and rng.random() < SHARE_OF_PLACES:
            place = next(at)
            kills = [_kill(rng, component_at(place), nodes, place)]
        else:
            kills = [_kill(rng, next(components), nodes)]
            while rng.random() < SHARE_OF_MULTIPLE:
                kills.append(_kill(rng, next(components), nodes))
        yield Strike(number, delay, tuple(dict.fromkeys(kills)))
        number += 1


def _kill(rng: random.Random, component: str, nodes: int, place: str | None = None) -> Kill:
    # At a place, whichever volunteer comes by first is the one.
    chosen = rng.randrange(nodes) if component in VOLUNTEER and place is None else None
    return Kill(component, chosen, place)


def _deck(rng: random.Random, cards: Sequence[str]) -> Iterator[str]:
    while cards:
        hand = list(cards)
        rng.shuffle(hand)
        yield from hand
