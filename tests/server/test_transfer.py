from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from tests.data_plane import (
    AUTHORITY,
    IDENTITIES,
    LEASE,
    MIB,
    NODE,
    OTHER,
    OTHER_LEASE,
    SERVER_CERT,
    SERVER_KEY,
    SHORT,
    Authority,
    Network,
    error_of,
    ref_of,
    signed,
)

from talkoot.client.pace import Meter, Stopped, TransferOptions
from talkoot.protocol import limits
from talkoot.protocol.artifacts import Slice
from talkoot.protocol.errors import (
    CapacityError,
    CorpusError,
    IntegrityError,
    ProtocolError,
    RefusedError,
    StateError,
    TalkootError,
    UnavailableError,
    VersionError,
)
from talkoot.protocol.ingest import received_bytes
from talkoot.protocol.messages import (
    ArtifactRef,
    NodeReport,
    canonical_bytes,
)
from talkoot.protocol.refusals import from_status
from talkoot.protocol.wire.transfer_pb2 import (
    Envelope,
    FetchRequest,
    PushChunk,
    PushState,
    PushStatusRequest,
)
from talkoot.protocol.wire.transfer_pb2_grpc import TransferStub
from talkoot.server.transfer import MAX_PARTS_PER_NODE, MAX_STREAMS_PER_NODE, serve

# Fetch ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, MIB, 3 * MIB + 17])
def test_an_artifact_arrives_whole(network: Network, size: int) -> None:
    data = os.urandom(size)
    ref = network.shelf.store.put_bytes(data)
    meter = Meter()
    store = network.local()
    path = network.client(meter=meter).fetch(ref, store)
    assert path == store.path(ref.digest)
    assert path.read_bytes() == data
    assert (meter.bytes_down, meter.bytes_up) == (size, 0)


def test_what_is_here_already_is_not_fetched_again(network: Network) -> None:
    store = network.local()
    ref = store.put_bytes(b"here")
    network.stop()
    assert network.client().fetch(ref, store) == store.path(ref.digest)


def test_a_slice_of_a_larger_file_is_an_artifact_too(network: Network) -> None:
    data = os.urandom(3 * MIB)
    corpus = network.home / "tokens.bin"
    corpus.write_bytes(data)
    block = data[MIB - 5 : 2 * MIB + 99]

    class Corpus:
        def lookup(self, digest: str) -> Slice | None:
            known = ref_of(block).digest
            return Slice(corpus, MIB - 5, len(block)) if digest == known else None

    network.shelf.extra.append(Corpus())
    assert network.client().fetch(ref_of(block), network.local()).read_bytes() == block


def test_a_fetch_goes_on_at_its_offset_after_the_server_died_mid_stream(network: Network) -> None:
    data = os.urandom(24 * MIB)
    ref = network.shelf.store.put_bytes(data)
    deaths: list[int] = []

    def die_twice(done: int, total: int) -> None:
        assert total == len(data)
        if len(deaths) < 2 and done >= (len(deaths) + 1) * 6 * MIB:
            deaths.append(done)
            network.stop()
            network.start()

    meter = Meter()
    path = network.client(meter=meter).fetch(ref, network.local(), on_progress=die_twice)
    assert path.read_bytes() == data
    assert len(deaths) == 2
    assert meter.bytes_down == len(data)  # not one byte was taken twice


def test_a_fetch_goes_on_where_another_process_ended(network: Network) -> None:
    data = os.urandom(4 * MIB)
    ref = network.shelf.store.put_bytes(data)
    store = network.local()
    with store.ingest("fetch", ref.digest, ref.size_bytes) as ingest:
        ingest.append(0, data[: 3 * MIB])
    meter = Meter()
    network.client(meter=meter).fetch(ref, store)
    assert store.verify(ref.digest)
    assert meter.bytes_down == MIB


def test_a_damaged_part_of_an_earlier_process_is_fetched_anew_once(network: Network) -> None:
    data = os.urandom(2 * MIB)
    ref = network.shelf.store.put_bytes(data)
    store = network.local()
    with store.ingest("fetch", ref.digest, ref.size_bytes) as ingest:
        ingest.append(0, bytes(MIB))
    assert network.client().fetch(ref, store).read_bytes() == data


def test_a_fetch_that_is_stopped_keeps_its_part(network: Network) -> None:
    data = os.urandom(8 * MIB)
    ref = network.shelf.store.put_bytes(data)
    store = network.local()
    wish = threading.Event()
    slow = TransferOptions(max_rate_down=2.0 * MIB)
    with pytest.raises(Stopped):
        network.client(options=slow).fetch(
            ref, store, on_progress=lambda done, _: wish.set(), should_stop=wish.is_set
        )
    kept = received_bytes(store.incoming, "fetch", ref.digest, ref.size_bytes)
    assert 0 < kept < len(data)
    meter = Meter()
    network.client(meter=meter).fetch(ref, store)
    assert meter.bytes_down == len(data) - kept


def test_corrupted_bytes_are_an_integrity_error_and_nothing_is_left(network: Network) -> None:
    data = os.urandom(2 * MIB)
    ref = network.shelf.store.put_bytes(data)
    network.shelf.store.path(ref.digest).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    store = network.local()
    with pytest.raises(IntegrityError):
        network.client().fetch(ref, store)
    assert not store.has(ref.digest)
    assert not [path for path in store.incoming.rglob("*") if path.is_file()]


def test_an_artifact_of_another_size_than_announced_is_refused_at_its_first_chunk(
    network: Network,
) -> None:
    ref = network.shelf.store.put_bytes(os.urandom(4 * MIB))
    store = network.local()
    lie = ArtifactRef(digest=ref.digest, size_bytes=5 * MIB)
    meter = Meter()
    with pytest.raises(IntegrityError):
        network.client(meter=meter).fetch(lie, store)
    assert meter.bytes_down == 0
    assert not [path for path in store.incoming.rglob("*") if path.is_file()]


def test_an_unknown_artifact_is_refused_at_once(network: Network) -> None:
    with pytest.raises(RefusedError) as info:
        network.client().fetch(ref_of(b"nowhere"), network.local())
    assert info.value.code == "unknown-artifact"


def test_a_fetch_past_the_end_or_of_no_digest_is_a_protocol_error(network: Network) -> None:
    ref = network.shelf.store.put_bytes(b"abc")
    for request, code in (
        (FetchRequest(digest=ref.digest, offset=4), "wrong-offset"),
        (FetchRequest(digest=ref.digest, offset=2**64 - 1), "wrong-offset"),
        (FetchRequest(digest="../" * 21 + "x"), "malformed"),
        (FetchRequest(), "malformed"),
    ):
        err = error_of(lambda request=request: list(network.raw().Fetch(request)))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        assert (type(err), err.code) == (ProtocolError, code)


def test_a_fetch_gives_up_after_attempts_that_move_nothing(network: Network) -> None:
    network.stop()
    with pytest.raises(UnavailableError) as info:
        network.client(options=SHORT).fetch(ref_of(b"x"), network.local())
    assert network.address in info.value.sentence


# Push ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, MIB, 3 * MIB + 17])
def test_a_payload_is_delivered_whole(network: Network, size: int) -> None:
    data = os.urandom(size)
    ref, path = network.file(data)
    meter = Meter()
    network.client(meter=meter).push(LEASE, ref, path)
    assert network.shelf.arrived == [(NODE, LEASE, ref.digest)]
    assert network.shelf.store.path(ref.digest).read_bytes() == data
    assert network.incoming() == []
    assert (meter.bytes_up, meter.bytes_down) == (size, 0)
    assert path.exists()


def test_a_push_goes_on_at_its_offset_after_the_server_died_mid_stream(network: Network) -> None:
    data = os.urandom(24 * MIB)
    ref, path = network.file(data)
    meter = Meter()
    died: list[tuple[int, int]] = []  # (sent, kept by the server) in bytes

    def die_once(done: int, total: int) -> None:
        if not died and done >= 12 * MIB:
            network.stop()
            kept = received_bytes(network.shelf.store.incoming, NODE, ref.digest, total)
            died.append((meter.bytes_up, kept))
            network.start()

    network.client(meter=meter).push(LEASE, ref, path, on_progress=die_once)
    assert network.shelf.arrived == [(NODE, LEASE, ref.digest)]
    assert network.shelf.store.verify(ref.digest)
    [(sent, kept)] = died
    assert kept > 0
    # What the dying stream took from us on top is in flight: gRPC asks for a chunk ahead. And what
    # it had taken in may still be written after we looked.
    assert len(data) - kept - 4 * MIB <= meter.bytes_up - sent <= len(data) - kept + 2 * MIB


def test_pushing_again_is_harmless_and_sends_nothing(network: Network) -> None:
    ref, path = network.file(os.urandom(MIB))
    meter = Meter()
    client = network.client(meter=meter)
    client.push(LEASE, ref, path)
    client.push(LEASE, ref, path)
    assert network.shelf.arrived == [(NODE, LEASE, ref.digest)]
    assert meter.bytes_up == MIB


def test_a_file_that_is_not_what_it_should_be_is_refused_and_said_to_be_at_fault(
    network: Network,
) -> None:
    ref, path = network.file(b"good")
    for damaged in (b"evil", b"longer"):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="payload is not the artifact"):
            network.client().push(LEASE, ref, path)
    assert network.shelf.arrived == []
    assert network.incoming() == []


def chunks(data: bytes, *, lease: str = LEASE, ref: ArtifactRef | None = None) -> list[PushChunk]:
    ref = ref or ref_of(data)
    return [PushChunk(lease_id=lease, digest=ref.digest, size=ref.size_bytes, offset=0, data=data)]


def test_pushed_bytes_of_another_digest_are_refused_and_deleted(network: Network) -> None:
    lie = ArtifactRef(digest=ref_of(b"right").digest, size_bytes=5)
    err = error_of(lambda: network.raw().Push(iter(chunks(b"wrong", ref=lie))))
    assert type(err) is IntegrityError
    assert network.shelf.arrived == []
    assert network.incoming() == []


def test_a_damaged_part_on_the_server_is_pushed_anew_once(network: Network) -> None:
    data = os.urandom(2 * MIB)
    ref, path = network.file(data)
    start = PushChunk(
        lease_id=LEASE, digest=ref.digest, size=ref.size_bytes, offset=0, data=bytes(MIB)
    )
    assert network.raw().Push(iter([start])) == PushState(offset=MIB)
    network.client().push(LEASE, ref, path)
    assert network.shelf.store.verify(ref.digest)


def test_a_node_cannot_push_under_another_nodes_lease(network: Network) -> None:
    ref, path = network.file(b"mine")
    with pytest.raises(RefusedError) as info:
        network.client(OTHER).push(LEASE, ref, path)
    assert info.value.code == "not-your-lease"
    err = error_of(lambda: network.raw(OTHER).Push(iter(chunks(b"mine"))))
    assert (type(err), err.code) == (RefusedError, "not-your-lease")
    assert network.incoming() == []


def test_two_nodes_that_push_the_same_digest_do_not_meet(network: Network) -> None:
    data = b"x" * 100
    ref = ref_of(data)

    def part(lease: str, body: bytes) -> list[PushChunk]:
        return [PushChunk(lease_id=lease, digest=ref.digest, size=100, offset=0, data=body)]

    network.raw(OTHER).Push(iter(part(OTHER_LEASE, b"spoiled" * 5)))
    request = PushStatusRequest(lease_id=LEASE, digest=ref.digest, size=100)
    assert network.raw(NODE).PushStatus(request) == PushState(offset=0)
    network.raw(NODE).Push(iter(part(LEASE, b"x" * 10)))
    assert network.incoming() == sorted(f"{n}/{ref.digest}.part" for n in (NODE, OTHER))
    _, path = network.file(data)
    network.client(NODE).push(LEASE, ref, path)
    assert network.shelf.arrived == [(NODE, LEASE, ref.digest)]
    assert network.incoming() == [f"{OTHER}/{ref.digest}.part"]


def test_claims_and_chunks_over_a_cap_are_refused_before_the_disk_is_touched(
    network: Network,
) -> None:
    ref = ref_of(b"x")
    stub = network.raw()

    def chunk_of(size: int, data: bytes, offset: int = 0) -> PushChunk:
        return PushChunk(lease_id=LEASE, digest=ref.digest, size=size, offset=offset, data=data)

    cases: list[tuple[PushChunk, str]] = [
        (chunk_of(limits.MAX_ARTIFACT + 1, b"x"), "too-large"),
        (chunk_of(2**64 - 1, b"x"), "too-large"),
        (chunk_of(4 * MIB, bytes(limits.TRANSFER_CHUNK + 1)), "too-large"),
        (chunk_of(3, b"1234"), "too-large"),
        (chunk_of(4, b"1", offset=1), "wrong-offset"),
        (PushChunk(lease_id="../../etc", digest=ref.digest, size=1, data=b"x"), "malformed"),
        (PushChunk(lease_id=LEASE, digest="../../etc/passwd", size=1, data=b"x"), "malformed"),
    ]
    for chunk, code in cases:
        err = error_of(lambda chunk=chunk: stub.Push(iter([chunk])))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        assert (type(err), err.code) == (ProtocolError, code)
        root = network.shelf.store.incoming
        assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) == 0
    err = error_of(lambda: stub.Push(iter([])))
    assert (type(err), err.code) == (ProtocolError, "malformed")
    with pytest.raises(grpc.RpcError) as info:
        stub.Push(iter([chunk_of(8 * MIB, bytes(2 * MIB))]))
    assert isinstance(info.value, grpc.Call)
    assert info.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC's own cap
    assert network.shelf.arrived == []


def test_an_upload_cannot_change_its_name_on_the_way(network: Network) -> None:
    first = PushChunk(lease_id=LEASE, digest=ref_of(b"ab").digest, size=2, offset=0, data=b"a")
    for other in (
        PushChunk(lease_id=OTHER_LEASE, offset=1, data=b"b"),
        PushChunk(digest=ref_of(b"c").digest, offset=1, data=b"b"),
        PushChunk(size=3, offset=1, data=b"b"),
    ):
        network.shelf.store.sweep(set(), older_than_unix=float("inf"))
        err = error_of(lambda other=other: network.raw().Push(iter([first, other])))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        assert (type(err), err.code) == (ProtocolError, "malformed")
    assert network.shelf.arrived == []


def test_a_compressed_message_is_refused_even_if_it_would_be_valid(network: Network) -> None:
    data = bytes(MIB // 2)
    stub = network.raw(compression=grpc.Compression.Gzip)
    with pytest.raises(grpc.RpcError):
        stub.Push(iter(chunks(data)))
    assert network.shelf.arrived == []
    assert network.incoming() == []
    network.raw().Push(iter(chunks(data)))
    assert network.shelf.arrived == [(NODE, LEASE, ref_of(data).digest)]


def test_a_message_that_inflates_past_the_cap_is_refused(network: Network) -> None:
    # 64 MiB of zeros are 64 KiB on the wire: far under the cap on messages.
    stub = network.raw(compression=grpc.Compression.Gzip)
    with pytest.raises(grpc.RpcError):
        stub.Push(iter(chunks(bytes(64 * MIB))))
    assert network.incoming() == []


def test_a_node_keeps_few_unfinished_uploads(network: Network) -> None:
    stub = network.raw()
    for number in range(MAX_PARTS_PER_NODE + 3):
        digest = ref_of(bytes([number])).digest
        stub.Push(iter([PushChunk(lease_id=LEASE, digest=digest, size=10, offset=0, data=b"1")]))
    assert len(network.incoming()) == MAX_PARTS_PER_NODE


def test_a_new_push_takes_over_from_one_whose_connection_hangs(network: Network) -> None:
    data = os.urandom(2 * MIB)
    ref, path = network.file(data)
    hang = threading.Event()
    received = threading.Event()

    def hanging() -> Iterator[PushChunk]:
        yield PushChunk(lease_id=LEASE, digest=ref.digest, size=len(data), data=data[:MIB])
        received.set()
        hang.wait()

    stuck = network.raw().Push.future(hanging())
    assert received.wait(30)
    try:
        network.client().push(LEASE, ref, path)
    finally:
        hang.set()
    assert network.shelf.store.verify(ref.digest)
    assert isinstance(stuck.exception(), grpc.RpcError)


def test_streams_that_hang_do_not_keep_a_node_or_others_out(network: Network) -> None:
    hang = threading.Event()
    ref, path = network.file(b"payload")

    def silent() -> Iterator[PushChunk]:
        hang.wait()
        yield from ()

    for _ in range(3 * MAX_STREAMS_PER_NODE):
        network.raw(OTHER).Push.future(silent())
    try:
        network.client(NODE).push(LEASE, ref, path)
        network.client(OTHER).push(OTHER_LEASE, ref, path)
    finally:
        hang.set()
    assert {node for node, _, _ in network.shelf.arrived} == {NODE, OTHER}


def test_a_full_disk_of_the_coordinator_is_told_without_its_paths(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, path = network.file(os.urandom(MIB))
    full = os.statvfs_result((4096, 4096, 100, 1, 1, 10, 10, 10, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda fd: full)
    with pytest.raises(CapacityError) as info:
        network.client().push(LEASE, ref, path)
    assert info.value.code == "disk-full"
    assert str(network.home) not in info.value.sentence


# Identity ----------------------------------------------------------------------


def test_a_client_without_a_certificate_is_refused(network: Network) -> None:
    channel = grpc.secure_channel(
        network.address,
        grpc.ssl_channel_credentials(AUTHORITY.pem),
        options=[("grpc.ssl_target_name_override", "talkoot-coordinator")],
    )
    with channel, pytest.raises(grpc.RpcError):
        TransferStub(channel).GetRun(Envelope(), timeout=20)
    assert network.shelf.submitted == []


def test_a_certificate_of_another_authority_is_refused(network: Network) -> None:
    stranger = Authority().issue(NODE)
    with pytest.raises(UnavailableError):
        network.client(identity=stranger).run_spec()


def test_a_server_of_another_authority_is_not_trusted(network: Network) -> None:
    with pytest.raises(UnavailableError):
        network.client(ca=Authority().pem).run_spec()


def test_a_server_of_another_name_is_not_trusted(network: Network) -> None:
    with pytest.raises(UnavailableError):
        network.client(server_name="somebody-else").run_spec()
    # Any node's certificate is signed by the same CA, and must not pass for the coordinator.
    network.stop()
    key, certificate = IDENTITIES[OTHER]
    impostor = serve(network.shelf, network.address, key, certificate, AUTHORITY.pem)
    try:
        with pytest.raises(UnavailableError):
            network.client().run_spec()
    finally:
        impostor.stop(0).wait()


@pytest.mark.parametrize(
    "name", ["talkoot-coordinator", NODE.upper(), NODE + "0", NODE[1:], NODE + "\n"]
)
def test_a_certificate_that_does_not_name_a_node_is_refused(network: Network, name: str) -> None:
    with pytest.raises(RefusedError) as info:
        network.client(identity=AUTHORITY.issue(name)).run_spec()
    assert info.value.code == "no-identity"


def test_a_banned_node_is_refused_on_every_call_with_the_reason(network: Network) -> None:
    ref = network.shelf.store.put_bytes(b"x")
    network.shelf.banned.add(NODE)
    client, stub = network.client(), network.raw()
    status = PushStatusRequest(lease_id=LEASE, digest=ref.digest, size=1)
    calls: list[Callable[[], object]] = [
        lambda: list(stub.Fetch(FetchRequest(digest=ref.digest))),
        lambda: stub.PushStatus(status),
        lambda: stub.Push(iter(chunks(b"x"))),
        *(
            lambda method=method: method(Envelope(body=b"{}"))
            for method in (
                stub.Submit,
                stub.Prove,
                stub.Challenge,
                stub.Report,
                stub.GetRun,
                stub.GetTask,
                stub.Renew,
            )
        ),
    ]
    for call in calls:
        err = error_of(call)
        assert (type(err), err.code) == (RefusedError, "banned")
        assert err.sentence == "This node was banned: ask why."
    with pytest.raises(RefusedError):
        client.fetch(ref, network.local())
    network.client(OTHER).fetch(ref, network.local())


# Messages and errors ----------------------------------------------------------------------


REPORT = NodeReport(
    state="training",
    version=3,
    weights_digest=None,
    lease_id=LEASE,
    step=1,
    steps=10,
    loss=2.5,
    tokens_per_second=100.0,
    bytes_up=1,
    bytes_down=2,
    healed=0,
    started_unix=1.0,
)


def test_messages_reach_the_backend_with_the_certificates_node_id(network: Network) -> None:
    client = network.client()
    work = signed("Contribution", '{"claims":"anything"}')
    assert client.submit(work).accepted
    assert network.shelf.submitted == [(NODE, work)]
    assert client.prove(signed("Proof")).sentence == f"{NODE} is too slow."
    assert client.challenge() == b'{"nonce":"' + NODE.encode() + b'"}'
    assert client.report(REPORT).latest_version == 7
    assert network.shelf.reports == [(NODE, REPORT)]
    assert client.run_spec() == signed("RunSpec")


def test_a_node_without_a_task_gets_none(network: Network) -> None:
    client = network.client()
    assert client.task() is None
    network.shelf.open_task = signed("RoundTask")
    assert client.task() == signed("RoundTask")


def test_a_message_of_the_wrong_kind_or_shape_or_size_is_a_protocol_error(
    network: Network,
) -> None:
    client = network.client()
    for call in (client.submit, client.prove):
        with pytest.raises(ProtocolError) as info:
            call(signed("RunSpec"))
        assert info.value.code == "wrong-kind"
    stub = network.raw()
    for body, code in (
        (b"", "malformed"),
        (b"{}", "malformed"),
        (canonical_bytes(REPORT), "malformed"),
        (b" " * (limits.MAX_CONTROL_MESSAGE + 1), "too-large"),
    ):
        err = error_of(lambda body=body: stub.Submit(Envelope(body=body)))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        assert (type(err), err.code) == (ProtocolError, code)
    assert network.shelf.submitted == []


@pytest.mark.parametrize(
    "error",
    [
        RefusedError("The lease is closed.", code="lease-closed"),
        ProtocolError("Nonsense.", code="nonsense"),
        VersionError("Update talkoot."),
        IntegrityError("A wrong signature."),
        CapacityError("Too many runs.", code="runs"),
        UnavailableError("The ledger is busy.", code="busy"),
        RefusedError("Älä! " * 400, code="long"),
    ],
    ids=lambda error: type(error).__name__ + "-" + error.code,
)
def test_an_error_crosses_the_wire_as_itself(network: Network, error: TalkootError) -> None:
    network.shelf.failure = error
    with pytest.raises(TalkootError) as info:
        network.client().run_spec()
    assert (type(info.value), info.value.code) == (type(error), error.code)
    assert error.sentence.startswith(info.value.sentence)
    assert len(info.value.sentence) >= min(len(error.sentence), 500)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("secret path /srv/x"),
        StateError("secret path /srv/x"),
        CorpusError("secret path /srv/x"),
        OSError(5, "secret path /srv/x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_or_inner_trouble_is_told_in_a_neutral_sentence(
    network: Network, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    network.shelf.failure = error
    with pytest.raises(UnavailableError) as info:
        network.client().run_spec()
    assert info.value.code == "internal"
    assert "secret" not in info.value.sentence
    assert "secret" in caplog.text  # the operator can read it


def test_a_peers_sentence_cannot_steer_the_terminal() -> None:
    err = from_status(
        grpc.StatusCode.PERMISSION_DENIED,
        '{"code":"x","sentence":"a\\u001b[2Jb\\nc"}',
        peer="the server",
    )
    assert err.sentence == "a [2Jb c"


def test_calls_on_a_closed_client_end_at_once(network: Network) -> None:
    ref, path = network.file(b"x")
    client = network.client()
    client.close()
    with pytest.raises(Stopped):
        client.fetch(ref, network.local())
    with pytest.raises(UnavailableError):
        client.push(LEASE, ref, path)
    with pytest.raises(UnavailableError):
        client.run_spec()


def test_a_second_server_on_the_same_address_says_so(network: Network) -> None:
    with pytest.raises(StateError) as info:
        serve(network.shelf, network.address, SERVER_KEY, SERVER_CERT, AUTHORITY.pem)
    assert info.value.code == "address-in-use"
