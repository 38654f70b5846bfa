"""All that the server touches of Flower's internals, in one file (ADR 2).

Public Flower API (``ServerApp``, ``Grid``, ``Message``) is used elsewhere, too. What is here has no
promise from Flower to stay: the Control API's client, the bundle builder, the SuperLink's command
line. ``tests/server/test_flower_contract.py`` says what broke when Flower changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from talkoot.protocol.control import (
    MESSAGE_TYPE,
    TASK_KEY,
    TASK_RECORD,
    VERDICT_KEY,
    VERDICT_RECORD,
)
from talkoot.protocol.errors import RefusedError, UnavailableError

if TYPE_CHECKING:
    from flwr.serverapp import Grid

log = logging.getLogger(__name__)

MAX_PARTS: Final = 8
"""Of a reply; ours have three: the message, its records, and the one with the verdict."""
REPLY_SECONDS: Final = 15.0
"""The parts of a reply follow its announcement at once, or do not come."""

_BUNDLE = b"""\
[project]
name = "talkoot-network"
version = "1.0.0"
description = "Names the installed ServerApp and ClientApp, and carries no code."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "talkoot"

[tool.flwr.app.components]
serverapp = "talkoot.server.app:app"
clientapp = "talkoot.client.app:app"

[tool.flwr.app.config]
"""


def quiet_environment(base: Mapping[str, str]) -> dict[str, str]:
    """``base`` with Flower's telemetry and update checks off, unless the operator set them."""
    env = dict(base)
    env.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    env.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    return env


def superlink_environment(base: Mapping[str, str], flwr_home: Path) -> dict[str, str]:
    """The SuperLink's environment: its helpers must be on PATH, its state below ours."""
    env = quiet_environment(base)
    env["FLWR_HOME"] = str(flwr_home)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    # SuperExec looks for a run to start this often: what a restart waits for at the most.
    env.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2")
    env["PYTHONUNBUFFERED"] = "1"
    return env


def drop_damaged_bundles(flwr_home: Path) -> None:
    """Remove what Flower has unpacked of our bundle and is not whole, so that it unpacks it anew.

    It does not flush these files, and takes a directory that is there for whole: after a power cut
    the run would end with "Invalid pyproject.toml" for ever.
    """
    for app in (flwr_home / "apps").glob("*"):
        try:
            whole = (app / "pyproject.toml").read_bytes() == _BUNDLE
        except OSError:
            whole = False
        if not whole:
            shutil.rmtree(app, ignore_errors=True)


def superlink_command(
    *, port: int, database: Path, certificate: Path, key: Path, ca: Path
) -> list[str]:
    """The SuperLink: loopback only, nodes authenticated, durable database, nothing installed."""
    return [
        str(Path(sys.executable).parent / "flower-superlink"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--ssl-certfile",
        str(certificate),
        "--ssl-keyfile",
        str(key),
        "--ssl-ca-certfile",
        str(ca),
        "--enable-supernode-auth",
        "--database",
        str(database),
        "--disable-runtime-dependency-installation",
        # The supervisor runs SuperExec as a part of its own: one that the SuperLink starts meets a
        # port that is not open yet, and backs off for up to half a minute.
        "--isolation",
        "process",
    ]


def run_superexec(port: int, ca: Path) -> None:
    """Be Flower's SuperExec, which starts our ServerApp's process when a run is submitted.

    Its imports, which take a second or two, run while the SuperLink starts.
    """
    from flwr.supercore.cli import flower_superexec

    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    address = f"127.0.0.1:{port}"
    sys.argv[1:] = ["--runtime-api-address", address, "--root-certificates", str(ca)]
    flower_superexec()


class ControlApi:
    """The SuperLink's Control API, reachable on loopback only.

    Args:
        port: the SuperLink's port on 127.0.0.1.
        ca_pem: trusted for the SuperLink's certificate.
    """

    def __init__(self, port: int, ca_pem: bytes) -> None:
        from flwr.supercore.control import ControlHttpClient

        self._client: Any = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}", False, ca_pem, interceptors=[]
        )

    def _call(self, name: str, request: Any) -> Any:
        import httpx

        try:
            return getattr(self._client, name)(request)
        except httpx.HTTPStatusError as err:
            status = err.response.status_code
            text = err.response.text[:300]
            if status in {502, 503, 504}:
                raise UnavailableError(f"The SuperLink is not ready ({status}).") from err
            raise RefusedError(
                f"The SuperLink refused {name} ({status}): {text}", code="superlink-refused"
            ) from err
        except httpx.HTTPError as err:
            raise UnavailableError(f"The SuperLink does not answer: {err}.") from err

    def register_node(self, public_key_pem: bytes, name: str) -> int | None:
        """Let a key take part; returns Flower's node id, or None if the key is known already."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        try:
            reply = self._call(
                "RegisterNode", RegisterNodeRequest(public_key=public_key_pem, name=name)
            )
        except RefusedError as err:
            if "in use" in err.sentence:
                return None
            raise
        return int(reply.node_id)

    def registered_nodes(self) -> dict[bytes, int]:
        """Flower's node ids of all registered keys."""
        from flwr.proto.control_pb2 import ListNodesRequest

        return {
            bytes(node.public_key): int(node.node_id)
            for node in self._call("ListNodes", ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        }

    def start_run(self) -> int:
        """Submit the bundle that names our ServerApp; returns Flower's run id."""
        from flwr.cli.build import build_fab_from_files
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        content, _ = build_fab_from_files({"pyproject.toml": _BUNDLE})
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        reply = self._call("StartRun", StartRunRequest(fab=fab_to_proto(fab)))
        if not reply.HasField("run_id"):
            raise RefusedError("The SuperLink did not start the run.", code="superlink-refused")
        return int(reply.run_id)

    def runs(self) -> dict[int, tuple[str, str, str]]:
        """Flower's runs: id → (status, sub-status, details)."""
        from flwr.proto.control_pb2 import ListRunsRequest

        reply = self._call("ListRuns", ListRunsRequest())
        return {
            int(run_id): (run.status.status, run.status.sub_status, run.status.details)
            for run_id, run in reply.run_dict.items()
        }

    def stop_run(self, run_id: int) -> None:
        """Stop a run; harmless when it has ended."""
        from flwr.proto.control_pb2 import StopRunRequest

        try:
            self._call("StopRun", StopRunRequest(run_id=run_id))
        except RefusedError as err:
            if "finished" not in err.sentence.lower():
                raise


class GridControl:
    """The round loop's way to the nodes: small messages over Flower's Grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting: dict[str, int] = {}
        """Flower's node ids by the messages that they have not answered."""

    def online(self) -> frozenset[int]:
        """Flower ids of the nodes whose heartbeat is fresh."""
        return frozenset(int(node_id) for node_id in self._grid.get_node_ids())

    def send(self, tasks: Mapping[int, str], *, round_number: int, ttl_seconds: float) -> None:
        """Send each node its signed task (JSON)."""
        from flwr.app import ConfigRecord, Message, RecordDict

        messages = [
            Message(
                RecordDict({TASK_RECORD: ConfigRecord({TASK_KEY: signed})}),
                dst_node_id=flower_node_id,
                message_type=MESSAGE_TYPE,
                ttl=ttl_seconds,
                group_id=str(round_number),
            )
            for flower_node_id, signed in tasks.items()
        ]
        if not messages:
            return
        pushed = frozenset(self._grid.push_messages(messages))
        for message in messages:
            if message.metadata.message_id in pushed:
                self._waiting[message.metadata.message_id] = int(message.metadata.dst_node_id)

    def replies(self) -> Iterable[tuple[int, str | None]]:
        """What came back since the last call: (Flower node id, verdict JSON or None on an error).

        A reply is news, never truth: what counts is what the ledger accepted.
        """
        if not self._waiting:
            return []
        out = []
        for reply in self._grid.pull_messages(sorted(self._waiting)):
            node_id = self._answers(reply.metadata)
            if node_id is not None:
                out.append((node_id, _verdict_of(reply)))
        return out

    def _answers(self, metadata: Any) -> int | None:
        """Whose reply a message is, which then is waited for no longer.

        None when it is nobody's. For a node that is away Flower answers in its own name, with an
        error: its lease is kept all the same, since it may be back within a minute.
        """
        node_id = self._waiting.pop(metadata.reply_to_message_id, None)
        return node_id if node_id == metadata.src_node_id else None

    def forget(self) -> None:
        """Stop waiting for the replies of an earlier round."""
        self._waiting.clear()


@dataclass
class _Arriving:
    """A reply that was announced, and whose parts the SuperLink may not have yet."""

    node_id: int
    message_id: str
    missing: list[str]
    parts: dict[str, bytes]
    until: float
    """By the clock of the control."""


class WaryGridControl(GridControl):
    """:class:`GridControl` over a SuperLink whose nodes are strangers: it waits for nobody.

    A node announces its reply and sends the parts of it afterwards. The Grid's own
    ``pull_messages`` waits up to two hours for parts that do not come, because their sender was
    banned meanwhile, died or means harm, and the round loop with it. Here each part is asked for
    once a call, and a reply that is not whole after :data:`REPLY_SECONDS` counts as an error, as
    does one that has more parts than any of ours or cannot be read.

    Args:
        grid: Flower's ``HttpGrid``.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, grid: Grid, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(grid)
        self._http: Any = grid
        self._clock = clock
        self._arriving: list[_Arriving] = []

    def replies(self) -> Iterable[tuple[int, str | None]]:
        """See :meth:`GridControl.replies`."""
        if self._waiting:
            self._arriving += self._announced()
        out: list[tuple[int, str | None]] = []
        still = []
        for reply in self._arriving:
            if len(reply.missing) + len(reply.parts) > MAX_PARTS:
                out.append((reply.node_id, None))
            elif self._pull(reply):
                out.append((reply.node_id, _read(reply)))
            elif self._clock() < reply.until:
                still.append(reply)
                continue
            else:
                out.append((reply.node_id, None))
            self._confirm(reply)
        self._arriving = still
        return out

    def forget(self) -> None:
        """Stop waiting for the replies of an earlier round."""
        super().forget()
        for reply in self._arriving:
            self._confirm(reply)
        self._arriving.clear()

    def _announced(self) -> list[_Arriving]:
        """The replies that are on their way since the last call; of their parts one over the cap
        is noted at most."""
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        asked = PullAppMessagesRequest(message_ids=sorted(self._waiting))
        found = self._http._runtime_client.PullMessages(asked)
        until = self._clock() + REPLY_SECONDS
        replies = []
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            node_id = self._answers(message.metadata)
            if node_id is not None:
                parts = islice(iterate_object_tree(tree), MAX_PARTS + 1)
                ids = [part.object_id for part in parts]
                replies.append(_Arriving(node_id, message.metadata.message_id, ids, {}, until))
        return replies

    def _pull(self, reply: _Arriving) -> bool:
        """Ask once for what is missing of a reply; whether it is whole."""
        from flwr.proto.message_pb2 import PullObjectRequest

        for part in list(reply.missing):
            asked = PullObjectRequest(
                node=self._http.node, run_id=self._http.run.run_id, object_id=part
            )
            found = self._http._runtime_client.PullObject(asked)
            if not found.object_available:
                return False
            reply.parts[part] = found.object_content
            reply.missing.remove(part)
        return True

    def _confirm(self, reply: _Arriving) -> None:
        """Let the SuperLink forget it."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

        self._http._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._http.node,
                run_id=self._http.run.run_id,
                message_object_id=reply.message_id,
            )
        )


def _read(reply: _Arriving) -> str | None:
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    try:
        message = inflate_object_from_contents(reply.message_id, reply.parts)
        return _verdict_of(message) if isinstance(message, Message) else None
    except Exception as err:  # noqa: BLE001 - flwr meets a stranger's nonsense with any error
        log.warning("Flower's node %d sent a broken reply (%s)", reply.node_id, err)
        return None


def _verdict_of(reply: Any) -> str | None:
    if reply.has_error():
        return None
    record = reply.content.config_records.get(VERDICT_RECORD)
    verdict = record.get(VERDICT_KEY) if record is not None else None
    return verdict if isinstance(verdict, str) else None
