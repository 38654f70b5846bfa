"""The fleet host against a SuperLink that means harm, or breaks: real HTTPS, scripted answers."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from talkoot.client.flower import MAX_OBJECTS, FleetHost
from talkoot.protocol.control import MESSAGE_TYPE, TASK_KEY, TASK_RECORD
from talkoot.protocol.errors import ProtocolError, RefusedError, UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.limits import MAX_CONTROL_MESSAGE
from talkoot.protocol.messages import Refusal, canonical_bytes
from talkoot.server.ca import CertificateAuthority

NODE_ID = 2**63 + 5
Answer = tuple[int, bytes, dict[str, str]]


def _ok(message: Any) -> Answer:
    return 200, message.SerializeToString(), {}


class Gateway(ThreadingHTTPServer):
    """Answers each Fleet call with what the test says; by default as a SuperLink with one task."""

    daemon_threads = True

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.calls: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[bytes], Answer]] = {
            "activate-node": lambda _: _ok(ActivateNodeResponse(node_id=NODE_ID)),
            "deactivate-node": lambda _: _ok(DeactivateNodeResponse()),
            "send-node-heartbeat": lambda _: _ok(SendNodeHeartbeatResponse(success=True)),
            "pull-messages": lambda _: _ok(PullMessagesResponse()),
            "pull-object": self._object,
            "confirm-message-received": lambda _: _ok(ConfirmMessageReceivedResponse()),
            "push-messages": lambda _: _ok(PushMessagesResponse()),
            "push-object": lambda _: _ok(PushObjectResponse(stored=True)),
        }
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def _object(self, body: bytes) -> Answer:
        wanted = PullObjectRequest.FromString(body).object_id
        return _ok(
            PullObjectResponse(
                object_found=True, object_available=True, object_content=self.objects[wanted]
            )
        )

    def offer(self, message: Message) -> PullMessagesResponse:
        """Have one message ready, once."""
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            tree = get_object_tree(message)
            self.objects = {i: o.deflate() for i, o in get_all_nested_objects(message).items()}
        proto = message_to_proto(remove_content_from_message(message))
        reply = PullMessagesResponse(messages_list=[proto], message_object_trees=[tree])
        self.answers["pull-messages"] = lambda _: _ok(reply)
        return reply

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        gateway = self.server
        assert isinstance(gateway, Gateway)
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        call = self.path.removeprefix("/v1/fleet/")
        gateway.calls.append(call)
        status, answer, headers = gateway.answers[call](body)
        self.send_response(status)
        self.send_header("content-type", "application/protobuf")
        for name, value in headers.items():
            self.send_header(name, value)
        if not {"content-length", "transfer-encoding"} & set(headers):
            self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pki")
    authority = CertificateAuthority.create(root)
    key = NodeKey.generate()
    key.save(root / "server.key")
    (root / "server.pem").write_bytes(authority.issue_server([], [], key))
    return root


@pytest.fixture
def gateway(pki: Path) -> Iterator[Gateway]:
    server = Gateway(pki / "server.pem", pki / "server.key")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def done() -> list[str]:
    """Tasks that reached the app."""
    return []


@pytest.fixture
def host(pki: Path, gateway: Gateway, done: list[str]) -> Iterator[FleetHost]:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # flwr is not typed for us
    def train(message: Message, context: Context) -> Message:
        assert context.run_id == 77
        assert context.node_id == NODE_ID
        done.append(message.content.config_records[TASK_RECORD][TASK_KEY])
        return Message(RecordDict({"verdict": ConfigRecord({"json": "{}"})}), reply_to=message)

    host = FleetHost(
        f"localhost:{gateway.server_address[1]}",
        (pki / "ca.pem").read_bytes(),
        NodeKey.generate(),
        app,
        {},
    )
    host.connect(1.0)
    yield host
    host.close()


def _message(content: RecordDict) -> Message:
    """As a ServerApp's Grid makes it."""
    metadata = Metadata(
        run_id=77,
        message_id="",
        src_node_id=1,
        dst_node_id=NODE_ID,
        reply_to_message_id="",
        group_id="1",
        created_at=time.time(),
        ttl=600.0,
        message_type=MESSAGE_TYPE,
    )
    return make_message(metadata=metadata, content=content)


def _task(text: str = "a task") -> Message:
    return _message(RecordDict({TASK_RECORD: ConfigRecord({TASK_KEY: text})}))


def test_a_task_is_done_and_answered(gateway: Gateway, host: FleetHost, done: list[str]) -> None:
    gateway.offer(_task())
    assert host.poll() is True
    assert done == ["a task"]
    assert gateway.calls.count("push-messages") == 1


def test_the_app_is_told_of_only_after_the_message_is_whole(
    gateway: Gateway, host: FleetHost, done: list[str]
) -> None:
    reply = gateway.offer(_task())
    reply.message_object_trees[0].children[0].object_id = "0" * 64
    gateway.objects["0" * 64] = b"nonsense"
    with pytest.raises(ProtocolError):
        host.poll()
    assert done == []


def test_a_message_of_too_many_parts_is_refused_before_one_is_fetched(
    gateway: Gateway, host: FleetHost, done: list[str]
) -> None:
    many = RecordDict({f"record-{i}": ConfigRecord({"n": i}) for i in range(MAX_OBJECTS)})
    gateway.offer(_message(many))
    with pytest.raises(ProtocolError, match="more parts"):
        host.poll()
    assert "pull-object" not in gateway.calls
    assert done == []


def test_a_part_over_the_cap_is_refused_before_it_is_read(
    gateway: Gateway, host: FleetHost, done: list[str]
) -> None:
    gateway.offer(_task("x" * (MAX_CONTROL_MESSAGE + 1)))
    with pytest.raises(ProtocolError, match="cap is"):
        host.poll()
    assert done == []


@pytest.mark.parametrize(
    "headers",
    [
        {"content-length": str(2**40)},
        {"transfer-encoding": "chunked"},
        {"content-length": "12", "content-encoding": "gzip"},
    ],
    ids=["terabyte", "without-end", "compressed"],
)
def test_an_answer_that_may_be_endless_is_not_read(
    gateway: Gateway, host: FleetHost, headers: dict[str, str]
) -> None:
    gateway.answers["pull-messages"] = lambda _: (200, b"x" * 12, headers)
    with pytest.raises(ProtocolError) as info:
        host.poll()
    assert info.value.code == "too-large"


def test_an_answer_that_is_no_protobuf_is_something_to_try_again(
    gateway: Gateway, host: FleetHost
) -> None:
    gateway.answers["pull-messages"] = lambda _: (200, b"\xff\xff\xff", {})
    with pytest.raises(UnavailableError, match="nonsense"):
        host.poll()


@pytest.mark.parametrize("call", ["push-messages", "push-object"])
def test_a_reply_that_is_dropped_is_harmless(
    gateway: Gateway, host: FleetHost, done: list[str], call: str
) -> None:
    gateway.answers["push-messages"] = lambda body: _ok(
        PushMessagesResponse(objects_to_push=_ids(body))
    )
    gateway.answers[call] = lambda _: (503, b"", {})
    gateway.offer(_task())
    assert host.poll() is True
    assert done == ["a task"]


def _ids(body: bytes) -> list[str]:
    from flwr.proto.fleet_pb2 import PushMessagesRequest

    tree = PushMessagesRequest.FromString(body).message_object_trees[0]
    return [tree.object_id, *(child.object_id for child in tree.children)]


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (503, b"", UnavailableError, "unavailable"),
        (429, b"", UnavailableError, "unavailable"),
        (500, b"oops", UnavailableError, "gateway-no"),
        (500, b"[" * 9000, UnavailableError, "unavailable"),  # deeper than Python reads
        (
            401,
            b'{"detail":"Invalid SuperNode authentication"}',
            UnavailableError,
            "not-authenticated",
        ),
        (403, canonical_bytes(Refusal(code="banned", sentence="Out.")), RefusedError, "banned"),
        (400, canonical_bytes(Refusal(code="odd", sentence="Odd.")), UnavailableError, "odd"),
    ],
)
def test_every_refusal_becomes_an_error_with_its_code(
    gateway: Gateway,
    host: FleetHost,
    status: int,
    body: bytes,
    kind: type[Exception],
    code: str,
) -> None:
    gateway.answers["pull-messages"] = lambda _: (status, body, {})
    with pytest.raises(kind) as info:
        host.poll()
    assert getattr(info.value, "code", None) == code


def test_a_gateway_that_hangs_does_not_hold_up_the_end(gateway: Gateway, host: FleetHost) -> None:
    release = threading.Event()

    def hang(_: bytes) -> Answer:
        release.wait(60)
        return _ok(DeactivateNodeResponse())

    gateway.answers["deactivate-node"] = hang
    ended = threading.Thread(target=host.close)
    ended.start()
    # Flower's own patience is 30 s, and the gateway's is endless.
    ended.join(20)
    assert not ended.is_alive()
    release.set()


def test_an_error_of_the_app_comes_out_and_nothing_is_answered(
    gateway: Gateway, host: FleetHost
) -> None:
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # flwr is not typed for us
    def train(_message: Message, _context: Context) -> Message:
        raise UnavailableError("Paused.", code="stopped")

    host._app = app
    gateway.offer(_task())
    # The lease stays this node's: a reply would give it back.
    with pytest.raises(UnavailableError) as stopped:
        host.poll()
    assert stopped.value.code == "stopped"
    assert "push-messages" not in gateway.calls
