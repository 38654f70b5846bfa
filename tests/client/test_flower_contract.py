"""What ``talkoot.client.flower`` relies on in Flower, tried out on a real SuperLink over TLS.

When a new flwr breaks one of these, its name says what to mend. What a hostile SuperLink may try is
in ``test_fleet_host.py``.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from flwr.clientapp import ClientApp
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.error import FlowerError
from flwr.supernode import node_auth_http_interceptor

from talkoot.client.app import app
from talkoot.client.flower import (
    MAX_HEARTBEAT,
    MIN_HEARTBEAT,
    NODE_ACTIVATION_FAILED,
    FleetHost,
)
from talkoot.protocol.errors import RefusedError, UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.sims.superlink import LocalSuperLink


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSuperLink]:
    with LocalSuperLink(tmp_path_factory.mktemp("flower") / "superlink") as running:
        yield running


@pytest.fixture
def key(superlink: LocalSuperLink) -> NodeKey:
    """A key that the SuperLink knows."""
    key = NodeKey.generate()
    superlink.register(key)
    return key


def _host(superlink: LocalSuperLink, key: NodeKey, flower_node_id: int | None = None) -> FleetHost:
    return FleetHost(
        superlink.address, superlink.ca_pem, key, ClientApp(), {"key": "value"}, flower_node_id
    )


def _status(superlink: LocalSuperLink, key: NodeKey) -> str:
    from flwr.proto.control_pb2 import ListNodesRequest

    nodes: Any = superlink.control._call("ListNodes", ListNodesRequest()).nodes_info
    return next(str(node.status) for node in nodes if node.public_key == key.public_pem)


# Shapes ------------------------------------------------------------------------------------------


def _fields(message: type[Any]) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (ActivateNodeRequest, {"public_key", "heartbeat_interval"}),
        (DeactivateNodeRequest, {"node_id"}),
        (SendNodeHeartbeatRequest, {"node", "heartbeat_interval"}),
        (SendNodeHeartbeatResponse, {"success"}),
        (PullMessagesRequest, {"node"}),
        (PullMessagesResponse, {"messages_list", "message_object_trees"}),
        (
            PushMessagesRequest,
            {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
        ),
        (PushMessagesResponse, {"session_id", "objects_to_push"}),
        (ObjectTree, {"object_id", "children"}),
        (PullObjectResponse, {"object_content"}),
    ],
)
def test_flowers_messages_have_the_fields_that_the_host_uses(
    message: type[Any], fields: set[str]
) -> None:
    assert fields <= _fields(message)


def test_the_clientapp_is_one_that_flower_can_call() -> None:
    assert isinstance(app, ClientApp)
    assert callable(app)


def test_flowers_client_lets_an_answer_be_judged_before_it_is_read(
    superlink: LocalSuperLink, key: NodeKey
) -> None:
    host = _host(superlink, key)
    inner = host._client._client
    assert isinstance(inner, httpx.Client)
    lengths: list[str] = []

    def look(response: httpx.Response) -> None:
        assert not response.is_closed
        lengths.append(response.headers["content-length"])  # the SuperLink says it, too
        with pytest.raises(httpx.ResponseNotRead):
            _ = response.content

    inner.event_hooks["response"].append(look)
    host.connect(1.0)
    host.close()
    assert len(lengths) == 2
    assert inner.is_closed


def test_flowers_errors_still_parse_from_their_json() -> None:
    assert FlowerError.from_json("no json") is None
    assert FlowerError.from_json('{"detail":"Invalid SuperNode authentication"}') is None


# Behaviour ----------------------------------------------------------------------------------------


def test_a_registered_node_comes_online_and_goes_offline(
    superlink: LocalSuperLink, key: NodeKey
) -> None:
    host = _host(superlink, key)
    node_id = host.connect(1.0)
    assert node_id == superlink.control.registered_nodes()[key.public_pem]
    assert _status(superlink, key) == "online"
    assert host.connect(1.0) == node_id  # harmless
    assert host.poll() is False  # nothing to do
    host.close()
    assert _status(superlink, key) == "offline"


def test_a_node_of_an_unknown_key_is_refused_with_2004(superlink: LocalSuperLink) -> None:
    host = _host(superlink, NodeKey.generate())
    with pytest.raises(httpx.HTTPStatusError) as info:
        host._client.ActivateNode(
            ActivateNodeRequest(public_key=host._public_key, heartbeat_interval=30.0)
        )
    refusal = FlowerError.from_json(info.value.response.text)
    assert refusal is not None
    assert refusal.code == NODE_ACTIVATION_FAILED == 2004
    with pytest.raises(RefusedError) as refused:
        host.connect(1.0)
    assert refused.value.code == "not-activated"
    host.close()


def test_activating_a_node_that_is_online_is_refused_with_2004(
    superlink: LocalSuperLink, key: NodeKey
) -> None:
    first = _host(superlink, key)
    first.connect(1.0)
    second = _host(superlink, key)  # a daemon that was killed, and does not know its node id
    with pytest.raises(RefusedError) as refused:
        second.connect(1.0)
    assert refused.value.code == "not-activated"
    second.close()
    first.close()
    third = _host(superlink, key)
    third.connect(1.0)
    third.close()


def test_a_node_that_knows_its_id_comes_back_by_a_heartbeat_online_or_not(
    superlink: LocalSuperLink, key: NodeKey
) -> None:
    killed = _host(superlink, key)
    node_id = killed.connect(1.0)
    back = _host(superlink, key, node_id)
    assert back.connect(1.0) == node_id  # still online: what 2004 would refuse
    back.close()
    assert _status(superlink, key) == "offline"
    again = _host(superlink, key, node_id)
    assert again.connect(1.0) == node_id
    assert _status(superlink, key) == "online"
    again.close()
    killed.close()


def test_a_node_id_that_is_not_the_keys_is_replaced_by_the_one_that_is(
    superlink: LocalSuperLink, key: NodeKey
) -> None:
    other = NodeKey.generate()
    other_id = superlink.register(other)
    host = _host(superlink, key, other_id)
    assert host._heartbeat(other_id) is False
    assert host.connect(1.0) == superlink.control.registered_nodes()[key.public_pem]
    assert _status(superlink, other) != "online"
    host.close()


@pytest.mark.parametrize("seconds", [MIN_HEARTBEAT, MAX_HEARTBEAT])
def test_flower_takes_the_shortest_and_the_longest_heartbeat_that_we_send(
    superlink: LocalSuperLink, key: NodeKey, seconds: float
) -> None:
    host = _host(superlink, key)
    host.connect(seconds / 20)
    assert host._heartbeat_seconds == seconds
    host.close()


def test_a_clock_that_is_wrong_is_told_in_a_sentence(
    superlink: LocalSuperLink, key: NodeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: ahead)
    host = _host(superlink, key)
    with pytest.raises(UnavailableError, match="set this machine's clock") as info:
        host.connect(1.0)
    assert info.value.code == "not-authenticated"
    host.close()


def test_a_superlink_of_another_ca_is_not_spoken_to(
    superlink: LocalSuperLink, key: NodeKey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from talkoot.server.ca import CertificateAuthority

    stranger = CertificateAuthority.create(tmp_path_factory.mktemp("ca"))
    host = FleetHost(superlink.address, stranger.certificate_pem, key, ClientApp(), {})
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        host.connect(1.0)
    host.close()


def test_closing_ends_the_hosts_thread(superlink: LocalSuperLink, key: NodeKey) -> None:
    before = set(threading.enumerate())
    host = _host(superlink, key)
    host.connect(1.0)
    assert len(set(threading.enumerate()) - before) == 1
    host.close()
    assert set(threading.enumerate()) <= before
