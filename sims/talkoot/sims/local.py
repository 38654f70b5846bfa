"""A network of real processes on this machine: one coordinator, volunteers, real TLS on loopback.

What runs here is what an operator and volunteers run; this module only starts, kills and watches
it. The demo, the end-to-end tests and the soak tests stand on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from talkoot.protocol.errors import StateError, UnavailableError

BIN = Path(sys.executable).parent
STOP_SECONDS = 15.0
POLL_SECONDS = 0.1


def environment() -> dict[str, str]:
    """The environment of every process: quiet, offline, and blind to the caller's settings."""
    env = dict(os.environ)
    env.update(
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        PYTHONUNBUFFERED="1",
    )
    for name in ("TALKOOT_HOME", "TALKOOT_STATE_DIR", "TALKOOT_STATE"):
        env.pop(name, None)
    return env


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything under it, at once, as a power cut would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass
class Command:
    """A long-running command with its log."""

    name: str
    arguments: Sequence[str]
    log: Path
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its output is appended to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                # On a leash: it ends with us, even if we are killed.
                [sys.executable, "-m", "talkoot.server.leash", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment() | dict(self.extra_environment),
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL its whole tree."""
        if self.process is not None:
            kill_tree(self.process.pid)
            self.process.wait()

    def stop(self) -> None:
        """Ctrl-C, and SIGKILL if it does not end in time."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def said(self) -> str:
        """Its whole log, of all its starts."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def tail(self, lines: int = 12) -> str:
        """The end of its log."""
        return "\n".join(self.said().splitlines()[-lines:])


@dataclass
class LocalNetwork:
    """A coordinator and its volunteers below one directory.

    Use as a context manager: whatever happens inside, no process outlives it.
    """

    root: Path
    nodes: dict[str, Command] = field(default_factory=dict)
    coordinator: Command | None = None
    extra_environment: dict[str, str] = field(default_factory=dict)
    """What every long-running process gets beside the rest."""
    prefixes: dict[str, Sequence[str]] = field(default_factory=dict)
    """By a volunteer's name, or "coordinator": put before its long-running command."""

    @property
    def state(self) -> Path:
        """The operator's state directory."""
        return self.root / "operator"

    def home(self, name: str) -> Path:
        """A volunteer's home."""
        return self.root / "volunteers" / name

    def attempt(
        self, *arguments: str, timeout_seconds: float = 600.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command to its end, however it ends."""
        return subprocess.run(
            [str(BIN / arguments[0]), *arguments[1:]],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=timeout_seconds,
            check=False,
        )

    def run(self, *arguments: str, timeout_seconds: float = 600.0) -> str:
        """Run a short command to its end and return its output.

        Raises:
            StateError: it ended with an error; the sentence is its own.
        """
        done = self.attempt(*arguments, timeout_seconds=timeout_seconds)
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip().splitlines()
            said = words[-1] if words else f"exit status {done.returncode}"
            raise StateError(f"{arguments[0]} {arguments[1]}: {said.removeprefix('error: ')}")
        return done.stdout

    def init(self, config: Path) -> str:
        """Make the operator's state from a configuration file."""
        return self.run(
            "talkoot-coordinator", "init", "--state", str(self.state), "--config", str(config)
        )

    def serve(self) -> None:
        """Start the coordinator."""
        if self.coordinator is None:
            self.coordinator = Command(
                "coordinator",
                [
                    *self.prefixes.get("coordinator", ()),
                    *(str(BIN / "talkoot-coordinator"), "serve", "--state", str(self.state)),
                ],
                self.root / "logs" / "coordinator.log",
                self.extra_environment,
            )
        self.coordinator.start()

    def invite(self, uses: int) -> str:
        """A fresh invite URL."""
        out = self.run(
            "talkoot-coordinator", "invite", "--state", str(self.state), "--uses", str(uses)
        )
        return out.strip()

    def join(self, name: str, url: str, *flags: str) -> None:
        """Start a volunteer's daemon with an invite."""
        self.nodes[name] = Command(
            name,
            [
                *self.prefixes.get(name, ()),
                *(str(BIN / "talkoot"), "join", url, "--home", str(self.home(name))),
                *("--name", name, *flags),
            ],
            self.root / "logs" / f"{name}.log",
            self.extra_environment,
        )
        self.nodes[name].start()

    def rejoin(self, name: str) -> None:
        """Start a volunteer that joined before, without its invite."""
        arguments = [str(BIN / "talkoot"), "join", "--home", str(self.home(name))]
        self.nodes[name] = Command(
            name, arguments, self.root / "logs" / f"{name}.log", self.extra_environment
        )
        self.nodes[name].start()

    def status(self) -> dict[str, Any] | None:
        """The coordinator's public status page, over TLS; None while nobody answers."""
        import httpx

        try:
            answer = httpx.get(
                f"https://127.0.0.1:{self.gateway_port}/api/v1/status",
                verify=self._context(),
                timeout=5,
            )
            answer.raise_for_status()
            document: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError, OSError):
            return None
        return document

    def _context(self) -> Any:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.state / "ca" / "ca.pem")
        return context

    @property
    def ports(self) -> Mapping[str, Any]:
        """The operator's ``[network]``, with the ports as ``init`` chose them."""
        import tomllib

        network: Mapping[str, Any] = tomllib.loads((self.state / "config.toml").read_text("utf-8"))[
            "network"
        ]
        return network

    @property
    def gateway_port(self) -> int:
        """The gateway's port."""
        return int(self.ports["gateway_port"])

    def ledger_status(self) -> dict[str, Any]:
        """The whole history, straight from the ledger: also while nothing runs."""
        from talkoot.server.coordinator import Coordinator
        from talkoot.server.status import status

        coordinator = Coordinator.open(self.state)
        try:
            return status(coordinator, history_rounds=None)
        finally:
            coordinator.close()

    def wait_for(
        self,
        what: str,
        holds: Callable[[Mapping[str, Any]], bool],
        timeout_seconds: float,
        watch: Callable[[dict[str, Any] | None], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Wait until the status satisfies ``holds``; returns that status.

        Raises:
            UnavailableError: it did not in time, or a process that should run has ended.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            status = self.status()
            watch(status)
            if status is not None and holds(status):
                return status
            for command in [self.coordinator, *self.nodes.values()]:
                if command is not None and command.process is not None and not command.running:
                    raise UnavailableError(
                        f"{command.name} ended while waiting for {what}:\n{command.tail()}"
                    )
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{what} did not happen within {timeout_seconds:.0f} s:\n{self.tails()}"
                )
            time.sleep(POLL_SECONDS)

    def tails(self, lines: int = 12) -> str:
        """The ends of all logs, for an error message."""
        commands = [c for c in (self.coordinator, *self.nodes.values()) if c is not None]
        return "\n".join(f"--- {c.name}\n{c.tail(lines)}" for c in commands)

    def kill_node(self, name: str) -> None:
        """SIGKILL a volunteer with its trainer."""
        self.nodes[name].kill()
        self.nodes[name].process = None

    def kill_coordinator(self) -> None:
        """SIGKILL the coordinator's whole process tree."""
        assert self.coordinator is not None
        self.coordinator.kill()
        self.coordinator.process = None

    def stop(self) -> None:
        """Stop everything cleanly: volunteers first."""
        for command in self.nodes.values():
            if command.running and command.process is not None:
                command.process.send_signal(signal.SIGINT)
        for command in self.nodes.values():
            command.stop()
        if self.coordinator is not None:
            self.coordinator.stop()

    def __enter__(self) -> LocalNetwork:
        if self.root.exists():
            shutil.rmtree(self.root)
        self.root.mkdir(parents=True)
        return self

    def __exit__(self, *exc: object) -> None:
        for command in [*self.nodes.values(), self.coordinator]:
            if command is not None:
                command.kill()
