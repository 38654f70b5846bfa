"""The whole of ``make chaos``: a soak, its replay, a paired run, and ``chaos.json``."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from talkoot.protocol.files import write_atomic
from talkoot.sims.chaos import plan
from talkoot.sims.chaos.arena import Arena
from talkoot.sims.chaos.paired import paired
from talkoot.sims.chaos.replay import replay
from talkoot.sims.chaos.shape import Shape
from talkoot.sims.chaos.soak import BrokenPromise, Say, Soak
from talkoot.sims.local import LocalNetwork
from talkoot.sims.postgres import PostgresCluster


@dataclass(frozen=True)
class ChaosOptions:
    """What is struck how often."""

    out: Path
    seed: int = 0
    kills: int = 200
    """Deaths of the soak."""
    nodes: int = 3
    paired_rounds: int = 12
    paired_kills: int = 20
    postgres: bool = False
    """The soak's ledger on a private PostgreSQL instead of SQLite."""


QUICK = {"kills": 10, "nodes": 2, "paired_rounds": 4, "paired_kills": 3}
"""The quick form: about two minutes on an idle machine."""


def run_chaos(options: ChaosOptions, say: Say) -> dict[str, Any]:
    """Run everything; returns what ``chaos.json`` holds, which is written even after a failure.

    Raises:
        BrokenPromise: something was lost, or two models differ that must not.
        UnavailableError: the network did not come back.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    document: dict[str, Any] = {
        "seed": options.seed,
        "nodes": options.nodes,
        "ledger": "postgresql" if options.postgres else "sqlite",
        "software": {name: version(name) for name in ("talkoot", "flwr", "torch")},
        "lost_items": None,
        "passed": False,
    }
    say(f"Seed {options.seed}: the same seed strikes the same components in the same order.")
    try:
        if options.postgres:
            with PostgresCluster() as cluster:
                _soak(options, document, say, cluster.create("chaos"))
        else:
            _soak(options, document, say)
        # The paired run takes minutes more, and may be stopped: what was seen so far is kept.
        _write(options, document, began)
        if options.paired_rounds:
            document["paired"], record = paired(
                options.out / "paired",
                options.nodes,
                options.paired_rounds,
                plan.strikes(options.seed + 1, options.nodes),
                options.paired_kills,
                say,
            )
            document["paired"]["under_kills"] = record.to_json()
            if not document["paired"]["final_model_equal"]:
                raise BrokenPromise(
                    "The run under kills did not end at the model of the calm run: "
                    f"{document['paired']}."
                )
        document["lost_items"] = 0
        document["passed"] = True
    finally:
        _write(options, document, began)
    return document


def _write(options: ChaosOptions, document: dict[str, Any], began: float) -> None:
    document["seconds"] = round(time.monotonic() - began, 1)
    write_atomic(options.out / "chaos.json", json.dumps(document, indent=2).encode() + b"\n")


def _soak(options: ChaosOptions, document: dict[str, Any], say: Say, ledger_url: str = "") -> None:
    shape = Shape(nodes=options.nodes, ledger_url=ledger_url)
    with LocalNetwork(options.out / "network") as network:
        arena = Arena(network, shape)
        arena.make()
        first = Path(shutil.copytree(network.state / "versions" / "v00000000", network.root / "v0"))
        arena.start()
        soak = Soak(arena, say)
        try:
            soak.run(plan.strikes(options.seed, options.nodes), options.kills)
            say("Enough. Every replica comes to the last version …")
            document["converged"] = soak.converge()
        finally:
            document["soak"] = soak.record.to_json()
            document["restarts_by_hand"] = dict(arena.restarts)
        say("The whole run again, from what was accepted, without a death …")
        document["replay"] = replay(network.state, soak.archive, first, network.root / "replay")
    if document["replay"]["first_difference"] is not None:
        raise BrokenPromise(f"A replay gives other bits: {document['replay']}.")
