"""``make bench-control``: how many nodes one coordinator bears.

A real coordinator (``talkoot-coordinator serve``: gateway, SuperLink on its database, round loop,
transfer service) on this machine, and one process that plays thousands of nodes. Each node has what
an enrolled node has: its key, which the SuperLink knows, and a certificate of the coordinator's CA.
Each does what an idle daemon does, with the daemon's own client code and at its pace: it activates
itself through the gateway, sends heartbeats, polls for messages, asks the data plane for a lost
task, and reports. Rounds don't open (``min_nodes`` is out of reach): what is measured is what nodes
cost by being there.

Enrolment takes the coordinator's own code, in this process, since the gateway lets only so many
through from one address; that a node could train is written into the ledger, not proved.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
from flwr.clientapp import ClientApp
from flwr.proto.control_pb2 import ListNodesRequest

from talkoot.client.daemon import IDLE_TASK_CHECK_SECONDS
from talkoot.client.flower import FleetHost
from talkoot.client.transfer import MESSAGE_OPTIONS, SERVER_NAME
from talkoot.protocol.errors import CapacityError, TalkootError, UnavailableError
from talkoot.protocol.identity import NodeKey, make_csr
from talkoot.protocol.limits import PROTOCOL_VERSION
from talkoot.protocol.messages import (
    Capability,
    EnrolRequest,
    NodeReport,
    NodeReportReply,
    canonical_bytes,
    parse,
)
from talkoot.protocol.wire.transfer_pb2 import Envelope
from talkoot.protocol.wire.transfer_pb2_grpc import TransferStub
from talkoot.server.flower import ControlApi
from talkoot.sims.local import LocalNetwork

DRIVERS: Final = 48
"""Calls that the driver has under way at once."""
RAMP_PER_SECOND: Final = 12.0
"""Nodes that come online a second: activation is the dearest call of all."""
START_SECONDS: Final = 180.0
SETTLE_SECONDS: Final = 60.0
"""For the last that came to be seen by all; who is missing after that was lost."""
GIB: Final = 2**30

CONFIG: Final = """
[run]
name = "control"
rounds = 3
[model]
preset = "nano"
sequence_length = 64
micro_batch = 2
[corpus]
block_tokens = 128
[round]
tokens_per_node = 128
min_nodes = 100000
[network]
bind = "127.0.0.1"
gateway_port = 0
transfer_port = 0
max_connections = {connections}
max_connections_per_address = {connections}
"""

CAPABILITY: Final = Capability(
    device="cpu",
    device_name="a load driver",
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
class Counts:
    """What the driver saw. Thread-safe enough: appends and additions under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    pulls: list[tuple[float, float]] = field(default_factory=list)
    """(monotonic time, seconds) of each poll that was answered."""
    reports: list[float] = field(default_factory=list)
    connects: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)

    def failed(self, what: str, err: Exception) -> None:
        """Count a failure by what it says."""
        said = getattr(err, "sentence", None) or str(err)
        with self.lock:
            key = f"{what}: {said[:120]}"
            self.failures[key] = self.failures.get(key, 0) + 1


class Node:
    """One node that is there and idle: what ``client/daemon.py`` does, a step at a time."""

    def __init__(
        self, network: Place, key: NodeKey, certificate: str, counts: Counts, poll_seconds: float
    ) -> None:
        self._counts = counts
        self._poll_seconds = poll_seconds
        self._report_at = self._task_at = 0.0
        self._network = network
        self._host: FleetHost | None = None
        self._key = key
        self._certificate = certificate.encode("ascii")
        self._stub: TransferStub | None = None
        self._began = time.time()
        self._version = 0

    def step(self) -> float:
        """Do what is due; returns the seconds until the next step."""
        try:
            if self._host is None:
                self._join()
            self._report()
            self._poll()
        except (TalkootError, grpc.RpcError) as err:
            self._counts.failed("step", err)
            return 2.0 * random.uniform(0.7, 1.3)
        return self._poll_seconds * random.uniform(0.8, 1.2)

    def _join(self) -> None:
        options = (*MESSAGE_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME))
        credentials = grpc.ssl_channel_credentials(
            self._network.ca, self._key.private_pem(), self._certificate
        )
        if self._stub is None:
            self._channel = grpc.secure_channel(
                f"127.0.0.1:{self._network.transfer_port}", credentials, options=options
            )
            self._stub = TransferStub(self._channel)
        self._report()
        host = FleetHost(
            f"127.0.0.1:{self._network.gateway_port}",
            self._network.ca,
            self._key,
            ClientApp(),
            {},
        )
        began = time.monotonic()
        try:
            host.connect(self._poll_seconds)
        except TalkootError:
            host.close()
            raise
        with self._counts.lock:
            self._counts.connects.append(time.monotonic() - began)
        self._host = host

    def _poll(self) -> None:
        assert self._host is not None
        assert self._stub is not None
        began = time.monotonic()
        self._host.keep_pace(self._poll_seconds)
        self._host.poll()
        with self._counts.lock:
            self._counts.pulls.append((began, time.monotonic() - began))
        if began > self._task_at:
            self._task_at = began + IDLE_TASK_CHECK_SECONDS
            try:
                self._stub.GetTask(Envelope(), timeout=60)
            except grpc.RpcError as err:
                if "no-task" not in str(err):
                    raise

    def _report(self) -> None:
        now = time.monotonic()
        if now < self._report_at:
            return
        assert self._stub is not None
        report = NodeReport(
            state="idle",
            version=self._version,
            weights_digest=None,
            lease_id=None,
            step=0,
            steps=0,
            loss=None,
            tokens_per_second=0.0,
            bytes_up=0,
            bytes_down=0,
            healed=0,
            started_unix=self._began,
        )
        answer = self._stub.Report(Envelope(body=canonical_bytes(report)), timeout=60)
        with self._counts.lock:
            self._counts.reports.append(time.monotonic() - now)
        reply = parse(NodeReportReply, answer.body)
        self._poll_seconds = reply.poll_seconds
        self._version = reply.latest_version or 0
        self._report_at = now + reply.report_seconds


@dataclass(frozen=True)
class Place:
    """Where the coordinator is, and what proves it."""

    ca: bytes
    gateway_port: int
    transfer_port: int


class Driver:
    """Lets every node do its next step when it is due, a few at once."""

    def __init__(self, nodes: Sequence[Node], ramp_per_second: float) -> None:
        now = time.monotonic()
        self._due = [(now + i / ramp_per_second, i) for i in range(len(nodes))]
        self._nodes = nodes
        self._changed = threading.Condition()
        self._stopping = False
        self.lateness: list[float] = []
        """Seconds between when a step was due and when it began: a driver that is late is slower
        than the nodes it plays."""

    def run(self) -> None:
        """Until :meth:`stop`."""
        with ThreadPoolExecutor(DRIVERS, thread_name_prefix="nodes") as pool:
            for _ in range(DRIVERS):
                pool.submit(self._work)

    def stop(self) -> None:
        """End after the steps under way."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (index := self._next()) is not None:
            pause = self._nodes[index].step()
            with self._changed:
                heapq.heappush(self._due, (time.monotonic() + pause, index))
                self._changed.notify()

    def _next(self) -> int | None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    due, index = heapq.heappop(self._due)
                    self.lateness.append(now - due)
                    return index
                self._changed.wait(self._due[0][0] - now if self._due else 1.0)
            return None


# The coordinator's side ------------------------------------------------------------------

PARTS: Final = {
    "superlink": "flower-superlink",
    "gateway": "parts gateway",
    "transfer": "parts transfer",
    "round loop": "serverapp",
    "superexec": "parts superexec",
}


class Watch:
    """Processor time and memory of the coordinator's parts."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.peak: dict[str, int] = {}
        self._cpu: dict[int, tuple[str, float]] = {}
        self._from: dict[str, float] = {}
        self._began = 0.0

    def look(self) -> None:
        """Take a sample."""
        memory: dict[str, int] = {}
        for process in self._root.children(recursive=True):
            try:
                command = " ".join(process.cmdline())
                name = next((n for n, part in PARTS.items() if part in command), "other")
                times = process.cpu_times()
                self._cpu[process.pid] = (name, times.user + times.system)
                memory[name] = memory.get(name, 0) + process.memory_info().rss
            except psutil.Error:
                continue
        for name, used in memory.items():
            self.peak[name] = max(self.peak.get(name, 0), used)

    def mark(self) -> None:
        """Processor time counts from here."""
        self.look()
        self._from = self._totals()
        self._began = time.monotonic()

    def shares(self) -> dict[str, float]:
        """Of one core, by part, since :meth:`mark`."""
        self.look()
        seconds = time.monotonic() - self._began
        return {n: (t - self._from.get(n, 0.0)) / seconds for n, t in self._totals().items()}

    def _totals(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, seconds in self._cpu.values():
            totals[name] = totals.get(name, 0.0) + seconds
        return totals


def enrol(root: Path, count: int, say: Callable[[str], None]) -> list[tuple[NodeKey, str]]:
    """Enrol so many nodes with the coordinator's own code: (key, certificate) of each."""
    from sqlalchemy import update

    from talkoot.server.coordinator import Coordinator
    from talkoot.server.ledger.schema import Node as NodeRow
    from talkoot.server.registry import Registry

    coordinator = Coordinator.open(root)
    try:
        control = ControlApi(coordinator.config.network.superlink_port, coordinator.loopback_ca_pem)
        _until_it_answers(control)
        registry = Registry(coordinator, control)
        invite = registry.invite(uses=count, expires_seconds=86_400)
        made = []
        began = time.monotonic()
        for number in range(count):
            key = NodeKey.generate()
            request = EnrolRequest(
                protocol=PROTOCOL_VERSION,
                token=invite.token,
                csr_pem=make_csr(key, key.node_id).decode("ascii"),
                name=f"n{number}",
                capability=CAPABILITY,
            )
            made.append((key, registry.enrol(request, "127.0.0.1").certificate_pem))
            if number % 200 == 199:
                rate = (number + 1) / (time.monotonic() - began)
                say(f"{number + 1} of {count} enrolled, {rate:.0f} a second")
        with coordinator.ledger.write() as session:
            session.execute(
                update(NodeRow).values(
                    status="admitted", sentence="Admitted.", tokens_per_second=1000.0
                )
            )
        return made
    finally:
        coordinator.close()


def _until_it_answers(control: ControlApi) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            control.runs()
        except UnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
        else:
            return


def census(root: Path) -> tuple[int, int]:
    """(nodes that the SuperLink holds for online, nodes that a round would be planned for)."""
    from talkoot.server.book import Book
    from talkoot.server.coordinator import Coordinator

    coordinator = Coordinator.open(root)
    try:
        control = ControlApi(coordinator.config.network.superlink_port, coordinator.loopback_ca_pem)
        nodes = control._call("ListNodes", ListNodesRequest()).nodes_info
        online = frozenset(int(node.node_id) for node in nodes if node.status == "online")
        with coordinator.ledger.read() as session:
            members = Book(coordinator).members(session, online, time.time())
        return len(online), len(members)
    finally:
        coordinator.close()


# The whole ------------------------------------------------------------------------------


def measure(count: int, seconds: float, root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Bring ``count`` nodes online, hold them for ``seconds``, and tell what that took."""
    _allow_descriptors(8 * count + 1024)
    with LocalNetwork(root / "network") as network:
        config = root / "config.toml"
        config.write_text(CONFIG.format(connections=16 * count + 1024), encoding="utf-8")
        network.init(config)
        network.serve()
        network.wait_for("the coordinator", lambda _: True, START_SECONDS)
        say("the coordinator serves")
        began = time.monotonic()
        identities = enrol(network.state, count, say)
        enrolled = time.monotonic() - began
        assert network.coordinator is not None
        assert network.coordinator.process is not None
        watch = Watch(network.coordinator.process.pid)
        place = Place(
            (network.state / "ca" / "ca.pem").read_bytes(),
            network.gateway_port,
            int(network.ports["transfer_port"]),
        )
        counts = Counts()
        nodes = [Node(place, key, pem, counts, 1.0) for key, pem in identities]
        driver = Driver(nodes, RAMP_PER_SECOND)
        thread = threading.Thread(target=driver.run, name="driver", daemon=True)
        thread.start()
        ramp = _until_all_are_there(counts, count, watch, say)
        watch.mark()
        steady = time.monotonic()
        lowest = _hold(network.state, count, seconds, watch, say, lambda: _said(counts, steady))
        shares = watch.shares()
        pulls = sorted(took for at, took in counts.pulls if at >= steady)
        held = time.monotonic() - steady
        driver.stop()
        thread.join(120)
    return {
        "nodes": count,
        "enrolments_per_second": count / enrolled,
        "ramp_seconds": ramp,
        "held_seconds": held,
        "lowest_online": lowest[0],
        "lowest_members": lowest[1],
        "pulls_per_second": len(pulls) / held,
        "pull_median_ms": 1e3 * statistics.median(pulls) if pulls else None,
        "pull_p99_ms": 1e3 * pulls[int(0.99 * (len(pulls) - 1))] if pulls else None,
        "report_median_ms": 1e3 * statistics.median(counts.reports),
        "connect_median_ms": 1e3 * statistics.median(counts.connects),
        "driver_late_median_ms": 1e3 * statistics.median(driver.lateness),
        "core_shares": shares,
        "peak_mb": {name: used / 1e6 for name, used in watch.peak.items()},
        "failures": counts.failures,
    }


def _allow_descriptors(wanted: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise CapacityError(
            f"So many nodes need {wanted} open files and this machine allows {hard}: "
            "raise it (ulimit -Hn) or take fewer nodes."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _until_all_are_there(
    counts: Counts, count: int, watch: Watch, say: Callable[[str], None]
) -> float:
    began = time.monotonic()
    told = began
    while len(counts.connects) < count:
        time.sleep(0.5)
        watch.look()
        if time.monotonic() - told > 20:
            told = time.monotonic()
            say(f"{len(counts.connects)} of {count} came online; {_worst(counts)}")
        if time.monotonic() - began > 60 + 6 * count / RAMP_PER_SECOND:
            raise CapacityError(
                f"Only {len(counts.connects)} of {count} nodes came online: {_worst(counts)}."
            )
    return time.monotonic() - began


def _worst(counts: Counts) -> str:
    with counts.lock:
        ranked = sorted(counts.failures.items(), key=lambda item: -item[1])
    return "; ".join(f"{number} x {what}" for what, number in ranked[:3]) or "no failure"


def _said(counts: Counts, since: float) -> str:
    took = sorted(t for at, t in list(counts.pulls) if at >= since)
    if not took:
        return "no pull yet"
    return f"{len(took)} pulls, median {1e3 * took[len(took) // 2]:.0f} ms; {_worst(counts)}"


def _hold(
    state: Path,
    count: int,
    seconds: float,
    watch: Watch,
    say: Callable[[str], None],
    said: Callable[[], str],
) -> tuple[int, int]:
    """Hold for so long; the lowest (online, members) that were seen."""
    settled = time.monotonic() + SETTLE_SECONDS
    while min(census(state)) < count and time.monotonic() < settled:
        time.sleep(1.0)
    end = time.monotonic() + seconds
    online, members = census(state)
    looked = time.monotonic()
    while time.monotonic() < end:
        time.sleep(1.0)
        watch.look()
        if time.monotonic() - looked > 15 or time.monotonic() >= end:
            looked = time.monotonic()
            seen = census(state)
            online, members = min(online, seen[0]), min(members, seen[1])
            say(f"{seen[0]} online, {seen[1]} to plan for; {said()}")
    return online, members


def main() -> int:
    """Entry point; 1 when a node was lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.control", description="Count nodes.")
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to hold them")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/control.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = measure(args.nodes, args.seconds, Path(directory), _say)
        except TalkootError as err:
            print(f"error: {err.sentence}", file=sys.stderr)
            return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if min(result["lowest_online"], result["lowest_members"]) >= args.nodes else 1


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
