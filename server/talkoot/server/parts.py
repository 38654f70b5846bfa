"""The long-running parts of a coordinator, each a process of its own under the supervisor.

``python -m talkoot.server.parts gateway|transfer|evaluator|superexec|store --state DIR``: runs
until SIGTERM, or until the supervisor that started it is gone.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from talkoot.protocol.errors import TalkootError
from talkoot.server.config import load_config
from talkoot.server.coordinator import Coordinator
from talkoot.server.desk import Desk
from talkoot.server.flower import ControlApi, run_superexec
from talkoot.server.leash import die_with_parent
from talkoot.server.logs import configure
from talkoot.server.registry import Registry
from talkoot.server.state import StateDir
from talkoot.server.trust import stamp
from talkoot.server.validator import Validator

log = logging.getLogger(__name__)

READY = "ready"
"""A part prints this line on standard output when it serves."""


def serve_gateway_until(coordinator: Coordinator, stop: threading.Event) -> None:
    """Run the gateway until ``stop`` is set."""
    from talkoot.server.gateway_server import GatewaySettings, serve_gateway

    network = coordinator.config.network
    state = coordinator.state
    control = ControlApi(network.superlink_port, coordinator.loopback_ca_pem)
    settings = GatewaySettings(
        host=network.bind,
        port=network.gateway_port,
        certificate=state.tls / "server.pem",
        key=state.tls / "server.key",
        superlink_port=network.superlink_port,
        superlink_ca=state.loopback_ca,
        max_connections=network.max_connections,
        max_connections_per_address=network.max_connections_per_address,
    )
    shown = file_stamp(settings.certificate)
    with serve_gateway(Desk(coordinator, Registry(coordinator, control)), settings) as server:
        print(READY, flush=True)
        while not stop.wait(0.5):
            if not server.is_alive():
                raise TalkootError("The gateway stopped by itself.")
            if shown != (shown := file_stamp(settings.certificate)):
                server.reload_certificate()
                log.info("the server's certificate was renewed")


def serve_transfer_until(coordinator: Coordinator, stop: threading.Event) -> None:
    """Run the transfer service until ``stop`` is set."""
    from talkoot.server.transfer import serve

    network = coordinator.config.network
    control = ControlApi(network.superlink_port, coordinator.loopback_ca_pem)
    host = f"[{network.bind}]" if ":" in network.bind else network.bind
    files = TlsWatch(coordinator)
    server = serve(
        Desk(coordinator, Registry(coordinator, control)),
        f"{host}:{network.transfer_port}",
        *files.read(),
        reload=files.changed,
        max_connections=network.max_connections,
        max_connections_per_address=network.max_connections_per_address,
    )
    print(READY, flush=True)
    # Verifying a payload needs torch, which takes seconds to import: not before the port is open.
    importlib.import_module("talkoot.protocol.payload")
    stop.wait()
    server.stop(2).wait()


def evaluate_until(coordinator: Coordinator, stop: threading.Event) -> None:
    """Measure published versions until ``stop`` is set."""
    from talkoot.server.evaluator import LOWEST_PRIORITY, Evaluator

    os.nice(LOWEST_PRIORITY)
    print(READY, flush=True)
    Evaluator(coordinator).run(stop)


def copy_until(coordinator: Coordinator, stop: threading.Event) -> None:
    """Copy artifacts to the operator's object store until ``stop`` is set."""
    from talkoot.server.copier import Copier, open_store

    copier = Copier(coordinator, open_store(coordinator), stop.is_set)
    print(READY, flush=True)
    copier.run(stop.wait)


class TlsWatch:
    """The TLS files of the transfer service, read again after the supervisor changed them."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._seen = self._stamp()

    def _stamp(self) -> tuple[object, ...]:
        return (*file_stamp(self._c.state.tls / "server.pem"), *stamp(self._c.state.ca))

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate and the CAs of clients."""
        tls = self._c.state.tls
        return (
            (tls / "server.key").read_bytes(),
            (tls / "server.pem").read_bytes(),
            self._c.ca_pem,
        )

    def changed(self) -> tuple[bytes, bytes, bytes] | None:
        """What is new since the last call; None when nothing is."""
        now = self._stamp()
        if now == self._seen:
            return None
        try:
            files = self.read()
        except (OSError, TalkootError) as err:  # half-way through a change: the next peer sees it
            log.warning("the TLS files could not be read: %s", err)
            return None
        self._seen = now
        return files


def file_stamp(path: Path) -> tuple[int, int]:
    """Changes whenever the file is replaced."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="talkoot.server.parts")
    parts = ["gateway", "transfer", "evaluator", "validator", "superexec", "store"]
    parser.add_argument("part", choices=parts)
    parser.add_argument("--state", type=Path, required=True)
    args = parser.parse_args()
    die_with_parent()
    if args.part == "superexec":
        state = StateDir(args.state)
        run_superexec(load_config(state.config).network.superlink_port, state.loopback_ca)
        return 0
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        coordinator = Coordinator.open(args.state)
        configure(coordinator.state.logs / f"{args.part}.log")
        if args.part == "gateway":
            serve_gateway_until(coordinator, stop)
        elif args.part == "evaluator":
            evaluate_until(coordinator, stop)
        elif args.part == "store":
            copy_until(coordinator, stop)
        elif args.part == "validator":
            print(READY, flush=True)
            Validator(coordinator).run(stop)
        else:
            serve_transfer_until(coordinator, stop)
    except TalkootError as err:
        print(err.sentence, file=sys.stderr, flush=True)
        return 1
    except Exception:
        log.exception("the %s failed", args.part)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
