"""Strangers and stock tools at the two public ports of a real coordinator."""

from __future__ import annotations

import contextlib
import re
import socket
import sqlite3
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.supercore.protobuf import translation

from talkoot.client.enrol import Enrolment, enrol
from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.invite import Invite
from talkoot.server.flower import ControlApi
from talkoot.sims.in_process import CAPABILITY
from talkoot.sims.local import BIN, LocalNetwork, environment
from talkoot.sims.probe import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # a whole story in one set-up

ROUTES = sorted(
    set(re.findall(r'"(/v1/[a-z-]+/[a-z-]+)"', Path(translation.__file__).read_text("utf-8")))
)
"""Every path that the installed Flower serves."""
OURS = {
    f"/v1/fleet/{name}"
    for name in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages"),
        *("push-messages", "get-run", "get-fab", "push-object", "pull-object"),
        "confirm-message-received",
    )
}


@dataclass
class Door:
    """The public address, and what stands behind it to see whether anybody came through."""

    network: LocalNetwork
    control: ControlApi
    key: NodeKey
    enrolment: Enrolment

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.network.state / "ca" / "ca.pem")
        context.check_hostname = False
        return context

    def connect(
        self, *, alpn: tuple[str, ...] = (), source: str = "127.0.0.1", port: int | None = None
    ) -> ssl.SSLSocket:
        where = ("127.0.0.1", port or self.network.gateway_port)
        raw = socket.create_connection(where, timeout=20, source_address=(source, 0))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = self.context()
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context.wrap_socket(raw)

    def raw(self, request: bytes, *, alpn: tuple[str, ...] = ()) -> bytes:
        """Send exact bytes; all that comes back until the end."""
        answer = b""
        with self.connect(alpn=alpn) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(request)
            with contextlib.suppress(OSError):
                while data := connection.recv(65536):
                    answer += data
        return answer

    def behind(self) -> tuple[object, ...]:
        """What a stranger could have changed: Flower's runs and nodes."""
        with contextlib.closing(sqlite3.connect(self.network.state / "flower.db")) as raw:
            nodes = raw.execute("SELECT COUNT(*) FROM node").fetchone()
        alive = {run: status == "finished" for run, (status, _, _) in self.control.runs().items()}
        return alive, nodes


@pytest.fixture(scope="module")
def door(coordinator: LocalNetwork) -> Door:
    state = coordinator.state
    key = NodeKey.generate()
    ca = (state / "tls" / "loopback" / "ca.pem").read_bytes()
    control = ControlApi(int(coordinator.ports["superlink_port"]), ca)

    def started() -> bool:
        with contextlib.suppress(UnavailableError):
            return bool(control.runs())
        return False

    until("the SuperLink's run", started, coordinator)
    enrolment = enrol(Invite.parse(coordinator.invite(1)), key, "stranger", CAPABILITY)
    return Door(coordinator, control, key, enrolment)


@pytest.fixture
def untouched(door: Door) -> Iterator[None]:
    """Whatever the test sends, nothing is changed behind the door."""
    before = door.behind()
    yield
    assert door.behind() == before
    assert door.network.status() is not None


def statuses(answer: bytes) -> set[int]:
    return {int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)}


# Stock tools --------------------------------------------------------------------------------------


def _flwr(door: Door, root: Path, address: str, ca: Path, *arguments: str) -> str:
    """Flower's own command line, pointed at an address; what it said, failed or not."""
    home = root / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "there"\n\n[superlink.there]\naddress = "{address}"\n'
        f'root-certificates = "{ca}"\n'
    )
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments],
        capture_output=True,
        text=True,
        env=environment() | {"FLWR_HOME": str(home), "COLUMNS": "200"},
        cwd=root,
        timeout=120,
        check=False,
    )
    return f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


def _app(root: Path) -> Path:
    """A Flower app that would say who it runs as."""
    app = root / "app"
    (app / "evil").mkdir(parents=True)
    (app / "evil" / "__init__.py").touch()
    (app / "evil" / "server.py").write_text(
        "from pathlib import Path\nfrom flwr.serverapp import ServerApp\napp = ServerApp()\n"
        f"Path({str(root / 'executed')!r}).touch()\n"
    )
    (app / "evil" / "client.py").write_text(
        "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    )
    (app / "pyproject.toml").write_text(
        '[project]\nname = "evil"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
        'dependencies = []\n[tool.flwr.app]\npublisher = "evil"\n[tool.flwr.app.components]\n'
        'serverapp = "evil.server:app"\nclientapp = "evil.client:app"\n[tool.flwr.app.config]\n'
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    )
    return app


@pytest.mark.usefixtures("untouched")
def test_flowers_own_command_line_gets_nowhere_at_the_public_address(
    door: Door, tmp_path: Path
) -> None:
    state = door.network.state
    key = tmp_path / "key.pub"
    key.write_bytes(
        NodeKey.generate().public_key.public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    (run_id,) = door.control.runs()
    commands = (
        ("run", str(_app(tmp_path)), "there"),
        ("stop", str(run_id), "there"),
        ("list", "there"),
        ("supernode", "register", str(key), "there"),
        ("supernode", "list", "there"),
    )
    public = f"127.0.0.1:{door.network.gateway_port}"
    for command in commands:
        said = _flwr(door, tmp_path, public, state / "ca" / "ca.pem", *command)
        assert not said.startswith("exit status 0"), (command, said)
        assert "404" in said, said
    assert not (tmp_path / "executed").exists()
    # The same words, at the socket that is not public, are understood: they were not just wrong.
    inside = f"127.0.0.1:{door.network.ports['superlink_port']}"
    said = _flwr(door, tmp_path, inside, state / "tls" / "loopback" / "ca.pem", *commands[2])
    assert said.startswith("exit status 0"), said
    assert str(run_id) in said


# Paths and encodings ------------------------------------------------------------------------------


def _spellings(path: str) -> list[bytes]:
    """A path in every spelling that some server takes for the same."""
    area, name = path.removeprefix("/v1/").split("/")
    twice = "".join(f"%25{ord(c):02x}" for c in "/")
    return [
        spelling.encode("latin-1")
        for spelling in (
            path,
            f"/{path}",
            f"/v1//{area}/{name}",
            f"/v1/{area}%2f{name}",
            f"/v1/{area}{twice}{name}",
            f"/v1/{area}%5c{name}",
            f"/v1/{area}\\{name}",
            path.upper(),
            path.title(),
            f"/v1/fleet/../{area}/{name}",
            f"/v1/fleet/%2e%2e/{area}/{name}",
            f"/v1/fleet/..%2f{area}/{name}",
            f"/v1/fleet/..;/{area}/{name}",
            f"/v1/fleet/pull-messages/../../{area}/{name}",
            f"/v1/fleet/pull-messages;/../../{area}/{name}",
            f"/v1/fleet/%c0%ae%c0%ae/{area}/{name}",
            f"{path}/",
            f"{path}?x=1",
            f"{path}#x",
            f"{path}%00",
            f"{path}%20",
            f"{path};a=b",
            "/" + "".join(f"%{ord(c):02x}" for c in path[1:]),
            f"https://127.0.0.1{path}",
            f"http://localhost:1{path}",
            f"//127.0.0.1{path}",
            path.replace("/", "/./"),
            path.replace("v1", "v1\u00ad"),
            path[1:],
        )
    ]


@pytest.mark.usefixtures("untouched")
def test_no_path_of_flowers_but_our_ten_is_there_whatever_its_spelling(door: Door) -> None:
    assert len(ROUTES) > 50
    assert set(ROUTES) > OURS
    others = [route for route in ROUTES if route not in OURS]
    spelt = [route.encode() for route in others]
    for route in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"):
        assert route in others
        spelt += _spellings(route)
    for number, path in enumerate(spelt):
        version = (b"HTTP/1.1", b"HTTP/1.0")[number % 2]
        head = b"POST " + path + b" " + version + b"\r\nHost: x\r\nConnection: close\r\n"
        answer = door.raw(head + b"Content-Length: 0\r\n\r\n")
        assert statuses(answer) <= {400, 404}, (path, answer[:200])


START = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
PAGE = b"GET /api/v1/info HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("request_bytes", "may_be"),
    [
        pytest.param(PAGE + b"\r\n" + START, {200, 404}, id="pipelined"),
        pytest.param(
            PAGE + b"Content-Length: %d\r\n\r\n" % len(START) + START, {200, 400, 413}, id="as body"
        ),
        pytest.param(
            PAGE + b"Content-Length: 0\r\nContent-Length: 80\r\n\r\n" + START, {400}, id="lengths"
        ),
        pytest.param(
            PAGE + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + START,
            {400},
            id="length and chunks",
        ),
        pytest.param(
            PAGE + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + START,
            {400},
            id="chunks and length",
        ),
        pytest.param(
            PAGE + b'Transfer-Encoding: chunked\r\n\r\n0;ext="\r\n\r\n' + START,
            {200, 400, 404, 413},
            id="chunk extension",
        ),
        pytest.param(
            PAGE + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n" + START,
            {400, 413},
            id="chunk of 2^68",
        ),
        pytest.param(PAGE + b"X: a\r\n folded\r\n\r\n" + START, {200, 400, 404}, id="fold"),
        pytest.param(
            PAGE + b"Content-Length:\r\n 0\r\nX: y\r\n\r\n" + START,
            {200, 400, 404},
            id="fold length",
        ),
        pytest.param(PAGE + b"X: \x00\r\n\r\n" + START, {400}, id="NUL"),
        pytest.param(PAGE + b"X\x00: y\r\n\r\n" + START, {400}, id="NUL in a name"),
        pytest.param(PAGE + b"X : y\r\n\r\n" + START, {400}, id="space before colon"),
        pytest.param(PAGE + b"X: " + b"y" * 70_000 + b"\r\n\r\n", {400}, id="headers"),
        pytest.param(PAGE + b"X: y\r\n" * 5000 + b"\r\n", {400}, id="many headers"),
        pytest.param(PAGE.replace(b"\r\n", b"\n") + b"\n" + START, {200, 400, 404}, id="bare LF"),
        pytest.param(PAGE.replace(b"\r\n", b"\r") + b"\r" + START, {400}, id="bare CR"),
        pytest.param(b"GET /v1/control/list-runs\r\n", {400}, id="HTTP/0.9"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" + START, {400, 404}, id="no host"),
        pytest.param(
            b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n" + START, {400, 404}, id="CONNECT"
        ),
        pytest.param(
            PAGE
            + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ"
            + b"\r\n\r\n"
            + START,
            {200, 404},
            id="h2c",
        ),
        pytest.param(
            PAGE
            + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            + START,
            {200, 400, 404},
            id="websocket",
        ),
        pytest.param(
            PAGE + b"X-HTTP-Method-Override: POST\r\nX-Original-URL: /v1/control/start-run\r\n"
            b"X-Rewrite-URL: /v1/control/start-run\r\nConnection: close\r\n\r\n",
            {200},
            id="override",
        ),
    ],
)
def test_nothing_is_smuggled_past_the_gateway(
    request_bytes: bytes, may_be: set[int], door: Door
) -> None:
    close = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = door.raw(request_bytes + close)
    assert statuses(answer) <= may_be | {404}, answer[:500]
    assert b"101 Switching" not in answer


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return (
        len(payload).to_bytes(3, "big")
        + bytes([kind, flags])
        + stream.to_bytes(4, "big")
        + (payload)
    )


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field, never indexed, not coded (RFC 7541, section 6.2.3)."""
    return b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value


@pytest.mark.usefixtures("untouched")
def test_http_2_is_not_spoken_at_the_gateway_with_or_without_negotiation(door: Door) -> None:
    fields = {
        b":method": b"POST",
        b":scheme": b"https",
        b":authority": b"x",
        b":path": b"/v1/control/start-run",
        b"content-length": b"0",
        b"x": b"y\r\n\r\nPOST /v1/control/start-run HTTP/1.1\r\nHost: x\r\n\r\n",
    }
    block = b"".join(_literal(name, value) for name, value in fields.items())
    request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 5, 1, block)
    for alpn in ((), ("h2",), ("h2", "http/1.1")):
        with contextlib.suppress(ssl.SSLError):  # no protocol in common is an answer, too
            answer = door.raw(request, alpn=alpn)
            assert statuses(answer) <= {400}
            assert not answer.startswith(b"\x00\x00")  # a SETTINGS frame
    with door.connect(alpn=("h2", "http/1.1")) as connection:
        assert connection.selected_alpn_protocol() in (None, "http/1.1")


# The transfer port --------------------------------------------------------------------------------


def test_the_transfer_port_knows_no_method_but_its_own(door: Door) -> None:
    credentials = grpc.ssl_channel_credentials(
        (door.network.state / "ca" / "ca.pem").read_bytes(),
        door.key.private_pem(),
        door.enrolment.certificate_pem.encode(),
    )
    port = int(door.network.ports["transfer_port"])
    options = [("grpc.ssl_target_name_override", "talkoot-coordinator")]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        for method in (
            "/flwr.proto.Control/StartRun",
            "/flwr.proto.Fleet/PullMessages",
            "/flwr.proto.Fleet/CreateNode",
            "/flwr.proto.ServerAppIo/PushMessages",
            "/flwr.proto.Exec/StartRun",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "/grpc.health.v1.Health/Check",
            "/talkoot.transfer.v1.Transfer/../../flwr.proto.Control/StartRun",
            "/talkoot.transfer.v1.Transfer/GetTask/",
            "/talkoot.transfer.v1.Transfer/gettask",
            "//talkoot.transfer.v1.Transfer/GetTask",
            "/v1/control/start-run",
            "/",
        ):
            call: Any = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=20)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, method


def test_who_shows_no_certificate_gets_no_byte_at_the_transfer_port(door: Door) -> None:
    port = int(door.network.ports["transfer_port"])
    with contextlib.suppress(OSError), door.connect(port=port, alpn=("h2",)) as connection:
        connection.sendall(START)
        while data := connection.recv(65536):
            assert not statuses(data)


# Who holds on -------------------------------------------------------------------------------------


def test_one_address_that_holds_connections_open_is_capped_and_others_are_served(
    door: Door,
) -> None:
    most = int(door.network.ports["max_connections_per_address"])
    held: list[ssl.SSLSocket] = []
    refused = 0
    try:
        for _ in range(most + 8):
            try:
                connection = door.connect(source="127.0.0.3")
                connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX: ")
                held.append(connection)
            except OSError:
                refused += 1
        assert refused >= 8
        assert door.network.status() is not None  # from 127.0.0.1: another household
    finally:
        for connection in held:
            connection.close()
