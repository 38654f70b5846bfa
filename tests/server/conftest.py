"""A real coordinator's state with a nano model, made once and copied for each test."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.data_plane import Network, Shelf

from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.codec import encode_tensor
from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.identity import NodeKey, make_csr
from talkoot.protocol.limits import PROTOCOL_VERSION
from talkoot.protocol.messages import (
    ArtifactRef,
    Capability,
    Contribution,
    EnrolReply,
    EnrolRequest,
    Proof,
    RoundTask,
    Signed,
    canonical_bytes,
    parse,
)
from talkoot.protocol.payload import write_payload
from talkoot.server.backup.rows import copy_rows
from talkoot.server.book import Book
from talkoot.server.conductor import Conductor
from talkoot.server.config import Config, LedgerSection, dump_config, load_config, parse_config
from talkoot.server.coordinator import Coordinator
from talkoot.server.desk import Desk
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import LeaseRecord, Node, ProofRecord
from talkoot.server.registry import Registry
from talkoot.server.setup import init
from talkoot.sims.in_process import MemoryControl, MemoryRegister
from talkoot.sims.postgres import FAST, PostgresCluster, why_not

os.environ.setdefault("OMP_NUM_THREADS", "1")

GIB = 2**30
NOW = 1_800_000_000.0
CAPABILITY = Capability(
    device="cpu",
    device_name="a test's processor",
    device_total_bytes=64 * GIB,
    device_free_bytes=64 * GIB,
    host_total_bytes=64 * GIB,
    host_free_bytes=64 * GIB,
    disk_free_bytes=64 * GIB,
    cpu_count=2,
    torch_version="2",
    talkoot_version="0",
)


@dataclass
class FlowerRegister:
    """Flower's register of keys, in memory: the ``Register`` that a ``Registry`` is given."""

    nodes: dict[bytes, int] = field(default_factory=dict)
    down: bool = False
    """Nobody answers, as while a SuperLink restarts."""
    silent: bool = False
    """Answers, and registers nothing."""
    _next: Iterator[int] = field(default_factory=lambda: itertools.count(2**63 + 1))

    def register_node(self, public_key_pem: bytes, name: str) -> int | None:
        self._answer()
        if public_key_pem in self.nodes or self.silent:
            return None
        return self.nodes.setdefault(public_key_pem, next(self._next))

    def registered_nodes(self) -> dict[bytes, int]:
        self._answer()
        return dict(self.nodes)

    def _answer(self) -> None:
        if self.down:
            raise UnavailableError("The SuperLink does not answer.")


@dataclass
class Site:
    """An operator's open state, and the keys of the nodes that a test plays."""

    coordinator: Coordinator
    flower: FlowerRegister = field(default_factory=FlowerRegister)
    keys: dict[str, NodeKey] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = Registry(self.coordinator, self.flower)
        self.book = Book(self.coordinator)
        self.desk = Desk(self.coordinator, self.registry)

    def reopen(self, **changes: dict[str, object]) -> None:
        """Close and open again, with other settings by section: ``round={"quorum": 2}``."""
        settings = self.coordinator.config.model_dump()
        for section, values in changes.items():
            settings[section] |= values
        state = self.coordinator.state
        state.config.write_text(dump_config(Config.model_validate(settings)), encoding="utf-8")
        self.coordinator.close()
        self.coordinator = Coordinator.open(state.root)
        self.__post_init__()

    # Nodes ----------------------------------------------------------------------------------------

    def request(self, token: str | None, key: NodeKey, name: str = "anna") -> EnrolRequest:
        return EnrolRequest(
            protocol=PROTOCOL_VERSION,
            token=token,
            csr_pem=make_csr(key, key.node_id).decode("ascii"),
            name=name,
            capability=CAPABILITY,
        )

    def enrol(self, name: str = "anna") -> tuple[str, EnrolReply]:
        """Enrol a new node through a fresh invite; returns its id and the answer."""
        key = NodeKey.generate()
        self.keys[key.node_id] = key
        invite = self.registry.invite(uses=1, expires_seconds=3600)
        return key.node_id, self.registry.enrol(self.request(invite.token, key, name), "127.0.0.1")

    def add_node(self, name: str, *, speed: float = 1000.0, key: NodeKey | None = None) -> str:
        """Put an admitted node into the ledger, as enrolment and proof leave it."""
        key = key or NodeKey.generate()
        self.keys[key.node_id] = key
        number = self.flower.register_node(key.public_pem, name)
        with self.coordinator.ledger.write() as session:
            session.add(
                Node(
                    node_id=key.node_id,
                    name=name,
                    public_key_pem=key.public_pem.decode("ascii"),
                    public_key_sha256=hashlib.sha256(key.public_pem).hexdigest(),
                    flower_node_id=str(number),
                    status="admitted",
                    sentence="Admitted.",
                    capability=canonical_bytes(CAPABILITY).decode("ascii"),
                    invite_id=None,
                    enrolled_unix=NOW,
                    tokens_per_second=speed,
                    nonce=None,
                )
            )
            session.flush()
            session.add(
                ProofRecord(
                    node_id=key.node_id,
                    signed=canonical_bytes(self.proof(key.node_id, "0" * 32)).decode("ascii"),
                    accepted=True,
                    code="admitted",
                    sentence="Admitted.",
                    unix=NOW,
                )
            )
        return key.node_id

    def flower_id(self, node_id: str) -> int:
        return self.flower.nodes[self.keys[node_id].public_pem]

    def online(self, *node_ids: str) -> frozenset[int]:
        """What Flower says when these nodes are there; all, if none is named."""
        return frozenset(self.flower_id(node_id) for node_id in node_ids or self.keys)

    def proof(self, signer: str, nonce: str, **changes: object) -> Signed:
        fields: dict[str, object] = {
            "run_id": self.coordinator.run_id,
            "node_id": signer,
            "nonce": nonce,
            "recipe": "fp32-adamw",
            "steps": 2,
            "loss": 5.5,
            "peak_bytes": GIB,
            "predicted_bytes": GIB,
            "tokens_per_second": 1000.0,
            "capability": CAPABILITY,
        }
        proof = Proof.model_validate({**fields, **changes})
        return self.keys[signer].sign("Proof", canonical_bytes(proof))

    # Rounds ---------------------------------------------------------------------------------------

    def task(self, node_id: str) -> RoundTask:
        """The node's open task."""
        signed = self.desk.task(node_id)
        assert signed is not None
        return parse(RoundTask, signed.body.encode("ascii"))

    def claim(self, task: RoundTask, payload: ArtifactRef, **changes: object) -> Contribution:
        fields: dict[str, object] = {
            "run_id": task.run_id,
            "round": task.round,
            "lease_id": task.lease.lease_id,
            "node_id": task.lease.node_id,
            "base_weights_digest": task.base.weights_digest,
            "payload": payload,
            "tokens": task.lease.tokens,
            "steps": 4,
            "loss": 5.0,
            "training_seconds": 2.0,
        }
        return Contribution.model_validate({**fields, **changes})

    def sign(self, claim: Contribution) -> Signed:
        return self.keys[claim.node_id].sign("Contribution", canonical_bytes(claim))

    def write_payload(self, path: Path, seed: int, *, scale: float = 1e-3) -> ArtifactRef:
        """A real payload of this run, made by the codec from noise."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        manifest, codec = self.coordinator.manifest, self.coordinator.spec.uplink
        items = (
            (t.name, encode_tensor(scale * torch.randn(t.shape, generator=generator), codec))
            for t in manifest.tensors
        )
        write_payload(path, manifest, codec, items, {})
        data = path.read_bytes()
        return ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def push(self, node_id: str, lease_id: str, seed: int, *, scale: float = 1e-3) -> ArtifactRef:
        """A real payload, arrived as the transfer service hands it over."""
        path = self.coordinator.state.incoming / f"test-{node_id}"
        ref = self.write_payload(path, seed, scale=scale)
        self.desk.pushed(node_id, lease_id, ref.digest, path)
        return ref

    def lease(self, lease_id: str) -> LeaseRecord:
        with self.coordinator.ledger.read() as session:
            return session.get_one(LeaseRecord, lease_id)

    def node(self, node_id: str) -> Node:
        with self.coordinator.ledger.read() as session:
            return session.get_one(Node, node_id)


@pytest.fixture(scope="session")
def state_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole state directory, straight from ``init``."""
    text = tmp_path_factory.mktemp("text")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(stdlib.glob("a*.py"))[:8]:
        shutil.copy(file, text / file.name)
    config = parse_config(f"""
        [run]
        name = "test"
        rounds = 3
        [model]
        preset = "nano"
        sequence_length = 64
        micro_batch = 4
        [corpus]
        sources = ["{text}"]
        block_tokens = 512
        heldout_fraction = 0.1
        [round]
        tokens_per_node = 1024
        deadline_seconds = 100
        checkpoint_every = 2
        keep_checkpoints = 2
        [network]
        gateway_port = 0
        transfer_port = 0
    """)
    root = tmp_path_factory.mktemp("template") / "state"
    init(root, config, say=lambda _line: None)
    return root


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    """A private PostgreSQL; a test that needs it is skipped where there can be none."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with PostgresCluster(FAST) as cluster:
        yield cluster


_names = itertools.count()


@pytest.fixture
def new_database(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Makes a database on the private PostgreSQL, perhaps as a copy of another; gives its URL."""
    made: list[str] = []

    def make(template: str = "template0") -> str:
        made.append(f"test{next(_names)}")
        url: str = request.getfixturevalue("postgres").create(made[-1], template)
        return url

    yield make
    for name in made:
        request.getfixturevalue("postgres").drop(name)


@pytest.fixture
def ledger_kind() -> str:
    """``sqlite``; a module whose tests are about the ledger overrides it with both kinds."""
    return "sqlite"


@pytest.fixture(scope="session")
def postgres_template(state_template: Path, postgres: PostgresCluster) -> str:
    """The template's ledger on PostgreSQL: the name of its database."""
    name = "template_site"
    with (
        closing(Ledger(postgres.create(name))) as ledger,
        closing(Ledger(Ledger.url_at(state_template))) as source,
    ):
        ledger.migrate()
        copy_rows(source, ledger)
    return name


@pytest.fixture
def make_site(
    state_template: Path,
    tmp_path: Path,
    ledger_kind: str,
    new_database: Callable[..., str],
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[], Site]]:
    """Opens a fresh copy of the state, again and again if wanted."""
    made: list[Site] = []

    def make() -> Site:
        root = tmp_path / f"site{len(made)}"
        shutil.copytree(state_template, root)
        if ledger_kind == "postgresql":
            config = load_config(root / "config.toml")
            url = new_database(request.getfixturevalue("postgres_template"))
            config = config.model_copy(update={"ledger": LedgerSection(url=url)})
            (root / "config.toml").write_text(dump_config(config), encoding="utf-8")
            (root / "ledger.db").unlink()
        made.append(Site(Coordinator.open(root)))
        return made[-1]

    yield make
    for site in made:
        site.coordinator.close()


@pytest.fixture
def site(make_site: Callable[[], Site]) -> Site:
    """One coordinator without nodes."""
    return make_site()


_PLAYED: list[Path] = []


@pytest.fixture
def played(
    make_site: Callable[[], Site], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Path:
    """A copy of a state with two published rounds, and a third half-way through.

    It was played once, by two nodes; in the third round one contributed and one lease is open.
    """
    if not _PLAYED:
        root = _play(make_site())
        _PLAYED.append(shutil.copytree(root, tmp_path_factory.mktemp("played") / "state"))
    copy: Path = shutil.copytree(_PLAYED[0], tmp_path / "state")
    return copy


def _play(site: Site) -> Path:
    nodes = [site.add_node(name) for name in ("anna", "bo")]
    register = MemoryRegister(nodes=site.flower.nodes)
    loop = Conductor(site.coordinator, site.registry, MemoryControl(register), sleep=lambda _: None)

    def work(node_id: str, seed: int) -> None:
        task = site.task(node_id)
        ref = site.push(node_id, task.lease.lease_id, seed)
        assert site.desk.submit(node_id, site.sign(site.claim(task, ref))).accepted

    for number in (1, 2, 3):
        while site.desk.task(nodes[0]) is None:
            loop.step()
        work(nodes[0], 10 * number)
        if number < 3:
            work(nodes[1], 10 * number + 1)
    site.coordinator.close()
    return Path(site.coordinator.state.root)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """A data plane on loopback (``tests/data_plane.py``)."""
    net = Network(Shelf(ArtifactStore(tmp_path / "server")), tmp_path)
    net.start()
    yield net
    for close in net.closing:
        close()
    net.stop()
