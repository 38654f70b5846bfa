"""A node's standing: a pure state machine that turns evidence into probation, trust or quarantine.

    probation ──enough counted──► established ──doubts──► probation
        │                              │
        └────────too much evidence─────┴──────► quarantined ──pardon──► probation

Suspicion is a CUSUM (Page 1954): evidence against a node adds, work that counted takes away, and it
never falls below zero, so that a long good record buys no licence. One odd contribution leads
nowhere; four in a row that were set aside lead to quarantine. A set-aside contribution does no harm
whatever becomes of its node, so there is no hurry, and an honest node that is odd now and then
(``p`` of its rounds) is quarantined with a probability that :func:`false_quarantine` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

StandingState = Literal["probation", "established", "quarantined"]

POINTS: Final[Mapping[str, float]] = {
    # What the judgement of a round says of a contribution.
    "counted": -1.0,
    "on-probation": -1.0,
    "alike": 0.0,
    "set-aside": 2.5,
    # Why acceptance refused one.
    "empty": 2.5,
    "wrong-steps": 2.5,
    "impossible-value": 4.0,
    "norm-too-large": 2.5,
    "norm-too-small": 1.5,
    "odd-profile": 2.5,
    "copied": 4.0,
    "not-finite": 4.0,
    "payload-malformed": 2.5,
    # Claims that are odd: clocks are wrong now and then.
    "claims-too-long": 0.5,
    "claims-too-fast": 0.5,
    # What a validator measured.
    "gain-good": -1.0,
    "gain-missing": 2.5,
    "replay-same": -4.0,
    "replay-differs": 8.0,
}
"""Points of evidence: against a node above zero. A kind that is not here says nothing."""
QUARANTINE_AT: Final = 10.0
DOUBT_AT: Final = 5.0
"""An established node is back on probation from here."""


@dataclass(frozen=True)
class Standing:
    """Where a node stands."""

    state: StandingState = "probation"
    suspicion: float = 0.0
    """Points, never below 0."""
    counted: int = 0
    """Contributions that counted since the last probation began."""
    since_unix: float = 0.0
    """When it came into this state."""
    sentence: str = "New here."


@dataclass(frozen=True)
class Evidence:
    """One thing that was seen."""

    kind: str
    sentence: str

    @property
    def points(self) -> float:
        """Against the node above zero."""
        return POINTS.get(self.kind, 0.0)


def advance(standing: Standing, evidence: Evidence, *, probation: int, now: float) -> Standing:
    """The standing after one more piece of evidence.

    Args:
        probation: contributions that must count before a node is established.
    """
    if standing.state == "quarantined":
        return standing
    suspicion = max(0.0, standing.suspicion + evidence.points)
    counted = standing.counted + (evidence.kind in ("counted", "on-probation"))
    if suspicion >= QUARANTINE_AT:
        return Standing("quarantined", suspicion, counted, now, evidence.sentence)
    if standing.state == "established" and suspicion >= DOUBT_AT:
        return Standing("probation", suspicion, 0, now, evidence.sentence)
    if standing.state == "probation" and counted >= probation and suspicion < DOUBT_AT:
        return Standing("established", suspicion, counted, now, f"{counted} contributions counted.")
    return replace(standing, suspicion=suspicion, counted=counted)


def quarantine(standing: Standing, why: str, *, now: float) -> Standing:
    """By the operator's word."""
    return Standing("quarantined", standing.suspicion, standing.counted, now, why)


def pardon(*, now: float) -> Standing:
    """The operator heard the node out: it begins anew."""
    return Standing("probation", 0.0, 0, now, "Pardoned by the operator.")


def false_quarantine(p: float, rounds: int, *, against: str = "set-aside") -> float:
    """The probability that an honest node is quarantined within so many rounds.

    Args:
        p: of ``against`` in a round; the other rounds count. Independent rounds are assumed.
    """
    grid = 2  # all points are multiples of 1/2
    up, down = round(POINTS[against] * grid), round(-POINTS["counted"] * grid)
    top = round(QUARANTINE_AT * grid)
    chances = [1.0] + [0.0] * (top - 1)
    lost = 0.0
    for _ in range(rounds):
        after = [0.0] * top
        for level, chance in enumerate(chances):
            if chance == 0.0:
                continue
            after[max(0, level - down)] += chance * (1 - p)
            if level + up >= top:
                lost += chance * p
            else:
                after[level + up] += chance * p
        chances = after
    return lost
