"""A mirror is a stranger: whatever it does costs time and no more than one piece."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.data_plane import Network, ref_of

from talkoot.client.mirrors import LONGEST_REST_SECONDS, MirrorLimits, MirrorSet, object_path
from talkoot.client.pace import Meter, Stopped, TransferOptions
from talkoot.client.transfer import TransferClient
from talkoot.protocol import limits
from talkoot.protocol.artifacts import ArtifactStore, Slice
from talkoot.protocol.errors import IntegrityError, ProtocolError
from talkoot.protocol.ingest import Ingest
from talkoot.protocol.messages import ArtifactRef, MirrorList, canonical_bytes, parse
from talkoot.protocol.pieces import Pieces, PieceShelf

MIB = limits.MIB
QUICK = MirrorLimits(stall_seconds=1.0, window_seconds=0.5, min_rate=256.0 * limits.KIB)

Answer = Callable[["Mirror", bytes, int], None]


class Mirror(BaseHTTPRequestHandler):
    """Serves files by digest, as a static web server with ranges does; or misbehaves."""

    protocol_version = "HTTP/1.1"
    server: MirrorServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        data = self.server.files.get(self.path.removeprefix("/some/prefix/"))
        if data is None:
            self.send_error(404)
            return
        stated = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range") or "bytes=0-")
        assert stated is not None
        self.server.answer(self, data, int(stated.group(1)))

    def begin(self, data: bytes, offset: int, **changed: str) -> None:
        headers = {"Content-Length": str(len(data) - offset)}
        if offset:
            headers["Content-Range"] = f"bytes {offset}-{len(data) - 1}/{len(data)}"
        headers.update({name.replace("_", "-"): value for name, value in changed.items()})
        self.send_response(206 if offset else 200)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class MirrorServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Mirror)
        self.answer = answer
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.done = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/some/prefix"

    def handle_error(self, *_: Any) -> None:
        pass  # the other side hung up, as it should


@contextmanager
def mirror(answer: Answer, *artifacts: bytes) -> Iterator[MirrorServer]:
    server = MirrorServer(answer)
    for data in artifacts:
        server.files[object_path(ref_of(data).digest)] = data
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.done.set()
        server.shutdown()
        server.server_close()


def honest(handler: Mirror, data: bytes, offset: int) -> None:
    handler.begin(data, offset)
    handler.wfile.write(data[offset:])


# What mirrors do wrong ----------------------------------------------------------------------


def lies(handler: Mirror, data: bytes, offset: int) -> None:
    wrong = bytes([data[0] ^ 1]) + data[1:]
    honest(handler, wrong, offset)


def lies_late(handler: Mirror, data: bytes, offset: int) -> None:
    honest(handler, data[:-1] + bytes([data[-1] ^ 1]), offset)


def never_ends(handler: Mirror, data: bytes, offset: int) -> None:
    handler.begin(data, offset, Content_Length="", Connection="close")
    handler.wfile.write(b"\x00" * len(data[offset:]))
    while not handler.server.done.is_set():
        handler.wfile.write(b"\x00" * MIB)


def has_another_length(handler: Mirror, data: bytes, offset: int) -> None:
    handler.begin(data, offset, Content_Length=str(10 * limits.GIB))


def sends_elsewhere(handler: Mirror, data: bytes, offset: int) -> None:
    handler.send_response(302)
    handler.send_header("Location", f"http://127.0.0.1:{handler.server.server_port}/elsewhere")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def says_nothing(handler: Mirror, data: bytes, offset: int) -> None:
    handler.server.done.wait(60)


def drips_headers(handler: Mirror, data: bytes, offset: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.done.wait(0.05):
        handler.wfile.write(b"X-More: yes\r\n"[:1])


def stops_in_the_middle(handler: Mirror, data: bytes, offset: int) -> None:
    handler.begin(data, offset)
    handler.wfile.write(data[offset : offset + 100_000])
    handler.server.done.wait(60)


def dies_in_the_middle(handler: Mirror, data: bytes, offset: int) -> None:
    handler.begin(data, offset)
    handler.wfile.write(data[offset : offset + 100_000])
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def drips(handler: Mirror, data: bytes, offset: int) -> None:
    handler.begin(data, offset)
    for at in range(offset, len(data), 1000):
        if handler.server.done.wait(0.05):
            return
        handler.wfile.write(data[at : at + 1000])


def fails(handler: Mirror, data: bytes, offset: int) -> None:
    handler.send_error(503)


def compresses(handler: Mirror, data: bytes, offset: int) -> None:
    handler.begin(data, offset, Content_Encoding="gzip")


def sends_another_range(handler: Mirror, data: bytes, offset: int) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 1-{len(data) - 1}/{len(data)}")
    handler.send_header("Content-Length", str(len(data) - 1))
    handler.end_headers()
    handler.wfile.write(data[1:])


def speaks_another_language(handler: Mirror, data: bytes, offset: int) -> None:
    handler.wfile.write(b"220 smtp.example ESMTP\r\n" * 100)


FAULTS = [
    lies,
    lies_late,
    never_ends,
    has_another_length,
    sends_elsewhere,
    says_nothing,
    drips_headers,
    stops_in_the_middle,
    dies_in_the_middle,
    drips,
    fails,
    compresses,
    sends_another_range,
    speaks_another_language,
]


def client_of(network: Network, *urls: str, **kwargs: Any) -> TransferClient:
    client = network.client(mirror_limits=QUICK, **kwargs)
    client.mirrors.mirrors.replace(urls)
    return client


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_bad_mirror_is_left_for_the_next(network: Network, fault: Answer) -> None:
    data = os.urandom(MIB)
    ref = network.shelf.store.put_bytes(data)
    with mirror(fault, data) as bad, mirror(honest, data) as good:
        client = client_of(network, bad.url, good.url)
        assert client.fetch(ref, network.local()).read_bytes() == data
        assert len(bad.asked) == 1
        assert len(good.asked) == 1
        assert client.mirrors.mirrors.usable(time.monotonic()) == [good.url]
        # What comes next is not asked there again.
        other = os.urandom(1000)
        good.files[object_path(ref_of(other).digest)] = other
        client.fetch(ref_of(other), network.local())
        assert len(bad.asked) == 1


def test_where_all_mirrors_are_bad_the_coordinator_serves(network: Network) -> None:
    data = os.urandom(MIB)
    ref = network.shelf.store.put_bytes(data)
    with mirror(lies, data) as one, mirror(fails, data) as two:
        client = client_of(network, one.url, two.url, "http://127.0.0.1:9/nobody")
        assert client.fetch(ref, network.local()).read_bytes() == data


def test_a_mirror_serves_instead_of_the_coordinator(network: Network) -> None:
    data = os.urandom(3 * MIB)
    ref = ref_of(data)  # the coordinator does not even have it
    meter = Meter()
    with mirror(honest, data) as good:
        client = client_of(network, good.url, meter=meter)
        assert client.fetch(ref, network.local()).read_bytes() == data
        assert client.mirrors.bytes_received == meter.bytes_down == len(data)


def test_what_a_mirror_has_not_is_no_fault_of_it(network: Network) -> None:
    ref = network.shelf.store.put_bytes(b"only here")
    with mirror(honest) as empty:
        client = client_of(network, empty.url)
        client.fetch(ref, network.local())
        assert client.mirrors.mirrors.usable(time.monotonic()) == [empty.url]


def test_of_a_large_artifact_a_liar_costs_one_piece_and_what_was_right_stays(
    network: Network, tmp_path: Path
) -> None:
    data = os.urandom(2 * limits.PIECE + 5 * MIB)
    ref = network.shelf.store.put_bytes(data)
    wrong_at = limits.PIECE + 3

    def lies_in_the_second_piece(handler: Mirror, data: bytes, offset: int) -> None:
        wrong = data[:wrong_at] + bytes([data[wrong_at] ^ 1]) + data[wrong_at + 1 :]
        honest(handler, wrong, offset)

    meter = Meter()
    with mirror(lies_in_the_second_piece, data) as bad, mirror(honest, data) as good:
        client = client_of(network, bad.url, good.url, meter=meter)
        assert client.fetch(ref, network.local()).read_bytes() == data
        assert good.asked == [(f"/some/prefix/{object_path(ref.digest)}", f"bytes={limits.PIECE}-")]
    assert meter.bytes_down <= len(data) + limits.PIECE


def test_the_volunteers_limit_holds_for_mirrors_too(network: Network) -> None:
    data = os.urandom(MIB)
    seen: list[tuple[float, int]] = []
    began = time.monotonic()
    with mirror(honest, data) as good:
        client = client_of(network, good.url, options=TransferOptions(max_rate_down=MIB / 2.0))
        client.fetch(
            ref_of(data),
            network.local(),
            on_progress=lambda done, _: seen.append((time.monotonic() - began, done)),
        )
    # A second's worth may come at once; from then on the rate holds.
    assert all(done <= (at + 1.2) * MIB / 2 for at, done in seen)


def test_a_fetch_from_a_mirror_stops_on_request_and_goes_on_later(network: Network) -> None:
    data = os.urandom(MIB)
    wish = threading.Event()
    store = network.local()
    with mirror(stops_in_the_middle, data) as slow:
        client = client_of(network, slow.url)
        with pytest.raises(Stopped):
            client.fetch(
                ref_of(data),
                store,
                on_progress=lambda *_: wish.set(),
                should_stop=wish.is_set,
            )
    with mirror(honest, data) as good:
        client_of(network, good.url).fetch(ref_of(data), store)
        (_, asked) = good.asked[0]
        assert asked is not None
        assert int(asked.removeprefix("bytes=").removesuffix("-")) > 0


# Pieces ----------------------------------------------------------------------


def test_a_part_that_was_damaged_is_taken_up_before_the_damage(tmp_path: Path) -> None:
    data = os.urandom(2 * limits.PIECE + 100)
    path = tmp_path / "whole"
    path.write_bytes(data)
    pieces = Pieces.of(Slice(path, 0, len(data)))
    digest = ref_of(data).digest
    with Ingest(tmp_path, "fetch", digest, len(data)) as ingest:
        ingest.append(0, data[: limits.PIECE + 7])
        ingest.append(limits.PIECE + 7, bytes(limits.PIECE - 7))
    with Ingest(tmp_path, "fetch", digest, len(data), pieces=pieces) as ingest:
        assert ingest.offset() == limits.PIECE
        ingest.append(limits.PIECE, data[limits.PIECE :])
        assert ingest.finish().read_bytes() == data


def test_wrong_bytes_are_dropped_as_soon_as_their_piece_is_complete(tmp_path: Path) -> None:
    data = os.urandom(limits.PIECE + 100)
    whole = Slice(tmp_path / "whole", 0, len(data))
    whole.path.write_bytes(data)
    with Ingest(
        tmp_path, "fetch", ref_of(data).digest, len(data), pieces=Pieces.of(whole)
    ) as ingest:
        ingest.append(0, data[:-100])
        with pytest.raises(IntegrityError) as info:
            ingest.append(limits.PIECE, bytes(100))
        assert info.value.code == "bad-piece"
        assert ingest.offset() == limits.PIECE
        ingest.append(limits.PIECE, data[-100:])
        ingest.finish()


def test_a_shelf_of_pieces_reads_an_artifact_once(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    data = os.urandom(100)
    ref = store.put_bytes(data)
    found = store.lookup(ref.digest)
    assert found is not None
    shelf = PieceShelf(tmp_path / "pieces")
    assert shelf.get(ref.digest, found).digests == hashlib.sha256(data).digest()
    store.delete(ref.digest)
    assert shelf.get(ref.digest, found).size == 100


def test_a_list_of_pieces_has_one_digest_for_each(tmp_path: Path) -> None:
    for size, digests in ((1, b""), (limits.PIECE, bytes(64)), (limits.MAX_ARTIFACT + 1, b"")):
        with pytest.raises(ProtocolError):
            Pieces(size, digests)


# The list of mirrors ----------------------------------------------------------------------


def test_a_mirror_that_fails_rests_longer_each_time_and_a_liar_longest() -> None:
    mirrors = MirrorSet()
    mirrors.replace(["http://a", "http://b/"])
    assert mirrors.usable(0.0) == ["http://a", "http://b"]
    mirrors.failed("http://a", 0.0)
    assert mirrors.usable(29.0) == ["http://b"]
    assert mirrors.usable(31.0) == ["http://a", "http://b"]
    mirrors.failed("http://a", 31.0)
    assert mirrors.usable(90.0) == ["http://b"]
    mirrors.replace(["http://a"])  # the same mirror in a new list is no better for it
    assert mirrors.usable(90.0) == []
    mirrors.failed("http://a", 100.0, lied=True)
    assert mirrors.usable(99.0 + LONGEST_REST_SECONDS) == []
    mirrors.worked("http://a")
    assert mirrors.usable(101.0 + LONGEST_REST_SECONDS) == ["http://a"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/x",
        "https://user:password@host/x",
        "https://host/x?query",
        "https://host/x#fragment",
        "https://host/a b",
        "https://host/\r\nHost: other",
        "https:///x",
        "file:///etc",
    ],
)
def test_a_mirrors_url_is_a_plain_http_address(url: str) -> None:
    good = MirrorList(run_id="run", urls=("https://host:8443/a/b/",), issued_unix=0.0)
    body = canonical_bytes(good)
    assert parse(MirrorList, body) == good
    with pytest.raises(ProtocolError):
        parse(MirrorList, body.replace(b"https://host:8443/a/b/", url.encode()))


def test_a_list_of_pieces_for_another_size_than_announced_is_refused(
    network: Network,
) -> None:
    data = os.urandom(limits.PIECE + 1)
    ref = network.shelf.store.put_bytes(data)
    lie = ArtifactRef(digest=ref.digest, size_bytes=limits.PIECE + 2)
    with mirror(honest, data) as good, pytest.raises(IntegrityError):
        client_of(network, good.url).fetch(lie, network.local())
