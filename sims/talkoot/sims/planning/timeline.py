"""When each node is online, as sorted intervals in flat arrays: every question is vectorised.

A node's work goes on where it stopped (the trainer's checkpoint is seconds old), so work is
measured in *online seconds*: ``online_seconds`` counts them up to a moment, ``when`` says at which
moment so many have passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
DAY = 86_400.0


@dataclass(frozen=True)
class Absence:
    """Some nodes are away from one moment to another."""

    nodes: I64  # (k,)
    begin: float  # seconds
    end: float  # seconds


class Timelines:
    """Online intervals of many nodes; a node's are sorted and do not touch.

    Args:
        starts, ends: (n,) seconds, node after node.
        first: (nodes + 1,) where each node's intervals begin.
    """

    def __init__(self, starts: F64, ends: F64, first: I64) -> None:
        self.starts, self.ends, self.first = starts, ends, first
        self.count = len(first) - 1
        lengths = ends - starts
        running = np.concatenate([[0.0], np.cumsum(lengths)])
        owner = np.repeat(np.arange(self.count), np.diff(first))
        self._before = running[:-1] - running[first[owner]]  # online seconds before an interval
        self._total = running[first[1:]] - running[first[:-1]]
        latest = float(ends.max()) if len(ends) else 0.0
        self._stride = 4 * max(latest, 1.0)  # keeps one node's keys apart from the next one's
        self._start_keys = owner * self._stride + starts
        self._work_keys = owner * self._stride + self._before

    def place(self, nodes: I64, moment: float | F64) -> I64:
        """Index of the last interval that begins by ``moment``; below ``first`` if there is none.

        ``moment`` may be a number or (k,), and is cut to what the timelines cover.
        """
        keys = nodes * self._stride + np.clip(moment, 0.0, self._stride / 2)
        return np.asarray(np.searchsorted(self._start_keys, keys, side="right") - 1)

    def is_online(self, nodes: I64, moment: float | F64) -> Bools:
        """(k,) whether each node is there at ``moment``."""
        place = self.place(nodes, moment)
        safe = np.maximum(place, 0)
        found = (place >= self.first[nodes]) & (moment < self._end(safe))
        return np.asarray(found)

    def online_seconds(self, nodes: I64, moment: float | F64) -> F64:
        """(k,) seconds that each node has been online by ``moment``."""
        if not len(self.starts):
            return np.zeros(len(nodes))
        place = self.place(nodes, moment)
        safe = np.maximum(place, 0)
        within = np.clip(moment - self.starts[safe], 0.0, self.ends[safe] - self.starts[safe])
        return np.where(place >= self.first[nodes], self._before[safe] + within, 0.0)

    def when(self, nodes: I64, seconds: F64) -> F64:
        """(k,) the moment at which each node has been online for ``seconds``; inf if never."""
        if not len(self.starts):
            return np.full(len(nodes), np.inf)
        keys = nodes * self._stride + np.minimum(seconds, self._stride / 2)
        place = np.searchsorted(self._work_keys, keys, side="left") - 1
        place = np.clip(np.maximum(place, self.first[nodes]), 0, len(self.starts) - 1)
        moment = self.starts[place] + (seconds - self._before[place])
        return np.where(seconds <= self._total[nodes], moment, np.inf)

    def absences(self, nodes: I64, begin: float, end: float) -> tuple[I64, F64, F64]:
        """Of nodes online at ``begin``: (index into ``nodes``, gone, back) until ``end``.

        ``back`` is inf for who does not come back.
        """
        who, gone, back = [], [], []
        places = self.place(nodes, begin)
        rest = np.arange(len(nodes))
        while len(rest):
            here = self.ends[places] < end
            rest, places = rest[here], places[here]
            last = places + 1 >= self.first[nodes[rest] + 1]
            following = np.minimum(places + 1, len(self.starts) - 1)
            who.append(rest)
            gone.append(self.ends[places])
            back.append(np.where(last, np.inf, self.starts[following]))
            rest, places = rest[~last], following[~last]
            still = self.starts[places] < end
            rest, places = rest[still], places[still]
        if not who:
            empty = np.zeros(0)
            return np.zeros(0, np.int64), empty, empty
        return np.concatenate(who), np.concatenate(gone), np.concatenate(back)

    def _end(self, place: I64) -> F64:
        if not len(self.ends):
            return np.zeros(len(place))
        return self.ends[place]


def intervals(on: tuple[F64, F64], off: tuple[F64, F64]) -> tuple[F64, F64, I64]:
    """What is within an ``on`` interval and in no ``off`` interval.

    Args:
        on: begins and ends, both (nodes, a); unused ones are inf.
        off: begins and ends, both (nodes, b); unused ones are inf.

    Returns:
        Begins, ends and the number a node, node after node.
    """
    nodes = len(on[0])
    times = np.concatenate([*on, *off], axis=1)
    steps = np.zeros(times.shape, dtype=np.int64)
    a, b = on[0].shape[1], off[0].shape[1]
    # One number for both counts: each off interval weighs as much as all on intervals together.
    heavy = a + 1
    steps[:, :a], steps[:, a : 2 * a] = 1, -1
    steps[:, 2 * a : 2 * a + b], steps[:, 2 * a + b :] = -heavy, heavy
    order = np.argsort(times, axis=1, kind="stable")
    times = np.take_along_axis(times, order, axis=1)
    level = np.cumsum(np.take_along_axis(steps, order, axis=1), axis=1)
    upon = level > 0
    # The state after the last of several changes at one moment counts.
    settled = np.concatenate(
        [times[:, 1:] > times[:, :-1], np.ones((nodes, 1), dtype=np.bool_)], axis=1
    )
    here = np.where(settled, upon, False)
    state = _hold(upon, settled)
    before = np.concatenate([np.zeros((nodes, 1), np.bool_), state[:, :-1]], axis=1)
    rises = settled & here & ~before & np.isfinite(times)
    falls = settled & ~upon & before
    begins, ends = times[rises], times[falls]
    return begins, ends, rises.sum(axis=1)


def _hold(values: Bools, valid: Bools) -> Bools:
    """``values`` where valid, and the last valid one elsewhere (False at first), along rows."""
    columns = np.arange(values.shape[1])
    last = np.maximum.accumulate(np.where(valid, columns, -1), axis=1)
    taken = np.take_along_axis(values, np.maximum(last, 0), axis=1)
    return np.asarray(taken & (last >= 0))


def schedule(
    hours: Sequence[tuple[float, float]],
    zones: F64,
    jitter: F64,
    horizon: float,
) -> tuple[F64, F64]:
    """On intervals of nodes with the same hours: begins and ends, (nodes, k) seconds.

    Args:
        hours: of the local day; an end before its begin is on the next day.
        zones: (nodes,) hours ahead of UTC.
        jitter: (nodes,) seconds by which a node is late every day.
        horizon: seconds; nothing is made beyond it.
    """
    count = len(zones)
    if tuple(hours) == ((0, 24),):
        return np.zeros((count, 1)), np.full((count, 1), horizon)
    days = np.arange(-2, int(np.ceil(horizon / DAY)) + 2)
    begins, ends = [], []
    for begin, end in hours:
        length = (end - begin) % 24 or 24.0
        first = days[None, :] * DAY + (begin - zones[:, None]) * 3600 + jitter[:, None]
        begins.append(first)
        ends.append(first + length * 3600)
    on, off = np.concatenate(begins, axis=1), np.concatenate(ends, axis=1)
    return np.clip(on, 0.0, horizon), np.clip(off, 0.0, horizon)


def drops(
    rng: np.random.Generator, count: int, per_day: float, mean_seconds: float, horizon: float
) -> tuple[F64, F64]:
    """Off intervals at random: begins and ends, (count, k) seconds; unused ones are inf."""
    if per_day <= 0 or count == 0:
        return np.zeros((count, 0)), np.zeros((count, 0))
    expected = per_day * horizon / DAY
    size = (count, int(expected + 6 * np.sqrt(expected) + 4))
    gaps = rng.exponential(DAY / per_day, size)
    lengths = rng.exponential(mean_seconds, size)
    begins = np.cumsum(gaps, axis=1) + np.cumsum(lengths, axis=1) - lengths
    ends = begins + lengths
    beyond = begins >= horizon
    return np.where(beyond, np.inf, begins), np.where(beyond, np.inf, ends)
