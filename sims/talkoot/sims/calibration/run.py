"""``calibrate``: a real network, simulations of what was measured of it, and how they differ."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.files import write_atomic
from talkoot.sims.calibration.compare import Comparison, compare
from talkoot.sims.calibration.line import Found, measure
from talkoot.sims.calibration.real import (
    WARM,
    NodeSeen,
    RoundSeen,
    Seen,
    insist_small,
    names_of,
    run_real,
    save,
)
from talkoot.sims.local import LocalNetwork
from talkoot.sims.scenario import Population, Scenario
from talkoot.sims.wan import FAR, Line, Wan

LOOPBACK: Final = "127.0.0.1"
LOOPBACK_MBIT: Final = 1000.0
"""What loopback is measured with; it carries more than any node needs."""
QUEUE_MS: Final = 200.0
SEEDS: Final = 6
"""With six, losses may differ by 2.8 times what seeds scatter by, with three by 5 times."""
Hear = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """What was found."""

    scenario: Scenario
    """As it was given."""
    simulated_as: Scenario
    """With one population a node, of its measured speed and line."""
    real: Seen
    simulated: tuple[Seen, ...]
    planned: Seen | None
    comparison: Comparison
    lines: tuple[Found, ...]
    """One a node, measured."""
    shaped: bool
    """Whether the scenario's lines were between the nodes and the coordinator."""
    load: tuple[float, float]
    """Of this machine, processes that wait or run (a minute's mean), before and after."""
    cores: int

    @property
    def notes(self) -> list[str]:
        """What a reader should know."""
        found = []
        if not self.shaped:
            found.append(
                "The real nodes were on plain loopback and not on the scenario's lines: lines need "
                "network namespaces, which need root."
            )
        if self.load[0] > self.cores / 2:
            found.append(
                f"Other programs kept this machine busy (load {self.load[0]:.1f} on {self.cores} "
                "cores before it began): real seconds are worth little."
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """For ``calibration.json`` and ``--json``."""
        return {
            "scenario": self.scenario.model_dump(mode="json"),
            "simulated_as": self.simulated_as.model_dump(mode="json"),
            "shaped": self.shaped,
            "lines": [asdict(line) for line in self.lines],
            "load": list(self.load),
            "cores": self.cores,
            "notes": self.notes,
            "real": self.real.to_json(),
            "simulated": [one.to_json() for one in self.simulated],
            "planned_round_seconds": None if self.planned is None else self.planned.round_seconds,
            **self.comparison.to_json(),
        }


def calibrate(
    scenario: Scenario,
    *,
    out: Path,
    seeds: int = SEEDS,
    shaped: bool = True,
    say: Hear = lambda _text: None,
) -> Calibration:
    """Let a small network live through a scenario, simulate it, and hold the two together.

    Args:
        scenario: at most eight nodes, all there from the beginning, no liars and no events.
        out: where both networks go (made anew), and ``calibration.json``.
        seeds: simulations; their difference is what chance does to a loss.
        shaped: put the scenario's lines between nodes and coordinator (needs root).
        say: hears what goes on.

    Raises:
        ConfigError: the scenario is not one that can be lived through here.
        UnavailableError: the real network or a simulation did not come to its end.
    """
    from talkoot.sims.virtual.command import require_extra

    insist_small(scenario)
    require_extra()
    if seeds < 2:
        raise ConfigError("Seed noise needs two simulations at least: give --seeds 2 or more.")
    shutil.rmtree(out / "simulated", ignore_errors=True)
    before = os.getloadavg()[0]
    real, lines = live(scenario, out, shaped=shaped, say=say)
    save(real, out / "real.json")
    found = against(scenario, real, lines, out=out, seeds=seeds, say=say)
    calibration = Calibration(
        scenario=scenario,
        simulated_as=found[0],
        real=real,
        simulated=tuple(found[1]),
        planned=found[2],
        comparison=compare(real, found[1], found[2].round_seconds if found[2] else None),
        lines=tuple(lines),
        shaped=shaped,
        load=(before, os.getloadavg()[0]),
        cores=os.cpu_count() or 1,
    )
    write_atomic(
        out / "calibration.json", json.dumps(calibration.to_json(), indent=1, default=str).encode()
    )
    return calibration


def live(scenario: Scenario, out: Path, *, shaped: bool, say: Hear) -> tuple[Seen, list[Found]]:
    """The real network, and its lines as they were measured before it began."""
    names = names_of(scenario)
    said = said_lines(scenario)
    with ExitStack() as stack:
        network = LocalNetwork(out / "real")
        near: list[Sequence[str]] = [()] * len(names)
        far: Sequence[str] = ()
        if shaped:
            say("lines are put up")
            wan = stack.enter_context(Wan(said))
            near, far = [wan.near_of(place) for place in range(len(names))], wan.far
            network.prefixes = {"coordinator": far, **dict(zip(names, near, strict=True))}
        say("lines are measured")
        address = FAR if shaped else LOOPBACK
        lines = [
            measure(
                near[place],
                far,
                address,
                line.up_mbit if shaped else LOOPBACK_MBIT,
                line.down_mbit if shaped else LOOPBACK_MBIT,
            )
            for place, line in enumerate(said)
        ]
        with network:
            bind = "0.0.0.0" if shaped else LOOPBACK  # noqa: S104 - within its own namespace
            seen = run_real(scenario, network, say, bind=bind, host=address)
        return seen, lines


def said_lines(scenario: Scenario) -> list[Line]:
    """The scenario's lines, one a node."""
    found = []
    for node in scenario.classes(1):
        link = node.link
        line = Line(link.up_mbit, link.down_mbit, link.latency_ms, 0.0, QUEUE_MS)
        found += [line] * node.population.count
    return found


def as_measured(scenario: Scenario, real: Seen, lines: Sequence[Found]) -> Scenario:
    """The scenario with a population for each node, of its measured speed and line."""
    entries = [entry for entry in scenario.population for _ in range(entry.count)]
    measured = []
    for entry, node, line in zip(entries, real.nodes, lines, strict=True):
        measured.append(_measured(entry, node, line))
    return scenario.model_copy(update={"population": tuple(measured)})


def _measured(entry: Population, node: NodeSeen, line: Found) -> Population:
    return entry.model_copy(
        update={
            "name": node.name,
            "count": 1,
            "tokens_per_second": node.tokens_per_second,
            "speed_spread": 0.0,
            "speed_noise": min(node.noise, 1.0),
            "up_mbit": line.up_mbit,
            "down_mbit": line.down_mbit,
            "latency_ms": line.rtt_ms,
        }
    )


def against(
    scenario: Scenario,
    real: Seen,
    lines: Sequence[Found],
    *,
    out: Path,
    seeds: int,
    say: Hear,
) -> tuple[Scenario, list[Seen], Seen | None]:
    """The scenario as measured, its simulations, and its plan."""
    from talkoot.sims.planning import plan
    from talkoot.sims.virtual.command import run

    measured = as_measured(scenario, real, lines)
    found = []
    for place in range(seeds):
        say(f"simulation {place + 1} of {seeds}")
        one = measured.model_copy(update={"seed": scenario.seed + place})
        result = run(one, out=out / "simulated" / f"seed-{one.seed}")
        found.append(seen_of(result.document, result.leases))
    say("the plan")
    return measured, found, _planned(plan(measured))


def _planned(result: Any) -> Seen | None:
    """Of a plan only its moments."""
    if len(result.rounds) < WARM + 2:
        return None
    rows = tuple(
        RoundSeen(row.round, row.opened, row.closed, row.published, 0.0, None)
        for row in result.rounds
    )
    return Seen(rows, (), int(result.figures["tokens"] or 0))


def seen_of(document: Mapping[str, Any], leases: Path) -> Seen:
    """A simulation as a real network is seen.

    Args:
        document: ``run.json``.
        leases: ``leases.csv``.
    """
    import csv

    from talkoot.sims.virtual.site import Messages

    rounds = document["rounds"]
    start = rounds[0]["opened"]
    rows = tuple(
        RoundSeen(
            row["round"],
            row["opened"] - start,
            row["closed"] - start,
            row["published"] - start,
            row["loss"],
            row["heldout"],
        )
        for row in rounds
    )
    seen = Seen(rows, (), document["figures"]["tokens"], document["first_loss"])
    said, heard = Messages(**document["messages"]).of(seen.round_seconds, 1.0)
    with leases.open(encoding="utf-8", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["answer"] == "accepted"]
    nodes = []
    for entry in document["scenario"]["population"]:
        mine = [row for row in table if row["population"] == entry["name"]]
        up = [int(row["bytes_up"]) for row in mine if WARM <= int(row["round"]) < len(rounds)]
        down = [int(row["bytes_down"]) for row in mine if int(row["round"]) > WARM]
        # A real node is looked at while it trains: between two looks it pushed what it made in the
        # round before, and fetched version and blocks of this one.
        nodes.append(
            NodeSeen(
                entry["name"],
                entry["tokens_per_second"],
                entry["speed_noise"],
                sum(up) / max(len(up), 1) + said,
                sum(down) / max(len(down), 1) + heard,
            )
        )
    return Seen(seen.rounds, tuple(nodes), seen.tokens, seen.first_loss, _parts(rows, table, start))


def _parts(
    rounds: Sequence[RoundSeen], table: Sequence[Mapping[str, str]], start: float
) -> dict[str, float]:
    """As ``real._parts``."""
    count = max(len(rounds) - WARM, 1)
    found = dict.fromkeys(("training", "around", "closing", "opening"), 0.0)
    for before, row in zip(rounds[WARM - 1 :], rounds[WARM:], strict=False):
        mine = [one for one in table if int(one["round"]) == row.round]
        last = max(mine, key=lambda one: float(one["answered"]))
        training = float(last["encoded"]) - float(last["fetched"])
        arrived = float(last["arrived"]) - start
        found["training"] += training / count
        found["around"] += (arrived - row.opened - training) / count
        found["closing"] += (row.published - arrived) / count
        found["opening"] += (row.opened - before.published) / count
    return found
