"""Looks inside a local network from outside: files on disk and the ledger, never the processes.

For tests, soak runs and whoever wonders what a network is doing.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

from talkoot.protocol.errors import UnavailableError
from talkoot.sims.local import LocalNetwork

T = TypeVar("T")

LOOK_SECONDS = 0.02


def until(
    what: str,
    look: Callable[[], T | None],
    network: LocalNetwork,
    timeout_seconds: float = 90.0,
) -> T:
    """Look again and again until there is an answer that isn't None or False; return it.

    Raises:
        UnavailableError: none came in time; carries the ends of all logs.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"{what} did not happen within {timeout_seconds:.0f} s:\n{network.tails()}"
            )
        time.sleep(LOOK_SECONDS)


def rows(network: LocalNetwork, query: str, *values: object) -> list[dict[str, Any]]:
    """What a query finds in the ledger (SQLite), read only."""
    uri = f"file:{network.state / 'ledger.db'}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(query, values)]


def node_of(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A node in the coordinator's status, by its name.

    Raises:
        KeyError: there is none.
    """
    for node in status["nodes"]:
        if node["name"] == name:
            found: Mapping[str, Any] = node
            return found
    raise KeyError(name)


def agree(status: Mapping[str, Any], *names: str) -> bool:
    """Whether these nodes say that they hold the newest version, bit for bit."""
    newest = (status["version"], status["weights_digest"])
    nodes = [node_of(status, name) for name in names]
    return all((node["version"], node["weights_digest"]) == newest for node in nodes)


def _document(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not there, or half there
        return None
    return found


def node_status(network: LocalNetwork, name: str) -> dict[str, Any]:
    """What a daemon last wrote of itself; empty when it never did."""
    return _document(network.home(name) / "status.json") or {}


def checkpoint(network: LocalNetwork, name: str) -> dict[str, Any] | None:
    """A volunteer's lease in progress (``lease_id``, ``step``, ``steps`` …), as saved on its disk.

    None when there is none.
    """
    return _document(network.home(name) / "work" / "checkpoint.json")


def replica(network: LocalNetwork, name: str) -> Path | None:
    """The file of a volunteer's published weights."""
    state = _document(network.home(name) / "work" / "state.json")
    if state is None or state.get("published") is None:
        return None
    return network.home(name) / "work" / "tensors" / str(state["published"]["file"])


def replica_digest(network: LocalNetwork, name: str) -> str:
    """The digest of a volunteer's published weights, from their bytes on disk."""
    from talkoot.protocol.manifest import Manifest
    from talkoot.protocol.weights import WeightsReader
    from talkoot.server.coordinator import Coordinator

    coordinator = Coordinator.open(network.state)
    try:
        manifest: Manifest = coordinator.manifest
    finally:
        coordinator.close()
    path = replica(network, name)
    if path is None:
        raise FileNotFoundError(f"{name} has no replica")
    return WeightsReader(path, manifest).weights_digest()


def held_version(network: LocalNetwork, name: str) -> int | None:
    """The version that a volunteer's replica is at."""
    state = _document(network.home(name) / "work" / "state.json")
    return None if state is None or state["published"] is None else state["published"]["version"]


def mid_lease(network: LocalNetwork, name: str) -> dict[str, Any] | None:
    """A volunteer's checkpoint while it is well inside a lease, far from both ends."""
    saved = checkpoint(network, name)
    if saved is None or not 0.15 < saved["step"] / saved["steps"] < 0.6:
        return None
    return saved if lease(network, saved["lease_id"])["state"] == "open" else None


def finished_lease(
    network: LocalNetwork, name: str, held: Mapping[str, Any], timeout_seconds: float = 120.0
) -> dict[str, Any]:
    """Wait for the end of a lease that was interrupted at the checkpoint ``held``; return it.

    Raises:
        AssertionError: its work began anew instead of going on from there.
    """

    def look() -> dict[str, Any] | None:
        saved = checkpoint(network, name)
        if saved is not None and saved["lease_id"] == held["lease_id"]:
            assert saved["step"] >= held["step"], "the lease was begun anew"
        found = lease(network, held["lease_id"])
        return found if found["state"] != "open" else None

    return until(f"the end of {name}'s lease", look, network, timeout_seconds)


def lease(network: LocalNetwork, lease_id: str) -> dict[str, Any]:
    """A lease in the ledger."""
    return rows(network, "SELECT * FROM leases WHERE lease_id = ?", lease_id)[0]


def versions(network: LocalNetwork) -> list[tuple[int, str]]:
    """All published versions with their digests."""
    found = rows(network, "SELECT version, weights_digest FROM versions ORDER BY version")
    return [(row["version"], row["weights_digest"]) for row in found]


def trainer_process(network: LocalNetwork, name: str) -> psutil.Process:
    """A volunteer's trainer."""
    return psutil.Process(node_status(network, name)["trainer_pid"])


def part_pids(network: LocalNetwork) -> dict[str, int]:
    """Process ids of the supervisor and its parts, by name."""
    try:
        lines = (network.state / "run" / "pids").read_text("ascii").splitlines()
    except OSError:
        return {}
    return {name: int(pid) for name, _, pid in (line.partition(" ") for line in lines) if pid}


def round_loop_pid(network: LocalNetwork) -> int | None:
    """Process id of the ServerApp that runs the rounds."""
    for process in _tree(part_pids(network).get("supervisor")):
        with contextlib.suppress(psutil.Error):
            if any("flwr-serverapp" in word for word in process.cmdline()):
                return process.pid
    return None


def _tree(pid: int | None) -> Iterator[psutil.Process]:
    if pid is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from psutil.Process(pid).children(recursive=True)


def runs(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
