"""All that the client touches of Flower's internals, in one file (ADR 2).

An in-process host for the *installed* ClientApp: it speaks the Fleet API like a SuperNode, but
never asks for the bundle (FAB) and so never runs what a SuperLink sends. It polls as often as the
coordinator says, where Flower's own SuperNode polls every 3 s. When Flower changes,
``tests/client/test_flower_contract.py`` says what broke.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from typing import Any, Final

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from talkoot.protocol.errors import (
    ProtocolError,
    RefusedError,
    TalkootError,
    UnavailableError,
)
from talkoot.protocol.identity import NodeKey, public_pem
from talkoot.protocol.limits import MAX_CONTROL_MESSAGE
from talkoot.protocol.messages import Refusal, parse

log = logging.getLogger(__name__)

MAX_OBJECTS: Final = 32
"""Objects in one control message: the message, its records, and room."""
MIN_HEARTBEAT: Final = 10.0  # seconds; Flower refuses less
MAX_HEARTBEAT: Final = 1800.0  # seconds; Flower refuses more
CLOSE_SECONDS: Final = 3.0
"""How long going offline may take; a SuperLink that does not hear of it finds out by itself."""
NOT_AUTHENTICATED: Final = "not-authenticated"
NODE_ACTIVATION_FAILED: Final = 2004
"""Flower's code for "this key may not be activated (now)"."""


class FleetHost:
    """One node on the Fleet API.

    Args:
        address: ``host:port`` of the gateway.
        ca_pem: the pinned CA.
        key: the node's key, which the SuperLink knows.
        app: the installed ClientApp.
        node_config: handed to the app with every message.
        flower_node_id: from an earlier activation: a SuperLink that still believes in it does not
            activate it a second time.
    """

    def __init__(
        self,
        address: str,
        ca_pem: bytes,
        key: NodeKey,
        app: ClientApp,
        node_config: dict[str, bool | float | int | str],
        flower_node_id: int | None = None,
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        self._client: Any = FleetHttpClient(
            f"https://{address}",
            verify=context,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key.private_key, key.public_key),
            ],
        )
        # Flower's client reads whatever comes. What has no length, or too much of it, is not read.
        self._client._client.event_hooks["response"].append(_cap)
        self._public_key = public_pem(key.public_key)
        self._app = app
        self._node_config = node_config
        self._heartbeat_seconds = MIN_HEARTBEAT
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.flower_node_id = flower_node_id

    def connect(self, poll_seconds: float) -> int:
        """Become online; returns Flower's node id. Harmless when it is online already.

        Raises:
            UnavailableError: nobody answers.
            RefusedError: the SuperLink does not know this key, or the gateway shuts it out.
        """
        self.keep_pace(poll_seconds)
        if self.flower_node_id is None or not self._heartbeat(self.flower_node_id):
            request = ActivateNodeRequest(
                public_key=self._public_key, heartbeat_interval=self._heartbeat_seconds
            )
            self.flower_node_id = int(self._call(self._client.ActivateNode, request).node_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="fleet-heartbeat", daemon=True)
            self._thread.start()
        return self.flower_node_id

    def keep_pace(self, poll_seconds: float) -> None:
        """Beat as often as a network needs whose nodes poll this often: a large one, less often.

        Each beat tells Flower when to expect the next, so that a change holds from the next on.
        """
        self._heartbeat_seconds = min(MAX_HEARTBEAT, max(MIN_HEARTBEAT, 20 * poll_seconds))

    def _heartbeat(self, node_id: int) -> bool:
        request = SendNodeHeartbeatRequest(
            node=Node(node_id=node_id), heartbeat_interval=self._heartbeat_seconds
        )
        try:
            return bool(self._call(self._client.SendNodeHeartbeat, request).success)
        except RefusedError:
            return False
        except UnavailableError as err:
            if err.code == NOT_AUTHENTICATED:  # the id is of another SuperLink's database
                return False
            raise

    def _beat(self) -> None:
        # Flower holds a node for gone after two intervals: three beats fit into that.
        while not self._stop.wait(0.6 * self._heartbeat_seconds):
            if self.flower_node_id is None:
                continue
            try:
                self._heartbeat(self.flower_node_id)
            except (UnavailableError, ProtocolError) as err:
                log.info("heartbeat: %s", err.sentence)

    def poll(self, before: Callable[[], None] | None = None) -> bool:
        """Pull one message, run the app on it and push its reply; False when there was none.

        Args:
            before: called when a message has come, before the app runs.
        """
        if self.flower_node_id is None:
            raise UnavailableError("This node is not connected to the SuperLink.")
        node = Node(node_id=self.flower_node_id)
        pulled = self._call(self._client.PullMessages, PullMessagesRequest(node=node))
        if not pulled.messages_list:
            return False
        tree = pulled.message_object_trees[0]
        run_id = int(pulled.messages_list[0].metadata.run_id)
        if sum(1 for _ in iterate_object_tree(tree)) > MAX_OBJECTS:
            raise ProtocolError("The SuperLink sent a message of more parts than any of ours has.")
        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._pull_object, node, run_id),
                make_confirm_message_received_fn_protobuf(
                    self._client.ConfirmMessageReceived, node, run_id
                ),
                return_type=Message,
            )
        except TalkootError:
            raise
        except httpx.HTTPError as err:
            raise _explain(err) from err
        except Exception as err:  # flwr trusts its SuperLink, and meets nonsense with any error
            raise ProtocolError(
                f"The SuperLink sent a broken message ({type(err).__name__}: {err})."
            ) from err
        message.metadata.__dict__["_message_id"] = tree.object_id
        if before is not None:
            before()
        context = Context(
            run_id=run_id,
            node_id=self.flower_node_id,
            node_config=dict(self._node_config),
            state=RecordDict(),
            run_config={},
        )
        reply = self._app(message, context)
        try:
            self._push(reply, node, run_id)
        except UnavailableError as err:
            # A reply is news, never truth: what counts reached the ledger over the data plane.
            log.info("a reply was not delivered: %s", err.sentence)
        return True

    def _pull_object(self, request: Any) -> Any:
        response = self._client.PullObject(request)
        if len(response.object_content) > MAX_CONTROL_MESSAGE:
            raise ValueError("an object over the cap of a control message")
        return response

    def _push(self, reply: Message, node: Node, run_id: int) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            tree = get_object_tree(reply)
            objects = get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            pushed = self._call(self._client.PushMessages, request)
            try:
                push_objects(
                    objects,
                    make_push_object_fn_protobuf(
                        self._client.PushObject, node, run_id, pushed.session_id
                    ),
                    object_ids_to_push=set(pushed.objects_to_push),
                )
            except httpx.HTTPError as err:
                raise _explain(err) from err
            except ObjectPushError as err:
                raise UnavailableError(f"The reply could not be delivered: {err}.") from err

    def close(self) -> None:
        """Go offline, so that the coordinator need not wait for a heartbeat to fail."""
        self._stop.set()
        self._client._client.timeout = httpx.Timeout(CLOSE_SECONDS)
        if self._thread is not None and self.flower_node_id is not None:
            self._thread.join(timeout=CLOSE_SECONDS)
            request = DeactivateNodeRequest(node_id=self.flower_node_id)
            try:
                self._call(self._client.DeactivateNode, request)
            except TalkootError as err:
                log.info("leaving: %s", err.sentence)
        self._client.close()

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        try:
            return method(request)
        except httpx.HTTPError as err:
            raise _explain(err) from err
        except (ValueError, RuntimeError) as err:
            # What flwr raises for a reply that is no protobuf, and httpx once it is closed.
            raise UnavailableError(f"The SuperLink answered nonsense: {err}.") from err


def _cap(response: httpx.Response) -> None:
    """Refuse an answer that may be larger than a control message, before it is read."""
    length = response.headers.get("content-length", "")
    if "content-encoding" in response.headers or not length.isascii() or not length.isdigit():
        raise ProtocolError("The gateway sent an answer without a length.", code="too-large")
    if len(length) > 9 or int(length) > MAX_CONTROL_MESSAGE:
        raise ProtocolError(
            f"The gateway sent an answer of {length[:20]} bytes, and the cap is "
            f"{MAX_CONTROL_MESSAGE}.",
            code="too-large",
        )


def _explain(err: httpx.HTTPError) -> UnavailableError | RefusedError:
    if not isinstance(err, httpx.HTTPStatusError):
        return UnavailableError(f"The coordinator's gateway does not answer ({err}).")
    status = err.response.status_code
    text = err.response.text[:MAX_CONTROL_MESSAGE]
    if status in {429, 502, 503, 504}:
        return UnavailableError(f"The coordinator is not ready ({status}).")
    try:
        flower = FlowerError.from_json(text)
    except RecursionError:  # JSON that is nested too deep to read
        flower = None
    if flower is not None:
        if flower.code == NODE_ACTIVATION_FAILED:
            return RefusedError(
                "The SuperLink does not let this node in: it is unknown there, or it was online a "
                "moment ago.",
                code="not-activated",
            )
        # A run of Flower's that has ended, mostly: the next one comes when the coordinator is back.
        return UnavailableError(f"The SuperLink said no: {flower.message}", code="superlink-no")
    try:
        refusal = parse(Refusal, text.encode("utf-8"))
    except ProtocolError:
        if status == 401:  # Flower signs the time; it may be 5 s ahead or 5 minutes behind
            return UnavailableError(
                "The SuperLink does not accept this node's signature: set this machine's clock.",
                code=NOT_AUTHENTICATED,
            )
        return UnavailableError(f"The gateway said no ({status}).", code="gateway-no")
    if refusal.code == "banned":
        return RefusedError(refusal.sentence, code="banned")
    return UnavailableError(f"The gateway said no: {refusal.sentence}", code=refusal.code)
