"""Progress decides when a transfer is given up, and not the clock."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator

import grpc
import pytest
from bench.lines import TcpRelay
from tests.data_plane import AUTHORITY, IDENTITIES, LEASE, NODE, OTHER, Network

from talkoot.client.pace import Meter, TransferOptions
from talkoot.protocol import limits
from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.flow import BUFFERED, SMALLEST, ChunkPace
from talkoot.protocol.wire.transfer_pb2 import Envelope, PushChunk
from talkoot.server import transfer

KIB = limits.KIB
IMPATIENT = TransferOptions(
    attempts=2, first_delay_seconds=0.05, max_delay_seconds=0.1, stall_seconds=2.5, call_seconds=2.0
)


def test_an_upload_that_moves_is_never_cut_off_however_long_it_takes(network: Network) -> None:
    data = os.urandom(192 * KIB)
    ref, path = network.file(data)
    meter = Meter()
    with TcpRelay(network.address, up=48.0 * KIB) as relay:
        # Four seconds on the line, of which the sender sees one moment: its buffers take it all.
        network.client(options=IMPATIENT, meter=meter, address=relay.address).push(LEASE, ref, path)
        assert relay.bytes_up < 1.2 * len(data)
    assert network.shelf.store.path(ref.digest).read_bytes() == data
    assert meter.bytes_up == len(data)  # in one go


def test_a_fetch_that_moves_is_never_cut_off_however_long_it_takes(network: Network) -> None:
    data = os.urandom(192 * KIB)
    ref = network.shelf.store.put_bytes(data)
    meter = Meter()
    with TcpRelay(network.address, down=64.0 * KIB) as relay:
        client = network.client(options=IMPATIENT, meter=meter, address=relay.address)
        assert client.fetch(ref, network.local()).read_bytes() == data
    assert meter.bytes_down == len(data)


def test_an_upload_that_does_not_move_is_given_up(network: Network) -> None:
    ref, path = network.file(os.urandom(8 * limits.MIB))
    with TcpRelay(network.address) as relay:
        client = network.client(options=IMPATIENT, address=relay.address)

        def hold(done: int, total: int) -> None:
            relay.up = 1.0

        with pytest.raises(UnavailableError):
            client.push(LEASE, ref, path, on_progress=hold)


def test_a_message_does_not_wait_behind_an_upload_that_fills_the_line(network: Network) -> None:
    ref, path = network.file(os.urandom(4 * limits.MIB))
    stop = threading.Event()
    with TcpRelay(network.address, up=64.0 * KIB) as relay:
        client = network.client(address=relay.address)
        under_way = threading.Event()

        def push() -> None:
            with pytest.raises(UnavailableError):
                client.push(
                    LEASE,
                    ref,
                    path,
                    on_progress=lambda *_: under_way.set(),
                    should_stop=stop.is_set,
                )

        thread = threading.Thread(target=push)
        thread.start()
        assert under_way.wait(20)
        client.run_spec()
        assert relay.bytes_up < limits.MIB  # the answer came long before what was queued
        assert relay.connections == 2
        stop.set()
        thread.join(20)


def test_an_upload_ends_soon_after_its_lease_was_closed(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ASK_AGAIN_SECONDS", 0.0)
    data = os.urandom(64 * KIB)
    digest = hashlib.sha256(data).hexdigest()

    def drip() -> Iterator[PushChunk]:
        for offset in range(len(data)):
            if offset == 3:
                network.shelf.leases.clear()
            yield PushChunk(
                lease_id=LEASE,
                digest=digest,
                size=len(data),
                offset=offset,
                data=data[offset : offset + 1],
            )

    with pytest.raises(grpc.RpcError) as info:
        network.raw().Push(drip())
    assert isinstance(info.value, grpc.Call)
    assert info.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert network.server is not None
    assert not network.server.open_transfers()


def test_calls_that_say_nothing_are_ended_and_hold_up_nobody(network: Network) -> None:
    network.stop()
    network.first_word_seconds = 1.0
    network.start()
    release = threading.Event()

    def silence() -> Iterator[Envelope]:
        release.wait(60)
        yield from ()

    key, certificate = IDENTITIES[OTHER]
    channel = grpc.secure_channel(
        network.address,
        grpc.ssl_channel_credentials(AUTHORITY.pem, key, certificate),
        options=[("grpc.ssl_target_name_override", "talkoot-coordinator")],
    )
    method = channel.stream_unary(
        "/talkoot.transfer.v1.Transfer/Submit",
        request_serializer=Envelope.SerializeToString,
        response_deserializer=Envelope.FromString,
    )
    calls = [method.future(silence()) for _ in range(14)]
    network.client(NODE).run_spec()  # the others are served meanwhile
    codes: list[grpc.StatusCode] = []
    for call in calls:
        err = call.exception(20)
        assert isinstance(err, grpc.Call)
        codes.append(err.code())
    release.set()
    channel.close()
    assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
    # A quarter of the workers, and what made room for the others.
    assert 4 <= codes.count(grpc.StatusCode.CANCELLED) <= 6


def test_messages_are_small_until_the_line_has_shown_what_it_carries() -> None:
    pace = ChunkPace(0.0)
    assert pace.size(0.0) == 4 * SMALLEST
    pace.took(BUFFERED)
    assert pace.size(0.1) == 4 * SMALLEST  # so much fits into buffers, and proves nothing
    pace.took(limits.MIB)
    assert pace.size(0.1) == limits.TRANSFER_CHUNK
    assert pace.size(1000.0) == SMALLEST
