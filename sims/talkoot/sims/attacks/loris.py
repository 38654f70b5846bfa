"""Slow-loris: liars that hold uploads open and drip bytes, beside honest nodes, over real mTLS.

Unlike the other arms this one has the transfer service between nodes and desk. Its places are few
(six, of eight threads) and its patience short, so that two liars are enough to want them all: one
drips single bytes, the other moves just as much as keeps a stream from counting as stalled. Both
take leases and never deliver.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from sqlalchemy import select

from talkoot.client.enrol import Enrolment
from talkoot.client.pace import Meter, TransferOptions
from talkoot.client.transfer import SERVER_NAME, TransferClient
from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.messages import ArtifactRef, RoundTask, Signed, Verdict
from talkoot.protocol.payload import max_payload_bytes
from talkoot.protocol.wire.transfer_pb2 import PushChunk
from talkoot.protocol.wire.transfer_pb2_grpc import TransferStub
from talkoot.server.laggards import MISSED
from talkoot.server.ledger.schema import LeaseRecord
from talkoot.server.streams import MIN_PROGRESS
from talkoot.server.transfer import MAX_STREAMS_PER_NODE
from talkoot.sims.attacks.kinds import Actor
from talkoot.sims.attacks.stage import Hand, Stage

SLOW_LORIS: Final = "slow-loris"
STALL_SECONDS: Final = 1.5
"""Production's patience of two minutes, made short."""
TRIED_PER_NODE: Final = 2 * MAX_STREAMS_PER_NODE
"""Uploads that a liar tries to hold at once."""
PULSE_SECONDS: Final = 0.1
FULL_SECONDS: Final = 60.0
"""For the liars to take what they can get, before honest nodes come."""
OPTIONS: Final = TransferOptions(attempts=30, first_delay_seconds=0.05, max_delay_seconds=0.5)


@dataclass
class Liar:
    """One attacker: a bare stub, and threads that hold uploads open.

    Args:
        pulse: bytes that a stream sends every :data:`PULSE_SECONDS`.
    """

    stub: TransferStub
    channel: grpc.Channel
    pulse: int
    largest: int
    """Bytes that an upload may have."""
    lease_id: str = ""
    ended: Counter[str] = field(default_factory=Counter)
    """How its uploads ended, by gRPC status."""
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, lease_id: str) -> None:
        """Go on under this lease."""
        self.lease_id = lease_id
        if not self.threads:
            self.threads = [
                threading.Thread(target=self._hold, daemon=True) for _ in range(TRIED_PER_NODE)
            ]
            for thread in self.threads:
                thread.start()

    def end(self) -> None:
        """Hang up."""
        self.stop.set()
        self.channel.close()
        for thread in self.threads:
            thread.join(10)

    def _hold(self) -> None:
        while not self.stop.is_set():
            call = self.stub.Push.future(self._drip(self.lease_id))
            with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
                call.result()
            self.ended[call.code().name] += 1
            self.stop.wait(PULSE_SECONDS)

    def _drip(self, lease_id: str) -> Iterator[PushChunk]:
        digest = os.urandom(32).hex()
        offset = 0
        while offset + self.pulse < self.largest and not self.stop.is_set():
            yield PushChunk(
                lease_id=lease_id,
                digest=digest,
                size=self.largest,
                offset=offset,
                data=b"\0" * self.pulse,
            )
            offset += self.pulse
            self.stop.wait(PULSE_SECONDS)


class WireStage(Stage):
    """A stage whose honest nodes push and submit over mTLS, while liars hold what they can."""

    def __init__(self, state: Path, root: Path, actors: Sequence[Actor]) -> None:
        self.clients: dict[str, TransferClient] = {}
        self.liars: dict[str, Liar] = {}
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        """Of honest uploads, before and under attack."""
        self.failed = 0
        self.most_held: Counter[str] = Counter()
        """Streams that each node was seen to hold at most."""
        self._over = threading.Event()
        super().__init__(state, root, actors)
        self.site.stall_seconds = STALL_SECONDS
        self.site.start()
        self._watch = threading.Thread(target=self._count, daemon=True)
        self._watch.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._watch.join()
        for liar in self.liars.values():
            liar.end()
        for client in self.clients.values():
            client.close()
        self.site.stop()
        super().__exit__(*exc)

    def add(self, actor: Actor) -> Hand:
        """A node joins, and has a line of its own."""
        hand = super().add(actor)
        enrolment = Enrolment.load(hand.home.enrolment)
        address = f"127.0.0.1:{enrolment.transfer_port}"
        ca, certificate = (
            pem.encode("ascii") for pem in (enrolment.ca_pem, enrolment.certificate_pem)
        )
        if actor.honest:
            self.clients[hand.node_id] = TransferClient(
                address,
                ca,
                certificate,
                hand.key.private_pem(),
                meter=Meter(),
                options=OPTIONS,
            )
            return hand
        channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(ca, hand.key.private_pem(), certificate),
            options=[
                ("grpc.ssl_target_name_override", SERVER_NAME),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        moving = int(2 * MIN_PROGRESS * PULSE_SECONDS / STALL_SECONDS)
        self.liars[hand.node_id] = Liar(
            TransferStub(channel),
            channel,
            1 if len(self.liars) % 2 == 0 else moving,
            max_payload_bytes(self.coordinator.manifest, self.coordinator.spec.uplink),
        )
        return hand

    def work_round(self) -> None:
        """Liars first: they hold their places before an honest node comes."""
        for hand, task in self._tasks():
            liar = self.liars.get(hand.node_id)
            if liar is not None and task.round >= hand.actor.begins:
                liar.begin(task.lease.lease_id)
        if any(liar.threads for liar in self.liars.values()) and self._attacked_for_the_first_time:
            self._wait_for_liars()
        super().work_round()

    @property
    def _attacked_for_the_first_time(self) -> bool:
        return not self.seconds[True]

    def _wait_for_liars(self) -> None:
        data_plane = self.site.data_plane
        assert data_plane is not None
        until = time.monotonic() + FULL_SECONDS
        while any(data_plane.open_transfers()[node_id] < 2 for node_id in self.liars):
            if time.monotonic() > until:
                raise UnavailableError("The liars came to hold no places.")
            time.sleep(0.01)

    def _work(self, hand: Hand, task: RoundTask, honest: tuple[Path, ...]) -> Path | None:
        if hand.node_id in self.liars:
            return None  # it has its threads
        return super()._work(hand, task, honest)

    def _send(
        self, hand: Hand, task: RoundTask, path: Path, ref: ArtifactRef, signed: Signed
    ) -> Verdict:
        client = self.clients[hand.node_id]
        began = time.monotonic()
        try:
            client.push(task.lease.lease_id, ref, path)
            verdict = client.submit(signed)
        except UnavailableError as err:
            self.failed += 1
            return Verdict(accepted=False, code=err.code, sentence=err.sentence)
        under = any(liar.threads for liar in self.liars.values())
        self.seconds[under].append(time.monotonic() - began)
        return verdict

    def _count(self) -> None:
        while not self._over.wait(0.02):
            if self.site.data_plane is not None:
                self.most_held |= self.site.data_plane.open_transfers()

    def figures(self) -> dict[str, Any]:
        """What became of uploads."""
        held = [count for node_id, count in self.most_held.items() if node_id in self.liars]
        ended: Counter[str] = sum((liar.ended for liar in self.liars.values()), Counter())
        return {
            "honest_uploads": sum(map(len, self.seconds.values())),
            "honest_failed": self.failed,
            "seconds_before": _summary(self.seconds[False]),
            "seconds_under_attack": _summary(self.seconds[True]),
            "places": {"a_liar_held_at_most": max(held, default=0), "cap": MAX_STREAMS_PER_NODE},
            "liars_uploads_ended": dict(sorted(ended.items())),
            "rounds_held_to_the_deadline": self._held_up(),
            "places_freed_at_the_end": self._freed(),
        }

    def _held_up(self) -> int:
        with self.coordinator.ledger.read() as session:
            late = select(LeaseRecord.round).where(LeaseRecord.reason == MISSED).distinct()
            return len(session.scalars(late).all())

    def _freed(self) -> bool:
        """Whether no place is taken once the liars have hung up."""
        for liar in self.liars.values():
            liar.end()
        data_plane = self.site.data_plane
        assert data_plane is not None
        until = time.monotonic() + FULL_SECONDS
        while data_plane.open_transfers():
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


def _summary(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"median": round(statistics.median(seconds), 3), "worst": round(max(seconds), 3)}
