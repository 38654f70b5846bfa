"""How fast `talkoot-sim run` is, what a node takes, and what it costs beside bare training steps.

    .venv/bin/python bench/simulation.py --nodes 10 100   # nano, 1,024 tokens a lease
    .venv/bin/python bench/simulation.py --overhead       # tiny (1.1 M parameters), 64 nodes
    .venv/bin/python bench/simulation.py --determinism    # one and two workers, the same bits

Rounds are counted from the second on: in the first Ray's workers start. Inner steps are timed where
they run, so the overhead is a ratio within one run on one machine. Prints JSON, a run a line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from talkoot.sims.scenario import parse_scenario
from talkoot.sims.virtual.command import RunResult, run

SCENARIO = """
name = "bench"
rounds = {rounds}
[model]
preset = "{model}"
sequence_length = 64
micro_batch = 4
[corpus]
block_tokens = {block}
[rules.round]
tokens_per_node = {tokens}
deadline_seconds = 36000
quorum = 2
min_nodes = 2
[rules.evaluation]
tokens = 4096
[[population]]
name = "volunteers"
device = "cpu-8"
count = {nodes}
tokens_per_second = 12.0
speed_spread = 0.0
"""


def measure(model: str, nodes: int, rounds: int, tokens: int, workers: int) -> dict[str, Any]:
    """One run in memory; its figures."""
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    try:
        text = SCENARIO.format(
            model=model, nodes=nodes, rounds=rounds, tokens=tokens, block=min(tokens, 1024)
        )
        found = run(parse_scenario(text), out=root / "out", work=root / "work", workers=workers)
        return figures(found, nodes, workers, root / "work")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def figures(found: RunResult, nodes: int, workers: int, work: Path) -> dict[str, Any]:
    """Of a finished run."""
    machine = found.document["machine"]
    later = [number for number in machine["round_seconds"] if int(number) > 1]
    wall = sum(machine["round_seconds"][number] for number in later)
    steps = sum(machine["step_seconds"][number] for number in later)
    busy = min(workers, os.cpu_count() or 1)
    files = [path.stat() for path in (work / "nodes").rglob("*") if path.is_file()]
    return {
        "nodes": nodes,
        "workers": workers,
        "node_rounds_per_second": nodes * len(later) / wall,
        "round_seconds": wall / len(later),
        "step_seconds_a_lease": steps / len(later) / nodes,
        "overhead_of_bare_steps": wall * busy / steps - 1,
        "engine_peak_mib": machine["peak_rss_bytes"] / 2**20,
        "disk_kib_per_node": sum(one.st_size for one in files) / nodes / 1024,
        "weights_digest": found.weights_digest,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--determinism", action="store_true")
    given = parser.parse_args()
    if given.overhead:
        print(json.dumps(measure("tiny", 64, given.rounds, 8192, given.workers)))
        return
    if given.determinism:
        rows = [measure("nano", 16, given.rounds, 1024, workers) for workers in (1, 2)]
        assert rows[0]["weights_digest"] == rows[1]["weights_digest"], rows
        print(json.dumps(rows))
        return
    for nodes in given.nodes:
        print(json.dumps(measure("nano", nodes, given.rounds, 1024, given.workers)), flush=True)


if __name__ == "__main__":
    main()
