"""How fast `talkoot-sim run` is, what a node takes, and what it costs beside bare training steps.

    .venv/bin/python bench/simulation.py --nodes 10 100   # nano, 1,024 tokens a lease
    .venv/bin/python bench/simulation.py --overhead       # tiny (1.1 M parameters), 64 nodes
    .venv/bin/python bench/simulation.py --determinism    # one and two workers, the same bits
    .venv/bin/python bench/simulation.py --nodes 64 256 --rounds 3 --workers 2 1   # size, both ways

Memory is the proportional share (PSS) of all processes of the engine's session, looked at every two
seconds; files are in /dev/shm and apart. Rounds are counted from the second on: in the first Ray's
workers start. Inner steps are timed where they run, so the overhead is a ratio within one run on
one machine. Prints JSON, a run a line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from talkoot.sims.scenario import parse_scenario
from talkoot.sims.virtual import session
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
        with Memory() as memory:
            began = time.monotonic()
            found = run(parse_scenario(text), out=root / "out", work=root / "work", workers=workers)
            wall = time.monotonic() - began
        engine, others = memory.processor_seconds
        return {
            **figures(found, nodes, workers, root / "work"),
            "wall_seconds": wall,
            "engine_processor_seconds": engine,
            "worker_processor_seconds": others,
            "peak_pss_mib": memory.peak / 2**20,
        }
    finally:
        shutil.rmtree(root, ignore_errors=True)


class Memory:
    """The most that the processes below this one and of their sessions had, in bytes.

    And the processor seconds that they used, which say more than the clock on a busy machine: of
    the engine, which is the coordinator's side, and of all others, which are Ray's.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._used: dict[int, float] = {}
        self._engines: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(2.0):
            engines = [child.pid for child in psutil.Process().children()]
            self._engines.update(engines)
            pids = [pid for engine in engines for pid in session.members(engine)]
            self.peak = max(self.peak, sum(_pss(pid) for pid in pids))
            for pid in pids:
                with suppress(psutil.Error):
                    times = psutil.Process(pid).cpu_times()
                    self._used[pid] = times.user + times.system

    @property
    def processor_seconds(self) -> tuple[float, float]:
        """Of the engines, and of their other processes."""
        engine = sum(seconds for pid, seconds in self._used.items() if pid in self._engines)
        return engine, sum(self._used.values()) - engine


def _pss(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def figures(found: RunResult, nodes: int, workers: int, work: Path) -> dict[str, Any]:
    """Of a finished run."""
    machine = found.document["machine"]
    later = [number for number in machine["round_seconds"] if int(number) > 1]
    wall = sum(machine["round_seconds"][number] for number in later)
    steps = sum(machine["step_seconds"][number] for number in later)
    busy = min(workers, os.cpu_count() or 1)
    files = {  # what many nodes hold under a name of their own is there once
        (stat.st_dev, stat.st_ino): stat.st_size
        for path in (work / "nodes").rglob("*")
        if path.is_file()
        for stat in [path.stat()]
    }
    return {
        "nodes": nodes,
        "workers": workers,
        "node_rounds_per_second": nodes * len(later) / wall,
        "round_seconds": wall / len(later),
        "step_seconds_a_lease": steps / len(later) / nodes,
        "overhead_of_bare_steps": wall * busy / steps - 1,
        "engine_peak_mib": machine["peak_rss_bytes"] / 2**20,
        "disk_kib_per_node": sum(files.values()) / nodes / 1024,
        "weights_digest": found.weights_digest,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--determinism", action="store_true")
    given = parser.parse_args()
    if given.overhead:
        print(json.dumps(measure("tiny", 64, given.rounds, 8192, given.workers[0])))
        return
    if given.determinism:
        rows = [measure("nano", 16, given.rounds, 1024, workers) for workers in (1, 2)]
        assert rows[0]["weights_digest"] == rows[1]["weights_digest"], rows
        print(json.dumps(rows))
        return
    for nodes in given.nodes:
        rows = [measure("nano", nodes, given.rounds, 1024, workers) for workers in given.workers]
        for row in rows:
            print(json.dumps(row), flush=True)
        assert len({row["weights_digest"] for row in rows}) == 1, "the bits differ"


if __name__ == "__main__":
    main()
