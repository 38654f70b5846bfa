"""A small real network of one scenario, and what it measured: rounds, bytes, losses, speeds.

The same operator's rules, real processes, real TLS. Moments come from the coordinator's ledger,
bytes from the nodes' own meters, which count all that goes over the data plane.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from talkoot.client.worker import TRAINING_BEGINS
from talkoot.protocol.errors import ConfigError, UnavailableError
from talkoot.server.config import Config, dump_config
from talkoot.sims import probe
from talkoot.sims.local import LocalNetwork
from talkoot.sims.scenario import Scenario
from talkoot.sims.virtual.site import config_of

MAX_NODES: Final = 8
"""Real processes that share this machine: with more, they wait for each other's processor."""
LOOK_SECONDS: Final = 0.1
START_SECONDS: Final = 300.0
ROUND_SECONDS: Final = 300.0
"""A round that takes longer here is not worth waiting for."""
BEGAN: Final = re.compile(
    re.escape(TRAINING_BEGINS).replace("%d", r"(\d+)")  # what the daemon says, read back
)
TCP_LISTEN: Final = "0A"
"""In /proc/PID/net/tcp (Linux, include/net/tcp_states.h)."""
WARM: Final = 1
"""Rounds at the beginning that are left out: caches are cold, and torch is loaded."""


@dataclass(frozen=True)
class RoundSeen:
    """One published round, real or simulated. Seconds since the first one opened."""

    round: int
    opened: float
    closed: float
    published: float
    loss: float
    """Mean training loss, weighted by tokens."""
    heldout: float | None


@dataclass(frozen=True)
class NodeSeen:
    """One node, from its second lease to its last. Bytes are those of an average round."""

    name: str
    tokens_per_second: float
    """While it trains."""
    noise: float
    """Standard deviation of the logarithm of that, from round to round."""
    bytes_up: float
    bytes_down: float


@dataclass(frozen=True)
class Seen:
    """What one network did."""

    rounds: tuple[RoundSeen, ...]
    nodes: tuple[NodeSeen, ...]
    tokens: int
    """Of accepted contributions."""
    first_loss: float | None = None
    """Held out, of the first version."""
    parts: dict[str, float] = field(default_factory=dict)
    """Mean seconds of a round's parts, after the first round."""

    @property
    def round_seconds(self) -> float:
        """From version to version, after the first."""
        moments = [row.published for row in self.rounds[WARM - 1 :]]
        return (moments[-1] - moments[0]) / (len(moments) - 1)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "round_seconds": self.round_seconds}


def insist_small(scenario: Scenario) -> None:
    """Raise :class:`ConfigError` when a scenario is not one that can be lived through here."""
    why = None
    if scenario.nodes > MAX_NODES or scenario.nodes < 1:
        why = f"it has {scenario.nodes} nodes, and 1 to {MAX_NODES} real ones run here"
    elif scenario.rounds is None or scenario.rounds < WARM + 2:
        why = f"it needs `rounds`, {WARM + 2} or more"
    elif scenario.attackers or scenario.events:
        why = "attackers and events are simulated only"
    elif scenario.rules.round.min_nodes != scenario.nodes:
        why = f"all nodes must begin together: set rules.round.min_nodes to {scenario.nodes}"
    if why is not None:
        raise ConfigError(
            f"{scenario.name} cannot be calibrated with: {why}. `talkoot-sim calibrate` without a "
            "name takes one that ships."
        )


def names_of(scenario: Scenario) -> list[str]:
    """The nodes' names, in the order of the fleet."""
    return [
        f"{entry.name}-{number}" for entry in scenario.population for number in range(entry.count)
    ]


def real_config(scenario: Scenario, *, bind: str = "127.0.0.1", host: str = "127.0.0.1") -> Config:
    """The operator's configuration: what is not simulated is switched off."""
    config = config_of(scenario)
    network = config.network.model_copy(
        update={"bind": bind, "public_host": host, "gateway_port": 0, "transfer_port": 0}
    )
    belief = config.belief.model_copy(update={"validate_up_to_parameters": 0})
    return config.model_copy(update={"network": network, "belief": belief})


def mean_bytes(log: Path, name: str) -> tuple[float, float]:
    """Bytes up and down of a node's average round, from the second one's training to the last's.

    Its daemon writes its meters down as training begins: by then all blocks of the lease are there,
    and its payload is not made yet.
    """
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    seen = {int(version): (int(up), int(down)) for version, up, down in BEGAN.findall(text)}
    warm = sorted(version for version in seen if version >= WARM)
    if len(warm) < 2:
        raise UnavailableError(f"{name} began fewer than two leases after round {WARM}: see {log}.")
    first, last = warm[0], warm[-1]
    up, down = (seen[last][place] - seen[first][place] for place in (0, 1))
    return up / (last - first), down / (last - first)


def run_real(
    scenario: Scenario,
    network: LocalNetwork,
    say: Callable[[str], None],
    progress: Callable[[int], None] = lambda _round: None,
    *,
    bind: str = "127.0.0.1",
    host: str = "127.0.0.1",
    ready: Callable[[], None] = lambda: None,
) -> Seen:
    """Let a network live through the scenario, and say what it measured.

    Args:
        scenario: see :func:`insist_small`.
        network: of real processes, entered by the caller, who ends it.
        say: hears what goes on.
        progress: hears of each published round.
        bind, host: the coordinator's addresses.
        ready: called once all nodes have joined.

    Raises:
        UnavailableError: it did not come to its end.
    """
    names = names_of(scenario)
    config = network.root / "config.toml"
    config.write_text(dump_config(real_config(scenario, bind=bind, host=host)), encoding="utf-8")
    say("the operator's state is made")
    network.init(config)
    network.serve()
    say("the coordinator starts")
    url = probe.until("the coordinator's start", lambda: _invite(network, len(names)), network)
    say("nodes join")
    for name in names:
        network.join(name, url, "--threads", "1")
    ready()
    _follow(scenario, network, say, progress)
    return _seen(scenario, network)


def _invite(network: LocalNetwork, uses: int) -> str | None:
    """An invite, once the coordinator serves: a volunteer whom nobody answers gives up."""
    parts = probe.part_pids(network)
    if not all(listens(parts.get(name)) for name in ("superlink", "gateway", "transfer")):
        return None
    return network.invite(uses)


def listens(pid: int | None) -> bool:
    """Whether a process takes connections, in whatever network namespace it is."""
    if pid is None:
        return False
    place = Path("/proc") / str(pid)
    try:
        mine = {str(handle.readlink()) for handle in (place / "fd").iterdir()}
        rows = [
            row.split()
            for name in ("tcp", "tcp6")
            for row in (place / "net" / name).read_text("ascii").splitlines()[1:]
        ]
    except OSError:
        return False
    return any(row[3] == TCP_LISTEN and f"socket:[{row[9]}]" in mine for row in rows)


def _follow(
    scenario: Scenario,
    network: LocalNetwork,
    say: Callable[[str], None],
    progress: Callable[[int], None],
) -> None:
    done, until = -1, time.monotonic() + START_SECONDS
    wanted = scenario.rounds or 0
    while done < wanted:
        newest = probe.rows(network, "SELECT MAX(version) AS newest FROM versions")[0]["newest"]
        if newest is not None and newest > done:
            done, until = newest, time.monotonic() + max(START_SECONDS, ROUND_SECONDS)
            say(f"round {min(done + 1, wanted)} of the real network")
            progress(done)
        for command in (network.coordinator, *network.nodes.values()):
            if command is not None and not command.running:
                raise UnavailableError(
                    f"{command.name} of the real network ended: {command.tail()}"
                )
        if time.monotonic() > until:
            raise UnavailableError(
                f"The real network came to version {done} and no further:\n{network.tails()}"
            )
        time.sleep(LOOK_SECONDS)
    if scenario.rules.evaluation.every:
        say("the last version is measured")
        with contextlib.suppress(UnavailableError):  # without it, training losses are compared
            query = "SELECT MAX(version) AS newest FROM evaluations"
            probe.until(
                "its evaluation",
                lambda: probe.rows(network, query)[0]["newest"] == wanted,
                network,
                60.0,
            )
    network.stop()


# What the ledger says -----------------------------------------------------------------------------


def _seen(scenario: Scenario, network: LocalNetwork) -> Seen:
    rounds = probe.rows(
        network,
        "SELECT round, opened_unix, closed_unix, published_unix FROM rounds "
        "WHERE state = 'published' ORDER BY round",
    )
    given = probe.rows(
        network,
        "SELECT c.round, c.tokens, c.loss, c.training_seconds, c.accepted_unix, n.name "
        "FROM contributions c JOIN nodes n ON n.node_id = c.node_id",
    )
    heldout = _heldout(network)
    start = rounds[0]["opened_unix"]
    rows = []
    for row in rounds:
        mine = [one for one in given if one["round"] == row["round"]]
        tokens = sum(one["tokens"] for one in mine)
        rows.append(
            RoundSeen(
                round=row["round"],
                opened=row["opened_unix"] - start,
                closed=row["closed_unix"] - start,
                published=row["published_unix"] - start,
                loss=sum(one["loss"] * one["tokens"] for one in mine) / max(tokens, 1),
                heldout=heldout.get(row["round"]),
            )
        )
    nodes = tuple(
        _node(name, given, network.home(name) / "logs" / "daemon.log")
        for name in names_of(scenario)
    )
    return Seen(
        rounds=tuple(rows),
        nodes=nodes,
        tokens=sum(one["tokens"] for one in given),
        first_loss=heldout.get(0),
        parts=_parts(rows, given, start),
    )


def _node(name: str, given: Sequence[Mapping[str, Any]], log: Path) -> NodeSeen:
    mine = [one for one in given if one["name"] == name and one["round"] > WARM]
    if not mine:
        raise UnavailableError(f"{name} of the real network contributed nothing after round 1.")
    seconds = sum(one["training_seconds"] for one in mine)
    logs = [math.log(one["tokens"] / max(one["training_seconds"], 1e-6)) for one in mine]
    up, down = mean_bytes(log, name)
    return NodeSeen(
        name=name,
        tokens_per_second=sum(one["tokens"] for one in mine) / max(seconds, 1e-6),
        noise=statistics.stdev(logs) if len(logs) > 1 else 0.0,
        bytes_up=up,
        bytes_down=down,
    )


def _parts(
    rounds: Sequence[RoundSeen], given: Sequence[Mapping[str, Any]], start: float
) -> dict[str, float]:
    """Mean seconds of a round: the last node's training, all else until it closed, publishing."""
    training, around, closing, gaps = [], [], [], []
    for before, row in zip(rounds[WARM - 1 :], rounds[WARM:], strict=False):
        last = max(
            (one for one in given if one["round"] == row.round),
            key=lambda one: float(one["accepted_unix"]),
        )
        training.append(last["training_seconds"])
        around.append(last["accepted_unix"] - start - row.opened - last["training_seconds"])
        closing.append(row.published - (last["accepted_unix"] - start))
        gaps.append(row.opened - before.published)
    named = {"training": training, "around": around, "closing": closing, "opening": gaps}
    return {name: statistics.fmean(values) for name, values in named.items()}


def _heldout(network: LocalNetwork) -> dict[int, float]:
    rows = probe.rows(
        network,
        "SELECT version, SUM(loss * weight) / SUM(weight) AS loss FROM evaluations "
        "GROUP BY version",
    )
    return {row["version"]: float(row["loss"]) for row in rows}


def save(seen: Seen, path: Path) -> None:
    """Keep what was measured, so that the simulation can be done again without it."""
    from talkoot.protocol.files import write_atomic

    write_atomic(path, json.dumps(asdict(seen), indent=1).encode())


def load(path: Path) -> Seen:
    """What :func:`save` kept."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["rounds"] = tuple(RoundSeen(**row) for row in data["rounds"])
    data["nodes"] = tuple(NodeSeen(**row) for row in data["nodes"])
    return Seen(**data)
