"""How planning grows with the network: seconds of one core, nodes a second, memory a node."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.child import run_child
from bench.registry import Row, Run, benchmark, figure
from talkoot.sims.planning import Sizes
from talkoot.sims.scenario import load_scenario

SIZES = (100, 1000, 10_000)
PARAMETERS = 6_738_415_616


def plan_thousands(nodes: int, days: float) -> dict[str, float]:
    """Plan 7b-thousand with so many nodes in a child; given sizes, so that torch stays out."""
    from talkoot.sims import plan

    factor = nodes / 1000
    scenario = load_scenario("7b-thousand")
    shares = {
        f"population.{k}.count": round(p.count * factor) for k, p in enumerate(scenario.population)
    }
    more = {
        "days": days,
        "rules.round.deadline_seconds": 7200,
        "rules.round.quorum": max(1, nodes // 10),
        "rules.round.min_nodes": max(1, nodes // 10),
        "coordinator.up_mbit": 2.5 * nodes,
        "coordinator.down_mbit": 2.5 * nodes,
    }
    sizes = Sizes(
        parameters=PARAMETERS,
        uplink_bytes=126e6,
        update_bytes=499e6,
        checkpoint_bytes=27e9,
        bytes_per_token=2.0,
        verify_seconds=100.0 / nodes,
        aggregate_seconds=100.0 / nodes,
        publish_seconds=100.0,
        encode_seconds=34.0,
        apply_seconds=27.0,
    )
    chosen = load_scenario("7b-thousand", {**shares, **more})
    began = time.process_time()
    result = plan(chosen, sizes=sizes)
    seconds = time.process_time() - began
    leases = sum(row.members for row in result.rounds)
    return {"seconds": seconds, "rounds": len(result.rounds), "leases": leases}


@benchmark("plan")
def planning(run: Run) -> Iterator[Row]:
    """Core seconds for a month of 100, 1,000 and 10,000 nodes, and bytes a node."""
    days = 3.0 if run.quick else 30.0
    base = 0
    for nodes in SIZES:
        child = run_child("bench.cases.plan:plan_thousands", {"nodes": nodes, "days": days})
        found = child.result
        note = f"{days:g} virtual days, {found['rounds']:.0f} rounds; CPU seconds of one core"
        most = 60.0 if nodes == SIZES[-1] else None
        yield figure(f"plan_seconds_{nodes}", "s", found["seconds"], at_most=most, note=note)
        yield figure(
            f"plan_leases_per_second_{nodes}",
            "1/s",
            found["leases"] / found["seconds"],
            note="nodes times rounds, in which each had a lease",
        )
        if nodes == SIZES[0]:
            base = child.peak_anonymous
    yield figure(
        "plan_bytes_per_node",
        "B",
        (child.peak_anonymous - base) / (SIZES[-1] - SIZES[0]),
        note=f"anonymous memory, between {SIZES[0]} and {SIZES[-1]} nodes",
    )
