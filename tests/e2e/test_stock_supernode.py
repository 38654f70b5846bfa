"""Flower's own SuperNode, as Flower ships it, in our network beside a daemon."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from talkoot.sims.local import BIN, LocalNetwork, environment

pytestmark = pytest.mark.e2e

LOST_AFTER = 3  # seconds; an idle stock SuperNode is silent for longer than this


def _config(root: Path) -> Path:
    text = root / "text"
    text.mkdir()
    for name in ("argparse", "ast", "inspect", "typing"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", text)
    path = root / "config.toml"
    path.write_text(f"""[run]
name = "stock"
rounds = 1000

[model]
preset = "nano"
sequence_length = 64
micro_batch = 4

[corpus]
sources = ["{text}"]
block_tokens = 512
heldout_fraction = 0.3

[round]
tokens_per_node = 2048
deadline_seconds = 120
min_nodes = 2
quorum = 2
lost_after_seconds = {LOST_AFTER}
checkpoint_every = 4

[network]
bind = "127.0.0.1"
gateway_port = 0
transfer_port = 0
""")
    return path


@contextmanager
def _supernode(command: str, root: Path) -> Iterator[Path]:
    """Run the command that ``talkoot join --enrol-only`` printed; yields its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name, *arguments = shlex.split(command)
    env = environment()
    env["FLWR_HOME"] = str(root / "flwr")  # where Flower unpacks the bundle
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"  # SuperExec starts its helpers by name
    log = root / "supernode.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            # Its API for its own children, which every SuperNode on this machine would open.
            [str(BIN / name), *arguments, "--port", str(port)],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield log
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C in its terminal
        assert process.wait(30) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _node(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((node for node in status["nodes"] if node["name"] == name), {})


def test_a_stock_supernode_contributes_round_after_round_beside_a_daemon(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path / "network") as network:
        network.init(_config(tmp_path))
        network.serve()
        network.wait_for("the coordinator", lambda status: True, 60)
        url = network.invite(2)
        home = network.home("stock")
        said = network.run(
            *("talkoot", "join", url, "--home", str(home), "--name", "stock"),
            *("--threads", "1", "--enrol-only"),
        )
        command = said[said.index("flower-supernode --superlink") :].strip()

        # It proved itself, so that the SuperNode need not; nothing secret is open to others.
        status = network.wait_for("admission", lambda status: bool(status["nodes"]), 60)
        assert _node(status, "stock")["status"] == "admitted"
        assert (home / "supernode.key").stat().st_mode & 0o777 == 0o600

        # Saying it again proves nothing twice, and needs no invite.
        again = network.run("talkoot", "join", "--home", str(home), "--enrol-only")
        assert again.strip().endswith(command)
        assert "Admitted: proved" in again

        with _supernode(command, tmp_path) as log:
            network.join("daemon", url, "--threads", "1")
            # A quorum of two: every version has a contribution of both. Between its leases the
            # SuperNode is silent for longer than "lost_after_seconds", and is leased to all the
            # same.
            status = network.wait_for(
                "a second version", lambda status: bool(status["version"] >= 2), 240
            )
        stock = _node(status, "stock")
        assert stock["contributions"] >= 2, log.read_text()
        assert stock["contributions"] + _node(status, "daemon")["contributions"] >= 4
        assert stock["restarts"] == 0  # a process a lease is how it works, and nothing of note
        version, digest = stock["version"], stock["weights_digest"]
        published = {
            row["version"]: row["weights_digest"] for row in network.ledger_status()["history"]
        }
        assert published[version] == digest
