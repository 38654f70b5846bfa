"""Flower alone: a real SuperLink as a coordinator starts it, with nothing of ours around it.

What holds of Flower is tried out here (the contract tests of both sides), by running it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.server.ca import CertificateAuthority
from talkoot.server.flower import ControlApi, superlink_command, superlink_environment

START_SECONDS = 60.0
STOP_SECONDS = 1.0
"""It waits for idle connections to end, and has nothing that is worth the wait."""


class LocalSuperLink:
    """One SuperLink on loopback, over TLS, with nodes authenticated. A context manager.

    Args:
        root: its own directory, which must not exist.
        superexec: also run what starts the ServerApp of a run that is submitted.
        env: what the ServerApp finds in its environment beside the usual.
    """

    def __init__(
        self, root: Path, *, superexec: bool = False, env: dict[str, str] | None = None
    ) -> None:
        self.root = root
        self._superexec = superexec
        self._env = superlink_environment({**os.environ, **(env or {})}, root / "flwr")
        self._processes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def ca_pem(self) -> bytes:
        """Whom to trust."""
        return (self.root / "ca" / "ca.pem").read_bytes()

    @property
    def address(self) -> str:
        """Where the Fleet API is."""
        return f"localhost:{self.port}"

    @property
    def control(self) -> ControlApi:
        """The operator's way in."""
        return ControlApi(self.port, self.ca_pem)

    def register(self, key: NodeKey, name: str = "node") -> int:
        """Let a key take part; returns Flower's node id."""
        node_id = self.control.register_node(key.public_pem, name)
        assert node_id is not None
        return node_id

    def log(self) -> str:
        """What Flower said."""
        return (self.root / "log").read_text("utf-8", "replace")

    def __enter__(self) -> LocalSuperLink:
        self.root.mkdir(parents=True)
        authority = CertificateAuthority.create(self.root / "ca")
        key = NodeKey.generate()
        key.save(self.root / "server.key")
        (self.root / "server.pem").write_bytes(authority.issue_server([], [], key))
        try:
            self._start(
                superlink_command(
                    port=self.port,
                    database=self.root / "flower.db",
                    certificate=self.root / "server.pem",
                    key=self.root / "server.key",
                    ca=self.root / "ca" / "ca.pem",
                )
            )
            if self._superexec:
                code = (
                    "import sys; from pathlib import Path; "
                    "from talkoot.server.flower import run_superexec; "
                    "run_superexec(int(sys.argv.pop(1)), Path(sys.argv.pop(1)))"
                )
                ca = str(self.root / "ca" / "ca.pem")
                self._start([sys.executable, "-c", code, str(self.port), ca])
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, command: list[str]) -> None:
        with (self.root / "log").open("ab") as out:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    start_new_session=True,
                )
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.control.runs()
            except UnavailableError as err:
                ended = any(process.poll() is not None for process in self._processes)
                if ended or time.monotonic() > deadline:
                    raise UnavailableError(f"Flower did not start:\n{self.log()}") from err
                time.sleep(0.05)
            else:
                return

    def __exit__(self, *exc: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + STOP_SECONDS
            for process in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
