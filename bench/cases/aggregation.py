"""A closed round beside raw reads and writes of the same state, and beside Flower's FedAvg.

Ours reads contributions and state from the disk and leaves the next version on it, flushed
(``fsync``). The raw copy of the same state bytes is done twice, through the page cache and past it;
the faster of the two is what ours is held against. None finds the state in the page cache: what the
round before wrote past it is not there, and a large model's does not fit. Flower's
``aggregate_arrayrecords`` is given its records in memory, as a ServerApp has them, and leaves its
result there; for like with like, ours is also run from and to files in memory (tmpfs).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cases.coding import DOWNLINK, UPLINK
from bench.child import ChildResult, run_child
from bench.registry import Row, Run, benchmark, compare, figure
from talkoot.protocol.manifest import Manifest, TensorSpec

SHAPE = (2048, 4096)
NODES = 8


def _manifest(parameters: int) -> Manifest:
    count = max(1, round(parameters / (SHAPE[0] * SHAPE[1])))
    return Manifest(
        tensors=tuple(TensorSpec(name=f"w{n}", shape=SHAPE, dtype="float32") for n in range(count))
    )


@benchmark("aggregation")
def aggregation(run: Run) -> Iterator[Row]:
    """8 nodes and 1 GB of fp32 weights: time and memory of a round, from disk to disk."""
    parameters = 2**25 if run.quick else 250_000_000
    root = run.scratch
    state = {"root": str(root), "parameters": parameters, "compiled": True}
    asked = {"root": str(root), "parameters": parameters, "nodes": 32}
    run_child("bench.cases.aggregation:prepare", asked)
    measured = _measure(run, state)
    rounds, raws, flowers = measured["disk"], measured["raw"], measured["flower"]
    yield compare(
        "aggregation_seconds",
        "s",
        _of(rounds, "seconds"),
        _of(raws, "seconds"),
        ratio_at_most=2.0,
        note="2 threads; baseline: the same state bytes read and written raw, the faster way",
    )
    yield compare(
        "aggregation_seconds_numpy",
        "s",
        _of(measured["numpy"], "seconds"),
        _of(raws, "seconds"),
        note="without the compiled loops (the extra compiled); the same baseline",
    )
    yield compare(
        "aggregation_seconds_cached",
        "s",
        _of(rounds, "seconds"),
        _of(measured["cached"], "seconds"),
        note="baseline: the raw copy through the page cache, as any program makes it",
    )
    yield compare(
        "aggregation_cpu_seconds",
        "s",
        _of(rounds, "cpu"),
        _of(raws, "cpu"),
        note="processor time of the same two: what other work on the machine disturbs less",
    )
    some = len(flowers)
    yield compare(
        "aggregation_seconds_flower",
        "s",
        _of(rounds, "seconds")[:some],
        _of(flowers, "seconds"),
        ratio_at_most=0.2,
        note="ours from disk to disk; baseline: Flower's aggregate_arrayrecords in memory",
    )
    yield compare(
        "aggregation_floor_flower",
        "s",
        _of(raws, "seconds")[:some],
        _of(flowers, "seconds"),
        note="the raw copy of the state; baseline: Flower. From disk to disk nothing is faster",
    )
    yield compare(
        "aggregation_memory_flower",
        "s",
        _of(measured["memory"], "seconds")[:some],
        _of(flowers, "seconds"),
        note="like with like: ours from and to files in memory; baseline: Flower",
    )
    yield compare(
        "aggregation_cpu_flower",
        "s",
        _of(measured["memory"], "cpu")[:some],
        _of(flowers, "cpu"),
        note="processor time of the same two; ours hashes and encodes what it publishes, too",
    )
    yield compare(
        "aggregation_peak_flower",
        "MB",
        [one.peak_anonymous / 1e6 for one in rounds[:some]],
        [one.peak_anonymous / 1e6 for one in flowers],
        ratio_at_most=0.1,
        note="anonymous memory of the whole process, torch included (mapped files: none)",
    )
    few, many = _round(state, 2), _round(state, 32)
    yield compare(
        "aggregation_peak_nodes",
        "MB",
        [many.peak_anonymous / 1e6],
        [few.peak_anonymous / 1e6],
        ratio_at_most=1.1,
        note="32 contributions; baseline: 2",
    )
    threads: dict[str, float] = {}
    for one in rounds:
        for stage, spent in one.result["threads"].items():
            threads[stage] = threads.get(stage, 0.0) + spent / len(rounds)
    for stage, spent in sorted(threads.items(), key=lambda pair: -pair[1]):
        yield figure(f"aggregation_{stage}", "s", spent, note="of all threads together")


def _measure(run: Run, state: dict[str, Any]) -> dict[str, list[ChildResult]]:
    """Rounds on disk, raw copies, rounds in memory and Flower's, in turn."""
    kinds = ("disk", "numpy", "raw", "cached", "memory", "flower")
    made: dict[str, list[ChildResult]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        _copy_of(Path(state["root"]), Path(memory))
        for number in range(2 if run.quick else 3):
            made["disk"].append(_cold(state, "close", **state, nodes=NODES))
            slower = state | {"compiled": False}
            made["numpy"].append(_cold(state, "close", **slower, nodes=NODES))
            raws = [
                _cold(state, "raw_copy", root=state["root"], past=past) for past in (False, True)
            ]
            made["cached"].append(raws[0])
            made["raw"].append(min(raws, key=lambda one: float(one.result["seconds"])))
            made["memory"].append(_round(state | {"root": memory}, NODES))
            if not run.quick or number == 0:
                asked = {"parameters": state["parameters"], "nodes": NODES}
                made["flower"].append(_child("flower", **asked))
            told = (f"{what} {_of(found, 'seconds')[-1]:.2f} s" for what, found in made.items())
            run.say(f"{', '.join(told)}; load {os.getloadavg()[0]:.1f}")
    return made


def _copy_of(root: Path, memory: Path) -> None:
    """The state and the first contributions, in memory."""
    shutil.copytree(root / "v1", memory / "v1")
    for node in range(NODES):
        shutil.copy(root / f"c{node}", memory / f"c{node}")


def _of(children: Sequence[ChildResult], what: str) -> list[float]:
    return [float(one.result[what]) for one in children]


def _child(name: str, **arguments: Any) -> ChildResult:
    return run_child(f"bench.cases.aggregation:{name}", arguments)


def _cold(state: dict[str, Any], name: str, **arguments: Any) -> ChildResult:
    """With nothing of the state in the page cache, as a round finds it that went past it."""
    for path in (Path(state["root"]) / "v1").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _child(name, **arguments)


def _round(state: dict[str, Any], nodes: int) -> ChildResult:
    return _child("close", **state, nodes=nodes)


# In child processes ----------------------------------------------------------------------------


def _parts(root: Path, nodes: int) -> list[Any]:
    from talkoot.server.aggregate import ContributionInput

    return [
        ContributionInput(root / f"c{n}", 1000 + n, 1.0 + n / 100, f"{n:02}") for n in range(nodes)
    ]


def prepare(root: str, parameters: int, nodes: int) -> None:
    """Version 1 (with feedback, as every one but the first) and contributions, on the disk."""
    import torch

    from talkoot.protocol.codec import encode_tensor
    from talkoot.protocol.payload import write_payload
    from talkoot.server.aggregate import VersionDir, aggregate_round, initial_state
    from talkoot.server.outer import OuterSpec

    directory, manifest = Path(root), _manifest(parameters)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    initial_state(manifest, lambda _: noise * 0.02, directory / "v0")
    # A few tensors, each encoded once; who sends which differs from node to node.
    pool = [encode_tensor(noise.roll(n, 0) * 1e-3 * (1 + n / 10), UPLINK) for n in range(nodes)]
    for node in range(nodes):
        items = ((t.name, pool[(n + node) % nodes]) for n, t in enumerate(manifest.tensors))
        write_payload(directory / f"c{node}", manifest, UPLINK, items, {})
    parts, first = _parts(directory, NODES), VersionDir(directory / "v0")
    out = directory / "v1"
    aggregate_round(manifest, first, parts, UPLINK, DOWNLINK, OuterSpec(), out, workers=2)
    shutil.rmtree(first.path)


def close(root: str, parameters: int, nodes: int, compiled: bool) -> dict[str, Any]:
    """One round; its seconds, and those of its threads by stage.

    Compiled loops are there before: a coordinator compiles once, and closes many rounds.
    """
    from talkoot.protocol.kernels import KERNELS
    from talkoot.server.aggregate import VersionDir, aggregate_round
    from talkoot.server.outer import OuterSpec

    directory, manifest = Path(root), _manifest(parameters)
    with KERNELS.running(compiled=compiled):
        began, cpu = time.perf_counter(), time.process_time()
        result = aggregate_round(
            manifest,
            VersionDir(directory / "v1"),
            _parts(directory, nodes),
            UPLINK,
            DOWNLINK,
            OuterSpec(),
            directory / "v2",
            workers=2,
        )
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    shutil.rmtree(directory / "v2")
    return {"seconds": seconds, "cpu": cpu, "threads": result.seconds}


def raw_copy(root: str, past: bool) -> dict[str, float]:
    """Read a version's state and write as much, flushed; through the page cache or past it."""
    import numpy as np

    from talkoot.protocol.direct import BLOCK, PastCache, congruent

    directory = Path(root)
    room = np.empty((4 << 20) + BLOCK, dtype=np.uint8)
    block = congruent(room, 4 << 20, 0 if past else 1)  # at 1 nothing fits: the usual way
    began, cpu = time.perf_counter(), time.process_time()
    for name in ("published", "feedback"):
        source, target = directory / "v1" / f"{name}.safetensors", directory / f"raw-{name}"
        with (
            source.open("rb", buffering=0) as old,
            target.open("wb", buffering=0) as new,
            PastCache(old.fileno(), os.O_RDONLY) as read,
            PastCache(new.fileno(), os.O_WRONLY) as write,
        ):
            at = 0
            while count := read.read(block, at):
                write.write(block[:count], at)
                at += count
            os.fsync(new.fileno())
    took = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    for name in ("published", "feedback"):
        (directory / f"raw-{name}").unlink()
    return took


def flower(parameters: int, nodes: int) -> dict[str, float]:
    """Flower's FedAvg over records in memory; seconds of the aggregation alone."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    tensors = _manifest(parameters).tensors
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(SHAPE, dtype=np.float32)
    records = []
    for node in range(nodes):
        arrays = {t.name: Array(np.roll(noise, node, axis=0)) for t in tensors}
        metrics = MetricRecord({"num-examples": 1000 + node})
        records.append(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}))
    began, cpu = time.perf_counter(), time.process_time()
    aggregate_arrayrecords(records, "num-examples")
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
