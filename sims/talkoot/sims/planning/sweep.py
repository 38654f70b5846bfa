"""One plan for each value of some keys, and what planning costs."""

from __future__ import annotations

import itertools
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from talkoot.protocol.errors import ConfigError
from talkoot.sims.figures import bytes_text, seconds_text
from talkoot.sims.planning.result import PlanResult
from talkoot.sims.scenario import Scenario, load_scenario

MAX_POINTS: Final = 1000
SECONDS: Final = (0.6, 5e-9, 1.2e-6)
"""Of a plan: in all, a node and minute of virtual time for building timelines, a node and round.
Measured (docs/LOG.md); the import of torch for the codec's sizes is another 3 s."""
INTERVAL_BYTES: Final = 160
"""Of memory, an interval in which a node is online."""
EVENT_BYTES: Final = 80
"""Of memory, a node and round with ``--events``."""


@dataclass
class Point:
    """One combination of values, with all its seeds."""

    label: str
    """``key=value`` of what was swept; empty for a single plan."""
    values: dict[str, Any]
    scenario: Scenario
    seeds: list[int]
    results: list[PlanResult] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a plan would take."""

    plans: int
    nodes: int
    seconds: float
    memory_bytes: float

    @property
    def sentence(self) -> str:
        """For people."""
        plans = "One plan" if self.plans == 1 else f"{self.plans} plans"
        return (
            f"{plans} of {self.nodes:,} nodes: about {seconds_text(self.seconds)} on one core and "
            f"{bytes_text(self.memory_bytes)} of memory beside torch's."
        )

    def to_json(self) -> dict[str, float]:
        """For ``--json``."""
        return {
            "plans": self.plans,
            "nodes": self.nodes,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
        }


def parse_value(text: str) -> object:
    """A TOML value: ``1e9``, ``true``, ``[0, 1]``, ``"a"``; anything else is a word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_changes(texts: Sequence[str]) -> dict[str, object]:
    """``key=value`` texts as overrides. Raises :class:`ConfigError`."""
    found: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r} is not key=value, such as rules.round.quorum=8.")
        found[key.strip()] = parse_value(value.strip())
    return found


def parse_sweep(text: str) -> tuple[str, list[object]]:
    """``key=a,b,c``. Raises :class:`ConfigError`."""
    key, equals, rest = text.partition("=")
    values = [parse_value(value.strip()) for value in rest.split(",") if value.strip()]
    if not equals or not key.strip() or not values:
        raise ConfigError(
            f"{text!r} is not key=a,b,c, such as rules.round.deadline_seconds=3600,7200."
        )
    return key.strip(), values


def points_of(
    name: str, sweeps: Sequence[str], changes: Mapping[str, object], seeds: int
) -> list[Point]:
    """All combinations, each validated before anything runs. Raises :class:`ConfigError`."""
    parsed = [parse_sweep(text) for text in sweeps]
    keys = [key for key, _ in parsed]
    combinations = list(itertools.product(*(values for _, values in parsed)))
    if len(combinations) * seeds > MAX_POINTS:
        raise ConfigError(
            f"That is {len(combinations) * seeds} plans, over {MAX_POINTS}: sweep fewer values."
        )
    points = []
    for combination in combinations:
        values = dict(zip(keys, combination, strict=True))
        scenario = load_scenario(name, {**changes, **values})
        label = ", ".join(f"{key.split('.')[-1]}={value}" for key, value in values.items())
        points.append(
            Point(label, values, scenario, [scenario.seed + number for number in range(seeds)])
        )
    return points


def run_points(points: Sequence[Point], console: Any, *, events: bool = False) -> list[Point]:
    """Plan them all, with a progress bar when there are several."""
    from rich.progress import track

    from talkoot.sims.planning import plan

    jobs = [(point, seed) for point in points for seed in point.seeds]
    shown: Any = (
        track(jobs, "planning", console=console, transient=True)
        if len(jobs) > 1 and console.is_terminal
        else jobs
    )
    for point, seed in shown:
        began = time.perf_counter()
        scenario = point.scenario.model_copy(update={"seed": seed})
        point.results.append(plan(scenario, events=events))
        point.seconds += time.perf_counter() - began
    return list(points)


def cost_of(points: Sequence[Point]) -> Cost:
    """What planning them would take, before it starts."""
    from talkoot.sims.planning.engine import horizon_of

    seconds, memory, most = 3.0, 0.0, 0
    for point in points:
        scenario = point.scenario
        joins = sum(event.join or 0 for event in scenario.events)
        nodes = scenario.nodes + joins
        length = horizon_of(scenario)
        rounds = length / scenario.rules.round.deadline_seconds
        if scenario.rounds is not None:
            rounds = min(rounds, scenario.rounds)
        intervals = sum(
            entry.count * (1 + length / 86_400 * (len(entry.hours) + entry.drops_per_day))
            for entry in scenario.population
        )
        one = SECONDS[0] + SECONDS[1] * nodes * length / 60 + SECONDS[2] * nodes * rounds
        seconds += one * len(point.seeds)
        memory = max(memory, intervals * INTERVAL_BYTES + nodes * rounds * EVENT_BYTES)
        most = max(most, nodes)
    return Cost(sum(len(point.seeds) for point in points), most, seconds, memory)


def summary_of(point: Point) -> dict[str, Any]:
    """A point for ``--json``: values, and the figures of each seed."""
    return {
        "values": point.values,
        "seeds": point.seeds,
        "figures": [result.figures for result in point.results],
        "phases": [result.phases for result in point.results],
        "bottleneck": point.results[0].bottleneck if point.results else "",
        "seconds": point.seconds,
    }
