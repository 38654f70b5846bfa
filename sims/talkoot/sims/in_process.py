"""A coordinator in this process: production's ledger, rounds, data plane and TLS; Flower is not.

Only the control plane is left out: what is leased is read from the ledger, which is where a
daemon, too, looks for what Flower lost. Tests and trials of a single node stand on it.
"""

from __future__ import annotations

import itertools
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkoot.client.enrol import Enrolment
from talkoot.client.home import Home, Settings
from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.identity import NodeKey, make_csr
from talkoot.protocol.limits import PROTOCOL_VERSION
from talkoot.protocol.messages import (
    Capability,
    EnrolRequest,
    Lease,
    RoundTask,
    Signed,
    VersionRef,
    canonical_bytes,
    parse,
)
from talkoot.server.book import Book
from talkoot.server.conductor import Conductor
from talkoot.server.config import dump_config, load_config, parse_config
from talkoot.server.coordinator import Coordinator
from talkoot.server.desk import Desk
from talkoot.server.gateway_server import GatewayServer, GatewaySettings
from talkoot.server.ledger.schema import ContributionRecord, Node, NodeState
from talkoot.server.registry import Registry
from talkoot.server.setup import init, issue_server_certificate, with_free_ports
from talkoot.server.transfer import STALL_SECONDS, TransferServer, serve

if TYPE_CHECKING:
    pass

GIB = 2**30
STEPS = 1000
"""Turns of the round loop, which changes something in every few."""
CAPABILITY = Capability(
    device="cpu",
    device_name="simulated",
    device_total_bytes=64 * GIB,
    device_free_bytes=64 * GIB,
    host_total_bytes=64 * GIB,
    host_free_bytes=64 * GIB,
    disk_free_bytes=64 * GIB,
    cpu_count=1,
    torch_version="2",
    talkoot_version="0",
)


def nano_state(root: Path) -> Path:
    """An operator's state with a nano model and some of the standard library, below ``root``."""
    text = root / "text"
    text.mkdir(parents=True)
    for name in ("argparse", "ast", "inspect", "typing"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", text)
    config = parse_config(f"""
[model]
preset = "nano"
sequence_length = 64
micro_batch = 2

[corpus]
sources = ["{text}"]
block_tokens = 512
heldout_fraction = 0.3

[round]
tokens_per_node = 2048
checkpoint_every = 100

[network]
bind = "127.0.0.1"
""")
    init(root / "state", config, say=lambda _: None)
    return root / "state"


@dataclass
class MemoryRegister:
    """Flower's register of keys. As in Flower, a key that was unregistered never comes back."""

    nodes: dict[bytes, int] = field(default_factory=dict)
    gone: set[bytes] = field(default_factory=set)
    _next: Iterable[int] = field(default_factory=lambda: itertools.count(2**63 + 1))

    def register_node(self, public_key_pem: bytes, name: str) -> int | None:
        """The new id; None for a key that is known."""
        if public_key_pem in self.nodes or public_key_pem in self.gone:
            return None
        return self.nodes.setdefault(public_key_pem, next(iter(self._next)))

    def registered_nodes(self) -> dict[bytes, int]:
        """The ids of all registered keys."""
        return dict(self.nodes)

    def unregister_node(self, flower_node_id: int) -> None:
        """Forget a key, and never take it again."""
        for pem in [pem for pem, number in self.nodes.items() if number == flower_node_id]:
            del self.nodes[pem]
            self.gone.add(pem)


@dataclass
class MemoryControl:
    """Everybody who is registered is online; tasks are fetched over the data plane."""

    register: MemoryRegister

    def online(self) -> frozenset[int]:
        """All."""
        return frozenset(self.register.nodes.values())

    def send(self, tasks: Mapping[int, str], *, round_number: int, ttl_seconds: float) -> None:
        """Nothing: a node asks."""

    def replies(self) -> Iterable[tuple[int, str | None]]:
        """None."""
        return []

    def forget(self) -> None:
        """Nothing to forget."""


class InProcessCoordinator:
    """One coordinator over a finished state directory, serving on loopback. A context manager.

    Args:
        state: made by ``init``; it is copied, so that many can stand on one.
        root: where the copy goes.
        desk: what stands behind the data plane; a subclass of :class:`Desk` injects faults.

    Attributes:
        stall_seconds: of the data plane (``transfer.serve``); changed before :meth:`start`.
        data_plane: while it serves.
    """

    def __init__(
        self, state: Path, root: Path, desk: Callable[[Coordinator, Registry], Desk] = Desk
    ) -> None:
        shutil.copytree(state, root)
        config = load_config(root / "config.toml")
        ports = {"gateway_port": 0, "transfer_port": 0, "superlink_port": 0}
        config = with_free_ports(
            config.model_copy(update={"network": config.network.model_copy(update=ports)})
        )
        (root / "config.toml").write_text(dump_config(config), encoding="utf-8")
        self.coordinator = Coordinator.open(root)
        self.register = MemoryRegister()
        self.registry = Registry(self.coordinator, self.register)
        self.book = Book(self.coordinator)
        self.desk = desk(self.coordinator, self.registry)
        self.conductor = Conductor(
            self.coordinator, self.registry, MemoryControl(self.register), sleep=lambda _: None
        )
        self.stall_seconds = STALL_SECONDS
        self.data_plane: TransferServer | None = None
        self._gateway: GatewayServer | None = None

    def start(self) -> None:
        """Serve gateway (with no SuperLink behind it) and data plane; again after :meth:`stop`."""
        network = self.coordinator.config.network
        certificate, key = issue_server_certificate(self.coordinator.state, self.coordinator.config)
        self._gateway = GatewayServer(
            self.desk,
            GatewaySettings(
                "127.0.0.1",
                network.gateway_port,
                certificate,
                key,
                network.superlink_port,
                self.coordinator.state.loopback_ca,
            ),
        )
        self._gateway.start()
        self.data_plane = serve(
            self.desk,
            f"127.0.0.1:{network.transfer_port}",
            key.read_bytes(),
            certificate.read_bytes(),
            self.coordinator.ca_pem,
            max_workers=8,
            stall_seconds=self.stall_seconds,
        )

    def stop(self) -> None:
        """Hang up on everybody."""
        if self.data_plane is not None:
            self.data_plane.stop(0).wait()
            self.data_plane = None
        if self._gateway is not None:
            self._gateway.stop()
            self._gateway = None

    def __enter__(self) -> InProcessCoordinator:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self.coordinator.close()

    # Nodes ----------------------------------------------------------------------------------------

    def enrol(
        self, home: Home, name: str, *, admitted: bool = True, key: NodeKey | None = None
    ) -> Enrolment:
        """Enrol a node and, unless it shall prove itself, admit it on the operator's word.

        ``key`` instead of a fresh one repeats a network: leases follow from node ids.
        """
        home.create()
        key = key or NodeKey.generate()
        key.save(home.key)
        network = self.coordinator.config.network
        reply = self.registry.enrol(
            EnrolRequest(
                protocol=PROTOCOL_VERSION,
                token=self.registry.invite(uses=1, expires_seconds=3600).token,
                csr_pem=make_csr(key, key.node_id).decode("ascii"),
                name=name,
                capability=CAPABILITY,
            ),
            "127.0.0.1",
        )
        enrolment = Enrolment(
            node_id=reply.node_id,
            name=name,
            host="127.0.0.1",
            gateway_port=network.gateway_port,
            transfer_port=network.transfer_port,
            run_id=reply.run_id,
            trust_serial=1,
            ca_pem=self.coordinator.ca_pem.decode("ascii"),
            certificate_pem=reply.certificate_pem,
            coordinator_key_pem=reply.coordinator_key_pem,
        )
        enrolment.save(home.enrolment)
        home.save(home.settings_path, Settings(threads=1, checkpoint_seconds=0.01))
        if admitted:
            with self.coordinator.ledger.write() as session:
                node = session.get_one(Node, key.node_id)
                node.status = "admitted"
                node.tokens_per_second = 1000.0
        return enrolment

    def state_of(self, node_id: str) -> str:
        """What the node's last report said it does; empty before the first."""
        with self.coordinator.ledger.read() as session:
            state = session.get(NodeState, node_id)
            return "" if state is None else str(parse_report(state.report)["state"])

    # Rounds ---------------------------------------------------------------------------------------

    def lease(self, node_id: str) -> Signed:
        """Turn the round loop until the node has a lease, and return its task."""
        for _ in range(STEPS):
            task = self.desk.task(node_id)
            if task is not None:
                return task
            self.conductor.step()
        raise UnavailableError("The round loop gave out no lease.")

    def lease_anew(self) -> None:
        """Give up the open round's leases and hand out others, as when the quorum is lost."""
        control = MemoryControl(self.register)
        opened = self.book.open_round(control.online(), 1.0, now=time.time())
        assert opened is not None
        assert opened.attempt > 0

    def publish(self) -> int:
        """Turn the round loop until the next version is out; returns its number."""
        before = self.version
        for _ in range(STEPS):
            if self.version > before:
                return self.version
            self.conductor.step()
        raise UnavailableError("The round loop published nothing: does it wait for a lease?")

    @property
    def version(self) -> int:
        """The newest published version."""
        with self.coordinator.ledger.read() as session:
            return self.book.latest_version(session).version

    def version_ref(self) -> VersionRef:
        """The newest version, and how to get there."""
        with self.coordinator.ledger.read() as session:
            return self.book.version_ref(session, self.book.latest_version(session))

    def sign(self, message: RoundTask | VersionRef) -> Signed:
        """As the coordinator signs."""
        if isinstance(message, VersionRef):
            return self.registry.statements.version(message, time.time())
        return self.coordinator.key.sign(type(message).__name__, canonical_bytes(message))

    def contributions(self, node_id: str) -> list[str]:
        """Lease ids of what the node has in the ledger."""
        with self.coordinator.ledger.read() as session:
            records = session.query(ContributionRecord).filter_by(node_id=node_id)
            return [record.lease_id for record in records]


def task_of(signed: Signed) -> RoundTask:
    """The task in an envelope."""
    return parse(RoundTask, signed.body.encode("ascii"))


def lease_of(signed: Signed) -> Lease:
    """The lease in a signed task."""
    return task_of(signed).lease


def parse_report(text: str) -> dict[str, Any]:
    """A report as the ledger keeps it."""
    import json

    document: dict[str, Any] = json.loads(text)
    return document
