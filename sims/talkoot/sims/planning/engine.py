"""``plan``: discrete events over the real rules, without training.

The coordinator is a SimPy process that opens, closes and publishes rounds; who is behind catches up
in processes of their own. What thousands of nodes do within a round is arithmetic on arrays, so a
round costs a few events and not thousands. The rules are the production ones: ``rounds.py``
decides, ``admission.py`` admits, ``leases.py`` sizes, the codec's own bytes travel.

What it leaves out: attackers (they contribute like anybody), and a node's work at a lease that was
taken back, which it gives up at once.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

import numpy as np

from talkoot.protocol.limits import MAX_UPDATE_CHAIN
from talkoot.server.conductor import MAX_REOPEN_SECONDS
from talkoot.server.rounds import patience_seconds, poll_seconds
from talkoot.sims.planning.account import Account
from talkoot.sims.planning.fit import fits_of
from talkoot.sims.planning.fleet import MBIT, Fleet
from talkoot.sims.planning.many import fair_rate, lease_tokens, measured_speeds, one_after_another
from talkoot.sims.planning.passing import Course, Outcome, Rule, settle
from talkoot.sims.planning.result import PlanResult
from talkoot.sims.planning.sizes import (
    PROOF_SECONDS,
    WIRE,
    Sizes,
    model_config,
    sizes_of,
)
from talkoot.sims.planning.timeline import DAY, F64, I64
from talkoot.sims.scenario import Scenario

RETRY_SECONDS: Final = 60.0
"""How often the engine looks for nodes while there are too few."""
MAX_DAYS: Final = 400.0
"""Of virtual time, when a scenario only says how many rounds."""
JOINING: Final = -1
"""Version of a node that has no replica yet."""


class Engine:
    """One plan.

    Args:
        scenario: validated.
        sizes: instead of those of the scenario's model and codecs.
        keep_events: hold every node's round for a table of events.
    """

    def __init__(
        self, scenario: Scenario, *, sizes: Sizes | None = None, keep_events: bool = False
    ) -> None:
        self.scenario, self.rules = scenario, scenario.rules
        self.config = scenario.config()
        config = model_config(scenario)
        self.sizes = sizes_of(scenario, config) if sizes is None else sizes
        self.fits = fits_of(scenario, config, self.sizes.parameters)
        self.horizon = horizon_of(scenario)
        self.fleet = Fleet(scenario, self.fits, self.horizon)
        self.rng = np.random.default_rng([scenario.seed, 2])
        line = scenario.coordinator
        self.egress = line.up_mbit * MBIT / WIRE
        self.mirrors = line.mirrors * line.mirror_up_mbit * MBIT / WIRE
        self.ingress = line.down_mbit * MBIT / WIRE
        self.up = self.fleet.up / WIRE
        self.down = self.fleet.down / WIRE
        self.version: I64 = np.zeros(self.fleet.count, dtype=np.int64)
        self.version[self.fleet.waiting] = JOINING
        self.catching = np.zeros(self.fleet.count, dtype=np.bool_)
        # The proof of admission has measured every node once.
        self.measured: F64 = self._speeds_of(np.arange(self.fleet.count))
        self.newest = 0
        self.outages: list[tuple[float, float]] = []
        self.account = Account(scenario, self.fits, self.fleet, self.sizes, keep_events)

    def run(self) -> PlanResult:
        """To the scenario's end."""
        import simpy

        env = simpy.Environment()
        for event in self.scenario.events:
            if event.day is not None:
                self._happen(event, event.day * DAY)
        env.process(self._coordinate(env))
        env.run(until=self.horizon)
        return self.account.result(self.horizon if self.scenario.days else None)

    # The coordinator ------------------------------------------------------------------------------

    def _coordinate(self, env: Any) -> Generator[Any, None, None]:
        last = self.scenario.rounds or 10**9
        while self.newest < last:
            number = self.newest + 1
            for event in self.scenario.events:
                if event.round == number:
                    # Who goes then goes with a lease; who comes is too late for one.
                    self._happen(event, env.now + 1.0)
            yield from self._round(env, number)

    def _round(self, env: Any, number: int) -> Generator[Any, None, None]:
        committed: I64 = np.zeros(0, dtype=np.int64)
        tokens, pause = 0, 0.0
        while True:
            attempt = yield from self._open(env, number, committed, tokens)
            course, outcome = attempt
            yield env.timeout(max(0.0, float(outcome.moment - env.now)))
            done = course.nodes[outcome.committed]
            self.measured[done] = measured_speeds(self.measured[done], self._seen(course, outcome))
            committed = np.concatenate([committed, done])
            tokens += int(course.tokens[outcome.committed].sum())
            closes = outcome.decision.action == "close"
            self.account.attempt(number, course, outcome, closes=closes)
            if closes:
                break
            pause = min(MAX_REOPEN_SECONDS, max(1.0, 2 * pause))
            yield env.timeout(pause)
        closed = env.now
        work = len(committed) * self.sizes.aggregate_seconds + self.sizes.publish_seconds
        done_at = float(self._defer(np.array([closed + work]))[0])
        yield env.timeout(done_at - closed)
        self.newest = number
        self.account.published(number, closed, env.now, outcome)

    def _open(
        self, env: Any, number: int, committed: I64, already_tokens: int
    ) -> Generator[Any, None, tuple[Course, Outcome]]:
        """Wait until enough nodes are there, and lease."""
        rule = self.rules.round
        while True:
            members = np.setdiff1d(self._members(env), committed, assume_unique=True)
            if len(members) and len(members) + len(committed) >= rule.min_nodes:
                break
            yield env.timeout(RETRY_SECONDS)
        course = self._course(members, env.now)
        outcome = settle(
            Rule(
                number,
                env.now + rule.deadline_seconds,
                rule.quorum,
                self._patience(),
                len(committed),
                already_tokens,
                rule.close_at_share,
            ),
            course,
            self.fleet.timelines.absences(members, env.now, env.now + rule.deadline_seconds),
            env.now,
            self._outage(env.now),
        )
        self.account.opened(env.now, course)
        return course, outcome

    def _patience(self) -> float:
        """How long a node may be silent, in seconds, in a network of this size."""
        return patience_seconds(self.rules.round.lost_after_seconds, self._poll())

    def _poll(self) -> float:
        """How often a node asks for messages, in seconds, in a network of this size."""
        network = self.config.network
        return poll_seconds(
            self.fleet.count, network.max_pulls_per_second, network.min_poll_seconds
        )

    def _members(self, env: Any) -> I64:
        """Nodes that are there, hold a replica that fits, and keep up."""
        everybody = np.arange(self.fleet.count)
        online = self.fleet.timelines.is_online(everybody, env.now)
        if self._outage(env.now)[0] <= env.now:
            online[:] = False  # they are there, and the coordinator is not
        here = everybody[online & self.fleet.fits_here & ~self.catching]
        self._follow(here, env.now)
        behind = self.newest - self.version[here]
        late = (behind > self.rules.round.max_behind) | (self.version[here] == JOINING)
        if late.any():
            env.process(self._catch_up(env, here[late]))
        members: I64 = here[~late]
        return members

    def _follow(self, nodes: I64, now: float) -> None:
        """Nodes that were idle have fetched what was published while they were."""
        lines = self.fleet.timelines
        behind = self.newest - 1 - self.version[nodes]
        idle = (behind > 0) & (self.version[nodes] != JOINING)
        if not idle.any():
            return
        nodes, behind = nodes[idle], behind[idle]
        since = now - lines.starts[lines.place(nodes, now)]
        needs = behind * (self.sizes.update_bytes / self.down[nodes] + self.sizes.apply_seconds)
        chain = behind <= self.rules.round.checkpoint_every
        able = nodes[(since >= needs) & chain]
        moved = (self.newest - 1 - self.version[able]).sum() * self.sizes.update_bytes
        self.account.moved(0.0, float(moved), float(moved) * self._own_share(float("inf")))
        self.version[able] = self.newest - 1

    def _catch_up(self, env: Any, nodes: I64) -> Generator[Any, None, None]:
        """Nodes far behind fetch a chain of updates or a checkpoint, outside rounds."""
        self.catching[nodes] = True
        rule, sizes = self.rules.round, self.sizes
        checkpoint = self.newest - self.newest % rule.checkpoint_every
        since = max(checkpoint - rule.checkpoint_every, self.newest - MAX_UPDATE_CHAIN, 0)
        joining = self.version[nodes] == JOINING
        chained = ~joining & (self.version[nodes] >= since)
        updates = np.where(chained, self.newest - self.version[nodes], self.newest - checkpoint)
        size = updates * sizes.update_bytes + np.where(chained, 0.0, sizes.checkpoint_bytes)
        rate = fair_rate(self.down[nodes], self.egress + self.mirrors)
        seconds = size / np.minimum(self.down[nodes], rate) + updates * sizes.apply_seconds
        seconds = seconds + np.where(joining, PROOF_SECONDS, 0.0)
        lines = self.fleet.timelines
        done = lines.when(nodes, lines.online_seconds(nodes, env.now) + seconds)
        moved = float(size.sum())
        self.account.moved(0.0, moved, moved * self._own_share(float(self.down[nodes].sum())))
        target = self.newest
        for moment in np.unique(done):
            if not np.isfinite(moment):
                break
            yield env.timeout(max(0.0, float(moment) - env.now))
            ready = nodes[done == moment]
            self.version[ready] = target
            self.catching[ready] = False

    # A round's arithmetic -------------------------------------------------------------------------

    def _course(self, members: I64, now: float) -> Course:
        sizes, lines = self.sizes, self.fleet.timelines
        tokens = lease_tokens(
            self.measured[members],
            self.rules.round.tokens_per_node,
            self.rules.round.deadline_seconds,
            self.scenario.corpus.block_tokens,
            max_ratio=self.rules.round.largest_lease,
        )
        behind = self.newest - self.version[members]
        size = behind * sizes.update_bytes + tokens * sizes.bytes_per_token
        rate = fair_rate(self.down[members], self.egress + self.mirrors)
        latency = self.fleet.latency[members]
        artifacts = behind + tokens / self.scenario.corpus.block_tokens
        # As in virtual/timing.py: Flower's message, then one artifact after the other.
        wait = sizes.hear_seconds + 3 * latency + artifacts * (latency + sizes.artifact_seconds)
        wait += self._poll() / 2 + size / np.minimum(self.down[members], rate)
        work = lines.online_seconds(members, now) + wait + behind * sizes.apply_seconds
        fetched = self._defer(lines.when(members, work))
        self._speeds = self._speeds_of(members)
        work = self._work_at(members, fetched, work) + tokens / self._speeds
        trained = lines.when(members, work)
        work = work + sizes.encode_seconds
        encoded = lines.when(members, work)
        own = lines.when(members, work + sizes.uplink_bytes / self.up[members])
        queued = one_after_another(encoded, sizes.uplink_bytes / self.ingress)
        pushed = self._defer(np.maximum(own, queued))
        claimed = pushed + sizes.submit_seconds + 3 * latency
        arrived = one_after_another(claimed, sizes.verify_seconds)
        self.version[members] = self.newest
        share = self._own_share(float(np.minimum(self.down[members], rate).sum()))
        self.account.moved(0.0, float(size.sum()), float(size.sum()) * share)
        return Course(members, tokens, fetched, trained, encoded, pushed, arrived)

    def _speeds_of(self, nodes: I64) -> F64:
        """Tokens a second in one round: a node's own speed, and what disturbs it this time."""
        noise = self.fleet.noise[nodes] * self.rng.standard_normal(len(nodes))
        return self.fleet.speed[nodes] * np.exp(noise)

    def _work_at(self, nodes: I64, moments: F64, otherwise: F64) -> F64:
        """Online seconds at ``moments``; inf stays never."""
        known = np.isfinite(moments)
        seconds = self.fleet.timelines.online_seconds(nodes, np.where(known, moments, 0.0))
        return np.where(known, seconds, otherwise + 1e12)

    def _seen(self, course: Course, outcome: Outcome) -> F64:
        """The speeds that the committed contributions report."""
        return self._speeds[outcome.committed]

    def _own_share(self, demand: float) -> float:
        """Share of what nodes fetch that comes from the coordinator and not from mirrors."""
        if not self.mirrors:
            return 1.0
        total = min(demand, self.egress + self.mirrors)
        return max(0.0, 1.0 - self.mirrors / total) if total > 0 else 0.0

    # What happens ---------------------------------------------------------------------------------

    def _happen(self, event: Any, moment: float) -> None:
        if event.outage_minutes is not None:
            self.outages.append((moment, moment + event.outage_minutes * 60))
        elif event.join is not None:
            self.fleet.join(event.population, event.join, moment)
        else:
            names = [fit.node_class.name for fit in self.fits]
            there = np.setdiff1d(np.arange(self.fleet.count), self.fleet.waiting)
            if event.population is not None:
                there = there[self.fleet.kind[there] == names.index(event.population)]
            gone = self.rng.choice(there, round(event.leave * len(there)), replace=False)
            hours = event.back_after_hours
            self.fleet.leave(gone, moment, np.inf if hours is None else moment + hours * 3600)

    def _outage(self, now: float) -> tuple[float, float]:
        """The outage that is, or comes next; (inf, inf) is none."""
        ahead = [one for one in self.outages if one[1] > now]
        return min(ahead, default=(np.inf, np.inf))

    def _defer(self, moments: F64) -> F64:
        """What falls into an outage happens at its end."""
        for begin, end in sorted(self.outages):
            moments = np.where((moments >= begin) & (moments < end), end, moments)
        return moments


def horizon_of(scenario: Scenario) -> float:
    """Virtual seconds after which a plan ends at the latest."""
    if scenario.days is not None:
        return scenario.days * DAY
    longest = (scenario.rounds or 1) * (scenario.rules.round.deadline_seconds + 3600) * 3
    return float(min(MAX_DAYS * DAY, longest + 2 * DAY))


def plan(scenario: Scenario, *, sizes: Sizes | None = None, events: bool = False) -> PlanResult:
    """Plan a scenario: how a network of these nodes under these rules would fare.

    Args:
        scenario: from ``load_scenario``.
        sizes: bytes and seconds instead of those of the scenario's model and codecs.
        events: keep every node's part in every round (``PlanResult.events``).

    Raises:
        ConfigError: the model's config cannot be read, or simpy is not installed.
    """
    from talkoot.protocol.errors import ConfigError

    try:
        import simpy  # noqa: F401
    except ImportError as err:
        raise ConfigError(
            "The planner needs simpy: install it with `pip install 'talkoot[sims]'`.",
            code="missing-extra",
        ) from err
    return Engine(scenario, sizes=sizes, keep_events=events).run()
