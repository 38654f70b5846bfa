"""A data plane in processes of its own, beside raw streams over the same line: what transfers are
measured with.

``python -m bench.plane serve DIR`` serves, until its standard input ends, the real transfer service
(mTLS, real certificates, a store on disk), a gRPC service that does nothing but stream the same
chunks over the same mTLS, and plain TCP. ``python -m bench.plane run DIR HOST WHAT …`` is one
client that moves bytes once and says how long it took. Both can run behind any command prefix, such
as ``ip netns exec NAME``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import grpc
from tests.data_plane import LEASE, NODE, Authority, Shelf

from talkoot.client.pace import Meter, TransferOptions
from talkoot.client.transfer import TransferClient
from talkoot.protocol import limits
from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.messages import ArtifactRef
from talkoot.protocol.wire.transfer_pb2 import (
    FetchChunk,
    FetchRequest,
    PushChunk,
    PushState,
)
from talkoot.server.transfer import serve

ROOT: Final = Path(__file__).resolve().parent.parent
SERVER_NAME: Final = "talkoot-coordinator"
RAW: Final = "/bench.Raw/"
WAIT_SECONDS: Final = 1800.0
SMALL: Final = 32 * limits.KIB
KINDS: Final = ("fetch", "fetch-on", "push", "grpc-down", "grpc-up", "tcp-down", "tcp-up")


def make_identities(root: Path) -> None:
    """Keys and certificates of a CA, the server and one node, as PEM files in ``root``."""
    authority = Authority()
    root.mkdir(parents=True, exist_ok=True)
    (root / "ca.pem").write_bytes(authority.pem)
    for name, (key, certificate) in {
        "server": authority.issue(SERVER_NAME, san=SERVER_NAME),
        "node": authority.issue(NODE),
    }.items():
        (root / f"{name}.key").write_bytes(key)
        (root / f"{name}.pem").write_bytes(certificate)


def _identity(root: Path, name: str) -> tuple[bytes, bytes, bytes]:
    """(CA, key, certificate) as PEM."""
    return tuple((root / file).read_bytes() for file in ("ca.pem", f"{name}.key", f"{name}.pem"))  # type: ignore[return-value]


def make_artifact(root: Path, size: int) -> ArtifactRef:
    """An artifact of noise in the server's store; the same file serves pushes."""
    path = root / "artifact"
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        left = size
        while left:
            data = os.urandom(min(left, limits.MIB))
            hasher.update(data)
            file.write(data)
            left -= len(data)
    ref = ArtifactRef(digest=hasher.hexdigest(), size_bytes=size)
    store = ArtifactStore(root / "server")
    copy = root / "copy"
    shutil.copyfile(path, copy)
    store.put_file(copy, verified=ref.digest)
    (root / "ref.json").write_text(json.dumps([ref.digest, ref.size_bytes]), encoding="utf-8")
    return ref


def _ref(root: Path) -> ArtifactRef:
    digest, size = json.loads((root / "ref.json").read_text(encoding="utf-8"))
    return ArtifactRef(digest=digest, size_bytes=size)


# The server's side ----------------------------------------------------------------------


class _Forgetful(Shelf):
    """Takes every upload, and forgets it: the next one is pushed in full again."""

    def pushed(self, node_id: str, lease_id: str, digest: str, path: Path) -> None:
        path.unlink()

    def has_pushed(self, node_id: str, lease_id: str, digest: str) -> bool:
        return False


def _raw_grpc(root: Path, host: str) -> tuple[grpc.Server, int]:
    """A gRPC service that streams chunks from and to nowhere."""
    ca, key, certificate = _identity(root, "server")

    def down(request: FetchRequest, context: grpc.ServicerContext) -> Iterator[FetchChunk]:
        data = os.urandom(limits.TRANSFER_CHUNK)
        for begin in range(0, request.offset, limits.TRANSFER_CHUNK):
            yield FetchChunk(data=data[: request.offset - begin], total_size=request.offset)

    def up(chunks: Iterator[PushChunk], context: grpc.ServicerContext) -> PushState:
        return PushState(offset=sum(len(chunk.data) for chunk in chunks), complete=True)

    server = grpc.server(
        futures.ThreadPoolExecutor(4),
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Down": grpc.unary_stream_rpc_method_handler(
            down, FetchRequest.FromString, FetchChunk.SerializeToString
        ),
        "Up": grpc.stream_unary_rpc_method_handler(
            up, PushChunk.FromString, PushState.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench.Raw", handlers)])
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    port = server.add_secure_port(f"{host}:0", credentials)
    server.start()
    return server, port


def _raw_tcp(host: str) -> int:
    """Plain TCP: eight bytes say how much comes down, or, negative, how much goes up."""
    listener = socket.create_server((host, 0))

    def one(peer: socket.socket) -> None:
        with peer:
            asked = int.from_bytes(_exactly(peer, 8), "big", signed=True)
            if asked >= 0:
                data = os.urandom(limits.TRANSFER_CHUNK)
                for begin in range(0, asked, len(data)):
                    peer.sendall(data[: asked - begin])
                return
            _swallow(peer, -asked)
            peer.sendall(b"!")

    def accept() -> None:
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            raise ConnectionError("the peer hung up")
        data += more
    return data


def _swallow(peer: socket.socket, size: int) -> None:
    while size:
        got = len(peer.recv(min(size, limits.MIB)))
        if not got:
            raise ConnectionError("the peer hung up")
        size -= got


def _serve(root: Path, host: str) -> None:
    ca, key, certificate = _identity(root, "server")
    shelf = _Forgetful(ArtifactStore(root / "server"))
    server = serve(shelf, f"{host}:0", key, certificate, ca, max_workers=16)
    raw, raw_port = _raw_grpc(root, host)
    ports = {"transfer": server.port, "grpc": raw_port, "tcp": _raw_tcp(host)}
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
    server.stop(0)
    raw.stop(0)


# The client's side ----------------------------------------------------------------------


def client_of(
    root: Path, address: str, meter: Meter, options: TransferOptions | None = None
) -> TransferClient:
    """The real client with the node's certificate."""
    ca, key, certificate = _identity(root, "node")
    return TransferClient(address, ca, certificate, key, meter=meter, options=options)


def _move(root: Path, host: str, ports: dict[str, int], what: str, size: int) -> float:
    """Move bytes once; wall seconds, connection included."""
    work: Callable[[], None]
    if what in {"fetch", "fetch-on", "push"}:
        ref, own = _ref(root), root / "client"
        if what != "fetch-on":  # which goes on where the one before it ended
            shutil.rmtree(own, ignore_errors=True)
        store = ArtifactStore(own)

        def work() -> None:
            with client_of(root, f"{host}:{ports['transfer']}", Meter()) as client:
                if what != "push":
                    client.fetch(ref, store)
                else:
                    client.push(LEASE, ref, root / "artifact")

    elif what.startswith("grpc"):

        def work() -> None:
            _grpc_once(root, f"{host}:{ports['grpc']}", size, down=what == "grpc-down")

    else:

        def work() -> None:
            _tcp_once((host, ports["tcp"]), size, down=what == "tcp-down")

    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _grpc_once(root: Path, address: str, size: int, *, down: bool) -> None:
    ca, key, certificate = _identity(root, "node")
    options = [
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.max_receive_message_length", -1),
    ]
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(address, credentials, options=options) as channel:
        if down:
            fetch = channel.unary_stream(
                f"{RAW}Down", FetchRequest.SerializeToString, FetchChunk.FromString
            )
            got = sum(len(chunk.data) for chunk in fetch(FetchRequest(offset=size)))
        else:
            data = os.urandom(limits.TRANSFER_CHUNK)
            chunks = (
                PushChunk(offset=begin, data=data[: size - begin])
                for begin in range(0, size, len(data))
            )
            push = channel.stream_unary(
                f"{RAW}Up", PushChunk.SerializeToString, PushState.FromString
            )
            got = push(chunks).offset
    if got != size:
        raise RuntimeError(f"{got} of {size} bytes came")


def _tcp_once(address: tuple[str, int], size: int, *, down: bool) -> None:
    with socket.create_connection(address) as peer:
        peer.sendall((size if down else -size).to_bytes(8, "big", signed=True))
        if down:
            _swallow(peer, size)
            return
        data = os.urandom(limits.TRANSFER_CHUNK)
        for begin in range(0, size, len(data)):
            peer.sendall(data[: size - begin])
        _exactly(peer, 1)


# Both, from the outside ------------------------------------------------------------------


@dataclass
class Plane:
    """A serving process, and clients that are started one after another.

    Args:
        root: where keys, the artifact and both stores are; made here.
        size: bytes of the artifact.
        host: the server's address.
        server_prefix: put before the server's command, such as ``ip netns exec far``.
        client_prefix: put before each client's.
    """

    root: Path
    size: int
    host: str = "127.0.0.1"
    server_prefix: Sequence[str] = ()
    client_prefix: Sequence[str] = ()
    ports: dict[str, int] = field(default_factory=dict)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Plane:
        make_identities(self.root)
        self.ref = make_artifact(self.root, self.size)
        command = [sys.executable, "-m", "bench.plane", "serve", str(self.root), self.host]
        self._process = subprocess.Popen(
            [*self.server_prefix, *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.ports = json.loads(self._process.stdout.readline())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.communicate()  # its input ends, and so does it

    @property
    def server_pid(self) -> int:
        """Of the serving process (of its prefix, if it has one)."""
        assert self._process is not None
        return self._process.pid

    def seconds(self, what: str) -> float:
        """One transfer of :data:`KINDS` by a client process of its own: its wall seconds."""
        command = [sys.executable, "-m", "bench.plane", "run", str(self.root), self.host, what]
        done = subprocess.run(
            [*self.client_prefix, *command, json.dumps(self.ports), str(self.size)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=WAIT_SECONDS,
            check=True,
        )
        return float(json.loads(done.stdout)["seconds"])


def main() -> None:
    """A process of :class:`Plane`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve")
    server.add_argument("root", type=Path)
    server.add_argument("host")
    run: Any = commands.add_parser("run")
    run.add_argument("root", type=Path)
    run.add_argument("host")
    run.add_argument("what", choices=KINDS)
    run.add_argument("ports", type=json.loads)
    run.add_argument("size", type=int)
    args = parser.parse_args()
    if args.command == "serve":
        _serve(args.root, args.host)
        return
    print(json.dumps({"seconds": _move(args.root, args.host, args.ports, args.what, args.size)}))


if __name__ == "__main__":
    main()
