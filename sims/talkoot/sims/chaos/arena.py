"""The network that the deaths happen to, and whatever would restart the dead on real machines."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from talkoot.protocol import faults
from talkoot.protocol.errors import UnavailableError
from talkoot.server.audit.reading import view
from talkoot.sims import probe
from talkoot.sims.chaos.plan import VOLUNTEER, Kill
from talkoot.sims.chaos.shape import Shape, config_toml
from talkoot.sims.local import LocalNetwork

JOIN_FLAGS = ("--threads", "1", "--checkpoint-seconds", "0.2")
READY_SECONDS = 300.0
LOOK_SECONDS = 0.05
LOCK_SECONDS = 1.5
"""How long a stranger holds the ledger's lock before it is killed in its transaction."""
STRANGER = """
import sqlite3, sys, time
raw = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
raw.execute("BEGIN IMMEDIATE")
raw.execute("INSERT INTO events (unix, kind, sentence) VALUES (0, 'stranger', 'never committed')")
print("locked", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Progress:
    """How far the run is: it grows with every accepted contribution and published version."""

    version: int
    contributions: int
    by_node: Mapping[str, int]
    """Contributions of each volunteer, by name."""

    def beyond(self, earlier: Progress, node: str | None = None) -> bool:
        """Whether work went on since: that of one volunteer, if one is named."""
        if node is not None:
            return self.by_node.get(node, 0) > earlier.by_node.get(node, 0)
        return (self.version, self.contributions) != (earlier.version, earlier.contributions)


@dataclass
class Arena:
    """A local network that keeps itself alive: what ends is started again, as an init system would.

    Use inside the network's own ``with`` block.
    """

    network: LocalNetwork
    shape: Shape
    restarts: dict[str, int] = field(default_factory=dict)

    @property
    def faults(self) -> Path:
        """Where places are armed."""
        return self.network.root / "faults"

    @property
    def names(self) -> list[str]:
        """The volunteers."""
        return [f"node{i}" for i in range(self.shape.nodes)]

    @property
    def ledger_url(self) -> str:
        """Where the ledger is."""
        return self.shape.ledger_url or f"sqlite:///{self.network.state / 'ledger.db'}"

    def make(self) -> None:
        """A state, from nothing."""
        text = self.network.root / "text"
        text.mkdir()
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        for file in sorted(stdlib.glob("[at]*.py")):
            shutil.copy(file, text / file.name)
        config = self.network.root / "config.toml"
        config.write_text(config_toml(self.shape, text), encoding="utf-8")
        self.network.init(config)
        self.adopt()

    def adopt(self) -> None:
        """Have every process that is started look for armed places."""
        self.faults.mkdir(exist_ok=True)
        self.network.extra_environment[faults.VARIABLE] = str(self.faults)

    def start(self) -> None:
        """Serve, and let every volunteer in."""
        self.network.serve()
        self.network.wait_for("the coordinator", lambda _: True, READY_SECONDS)
        url = self.network.invite(self.shape.nodes)
        for name in self.names:
            self.network.join(name, url, *JOIN_FLAGS)

    def resume(self) -> None:
        """Start everything that ran before."""
        self.network.serve()
        for name in self.names:
            self.network.rejoin(name)

    # Looking --------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """How far the run is, from the ledger."""
        with view(self.ledger_url) as ledger:
            version = ledger.number("SELECT COALESCE(MAX(version), 0) FROM versions")
            rows = ledger.rows(
                "SELECT nodes.name AS name, COUNT(*) AS n FROM contributions "
                "JOIN nodes ON nodes.node_id = contributions.node_id GROUP BY nodes.name"
            )
            by_node = {row["name"]: int(row["n"]) for row in rows}
        return Progress(version, sum(by_node.values()), by_node)

    def keep(self) -> None:
        """Start again what has ended."""
        coordinator = self.network.coordinator
        if coordinator is not None and not coordinator.running:
            self._count("coordinator")
            self.network.serve()
        for name, command in self.network.nodes.items():
            if not command.running:
                self._count("daemon")
                self.network.rejoin(name)

    def _count(self, what: str) -> None:
        self.restarts[what] = self.restarts.get(what, 0) + 1

    def until(self, what: str, holds: Callable[[], bool], seconds: float) -> float:
        """Keep everything alive until something holds; returns the seconds that it took.

        Raises:
            UnavailableError: it did not in time; carries the ends of all logs.
        """
        began = time.monotonic()
        while not holds():
            self.keep()
            if time.monotonic() - began > seconds:
                raise UnavailableError(
                    f"{what} did not happen within {seconds:.0f} s:\n{self.network.tails(30)}"
                )
            time.sleep(LOOK_SECONDS)
        return time.monotonic() - began

    def pid(self, kill: Kill) -> int | None:
        """The process that a kill is meant for; None while there is none."""
        if kill.component == "round loop":
            return probe.round_loop_pid(self.network)
        if kill.component == "coordinator":
            command = self.network.coordinator
            return command.process.pid if command and command.process and command.running else None
        if kill.component in ("daemon", "node"):
            command = self.network.nodes[self.names[kill.node or 0]]
            return command.process.pid if command.process and command.running else None
        if kill.component == "trainer":
            found = probe.node_status(self.network, self.names[kill.node or 0]).get("trainer_pid")
            return int(found) if found and probe.runs(int(found)) else None
        return probe.part_pids(self.network).get(kill.component)

    def serves(self, kill: Kill, old_pid: int) -> bool:
        """Whether the component that was killed does its work again, in another process."""
        component = kill.component
        if component == "ledger":
            return True
        if component == "coordinator":
            return self.network.status() is not None
        if component == "round loop":
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.network.state / "run" / "rounds.pid").read_text("ascii"))
                return pid != old_pid and probe.runs(pid)
            return False
        if component in VOLUNTEER:
            if kill.node is None:  # killed at a place: whoever it was works when all do
                everybody = [Kill(component, i) for i in range(self.shape.nodes)]
                return all(self.serves(one, old_pid) for one in everybody)
            said = probe.node_status(self.network, self.names[kill.node])
            mine = "trainer_pid" if component == "trainer" else "pid"
            return bool(
                said.get("reachable")
                and said.get(mine) not in (None, old_pid)
                and probe.runs(said[mine])
            )
        if self.pid(kill) in (None, old_pid):
            return False
        if component == "gateway":
            return self.network.status() is not None
        if component in ("transfer", "superlink"):
            port = int(self.network.ports[f"{component}_port"])
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False
        return True

    # Killing --------------------------------------------------------------------------------------

    def kill(self, kill: Kill) -> int | None:
        """SIGKILL, now; the process id, or None when there was nobody to kill."""
        if kill.component == "ledger":
            return self._cut_ledger()
        if kill.component == "coordinator":
            if self.network.coordinator is None or not self.network.coordinator.running:
                return None
            pid = self.pid(kill)
            self.network.kill_coordinator()
            return pid
        if kill.component == "node":
            pid = self.pid(kill)
            if pid is not None:
                self.network.kill_node(self.names[kill.node or 0])
            return pid
        pid = self.pid(kill)
        if pid is None:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
            return pid
        return None

    def _cut_ledger(self) -> int | None:
        """Take the ledger from whoever uses it."""
        if not self.shape.ledger_url:
            stranger = subprocess.Popen(
                [sys.executable, "-c", STRANGER, str(self.network.state / "ledger.db")],
                stdout=subprocess.PIPE,
            )
            assert stranger.stdout is not None
            with stranger.stdout:
                stranger.stdout.readline()
                time.sleep(LOCK_SECONDS)
                stranger.kill()
                stranger.wait()
            return stranger.pid
        from sqlalchemy import create_engine, text
        from sqlalchemy.pool import NullPool

        engine = create_engine(self.shape.ledger_url, poolclass=NullPool)
        with engine.connect() as connection:
            cut = connection.execute(
                text(
                    "SELECT COUNT(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            ).scalar_one()
        return os.getpid() if cut else None

    def replica_digests(self) -> dict[str, tuple[int | None, str]]:
        """Version and digest of every volunteer's replica, from the bytes on its disk."""
        return {
            name: (
                probe.held_version(self.network, name),
                probe.replica_digest(self.network, name),
            )
            for name in self.names
        }
