"""One network twice: the same state, keys and leases, once undisturbed and once under kills.

With every volunteer needed for every round, and leases whose size does not follow measured speed,
both runs accept the same contributions, and so must end at the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from talkoot.server.audit.reading import view
from talkoot.sims.chaos.arena import Arena
from talkoot.sims.chaos.plan import Strike
from talkoot.sims.chaos.shape import Shape
from talkoot.sims.chaos.soak import Record, Say, Soak, finish_soon
from talkoot.sims.local import LocalNetwork

RUN_SECONDS = 1800.0


def paired_shape(nodes: int) -> Shape:
    """A network in which nothing depends on time: one block a lease, and nobody left behind."""
    return Shape(
        nodes=nodes,
        # A lease is a quarter to four times as long as is asked, by speed: one block in any case.
        tokens_per_node=1024,
        block_tokens=4096,
        quorum=nodes,
        min_nodes=nodes,
        deadline_seconds=RUN_SECONDS,
        lost_after_seconds=RUN_SECONDS,
    )


def paired(
    root: Path, nodes: int, rounds: int, strikes: Iterable[Strike], kills: int, say: Say
) -> tuple[dict[str, Any], Record]:
    """Run both, and compare version by version.

    Args:
        root: below which both networks are made.
        nodes: volunteers.
        rounds: of either run.
        strikes: at the second run.
        kills: after so many deaths the second run is left alone to its end.
        say: tells one line.

    Returns:
        ``{"rounds", "same_contributions", "equal_versions", ...}`` and what the soak saw.
    """
    shape = paired_shape(nodes)
    say("A network whose leases depend on nothing but the seed …")
    with LocalNetwork(root / "network") as network:
        arena = Arena(network, shape)
        arena.make()
        _enrol(arena)
        template = root / "template"
        shutil.rmtree(template, ignore_errors=True)
        shutil.copytree(network.root, template, symlinks=True)

        say(f"{rounds} rounds undisturbed …")
        _begin(arena, rounds)
        arena.until("the end of the calm run", lambda: _finished(arena), RUN_SECONDS)
        calm = _chain(arena)
        network.stop()

        say(f"The same {rounds} rounds, with {kills} kills …")
        shutil.rmtree(network.root)
        shutil.copytree(template, network.root, symlinks=True)  # homes hold absolute paths
        soak = Soak(arena, say)
        _begin(arena, rounds)
        soak.run(_while_running(arena, strikes), kills)
        arena.until("the end of the run under kills", lambda: _finished(arena), RUN_SECONDS)
        soak.audit("the end")
        rough = _chain(arena)
        network.stop()
    same = 0
    while same < min(len(calm), len(rough)) and calm[same]["given"] == rough[same]["given"]:
        same += 1
    equal = sum(a["digest"] == b["digest"] for a, b in zip(calm[:same], rough[:same], strict=True))
    return {
        "rounds": rounds,
        "kills": sum(soak.record.kills.values()),
        "versions_of_the_same_contributions": same,
        "of_these_equal_bit_for_bit": equal,
        "final_model_equal": bool(same == len(calm) == len(rough) == equal),
    }, soak.record


def _enrol(arena: Arena) -> None:
    """Let everybody in and stop, before any round has opened."""
    network = arena.network
    config = network.state / "config.toml"
    text = config.read_text("utf-8")
    wanted = f"min_nodes = {arena.shape.min_nodes}"
    assert wanted in text
    config.write_text(text.replace(wanted, f"min_nodes = {arena.shape.nodes + 1}"), "utf-8")
    arena.start()
    network.wait_for(
        "everybody's admission",
        lambda s: sum(n["status"] == "admitted" for n in s["nodes"]) == arena.shape.nodes,
        RUN_SECONDS,
    )
    network.stop()
    config.write_text(text, "utf-8")


def _begin(arena: Arena, rounds: int) -> None:
    finish_soon(arena, rounds)
    arena.faults.mkdir(exist_ok=True)
    arena.resume()


def _while_running(arena: Arena, strikes: Iterable[Strike]) -> Iterable[Strike]:
    """Strikes until the run is nearly over: a strike waits for the work to go on afterwards."""
    with view(arena.ledger_url) as ledger:
        rounds = ledger.number("SELECT rounds_total FROM runs")
    for strike in strikes:
        if arena.progress().version >= rounds - 1:
            return
        yield strike


def _finished(arena: Arena) -> bool:
    with view(arena.ledger_url) as ledger:
        return ledger.number("SELECT COUNT(*) FROM runs WHERE finished_unix IS NOT NULL") == 1


def _chain(arena: Arena) -> list[dict[str, Any]]:
    """Each version's digest, and the payloads that were accepted for it."""
    with view(arena.ledger_url) as ledger:
        given: dict[int, list[tuple[str, str]]] = {}
        for row in ledger.rows("SELECT round, lease_id, payload_digest FROM contributions"):
            given.setdefault(row["round"], []).append((row["lease_id"], row["payload_digest"]))
        return [
            {"digest": row["weights_digest"], "given": sorted(given.get(row["version"], []))}
            for row in ledger.all("SELECT version, weights_digest FROM versions ORDER BY version")
        ]
