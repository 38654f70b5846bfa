"""Published runs as checks of the planner: what it predicts beside what they reported.

The planner is given what a report says of nodes, lines, payloads and the length of an inner phase,
and nothing of how it ended; where a report leaves a number out, the case says what stands for it.
Their topologies are not ours (rings, or everybody from everybody), so bytes are given and not taken
from our codec, and what their coordinators compute is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from talkoot.sims.planning.engine import plan
from talkoot.sims.planning.sizes import Sizes, payload_bytes
from talkoot.sims.scenario import Scenario

GIB_PER_NODE: Final = 10_000.0
"""Memory is not what these cases are about."""
LEASE: Final = 64 * 65_536
"""Tokens; only how long they take matters."""
WIRE_OUT: Final = 1.04
"""What the planner adds to bytes, and the reports' bandwidths do not carry: taken out again."""


@dataclass(frozen=True)
class Case:
    """One published figure and the planner's."""

    run: str
    case: str
    source: str
    published: float
    """Utilization, 0 to 1."""
    predicted: float
    why: str
    """What explains the difference."""

    @property
    def difference(self) -> float:
        """In points of utilization."""
        return self.predicted - self.published

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "difference": self.difference}


def predict(
    nodes: int,
    inner_seconds: float,
    up_bytes: float,
    down_bytes: float,
    up_mbit: float,
    down_mbit: float,
    noise: float = 0.0,
) -> float:
    """Utilization of equal nodes that train, push and fetch in turn."""
    scenario = Scenario.model_validate(
        {
            "name": "published",
            "rounds": 20,
            "model": {"preset": "llama-2-7b", "sequence_length": 2048},
            "corpus": {"block_tokens": 65_536},
            "rules": {
                "round": {
                    "tokens_per_node": LEASE,
                    "deadline_seconds": 10 * (inner_seconds + 3600),
                    "quorum": nodes,
                    "min_nodes": nodes,
                }
            },
            "coordinator": {"up_mbit": 1e9, "down_mbit": 1e9},
            "population": [
                {
                    "name": "nodes",
                    "device": "b200",
                    "link": "datacenter",
                    "count": nodes,
                    "memory_gib": GIB_PER_NODE,
                    "host_gib": GIB_PER_NODE,
                    "disk_gib": GIB_PER_NODE,
                    "tokens_per_second": LEASE / inner_seconds,
                    "speed_spread": 0.0,
                    "speed_noise": noise,
                    "up_mbit": up_mbit,
                    "down_mbit": down_mbit,
                    "latency_ms": 0.0,
                }
            ],
        }
    )
    sizes = Sizes(
        parameters=1,
        uplink_bytes=up_bytes / WIRE_OUT,
        update_bytes=down_bytes / WIRE_OUT,
        checkpoint_bytes=0.0,
        bytes_per_token=0.0,
        verify_seconds=0.0,
        aggregate_seconds=0.0,
        publish_seconds=0.0,
        encode_seconds=0.0,
        apply_seconds=0.0,
    )
    result = plan(scenario, sizes=sizes)
    # The first round fetches nothing: there is no update yet.
    rounds = result.rounds[1:]
    train = sum(sum(row.train_by_class) for row in rounds)
    return train / sum(sum(row.online_by_class) for row in rounds)


# INTELLECT-1 ----------------------------------------------------------------------------

INTELLECT: Final = "arXiv 2412.01152, table 2"
_ALL_REDUCE: Final = (
    ("USA", 103.0, 0.957),
    ("USA and Europe", 382.0, 0.856),
    ("global", 469.0, 0.83),
)
"""(where, median seconds of an all-reduce, utilization)."""


def intellect_1() -> Iterator[Case]:
    """10B parameters in int8, 14 nodes, H = 100 in 38 minutes."""
    nodes, inner, size = 14, 38 * 60.0, 10e9
    ring = (nodes - 1) / nodes * size  # each way: reduce-scatter, then all-gather
    for where, seconds, published in _ALL_REDUCE:
        mbit = 2 * ring * 8 / seconds / 1e6
        predicted = predict(nodes, inner, ring, ring, mbit, mbit)
        yield Case(
            "INTELLECT-1",
            f"{where}, {mbit / 1000:.2f} Gbit/s",
            INTELLECT,
            published,
            predicted,
            "The line is what their all-reduce came to, so this checks the planner's arithmetic.",
        )
    noisy = predict(nodes, inner, ring, ring, 500.0, 500.0, noise=0.03)
    yield Case(
        "INTELLECT-1",
        "global, 0.5 Gbit/s, nodes 3 % uneven",
        INTELLECT,
        0.83,
        noisy,
        "A line as nodes may have instead of their all-reduce's time, and nodes whose speed varies "
        "from round to round, so that all wait for the last.",
    )


# Covenant-72B ---------------------------------------------------------------------------

COVENANT: Final = "arXiv 2603.08163: 20 min of training, 70 s of communication, 94.5 %"


def covenant_72b() -> Iterator[Case]:
    """72.7B parameters, 16.9 peers a round, 110 Mbit/s up and 500 down."""
    peers, inner, parameters = 17, 1200.0, 72.7e9
    payload = 4 * parameters / 146  # their compression
    yield Case(
        "Covenant-72B",
        "as they move it, nothing overlapped",
        COVENANT,
        0.945,
        predict(peers, inner, payload, (peers - 1) * payload, 110.0, 500.0),
        f"A payload is {payload / 1e9:.2f} GB and each peer fetches {peers - 1} of them: at 500 "
        "Mbit/s that alone is 8.5 min. Their 70 s are what is left after pushing and fetching "
        "beside training, over an object store; the planner's nodes do one thing at a time.",
    )
    from talkoot.protocol.messages import CodecSpec
    from talkoot.server.config import DownlinkSection

    up = payload_bytes(CodecSpec(), round(parameters))
    down = payload_bytes(DownlinkSection(), round(parameters))
    yield Case(
        "Covenant-72B",
        "with our codec and one merged update",
        COVENANT,
        0.945,
        predict(peers, inner, up, down, 110.0, 500.0),
        f"{up / 1e9:.2f} GB up and {down / 1e9:.2f} GB down, one after the other: a merged update "
        "is a sixth of what peers fetch from each other; overlapping would hide the rest.",
    )


# Streaming DiLoCo -----------------------------------------------------------------------

STREAMING: Final = "arXiv 2501.18512, table 4, vanilla DiLoCo, H = 100"
_TARGETS: Final = (0.50, 0.80, 0.90, 0.95, 0.99)
_NEEDED: Final = (
    ("1B", 1e9, 0.1, (1.4, 6.2, 13.3, 23.3, 86.8)),
    ("10B", 10e9, 0.8, (1.7, 7.5, 16.0, 33.9, 104.8)),
    ("100B", 100e9, 4.9, (3.0, 11.0, 23.3, 49.4, 184.2)),
)
"""(model, parameters, seconds a step, Gbit/s to reach each target)."""


def streaming_diloco() -> Iterator[Case]:
    """Two replicas that all-reduce bf16 weights after 100 steps."""
    for model, parameters, step, needed in _NEEDED:
        size = 2 * parameters  # bf16; a ring of two sends half of it twice
        for target, gbit in zip(_TARGETS, needed, strict=True):
            mbit = gbit * 1000
            yield Case(
                "Streaming DiLoCo",
                f"{model} at {gbit:g} Gbit/s",
                STREAMING,
                target,
                predict(2, 100 * step, size / 2, size / 2, mbit, mbit),
                "Their bandwidths are points of a grid 23 % apart, the first that reaches the "
                "target; the last backward pass hides some of the transfer.",
            )


def published_cases() -> list[Case]:
    """All of them, in the order in which they are shown."""
    return [*intellect_1(), *covenant_72b(), *streaming_diloco()]


def print_cases(cases: Sequence[Case], console: Any) -> None:
    """The table, and what explains the differences, a run after the other."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for run in dict.fromkeys(case.run for case in cases):
        mine = [case for case in cases if case.run == run]
        console.print(Text.assemble((run, "bold"), (f"  {mine[0].source}", "dim")))
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 2))
        table.add_column("utilization", min_width=38)
        for head in ("published", "predicted", "points"):
            table.add_column(head, justify="right")
        for case in mine:
            table.add_row(
                case.case,
                f"{100 * case.published:.1f} %",
                f"{100 * case.predicted:.1f} %",
                f"{100 * case.difference:+.1f}",
            )
        console.print(table)
        for why in dict.fromkeys(case.why for case in mine):
            console.print(Padding(Text(why, "dim"), (0, 0, 0, 2)))
        console.print()
