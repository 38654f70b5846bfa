"""Where the nodes' time, the bytes and the energy of a plan went."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np

from talkoot.sims.panels import some_of
from talkoot.sims.planning.fit import Fit
from talkoot.sims.planning.fleet import Fleet
from talkoot.sims.planning.passing import Course, Outcome
from talkoot.sims.planning.result import PHASES, Bar, ClassRow, PlanResult, RoundRow
from talkoot.sims.planning.sizes import Sizes
from talkoot.sims.planning.timeline import DAY, F64, Bools
from talkoot.sims.scenario import Scenario

KEPT_ROUNDS: Final = 400
"""Rounds whose timelines are kept."""


class Account:
    """The books of one plan, by class of nodes."""

    def __init__(
        self, scenario: Scenario, fits: Sequence[Fit], fleet: Fleet, sizes: Sizes, keep_events: bool
    ) -> None:
        self.scenario, self.fits, self.fleet, self.sizes = scenario, fits, fleet, sizes
        classes = len(fits)
        self.seconds = {phase: np.zeros(classes) for phase in PHASES}
        self.online = np.zeros(classes)
        self.tokens = np.zeros(classes, dtype=np.int64)
        self.contributions = np.zeros(classes, dtype=np.int64)
        self.bytes = [0.0, 0.0, 0.0]  # up, down, out of the coordinator's own line
        self.rounds: list[RoundRow] = []
        self.bars: list[tuple[int, tuple[Bar, ...]]] = []
        self.events: list[Any] | None = [] if keep_events else None
        self.reopened = 0
        self._looked = 0.0  # up to here online time is in the books
        self._fresh()

    def _fresh(self) -> None:
        self._attempts = 0
        self._opened: float | None = None
        self._leased = 0.0
        self._members = self._committed = self._lost = 0
        # An attempt is in the books once its round is published: figures are of published rounds.
        classes = len(self.fits)
        self._seconds = {phase: np.zeros(classes) for phase in PHASES}
        self._tokens = np.zeros(classes, dtype=np.int64)
        self._contributions = np.zeros(classes, dtype=np.int64)
        self._before = list(self.bytes)
        self._pending: list[tuple[Course, Bools, float]] = []

    def moved(self, up: float, down: float, own: float) -> None:
        """Bytes that nodes pushed and fetched, and those out of the coordinator's own line."""
        for place, size in enumerate((up, down, own)):
            self.bytes[place] += size

    def opened(self, moment: float, course: Course) -> None:
        """An attempt at a round begins."""
        self._opened = moment if self._opened is None else self._opened
        self._leased = moment
        self._attempts += 1
        self._members += len(course.nodes)

    def attempt(self, number: int, course: Course, outcome: Outcome, *, closes: bool) -> None:
        """An attempt is over: where its members' time went."""
        kinds = self.fleet.kind[course.nodes]
        done = outcome.committed
        lines, end = self.fleet.timelines, outcome.moment
        marks = (self._leased, course.fetched, course.trained, course.encoded, course.arrived, end)
        at = [lines.online_seconds(course.nodes, np.minimum(mark, end)) for mark in marks]
        parts = [after - before for before, after in pairwise(at)]
        fetch, train, encode, push, others = parts
        phases = {"fetch": fetch, "encode": encode, "push": push, "others": others}
        phases["train"], phases["wasted"] = np.where(done, train, 0.0), np.where(done, 0.0, train)
        for phase, seconds in phases.items():
            self._seconds[phase] += self._sum(kinds, seconds)
        self._tokens += self._sum(kinds, np.where(done, course.tokens, 0)).astype(np.int64)
        self._contributions += self._sum(kinds, done.astype(np.float64)).astype(np.int64)
        self._committed += int(done.sum())
        self._lost = outcome.lost
        self.moved(self.sizes.uplink_bytes * float((course.pushed <= end).sum()), 0.0, 0.0)
        if closes:
            self._keep_bars(number, course, done)
        if self.events is not None:
            self.events.append((number, self._leased, course, done))
        self._pending.append((course, done, end))

    def published(self, number: int, closed: float, moment: float, outcome: Outcome) -> None:
        """A round is over."""
        lines = self.fleet.timelines
        last = self._pending[-1][0].nodes
        closing = lines.online_seconds(last, moment) - lines.online_seconds(last, closed)
        self._seconds["closing"] += self._sum(self.fleet.kind[last], closing)
        for phase, values in self._seconds.items():
            self.seconds[phase] += values
        self.tokens += self._tokens
        self.contributions += self._contributions
        self.reopened += self._attempts - 1
        online = self._look(moment)
        up, down, own = (now - then for now, then in zip(self.bytes, self._before, strict=True))
        assert self._opened is not None
        self.rounds.append(
            RoundRow(
                round=number,
                attempts=self._attempts,
                opened=self._opened,
                closed=closed,
                published=moment,
                code=outcome.decision.code,
                members=self._members,
                contributions=self._committed,
                lost=self._lost,
                tokens=int(self._tokens.sum()),
                bytes_up=up,
                bytes_down=down,
                egress=own,
                train_by_class=tuple(self._seconds["train"].tolist()),
                online_by_class=tuple(online.tolist()),
            )
        )
        self._fresh()

    def _look(self, moment: float) -> F64:
        """Take the time online up to ``moment`` into the books, of nodes that can train."""
        able = np.flatnonzero(self.fleet.fits_here)
        lines = self.fleet.timelines
        seconds = lines.online_seconds(able, moment) - lines.online_seconds(able, self._looked)
        self._looked = moment
        online = self._sum(self.fleet.kind[able], np.maximum(seconds, 0.0))
        self.online += online
        return online

    def _sum(self, kinds: Any, values: Any) -> F64:
        sums: F64 = np.bincount(kinds, weights=values, minlength=len(self.fits)).astype(np.float64)
        return sums

    def _keep_bars(self, number: int, course: Course, done: Bools) -> None:
        if len(self.bars) >= KEPT_ROUNDS:
            return
        kinds = self.fleet.kind[course.nodes]
        present = np.unique(kinds)
        order = np.argsort(course.arrived, kind="stable")
        chosen = [
            place
            for kind in present
            for place in some_of(order[kinds[order] == kind].tolist(), len(present))
        ]
        opened = self._leased if self._opened is None else self._opened

        def since(values: F64, place: int) -> float | None:
            value = float(values[place]) - opened
            return value if np.isfinite(value) else None

        self.bars.append(
            (
                number,
                tuple(
                    Bar(
                        node=int(course.nodes[place]),
                        kind=int(kinds[place]),
                        leased=self._leased - opened,
                        fetched=since(course.fetched, place),
                        trained=since(course.trained, place),
                        encoded=since(course.encoded, place),
                        arrived=since(course.arrived, place),
                        committed=bool(done[place]),
                    )
                    for place in chosen
                ),
            )
        )

    # The end --------------------------------------------------------------------------------------

    def result(self, end: float | None) -> PlanResult:
        """What was found; ``end`` is the plan's length if the scenario gives one."""
        length = float(self.rounds[-1].published if self.rounds else (end or 0.0))
        self.seconds["apart"] += np.maximum(self.online - sum(self.seconds.values()), 0.0)
        online = float(self.online.sum())
        phases = {
            phase: float(values.sum()) / online if online else 0.0
            for phase, values in self.seconds.items()
        }
        classes = tuple(self._class(kind) for kind in range(len(self.fits)))
        figures = self._figures(length, online, classes)
        return PlanResult(
            scenario=self.scenario,
            figures=figures,
            phases=phases,
            bottleneck=self._bottleneck(phases),
            classes=classes,
            rounds=tuple(self.rounds),
            bars=tuple(self.bars),
            payload={
                "parameters": self.sizes.parameters,
                "uplink_bytes": self.sizes.uplink_bytes,
                "update_bytes": self.sizes.update_bytes,
                "checkpoint_bytes": self.sizes.checkpoint_bytes,
            },
            notes=self._notes(end),
            events=self.events or [],
        )

    def _class(self, kind: int) -> ClassRow:
        fit = self.fits[kind]
        node = fit.node_class
        online = float(self.online[kind])
        seconds = {phase: float(values[kind]) for phase, values in self.seconds.items()}
        busy = seconds["train"] + seconds["wasted"]
        joules = busy * node.watts + (online - busy) * node.population.idle_watts
        return ClassRow(
            name=node.name,
            device=node.population.device,
            nodes=int((self.fleet.kind == kind).sum()),
            recipe=None if fit.recipe is None else fit.recipe.name,
            why=fit.verdict.sentence,
            tokens_per_second=fit.tokens_per_second,
            tokens=int(self.tokens[kind]),
            contributions=int(self.contributions[kind]),
            utilization=seconds["train"] / online if online else None,
            phases={name: value / online if online else 0.0 for name, value in seconds.items()},
            kwh=joules / 3.6e6,
        )

    def _figures(
        self, length: float, online: float, classes: Sequence[ClassRow]
    ) -> dict[str, float | None]:
        days = length / DAY
        rounds = len(self.rounds)
        tokens = int(self.tokens.sum())
        pace = tokens / days if days and rounds else None
        up = sum(row.bytes_up for row in self.rounds)
        down = sum(row.bytes_down for row in self.rounds)
        own = sum(row.egress for row in self.rounds)
        line = self.scenario.coordinator
        kwh = sum(row.kwh for row in classes)
        prices = [entry.price_per_kwh for entry in self.scenario.population]
        energy = sum(row.kwh * price for row, price in zip(classes, prices, strict=True))
        target = self.scenario.target_tokens
        spans = [row.published - row.opened for row in self.rounds]
        return {
            "rounds": rounds,
            "virtual_days": days,
            "round_seconds": float(np.mean(spans)) if spans else None,
            "reopened": self.reopened,
            "tokens": tokens,
            "tokens_per_day": pace,
            "utilization": float(self.seconds["train"].sum()) / online if online else None,
            "nodes": self.fleet.count,
            "nodes_that_fit": int(self.fleet.fits_here.sum()),
            "contributions_per_round": (
                float(np.mean([row.contributions for row in self.rounds])) if rounds else None
            ),
            "bytes_up": up,
            "bytes_down": down,
            "coordinator_egress_gb_per_day": own / 1e9 / days if days else None,
            "coordinator_ingress_gb_per_day": up / 1e9 / days if days else None,
            "kwh": kwh,
            "cost": energy + line.price_per_egress_gb * down / 1e9,
            "days_to_target": target / pace if target is not None and pace else None,
        }

    def _bottleneck(self, phases: dict[str, float]) -> str:
        if not self.fleet.fits_here.any():
            return "No node can hold a replica of this model: see why under each class."
        if not self.rounds:
            return "No round was published: too few nodes are there at once, or none are in time."
        sentences = {
            "fetch": "the way down: raise coordinator.up_mbit or mirrors, or compress [downlink]",
            "encode": "the nodes' encoding: longer leases make it count less",
            "push": "the way up: the nodes' lines, coordinator.down_mbit, or verification",
            "others": "the last nodes of a round: more even leases, or a shorter deadline",
            "closing": "the coordinator's closing of rounds: longer leases, or a faster machine",
            "apart": "nodes without a lease: fewer joiners at once, a larger max_behind, or a "
            "smaller min_nodes",
            "wasted": "work that comes too late: a longer deadline or smaller leases",
        }
        worst = max(sentences, key=lambda phase: phases[phase])
        return f"{phases[worst]:.1%} of the nodes' time goes to {sentences[worst]}."

    def _notes(self, end: float | None) -> tuple[str, ...]:
        notes = []
        wanted = self.scenario.rounds
        if wanted is not None and len(self.rounds) < wanted and end is None:
            notes.append(f"Only {len(self.rounds)} of {wanted} rounds were published in time.")
        if self.scenario.attackers:
            notes.append("A plan counts attackers as anybody; talkoot-sim run trains with them.")
        corpus, trained = self.scenario.corpus.tokens, int(self.tokens.sum())
        if corpus is not None and trained > corpus:
            notes.append(f"The corpus is passed {trained / corpus:.1f} times.")
        return tuple(notes)
