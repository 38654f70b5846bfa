"""Real beside simulated: round time, bytes and losses, and whether they agree. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from talkoot.sims.calibration.real import Seen

BAR: Final = 0.10
"""Relative, of round time and bytes."""
FALSE_ALARMS: Final = 0.05
"""How often the bar of losses is missed by a simulation that is right."""
T_975: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
"""Student's t that 2.5 % exceed, for 1, 2, … degrees of freedom (the e-Handbook of Statistical
Methods of NIST, 1.3.6.7.2)."""


@dataclass(frozen=True)
class Row:
    """One figure."""

    what: str
    unit: str
    """``s`` or ``B``."""
    real: float
    simulated: float
    """Mean over the seeds."""
    planned: float | None
    """What ``talkoot-sim plan`` says; None where it says nothing."""

    @property
    def difference(self) -> float:
        """Relative to the real one."""
        if self.real == self.simulated:
            return 0.0
        return self.simulated / self.real - 1 if self.real else float("inf")

    @property
    def holds(self) -> bool:
        """Whether it is within the bar."""
        return abs(self.difference) <= BAR


@dataclass(frozen=True)
class Losses:
    """Curves over the same versions."""

    kind: str
    """``held-out`` or ``training``."""
    rounds: tuple[int, ...]
    real: tuple[float, ...]
    simulated: tuple[tuple[float, ...], ...]
    """One a seed; the first has the real network's."""

    @property
    def real_mean(self) -> float:
        """Over the versions, in nats: one number a network, and so one test."""
        return statistics.fmean(self.real)

    @property
    def means(self) -> list[float]:
        """The same of each simulation."""
        return [statistics.fmean(curve) for curve in self.simulated]

    @property
    def apart(self) -> float:
        """How far the real network's mean is from the mean of the simulations, in nats."""
        return abs(self.real_mean - statistics.fmean(self.means))

    @property
    def noise(self) -> float:
        """Standard deviation between simulations that differ by their seed, in nats."""
        return statistics.stdev(self.means) if len(self.simulated) > 1 else 0.0

    @property
    def bar(self) -> float:
        """How far one more simulation would be from the mean of these in 95 of 100 cases, in nats.

        The prediction interval of one more draw from a normal distribution of which so many are
        known. The real network has the first simulation's weights to begin with, so that it is
        rather nearer.
        """
        count = len(self.simulated)
        if count < 2:
            return 0.0
        return T_975[min(count - 2, len(T_975) - 1)] * self.noise * math.sqrt(1 + 1 / count)

    @property
    def holds(self) -> bool:
        """Whether the real network could be one more seed."""
        return self.apart <= self.bar


@dataclass(frozen=True)
class Comparison:
    """What a calibration found."""

    rows: tuple[Row, ...]
    losses: Losses

    @property
    def broken(self) -> list[str]:
        """A sentence for each bar that is missed."""
        found = [
            f"{row.what}: simulated {row.difference:+.1%} off the real network (the bar is "
            f"{BAR:.0%})."
            for row in self.rows
            if not row.holds
        ]
        losses = self.losses
        if not losses.holds:
            found.append(
                f"{losses.kind} losses: the real network's mean is {losses.apart:.3f} nats from "
                f"the simulations'; one more seed would be within {losses.bar:.3f} in 95 of 100 "
                "cases."
            )
        return found

    @property
    def holds(self) -> bool:
        """Whether all bars are met."""
        return not self.broken

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        rows = [
            {**asdict(row), "difference": row.difference, "holds": row.holds} for row in self.rows
        ]
        losses = self.losses
        return {
            "bar": BAR,
            "figures": rows,
            "losses": {
                **asdict(losses),
                "apart": losses.apart,
                "noise": losses.noise,
                "bar": losses.bar,
                "false_alarms": FALSE_ALARMS,
                "holds": losses.holds,
            },
            "holds": self.holds,
            "broken": self.broken,
        }


def compare(real: Seen, simulated: Sequence[Seen], planned_seconds: float | None) -> Comparison:
    """Hold a real network against simulations of it; the first has its seed.

    Raises:
        ValueError: nothing was simulated, or not the same nodes and rounds.
    """
    names = [node.name for node in real.nodes]
    numbers = [row.round for row in real.rounds]
    for one in simulated:
        if [node.name for node in one.nodes] != names:
            raise ValueError("the networks have other nodes")
        if [row.round for row in one.rounds] != numbers:
            raise ValueError("the networks have other rounds")
    if not simulated:
        raise ValueError("nothing was simulated")
    seconds = statistics.fmean(one.round_seconds for one in simulated)
    rows = [Row("a round", "s", real.round_seconds, seconds, planned_seconds)]
    for place, node in enumerate(real.nodes):
        up = statistics.fmean(one.nodes[place].bytes_up for one in simulated)
        down = statistics.fmean(one.nodes[place].bytes_down for one in simulated)
        rows.append(Row(f"{node.name}, up a round", "B", node.bytes_up, up, None))
        rows.append(Row(f"{node.name}, down a round", "B", node.bytes_down, down, None))
    return Comparison(tuple(rows), _losses(real, simulated))


def _losses(real: Seen, simulated: Sequence[Seen]) -> Losses:
    """Held-out losses where all have them, which a busy machine may pass over; else training's."""
    curves = [real, *simulated]
    measured = [{r.round for r in one.rounds if r.heldout is not None} for one in curves]
    both = sorted(set.intersection(*measured))
    kind = "held-out" if len(both) >= 2 else "training"
    if kind == "training":
        both = [row.round for row in real.rounds]
    found = [
        tuple(
            (row.heldout or 0.0) if kind == "held-out" else row.loss
            for row in one.rounds
            if row.round in both
        )
        for one in curves
    ]
    return Losses(kind, tuple(both), found[0], tuple(found[1:]))
