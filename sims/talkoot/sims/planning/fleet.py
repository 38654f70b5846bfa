"""The nodes of a scenario as arrays: speeds, lines, and when each is online."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from talkoot.sims.planning.fit import Fit
from talkoot.sims.planning.timeline import (
    DAY,
    F64,
    I64,
    Absence,
    Timelines,
    drops,
    intervals,
    schedule,
)
from talkoot.sims.scenario import Scenario

JITTER_SECONDS = 1800.0
"""Nodes of a class do not come and go at the same second: each is late by up to so much."""
MBIT = 1e6 / 8


class Fleet:
    """All nodes that are there at the beginning or come later.

    Args:
        scenario: validated.
        fits: one for each population.
        horizon: seconds that the timelines cover.
    """

    def __init__(self, scenario: Scenario, fits: Sequence[Fit], horizon: float) -> None:
        self.scenario, self.fits, self.horizon = scenario, fits, horizon
        later = [0] * len(fits)
        names = [fit.node_class.name for fit in fits]
        for event in scenario.events:
            if event.join is not None and event.population is not None:
                later[names.index(event.population)] += event.join
        counts = [entry.count for entry in scenario.population]
        sizes = np.array(counts) + np.array(later)
        self.count = int(sizes.sum())
        self.kind: I64 = np.repeat(np.arange(len(fits)), sizes)
        """(nodes,) index of each node's class."""
        self.waiting: I64 = np.concatenate(
            [np.arange(n) >= counts[k] for k, n in enumerate(sizes)]
        ).nonzero()[0]
        """Nodes that only come with an event, in the order in which they come."""
        rng = np.random.default_rng([scenario.seed, 1])
        spread = rng.standard_normal(self.count)
        sigma = np.array([entry.speed_spread for entry in scenario.population])[self.kind]
        speeds = np.array([fit.tokens_per_second for fit in fits])[self.kind]
        self.speed: F64 = speeds * np.exp(sigma * spread - sigma**2 / 2)
        """(nodes,) tokens a second with the recipe that fits; 0 where none does."""
        self.noise: F64 = np.array([entry.speed_noise for entry in scenario.population])[self.kind]
        links = [fit.node_class.link for fit in fits]
        self.up: F64 = np.array([link.up_mbit for link in links])[self.kind] * MBIT
        self.down: F64 = np.array([link.down_mbit for link in links])[self.kind] * MBIT
        """(nodes,) bytes a second."""
        self.latency: F64 = np.array([link.latency_ms for link in links])[self.kind] / 1000
        """(nodes,) seconds there and back."""
        self.fits_here = self.speed > 0
        self._plans = [self._hours(k, int(n), rng) for k, n in enumerate(sizes)]
        self._absences = [Absence(self.waiting, 0.0, np.inf)] if len(self.waiting) else []
        self.timelines = self._build()

    def leave(self, nodes: I64, begin: float, end: float) -> None:
        """Take nodes away from ``begin`` to ``end`` (inf: for good)."""
        self._absences.append(Absence(nodes, begin, end))
        self.timelines = self._build()

    def join(self, population: str, count: int, moment: float) -> I64:
        """Let so many of the waiting nodes of a class come at ``moment``; who they are."""
        names = [fit.node_class.name for fit in self.fits]
        here: I64 = self.waiting[self.kind[self.waiting] == names.index(population)][:count]
        self.waiting = np.setdiff1d(self.waiting, here, assume_unique=True)
        self._absences[0] = Absence(self.waiting, 0.0, np.inf)
        if moment > 0:
            self._absences.append(Absence(here, 0.0, moment))
        self.timelines = self._build()
        return here

    def _hours(
        self, kind: int, count: int, rng: np.random.Generator
    ) -> tuple[tuple[F64, F64], tuple[F64, F64]]:
        entry = self.scenario.population[kind]
        zones = np.array(entry.time_zones)[np.arange(count) % len(entry.time_zones)]
        jitter = rng.uniform(0.0, JITTER_SECONDS, count)
        on = schedule(entry.hours, zones, jitter, self.horizon)
        off = drops(rng, count, entry.drops_per_day, entry.drop_minutes * 60, self.horizon)
        return on, off

    def _build(self) -> Timelines:
        starts, ends, counts = [], [], []
        base = 0
        for on, off in self._plans:
            nodes = len(on[0])
            extra_on, extra_off = self._away(base, nodes)
            begins = np.concatenate([off[0], extra_on], axis=1)
            backs = np.concatenate([off[1], extra_off], axis=1)
            found = intervals(on, (begins, backs))
            starts.append(found[0])
            ends.append(found[1])
            counts.append(found[2])
            base += nodes
        first = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return Timelines(np.concatenate(starts), np.concatenate(ends), first)

    def _away(self, base: int, nodes: int) -> tuple[F64, F64]:
        """Absences of the nodes ``base … base + nodes`` as off intervals, one column each."""
        begins, ends = [], []
        for absence in self._absences:
            mine = absence.nodes[(absence.nodes >= base) & (absence.nodes < base + nodes)] - base
            if not len(mine):
                continue
            begin, end = np.full((nodes, 1), np.inf), np.full((nodes, 1), np.inf)
            begin[mine], end[mine] = absence.begin, min(absence.end, 2 * self.horizon + DAY)
            begins.append(begin)
            ends.append(end)
        if not begins:
            return np.zeros((nodes, 0)), np.zeros((nodes, 0))
        return np.concatenate(begins, axis=1), np.concatenate(ends, axis=1)
