"""A real gateway over real TLS on loopback, in front of a real HTTPS server that records."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from hypothesis import given
from hypothesis import strategies as st

from talkoot.client.enrol import Enrolment, enrol, fetch_info
from talkoot.protocol import limits
from talkoot.protocol.errors import (
    ConfigError,
    IntegrityError,
    ProtocolError,
    RefusedError,
    StateError,
    TalkootError,
    UnavailableError,
    VersionError,
)
from talkoot.protocol.identity import NodeKey, load_certificate, make_csr
from talkoot.protocol.invite import Invite
from talkoot.protocol.messages import (
    Capability,
    CoordinatorInfo,
    EnrolReply,
    EnrolRequest,
    Refusal,
    RenewReply,
    RenewRequest,
    Signed,
    TrustBundle,
    canonical_bytes,
    parse,
)
from talkoot.server import http_edge, rates
from talkoot.server.ca import CertificateAuthority
from talkoot.server.fleet_proxy import FLEET_PATHS
from talkoot.server.gateway import GatewayLimits
from talkoot.server.gateway_server import GatewayServer, GatewaySettings, serve_gateway
from talkoot.server.http_edge import TimedCache
from talkoot.server.rates import RateLimiter, rate_key

TOKEN = "a-token-that-is-long-enough"
CAPABILITY = Capability(
    device="cpu",
    device_name="test",
    device_total_bytes=1,
    device_free_bytes=1,
    host_total_bytes=1,
    host_free_bytes=1,
    disk_free_bytes=1,
    cpu_count=1,
    torch_version="2",
    talkoot_version="0",
)
KEY = NodeKey.generate()
KEY_HEADER = b"flwr-public-key: " + base64.b64encode(KEY.public_pem)
PULL = b"/v1/fleet/pull-messages"


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Upstream(ThreadingHTTPServer):
    """Stands where the SuperLink would: records every request, answers what it is told to."""

    daemon_threads = True

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Recorder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.seen: list[Seen] = []
        self.status = 200
        self.answer = b"answer"
        self.headers = {"content-type": "application/protobuf"}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """Probes that hang up are part of the tests."""


class Recorder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        upstream = self.server
        assert isinstance(upstream, Upstream)
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        upstream.seen.append(Seen(self.command, self.path, headers, body))
        self.send_response(upstream.status)
        for name, value in upstream.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(upstream.answer)))
        self.end_headers()
        self.wfile.write(upstream.answer)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_OPTIONS = handle_any  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class MemoryCoordinator:
    """A small but real backend: it certifies keys and spends tokens."""

    ca: CertificateAuthority
    protocol: int = limits.PROTOCOL_VERSION
    key: NodeKey = field(default_factory=NodeKey.generate)
    spent: dict[str, str] = field(default_factory=dict)
    banned: dict[bytes, str] = field(default_factory=dict)
    enrolments: list[tuple[EnrolRequest, str]] = field(default_factory=list)
    failure: Exception | None = None
    impostor: NodeKey | None = None
    """Certify this key in place of the one that asked."""

    def info(self) -> CoordinatorInfo:
        return CoordinatorInfo(
            protocol=self.protocol, talkoot_version="0", ca_fingerprint=self.ca.fingerprint
        )

    def ca_pem(self) -> bytes:
        return self.ca.certificate_pem

    def enrol(self, request: EnrolRequest, peer: str) -> EnrolReply:
        self.enrolments.append((request, peer))
        if self.failure is not None:
            raise self.failure
        if request.token != TOKEN:
            raise RefusedError("This invite is not known here.", code="invite-unknown")
        if self.spent.setdefault(request.token, request.csr_pem) != request.csr_pem:
            raise RefusedError("This invite was used already.\x1b[2J", code="invite-used")
        certificate = self.ca.issue_node(request.csr_pem.encode("ascii"), 30)
        if self.impostor is not None:
            certificate = self.ca.issue_node(make_csr(self.impostor, "x"), 30)
        (name,) = load_certificate(certificate).subject
        return EnrolReply(
            run_id="test-run",
            node_id=str(name.value),
            certificate_pem=certificate.decode("ascii"),
            trust=self.trust(),
            coordinator_key_pem=self.key.public_pem.decode("ascii"),
            transfer_port=8444,
            poll_seconds=3.0,
        )

    def trust(self) -> Signed:
        bundle = TrustBundle(
            run_id="test-run",
            serial=1,
            authorities=(self.ca.certificate_pem.decode("ascii"),),
            issued_unix=0.0,
        )
        return self.key.sign("TrustBundle", canonical_bytes(bundle))

    def renew(self, signed: Signed, peer_node_id: str | None) -> RenewReply:
        assert peer_node_id is None
        claim = parse(RenewRequest, signed.body.encode("ascii"))
        certificate = self.ca.issue_node(claim.csr_pem.encode("ascii"), 30)
        return RenewReply(certificate_pem=certificate.decode("ascii"), trust=self.trust())

    def is_banned(self, public_key: bytes) -> str | None:
        return self.banned.get(public_key)

    def status(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        return b'{"phase":"waiting"}'


@dataclass
class Site:
    backend: MemoryCoordinator
    upstream: Upstream
    server: GatewayServer
    settings: GatewaySettings

    @property
    def invite(self) -> Invite:
        return Invite("127.0.0.1", self.server.port, self.backend.ca.fingerprint, TOKEN)

    @property
    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.backend.ca_pem().decode("ascii"))
        return context

    def connect(self) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.server.port), timeout=20)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.context.wrap_socket(raw, server_hostname="talkoot-coordinator")

    def raw(self, request: bytes) -> tuple[int, bytes]:
        """Send exact bytes; returns the first answer's status and all that came until the end."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                connection.sendall(request)  # a server that refuses early may close meanwhile
            answer = read_all(connection)
        return status_of(answer), answer

    def post(
        self, path: bytes, body: bytes = b"", *extra: bytes, method: bytes = b"POST"
    ) -> tuple[int, bytes]:
        lines = [method + b" " + path + b" HTTP/1.1", b"Host: x", b"Connection: close", KEY_HEADER]
        lines += [b"Content-Length: %d" % len(body), *extra]
        return self.raw(b"\r\n".join(lines) + b"\r\n\r\n" + body)


def read_all(connection: ssl.SSLSocket) -> bytes:
    answer = b""
    try:
        while chunk := connection.recv(65536):
            answer += chunk
    except (ConnectionError, ssl.SSLError):
        pass  # the server hung up on us, as it may
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def refusal_of(answer: bytes) -> Refusal:
    return parse(Refusal, answer.partition(b"\r\n\r\n")[2])


@dataclass
class Credentials:
    ca: CertificateAuthority
    certificate: Path
    key: Path
    authority: Path


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    directory = tmp_path_factory.mktemp("ca")
    ca = CertificateAuthority.create(directory)
    key = NodeKey.generate()
    key.save(directory / "server-key.pem")
    (directory / "server.pem").write_bytes(ca.issue_server([], [], key))
    return Credentials(
        ca, directory / "server.pem", directory / "server-key.pem", directory / "ca.pem"
    )


@pytest.fixture
def site(credentials: Credentials) -> Iterator[Site]:
    upstream = Upstream(credentials.certificate, credentials.key)
    backend = MemoryCoordinator(credentials.ca)
    settings = GatewaySettings(
        "127.0.0.1",
        0,
        credentials.certificate,
        credentials.key,
        upstream.port,
        credentials.authority,
        caps=GatewayLimits(join=(4, 1e-6)),
    )
    with serve_gateway(backend, settings) as server:
        yield Site(backend, upstream, server, settings)
    upstream.shutdown()
    upstream.server_close()


# What passes ----------------------------------------------------------------------


def test_each_fleet_call_passes_with_its_body_and_brings_its_answer_back(site: Site) -> None:
    assert len(FLEET_PATHS) == 10
    for path in sorted(FLEET_PATHS):
        status, answer = site.post(path, b"body\x00" + path)
        assert (status, answer.partition(b"\r\n\r\n")[2]) == (200, b"answer")
        seen = site.upstream.seen.pop()
        assert (seen.method, seen.path.encode(), seen.body) == ("POST", path, b"body\x00" + path)
    assert site.upstream.seen == []


def test_a_body_sent_in_chunks_arrives_whole(site: Site) -> None:
    head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + KEY_HEADER
    chunks = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert site.raw(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)[0] == 200
    assert site.upstream.seen[0].body == b"abcde"


def test_flowers_own_client_gets_through_with_every_header_that_it_adds(site: Site) -> None:
    site.upstream.answer = ActivateNodeResponse(node_id=7).SerializeToString()
    with FleetHttpClient.from_server_address(
        f"localhost:{site.server.port}",
        False,
        site.backend.ca_pem(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(KEY.private_key, KEY.public_key),
        ],
    ) as client:
        sent = ActivateNodeRequest(public_key=KEY.public_pem, heartbeat_interval=30.0)
        assert client.ActivateNode(sent).node_id == 7
    (seen,) = site.upstream.seen
    assert seen.body == sent.SerializeToString(deterministic=True)
    assert base64.b64decode(seen.headers["flwr-public-key"]) == KEY.public_pem
    assert {name for name in seen.headers if name.startswith("flwr-")} == {
        "flwr-public-key",
        "flwr-signature",
        "flwr-timestamp",
        "flwr-package-name",
        "flwr-package-version",
        "flwr-component-name",
    }


def test_headers_that_open_other_doors_do_not_pass_in_either_direction(site: Site) -> None:
    site.upstream.headers = {
        "content-type": "application/protobuf",
        "set-cookie": "a=b",
        "x-y": "z",
    }
    doors = [b"flwr-task-token: t", b"flwr-superexec-signature: s", b"Authorization: Bearer x"]
    doors += [b"X-Forwarded-For: 127.0.0.1", b"Cookie: a=b", b"Accept-Encoding: gzip"]
    status, answer = site.post(PULL, b"", *doors, b"Accept: application/protobuf")
    assert status == 200
    (seen,) = site.upstream.seen
    assert set(seen.headers) == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "flwr-public-key",
    }
    assert seen.headers["accept-encoding"] == "identity"
    assert seen.headers["host"] == f"127.0.0.1:{site.upstream.port}"
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"set-cookie" not in head
    assert b"x-y" not in head
    assert b"server:" not in head


# What does not pass ----------------------------------------------------------------------

FORBIDDEN = [
    b"/v1/fleet/register-node",
    b"/v1/fleet/unregister-node",
    b"/v1/control/start-run",
    b"/v1/runtime/acquire-task",
    b"/v1/control/start-run/../../fleet/pull-messages",
    b"/v1/fleet/../control/start-run",
    b"/v1/fleet/pull-messages/../../control/start-run",
    b"/v1/fleet/%2e%2e/control/start-run",
    b"/v1/fleet/..%2fcontrol/start-run",
    b"/v1/fleet/..%5ccontrol/start-run",
    b"/v1/fleet\\..\\control\\start-run",
    b"/v1/fleet/..;/control/start-run",
    b"/v1/./fleet/pull-messages",
    b"//v1/fleet/pull-messages",
    b"/v1//fleet/pull-messages",
    b"/v1/fleet//pull-messages",
    b"/v1/fleet/pull-messages/",
    b"/v1/fleet/pull-messages%00",
    b"/v1/fleet/pull-messages%20",
    b"/v1/fleet/pull-messages;x=1",
    b"/v1/fleet/pull-messages#x",
    b"/v1/fleet/pull-messages?x=1",
    b"/v1/fleet/pull-messages?/../../control/start-run",
    b"/v1/fleet%2fpull-messages",
    b"/v1/fleet/pull%2dmessages",
    b"/%76%31/fleet/pull-messages",
    b"/V1/fleet/pull-messages",
    b"/v1/fleet/Pull-Messages",
    b"/v1/fleet/",
    b"/v1/fleet",
    b"v1/fleet/pull-messages",
    b"https://127.0.0.1/v1/fleet/pull-messages",
    b"http://x/v1/control/start-run",
    b"x:443",
    b"*",
    b"/docs",
    b"/openapi.json",
    b"/join",
    b"/api/v1/enrol/",
    b"/api/v1/status?x",
]


def test_nothing_else_reaches_the_superlink(site: Site) -> None:
    for path in FORBIDDEN:
        status, answer = site.post(path)
        assert status in {400, 404}, path
        assert status == 400 or refusal_of(answer).code == "not-found", path
        assert site.post(path, b"", method=b"GET")[0] in {400, 404}, path
    assert site.upstream.seen == []


def test_who_opens_an_invite_in_a_browser_is_told_what_it_is_for(site: Site) -> None:
    status, answer = site.post(b"/join", method=b"GET")
    assert status == 404
    assert "for the command 'talkoot join'" in refusal_of(answer).sentence


def test_no_method_but_post_reaches_the_superlink(site: Site) -> None:
    for method in (b"GET", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"post", b"CONNECT"):
        assert site.post(PULL, b"", method=method)[0] == 404
    assert site.upstream.seen == []


def test_bytes_that_are_no_request_line_reach_nothing(site: Site) -> None:
    tail = b"\r\nHost: x\r\nContent-Length: 0\r\n" + KEY_HEADER + b"\r\n\r\n"
    for line in (
        b"POST /v1/fleet/pull-messages\xff HTTP/1.1",
        b"POST /v1/fleet/pull-messages /v1/control/start-run HTTP/1.1",
        b"POST  /v1/fleet/pull-messages HTTP/1.1",
        b"POST /v1/fleet/pull-messages\tx HTTP/1.1",
        b"POST /v1/fleet/pull-messages HTTP/2.0",
        b"PRI * HTTP/2.0",
        b"\x16\x03\x01",
    ):
        assert site.raw(line + tail)[0] in {0, 400, 404}, line
    assert site.upstream.seen == []


def test_a_request_whose_length_can_be_read_in_two_ways_is_refused(site: Site) -> None:
    smuggled = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    for fields in (
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"Content-Length: 4\r\nContent-Length: 5",
        b"Content-Length: 4, 5",
        b"Content-Length: +4",
        b"Content-Length: -1",
        b"Content-Length: 0x4",
        b"Content-Length : 4",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    ):
        head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\n" + KEY_HEADER + b"\r\n" + fields
        status, answer = site.raw(head + b"\r\n\r\n0\r\n\r\n" + smuggled)
        assert status in {400, 501}, fields
        assert answer.count(b"HTTP/1.1 ") == 1, fields  # what follows is not read as a request
    assert site.upstream.seen == []


def test_a_header_that_decides_something_may_not_come_twice(site: Site) -> None:
    other = b"flwr-public-key: " + base64.b64encode(NodeKey.generate().public_pem)
    for extra in (other, KEY_HEADER, b"flwr-signature: a\r\nFLWR-Signature: b"):
        status, answer = site.post(PULL, b"", extra)
        assert (status, refusal_of(answer).code) == (400, "bad-header")
    assert site.upstream.seen == []


# Caps and patience ----------------------------------------------------------------------


def test_a_body_at_the_cap_passes_and_one_byte_more_does_not(site: Site) -> None:
    cap = limits.MAX_CONTROL_MESSAGE
    assert site.post(PULL, b"x" * cap)[0] == 200
    # The length is claimed and the body kept back: an answer can't cross bytes under way.
    head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\n" + KEY_HEADER
    assert site.raw(head + b"\r\nContent-Length: %d\r\n\r\n" % (cap + 1))[0] == 413
    assert [len(seen.body) for seen in site.upstream.seen] == [cap]


def test_a_claimed_length_over_the_cap_is_refused_before_any_of_it_is_sent(site: Site) -> None:
    for path in (PULL, b"/api/v1/enrol"):
        head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + KEY_HEADER
        for length in (b"65537", b"99999999999999", b"9" * 19):
            status, _ = site.raw(head + b"\r\nContent-Length: " + length + b"\r\n\r\n")
            assert status in {400, 413}
    assert site.upstream.seen == []


def test_chunks_without_end_are_cut_off_at_the_cap(site: Site) -> None:
    head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\n" + KEY_HEADER
    chunks = (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 4 + b"1\r\nx\r\n"  # one byte too many
    status, _ = site.raw(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert status == 413
    assert site.upstream.seen == []


def test_headers_without_end_are_cut_off(site: Site) -> None:
    head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\n"
    assert site.raw(head + b"X: " + b"y" * (2 * http_edge.MAX_HEADERS))[0] in {0, 400}
    # Whole, in one delivery, as many TLS records as it takes.
    info = b"GET /api/v1/info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert site.raw(info + b"X: " + b"y" * (http_edge.MAX_HEADERS // 2) + b"\r\n\r\n")[0] == 200
    for size in (2, 4, 12):
        lines = b"X: y\r\n" * (size * http_edge.MAX_HEADERS // 6)
        assert site.raw(info + lines + b"\r\n")[0] == 400
    assert site.upstream.seen == []


def test_an_answer_over_the_cap_a_redirect_and_a_compressed_one_are_bad_answers(
    site: Site,
) -> None:
    site.upstream.answer = b"x" * limits.MAX_CONTROL_MESSAGE
    assert site.post(PULL)[0] == 200
    site.upstream.answer += b"x"
    assert site.post(PULL)[0] == 502
    site.upstream.answer = b""
    site.upstream.headers = {"content-encoding": "gzip"}
    assert site.post(PULL)[0] == 502
    site.upstream.status, site.upstream.headers = 307, {"location": "/v1/control/start-run"}
    assert site.post(PULL)[0] == 502
    assert {seen.path for seen in site.upstream.seen} == {PULL.decode()}


def test_the_superlinks_own_refusals_come_through(site: Site) -> None:
    site.upstream.status, site.upstream.answer = 401, b'{"detail":"no"}'
    status, answer = site.post(PULL)
    assert status == 401
    assert answer.endswith(b'{"detail":"no"}')


def test_a_superlink_that_is_down_is_a_503_and_the_gateway_lives_on(site: Site) -> None:
    site.upstream.shutdown()
    site.upstream.server_close()
    status, answer = site.post(PULL)
    assert (status, refusal_of(answer).code) == (503, "superlink-down")
    assert site.post(b"/api/v1/info", method=b"GET")[0] == 200


def test_a_superlink_with_another_authoritys_certificate_gets_nothing(
    site: Site, credentials: Credentials, tmp_path: Path
) -> None:
    other = CertificateAuthority.create(tmp_path / "other")
    key = NodeKey.generate()
    key.save(tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_bytes(other.issue_server([], [], key))
    impostor = Upstream(tmp_path / "cert.pem", tmp_path / "key.pem")
    settings = GatewaySettings(
        "127.0.0.1",
        0,
        credentials.certificate,
        credentials.key,
        impostor.port,
        credentials.authority,
    )
    with serve_gateway(site.backend, settings) as server:
        assert Site(site.backend, impostor, server, settings).post(PULL)[0] == 503
    assert impostor.seen == []
    impostor.shutdown()
    impostor.server_close()


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/fl", b"POST / HTTP/1.1\r\nX: y"],
    ids=["nothing", "half a line", "half a header"],
)
def test_a_connection_that_does_not_finish_its_headers_is_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_edge, "HEADER_SECONDS", 0.2)
    assert site.raw(sent) == (0, b"")


def test_a_body_that_does_not_come_is_a_408(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_edge, "BODY_SECONDS", 0.2)
    head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\n" + KEY_HEADER
    status, answer = site.raw(head + b"\r\nContent-Length: 9\r\n\r\nabc")
    assert (status, refusal_of(answer).code) == (408, "too-slow")
    assert site.upstream.seen == []


def test_an_exchange_without_end_is_cut_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_edge, "EXCHANGE_SECONDS", 0.2)
    head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\n" + KEY_HEADER
    assert site.raw(head + b"\r\nContent-Length: 9\r\n\r\nabc") == (0, b"")


def test_one_connection_serves_many_requests(site: Site) -> None:
    with httpx.Client(verify=site.context, trust_env=False) as client:
        for _ in range(5):
            url = f"https://127.0.0.1:{site.server.port}"
            assert client.get(url + "/api/v1/info").status_code == 200


# Bans ----------------------------------------------------------------------


def test_a_banned_node_is_told_so_and_reaches_nothing(site: Site) -> None:
    site.backend.banned[KEY.public_pem] = "This node sent broken updates three times."
    status, answer = site.post(PULL)
    assert status == 403
    assert refusal_of(answer) == Refusal(
        code="banned", sentence="This node sent broken updates three times."
    )
    assert site.upstream.seen == []


def test_a_key_that_is_missing_or_spelt_otherwise_reaches_nothing(site: Site) -> None:
    site.backend.banned[KEY.public_pem] = "Banned."
    spellings = [b"not a key", b"\n" + KEY.public_pem, KEY.public_pem + b" ", b""]
    values = [*map(base64.b64encode, spellings), b"!!!", KEY.public_pem.replace(b"\n", b" ")]
    for header in [b"x-nothing: x", *(b"flwr-public-key: " + value for value in values)]:
        head = b"POST " + PULL + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n" + header
        assert site.raw(head + b"\r\n\r\n")[0] == 401, header
    assert site.upstream.seen == []


async def _answer(answers: Iterator[str]) -> str:
    return next(answers)


def test_a_remembered_answer_is_asked_again_when_its_time_is_up() -> None:
    async def scenario() -> list[str]:
        now = [0.0]
        cache: TimedCache[str, str] = TimedCache(1.0, lambda: now[0])
        answers = iter(["first", "second"])
        got = []
        for now[0] in (0.0, 0.9, 1.0, 1.5):
            got.append(await cache.get("key", lambda: _answer(answers)))
        return got

    assert asyncio.run(scenario()) == ["first", "first", "second", "second"]


# Pages ----------------------------------------------------------------------


def test_the_api_pages_answer_anybody(site: Site) -> None:
    with httpx.Client(
        verify=site.context, trust_env=False, base_url=f"https://localhost:{site.server.port}"
    ) as client:
        assert client.get("/api/v1/ca").content == site.backend.ca_pem()
        assert client.get("/api/v1/status").json() == {"phase": "waiting"}
        assert parse(CoordinatorInfo, client.get("/api/v1/info").content) == site.backend.info()


def test_the_dashboard_runs_its_own_code_only_and_loads_nothing_from_elsewhere(site: Site) -> None:
    with httpx.Client(verify=site.context, trust_env=False) as client:
        answer = client.get(f"https://localhost:{site.server.port}/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(?:src|href)=\"(?!data:)|@import|url\(| style=| on\w+=", answer.text)
    assert "innerHTML" not in answer.text
    assert set(re.findall(r"https?://[^\s\"]+", answer.text)) == {"http://www.w3.org/2000/svg"}


def test_a_backend_that_fails_is_a_500_that_tells_a_stranger_nothing(site: Site) -> None:
    site.backend.failure = RuntimeError("/secret/path")
    status, answer = site.post(b"/api/v1/status", method=b"GET")
    assert (status, refusal_of(answer).code) == (500, "internal")
    assert b"secret" not in answer


# Enrolment ----------------------------------------------------------------------


def test_an_invite_and_a_key_become_an_enrolment_that_survives_a_restart(
    site: Site, tmp_path: Path
) -> None:
    assert fetch_info(site.invite) == site.backend.info()
    enrolment = enrol(site.invite, KEY, "Aino's laptop", CAPABILITY)
    ((request, peer),) = site.backend.enrolments
    assert (request.capability, request.name, peer) == (CAPABILITY, "Aino's laptop", "127.0.0.1")
    assert enrolment.node_id == KEY.node_id
    assert (enrolment.host, enrolment.gateway_port) == ("127.0.0.1", site.server.port)
    assert enrolment.transfer_port == 8444
    assert enrolment.ca_pem.encode() == site.backend.ca_pem()
    assert enrolment.coordinator_key_pem.encode() == site.backend.key.public_pem
    certificate = load_certificate(enrolment.certificate_pem.encode())
    assert certificate.public_key() == KEY.public_key
    path = tmp_path / "enrolment.json"
    enrolment.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Enrolment.load(path) == enrolment
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StateError, match="damaged"):
        Enrolment.load(path)


def test_a_used_invite_and_an_unknown_one_are_refused_with_the_coordinators_reason(
    site: Site,
) -> None:
    enrol(site.invite, KEY, "first", CAPABILITY)
    with pytest.raises(RefusedError, match="used already") as caught:
        enrol(site.invite, NodeKey.generate(), "second", CAPABILITY)
    assert caught.value.code == "invite-used"
    assert caught.value.sentence.isprintable()  # no escape sequences on a volunteer's terminal
    unknown = Invite("127.0.0.1", site.server.port, site.backend.ca.fingerprint, "x" * 20)
    with pytest.raises(RefusedError) as caught:
        enrol(unknown, KEY, "third", CAPABILITY)
    assert caught.value.code == "invite-unknown"


def test_the_status_says_what_kind_of_refusal_it_is(site: Site) -> None:
    body = json.dumps({"protocol": limits.PROTOCOL_VERSION + 1, "new": True}).encode()
    status, answer = site.post(b"/api/v1/enrol", body)
    assert (status, refusal_of(answer).code) == (426, "protocol-version")
    for bad in (b"", b"[" * 60_000, b'{"protocol":%d}' % limits.PROTOCOL_VERSION):
        assert site.post(b"/api/v1/enrol", bad)[0] == 400
    assert site.backend.enrolments == []


def test_a_wrong_fingerprint_stops_before_the_token_is_sent(site: Site) -> None:
    wrong = Invite("127.0.0.1", site.server.port, "0" * 64, TOKEN)
    with pytest.raises(IntegrityError, match="Wrong CA fingerprint"):
        enrol(wrong, KEY, "node", CAPABILITY)
    with pytest.raises(IntegrityError, match="Wrong CA fingerprint"):
        fetch_info(wrong)
    assert site.backend.enrolments == []


def test_showing_the_right_authority_without_a_certificate_of_it_is_not_enough(
    site: Site, tmp_path: Path
) -> None:
    mine = CertificateAuthority.create(tmp_path / "mine")
    key = NodeKey.generate()
    key.save(tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_bytes(mine.issue_server([], [], key))
    impostor = Upstream(tmp_path / "cert.pem", tmp_path / "key.pem")
    impostor.answer = site.backend.ca_pem()
    invite = Invite("127.0.0.1", impostor.port, site.backend.ca.fingerprint, TOKEN)
    with pytest.raises(IntegrityError, match="no valid certificate"):
        enrol(invite, KEY, "node", CAPABILITY)
    impostor.answer += mine.certificate_pem  # the right one first, a second one behind it
    with pytest.raises(IntegrityError, match="exactly one"):
        enrol(invite, KEY, "node", CAPABILITY)
    assert [seen.path for seen in impostor.seen] == ["/api/v1/ca", "/api/v1/ca"]
    impostor.shutdown()
    impostor.server_close()


def test_a_nodes_certificate_cannot_pose_as_the_coordinator(
    site: Site, credentials: Credentials, tmp_path: Path
) -> None:
    KEY.save(tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_bytes(credentials.ca.issue_node(make_csr(KEY, KEY.node_id), 9))
    impostor = Upstream(tmp_path / "cert.pem", tmp_path / "key.pem")
    impostor.answer = site.backend.ca_pem()
    invite = Invite("127.0.0.1", impostor.port, site.backend.ca.fingerprint, TOKEN)
    with pytest.raises(IntegrityError, match="no valid certificate"):
        fetch_info(invite)
    impostor.shutdown()
    impostor.server_close()


def test_another_protocol_version_stops_before_the_token_is_sent(site: Site) -> None:
    site.backend.protocol = limits.PROTOCOL_VERSION + 1
    with pytest.raises(VersionError, match="has to be upgraded"):
        enrol(site.invite, KEY, "node", CAPABILITY)
    assert site.backend.enrolments == []


def test_a_certificate_for_another_key_is_not_accepted(site: Site) -> None:
    site.backend.impostor = NodeKey.generate()
    with pytest.raises(IntegrityError, match="not for this node's key"):
        enrol(site.invite, KEY, "node", CAPABILITY)


def test_each_failure_of_the_coordinator_has_its_own_error_at_the_node(site: Site) -> None:
    failures: list[tuple[Exception, type[TalkootError]]] = [
        (ProtocolError("Bad request.", code="bad-csr"), RefusedError),
        (VersionError("Other version."), VersionError),
        (StateError("/disk/path is full."), UnavailableError),
        (RuntimeError("bug at /secret"), UnavailableError),
    ]
    for failure, seen_as in failures:
        site.backend.failure = failure
        with pytest.raises(seen_as) as caught:
            enrol(site.invite, KEY, "node", CAPABILITY)
        assert "/" not in str(caught.value)


def test_nobody_there_and_somebody_else_there_are_told_apart(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UnavailableError, match="No coordinator answers"):
        fetch_info(Invite("127.0.0.1", port, site.backend.ca.fingerprint, TOKEN))
    site.upstream.status, site.upstream.answer = 404, b"<html>"
    with pytest.raises(ProtocolError, match="not a talkoot coordinator"):
        fetch_info(Invite("127.0.0.1", site.upstream.port, site.backend.ca.fingerprint, TOKEN))


def test_a_name_that_cannot_be_shown_is_refused_before_anything_is_sent(site: Site) -> None:
    for name in ("", "a\nb", "x" * 65):
        with pytest.raises(ConfigError, match="node's name"):
            enrol(site.invite, KEY, name, CAPABILITY)
    assert site.backend.enrolments == []


def test_an_address_that_enrols_too_often_has_to_wait(site: Site) -> None:
    statuses = [site.post(b"/api/v1/enrol", b"{}")[0] for _ in range(6)]
    assert statuses == [400] * 4 + [429] * 2
    with pytest.raises(UnavailableError, match="Too many"):
        enrol(site.invite, KEY, "node", CAPABILITY)
    assert site.backend.enrolments == []


@given(
    burst=st.integers(1, 10),
    per_second=st.floats(0.1, 10),
    gaps=st.lists(st.floats(0, 5), max_size=60),
)
def test_no_address_passes_more_often_than_its_burst_and_rate_allow(
    burst: int, per_second: float, gaps: list[float]
) -> None:
    limiter = RateLimiter(burst, per_second)
    now, passed = 0.0, 0
    for gap in gaps:
        now += gap
        passed += limiter.allow("a", now)
        assert passed <= burst + now * per_second + 1e-6
    assert limiter.allow("another", now)


def test_the_limiter_remembers_a_bounded_number_of_addresses() -> None:
    limiter = RateLimiter(1, 1)
    for number in range(3 * rates.MAX_KEYS):
        limiter.allow(str(number), 0.0)
    assert len(limiter._buckets) == rates.MAX_KEYS


def test_addresses_of_one_household_count_as_one() -> None:
    assert rate_key("2001:db8:1:2::1") == rate_key("2001:db8:1:2:ffff::9")
    assert rate_key("2001:db8:1:2::1") != rate_key("2001:db8:1:3::1")
    assert rate_key("::ffff:192.0.2.1") == rate_key("192.0.2.1") != rate_key("192.0.2.2")
    assert rate_key("::1") == "::/64"


# Starting ----------------------------------------------------------------------


def test_a_port_in_use_and_a_missing_certificate_are_clear_errors(
    site: Site, credentials: Credentials, tmp_path: Path
) -> None:
    taken = GatewaySettings(
        "127.0.0.1",
        site.server.port,
        credentials.certificate,
        credentials.key,
        1,
        credentials.authority,
    )
    with pytest.raises(ConfigError, match="cannot listen"):
        serve_gateway(site.backend, taken)
    missing = GatewaySettings(
        "127.0.0.1", 0, tmp_path / "no.pem", credentials.key, 1, credentials.authority
    )
    with pytest.raises(StateError, match="issue them again"):
        serve_gateway(site.backend, missing)


def test_a_stopped_gateway_listens_no_more_and_its_port_is_free(site: Site) -> None:
    assert site.server.is_alive()
    site.server.stop()
    assert not site.server.is_alive()
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", site.server.port), timeout=5)
    socket.create_server(("127.0.0.1", site.server.port)).close()
