"""When a lease is fetched, trained and pushed, on a node's device and line. Pure.

The same arithmetic as the planner's, with the bytes of the real files instead of expected ones.
Online seconds count: a node's work goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from talkoot.sims.planning.fleet import MBIT, Fleet
from talkoot.sims.planning.many import fair_rate
from talkoot.sims.planning.sizes import (
    WIRE,
    Sizes,
)
from talkoot.sims.scenario import Scenario


@dataclass(frozen=True)
class Course:
    """A lease on its node. Virtual seconds since the beginning; inf is never."""

    sent: float
    fetched: float
    stepped: float
    """The last inner step is done."""
    trained: float
    """Training is done and the payload encoded."""
    steady: bool
    """Online from ``sent`` to ``trained`` without a break: the round waits for it until then."""


class Timing:
    """Of one scenario's nodes.

    Args:
        scenario: validated.
        fleet: its nodes.
        sizes: seconds of the coordinator's and the nodes' arithmetic.
    """

    def __init__(self, scenario: Scenario, fleet: Fleet, sizes: Sizes) -> None:
        line = scenario.coordinator
        self._fleet = fleet
        self.sizes = sizes
        self._egress = (line.up_mbit + line.mirrors * line.mirror_up_mbit) * MBIT / WIRE
        self._ingress = line.down_mbit * MBIT / WIRE

    def courses(
        self,
        sent: float,
        ready: Mapping[int, float],
        down: Mapping[int, int],
        behind: Mapping[int, int],
        artifacts: Mapping[int, int],
        tokens: Mapping[int, int],
        speeds: Mapping[int, float],
    ) -> dict[int, Course]:
        """Of leases that are sent together.

        Args:
            sent: now.
            ready: by node: when it can begin (it may still be at an earlier lease).
            down: bytes to fetch.
            behind: updates to apply.
            artifacts: to fetch, one after the other: each costs a round trip.
            tokens: of the lease.
            speeds: tokens a second.
        """
        fleet = self._fleet
        rates = self._shares([float(fleet.down[n]) / WIRE for n in down], self._egress)
        found = {}
        for node, rate in zip(down, rates, strict=True):
            begin = max(sent, ready[node])
            trips = artifacts[node] * (float(fleet.latency[node]) + self.sizes.artifact_seconds)
            # Flower's message is three calls: the pull, its objects, the word that they came.
            wait = (
                self.sizes.hear_seconds + 3 * float(fleet.latency[node]) + trips + down[node] / rate
            )
            fetched = self.after(node, begin, wait + behind[node] * self.sizes.apply_seconds)
            work = tokens[node] / speeds[node]
            stepped = self.after(node, fetched, work)
            trained = self.after(node, fetched, work + self.sizes.encode_seconds)
            steady = self._steady(node, sent, trained)
            found[node] = Course(sent, fetched, stepped, trained, steady)
        return found

    def arrival(self, node: int, trained: float, up: int, together: int) -> float:
        """When a payload of ``up`` bytes is at the coordinator and verified.

        ``together``: how many leases are out: they share the coordinator's ingress in equal parts.
        """
        fleet = self._fleet
        rate = min(float(fleet.up[node]) / WIRE, self._ingress / max(together, 1))
        # Asked, pushed and claimed: three round trips.
        seconds = up / rate + 3 * float(fleet.latency[node]) + self.sizes.verify_seconds
        return self.after(node, trained, seconds + self.sizes.submit_seconds)

    def fetching(self, node: int, moment: float, size: int, updates: int) -> float:
        """When a node that catches up outside a round has ``size`` bytes."""
        rate = min(float(self._fleet.down[node]) / WIRE, self._egress)
        return self.after(node, moment, size / rate + updates * self.sizes.apply_seconds)

    def publishing(self, contributions: int) -> float:
        """Seconds from closing a round to its published version."""
        sizes = self.sizes
        return contributions * sizes.aggregate_seconds + sizes.publish_seconds

    def after(self, node: int, moment: float, seconds: float) -> float:
        """When a node has been online for ``seconds`` after ``moment``."""
        if not math.isfinite(moment):
            return math.inf
        lines, who = self._fleet.timelines, np.array([node])
        done = float(lines.online_seconds(who, moment)[0]) + seconds
        return max(moment, float(lines.when(who, np.array([done]))[0]))

    def between(self, node: int, begin: float, end: float) -> float:
        """Seconds that a node was online from ``begin`` to ``end``."""
        lines, who = self._fleet.timelines, np.array([node])
        return float((lines.online_seconds(who, end) - lines.online_seconds(who, begin))[0])

    def _steady(self, node: int, begin: float, end: float) -> bool:
        if not math.isfinite(end):
            return False
        return abs(self.between(node, begin, end) - (end - begin)) < 1e-6

    def _shares(self, caps: Sequence[float], capacity: float) -> list[float]:
        """Max-min fair rates of streams that begin together, bytes a second."""
        rate = fair_rate(np.array(caps), capacity)
        return [min(cap, rate) for cap in caps]
