"""The data plane's server: artifacts by digest over gRPC with mTLS, resumable in both directions.

This is a thin shell. Who may do what, and what a message means, is the :class:`Backend`'s; here are
identity, caps, streams and the mapping of errors. The peer is the node that its certificate names,
whatever a message says.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast

import grpc

from talkoot.protocol import faults, limits
from talkoot.protocol.ahead import read_ahead
from talkoot.protocol.artifacts import Slice, Source
from talkoot.protocol.chunks import fetch_chunk
from talkoot.protocol.errors import ProtocolError, RefusedError, StateError, UnavailableError
from talkoot.protocol.flow import ChunkPace
from talkoot.protocol.identity import load_certificate
from talkoot.protocol.ingest import Ingest, check_digest, check_size, received_bytes, trim_parts
from talkoot.protocol.messages import (
    Message,
    NodeReport,
    NodeReportReply,
    RenewReply,
    Signed,
    Verdict,
    canonical_bytes,
    parse,
)
from talkoot.protocol.pieces import Pieces
from talkoot.protocol.refusals import CERTIFICATE_EXPIRED, to_status
from talkoot.protocol.wire.transfer_pb2 import (
    Envelope,
    FetchRequest,
    PieceList,
    PushChunk,
    PushState,
    PushStatusRequest,
)
from talkoot.protocol.wire.transfer_pb2_grpc import (
    TransferServicer as WireServicer,
)
from talkoot.protocol.wire.transfer_pb2_grpc import (
    add_TransferServicer_to_server,
)
from talkoot.server.calls import Calls
from talkoot.server.door import PortGuard
from talkoot.server.first_word import FirstWord, SilentCalls
from talkoot.server.streams import FetchAsBytes, StreamTable

log = logging.getLogger(__name__)

MAX_STREAMS_PER_NODE: Final = 4
MAX_PARTS_PER_NODE: Final = 4
"""Unfinished uploads kept for one node; the oldest goes when another begins."""
STALL_SECONDS: Final = 120.0
PATIENCE_SECONDS: Final = 5.0
CALLS_PER_NODE: Final = 8
"""Calls of one node that are answered at once, transfers not counted."""
STREAMS: Final = ("Fetch", "Push")
"""Methods that hold a stream; the others are short calls."""
QUOTAS: Final[Mapping[str, tuple[float, float]]] = {
    "Fetch": (1200, 100.0),
    "Push": (60, 2.0),
    "Pieces": (300, 30.0),
    "PushStatus": (100, 20.0),
    "Submit": (20, 1.0),
    "Prove": (6, 0.05),
    "Challenge": (6, 0.05),
    "Report": (60, 10.0),
    "GetRun": (20, 1.0),
    "GetTask": (60, 5.0),
    "GetMirrors": (20, 1.0),
    "Renew": (10, 0.2),
}
"""How often one node may call: so many at once, then so many a second. A proof takes the
coordinator seconds to check, so it is the rarest. A lease has up to 512 blocks to fetch."""
ASK_AGAIN_SECONDS: Final = 30.0
"""An upload whose lease was closed is for nothing: so often it is asked whether it was."""
WATCH_SECONDS: Final = 0.5
"""How often open calls are held against the list of the banned."""

_NODE_ID = re.compile(r"[0-9a-f]{16}")
_LEASE_ID = re.compile(r"[0-9a-f]{32}")

OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", limits.MAX_TRANSFER_MESSAGE),
    ("grpc.max_send_message_length", limits.MAX_TRANSFER_MESSAGE),
    ("grpc.max_metadata_size", 16 * limits.KIB),
    # Nothing of ours compresses on this layer, so nothing of a peer's is decompressed. (grpcio
    # 1.85 also caps what a message inflates to: 512 MiB of zeros left the server at 74 MiB.)
    ("grpc.per_message_decompression", 0),
    ("grpc.max_concurrent_streams", 16),  # of one connection
    ("grpc.so_reuseport", 0),  # a second server on this port must fail, not share it
    # A node behind a dead NAT entry is noticed within 6 minutes; not sooner, because the answer of
    # one on a slow line may have to queue behind megabytes. Nothing ends a connection for its age.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 300_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10 * 60_000),
)
FIRST_WORD_SECONDS: Final = 60.0
"""A call whose request has not come by then is ended. gRPC lets it wait in a worker thread, so that
a peer which opens calls and says nothing would hold them all."""
MAX_SILENT_PER_NODE: Final = 8
"""Calls of one node that may wait for their request at once."""
SILENT_SHARE: Final = 8
"""One of so many worker threads may wait for requests, half of those that transfers leave: or
sixteen calls of two nodes could hold them all."""


class Backend(Protocol):
    """What stands behind the data plane. Called from many threads at once.

    Any method may raise a :class:`~talkoot.protocol.errors.TalkootError`, which reaches the peer
    with its code and sentence (see ``talkoot.protocol.refusals`` for what stays inside).
    """

    def authorize(self, node_id: str) -> Verdict:
        """Whether this node may use the data plane at all; asked on every call."""
        ...

    def banned_nodes(self) -> frozenset[str]:
        """Ids of the nodes whose open calls are to be cut; asked twice a second."""
        ...

    def source(self) -> Source:
        """What may be fetched."""
        ...

    def may_push(self, node_id: str, lease_id: str, digest: str, size: int) -> Verdict:
        """Whether to take this upload (size in bytes); asked before a byte of it is taken."""
        ...

    def incoming_root(self) -> Path:
        """The directory of unfinished uploads; each node's are in its own folder there."""
        ...

    def pushed(self, node_id: str, lease_id: str, digest: str, path: Path) -> None:
        """A whole, verified file has arrived at ``path``: move it from there."""
        ...

    def pieces(self, digest: str, found: Slice) -> Pieces:
        """The piece list of an artifact that :meth:`source` knows."""
        ...

    def has_pushed(self, node_id: str, lease_id: str, digest: str) -> bool:
        """Whether ``pushed`` was called for this and has kept the file."""
        ...

    def submit(self, node_id: str, signed: Signed) -> Verdict:
        """Judge a signed Contribution."""
        ...

    def prove(self, node_id: str, signed: Signed) -> Verdict:
        """Judge a signed Proof."""
        ...

    def challenge(self, node_id: str) -> bytes:
        """What the node's next proof must be made for; at most ``limits.MAX_CONTROL_MESSAGE``."""
        ...

    def report(self, node_id: str, report: NodeReport) -> NodeReportReply:
        """Take a heartbeat."""
        ...

    def run_spec(self, node_id: str) -> Signed:
        """The signed RunSpec."""
        ...

    def task(self, node_id: str) -> Signed | None:
        """The signed RoundTask that is open for this node, or None."""
        ...

    def mirrors(self, node_id: str) -> Signed:
        """The signed MirrorList."""
        ...

    def renew(self, signed: Signed, peer_node_id: str | None) -> RenewReply:
        """A new certificate for this node, which signed a RenewRequest."""
        ...


class _Claim(NamedTuple):
    """What an upload says it is."""

    lease_id: str
    digest: str
    size: int  # bytes


class TransferServicer(WireServicer):
    """The service over a :class:`Backend`. ``max_streams``: transfers open at once."""

    def __init__(
        self, backend: Backend, *, max_streams: int, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._backend = backend
        self._calls = Calls(QUOTAS, per_node=CALLS_PER_NODE, now=time.monotonic, streams=STREAMS)
        self._streams = StreamTable(
            total=max_streams,
            per_node=MAX_STREAMS_PER_NODE,
            stall_seconds=stall_seconds,
            patience_seconds=PATIENCE_SECONDS,
            now=time.monotonic,
        )

    # Bulk ----------------------------------------------------------------------

    def Fetch(  # type: ignore[override]  # noqa: N802 - serialized already (FetchAsBytes)
        self, request: FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Stream an artifact from an offset to its end, as serialized ``FetchChunk``."""
        with self._answering(context, "Fetch") as node_id:
            found = self._backend.source().lookup(check_digest(request.digest))
            if found is None:
                raise _unknown()
            if request.offset > found.length:
                raise ProtocolError(
                    f"This artifact ends at {found.length}, before offset {request.offset}.",
                    code="wrong-offset",
                )
            stream = self._streams.admit(node_id, context.cancel)
            # gRPC drops the generator of a broken call without saying when.
            context.add_callback(stream.release)
            with stream:
                for data in _read(found, request.offset):
                    yield fetch_chunk(data, found.length)
                    stream.touch(len(data))

    def Pieces(  # noqa: N802
        self, request: FetchRequest, context: grpc.ServicerContext
    ) -> PieceList:
        """The digests of an artifact's pieces."""
        with self._answering(context, "Pieces"):
            digest = check_digest(request.digest)
            found = self._backend.source().lookup(digest)
            if found is None:
                raise _unknown()
            pieces = self._backend.pieces(digest, found)
            return PieceList(total_size=pieces.size, digests=pieces.digests)

    def PushStatus(  # noqa: N802
        self, request: PushStatusRequest, context: grpc.ServicerContext
    ) -> PushState:
        """How much of an upload is here."""
        with self._answering(context, "PushStatus") as node_id:
            claim = _claim(request)
            if self._taken(node_id, claim):
                return PushState(offset=claim.size, complete=True)
            incoming = self._backend.incoming_root()
            return PushState(offset=received_bytes(incoming, node_id, claim.digest, claim.size))

    def Push(  # noqa: N802
        self, request_iterator: Iterator[PushChunk], context: grpc.ServicerContext
    ) -> PushState:
        """Receive an upload; verified and delivered when its last byte is here."""
        with self._answering(context, "Push") as node_id:
            with self._streams.admit(node_id, context.cancel) as stream:
                first = next(request_iterator, None)
                if first is None:
                    raise ProtocolError("An upload began without a chunk.", code="malformed")
                claim = _claim(first)
                if self._taken(node_id, claim):
                    return PushState(offset=claim.size, complete=True)
                stream.claim(claim.digest)
                incoming = self._backend.incoming_root()
                trim_parts(incoming, node_id, MAX_PARTS_PER_NODE - 1, spare=claim.digest)
                asked = time.monotonic()
                with Ingest(incoming, node_id, claim.digest, claim.size) as ingest:
                    for chunk in chain([first], read_ahead(request_iterator)):
                        if time.monotonic() - asked > ASK_AGAIN_SECONDS:
                            asked = time.monotonic()
                            self._insist_wanted(node_id, claim)
                        data = chunk.data  # each look at it is a copy
                        _check_chunk(chunk, data, claim)
                        ingest.append(chunk.offset, data)
                        faults.place("push.mid")
                        stream.touch(len(data))
                    if ingest.offset() < claim.size:
                        return PushState(offset=ingest.offset())
                    path = ingest.finish()
                    self._backend.pushed(node_id, claim.lease_id, claim.digest, path)
            return PushState(offset=claim.size, complete=True)

    def _taken(self, node_id: str, claim: _Claim) -> bool:
        """True if it is here already; otherwise the backend must want it."""
        if self._backend.has_pushed(node_id, claim.lease_id, claim.digest):
            return True
        self._insist_wanted(node_id, claim)
        return False

    def _insist_wanted(self, node_id: str, claim: _Claim) -> None:
        _insist(self._backend.may_push(node_id, claim.lease_id, claim.digest, claim.size))

    def open_transfers(self) -> Counter[str]:
        """How many transfers each node has open now."""
        return self._streams.by_node()

    # Messages ----------------------------------------------------------------------

    def Submit(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """A signed Contribution: a Verdict."""
        with self._answering(context, "Submit") as node_id:
            return _envelope(self._backend.submit(node_id, _signed(request, "Contribution")))

    def Prove(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """A signed Proof: a Verdict."""
        with self._answering(context, "Prove") as node_id:
            return _envelope(self._backend.prove(node_id, _signed(request, "Proof")))

    def Challenge(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """What the next proof must be made for."""
        with self._answering(context, "Challenge") as node_id:
            body = self._backend.challenge(node_id)
            if len(body) > limits.MAX_CONTROL_MESSAGE:
                raise ValueError(f"the backend's challenge has {len(body)} bytes")
            return Envelope(body=body)

    def Report(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """A heartbeat."""
        with self._answering(context, "Report") as node_id:
            return _envelope(self._backend.report(node_id, parse(NodeReport, request.body)))

    def GetRun(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """The signed RunSpec."""
        with self._answering(context, "GetRun") as node_id:
            return _envelope(self._backend.run_spec(node_id))

    def GetTask(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """The signed RoundTask that is open for the node."""
        with self._answering(context, "GetTask") as node_id:
            task = self._backend.task(node_id)
            if task is None:
                raise RefusedError("There is no task for this node now.", code="no-task")
            return _envelope(task)

    def GetMirrors(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """The signed MirrorList."""
        with self._answering(context, "GetMirrors") as node_id:
            return _envelope(self._backend.mirrors(node_id))

    def Renew(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:  # noqa: N802
        """A fresh certificate for the caller's own key."""
        with self._answering(context, "Renew") as node_id:
            return _envelope(self._backend.renew(_signed(request, "RenewRequest"), node_id))

    def cut_banned(self) -> None:
        """End what is open for those who are banned."""
        self._calls.end(self._backend.banned_nodes())

    @contextmanager
    def _answering(self, context: grpc.ServicerContext, method: str) -> Iterator[str]:
        """The peer's node id, once authorized; any error inside becomes the call's status."""
        try:
            node_id = peer_node_id(context)
            with self._calls.admit(node_id, method, context.cancel) as call:
                # gRPC drops the generator of a broken call without saying when.
                context.add_callback(call.close)
                _insist(self._backend.authorize(node_id))
                yield node_id
            return
        except grpc.RpcError:
            raise  # the call is over: there is nobody left to tell
        except Exception as err:  # a bug must not tell a peer about our insides
            status, detail = to_status(err)
            if status is grpc.StatusCode.INTERNAL:
                log.error("the data plane failed while answering", exc_info=err)
        context.abort(status, detail)


def peer_node_id(context: grpc.ServicerContext) -> str:
    """The node id in the common name of the peer's verified certificate.

    gRPC shows the first common name of a subject; the CA, which writes the subject, puts one there.

    Raises:
        RefusedError: the certificate does not name a node (code ``no-identity``).
    """
    # The stubs say "bytes"; gRPC gives an iterable of them (grpc.ServicerContext.auth_context).
    auth = cast(Mapping[str, Iterable[bytes]], context.auth_context())
    names = list(auth.get("x509_common_name", ()))
    name = names[0].decode("ascii", "replace") if len(names) == 1 else ""
    if not _NODE_ID.fullmatch(name):
        raise RefusedError(
            "The certificate of this connection names no node: enrol first.", code="no-identity"
        )
    # TLS asks when a connection begins, and one may last longer than its certificate.
    if any(_expires(bytes(pem)) < time.time() for pem in auth.get("x509_pem_cert", ())):
        raise RefusedError(
            "This node's certificate has ended: it has to be renewed.", code=CERTIFICATE_EXPIRED
        )
    return name


@lru_cache(maxsize=4096)
def _expires(pem: bytes) -> float:
    return load_certificate(pem).not_valid_after_utc.timestamp()


def _peer_name(context: grpc.ServicerContext) -> str:
    try:
        return peer_node_id(context)
    except RefusedError:
        return ""


TlsFiles = tuple[bytes, bytes, bytes]
"""PEMs: the server's key, its certificate, and the CAs that clients' certificates may come from."""


class TransferServer:
    """A running data plane.

    Attributes:
        port: that it listens on.
    """

    def __init__(
        self, server: grpc.Server, port: int, servicer: TransferServicer, guard: PortGuard | None
    ) -> None:
        self.port = port
        self._server = server
        self._servicer = servicer
        self._guard = guard
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._run, name="transfer-watch", daemon=True)
        self._watch.start()
        if guard is not None:
            guard.start()

    def open_transfers(self) -> Counter[str]:
        """How many transfers each node has open now."""
        return self._servicer.open_transfers()

    def stop(self, grace_seconds: float | None) -> threading.Event:
        """Take no new calls, and end those that are open after the grace."""
        self._stop.set()
        if self._guard is not None:
            self._guard.stop()
        return self._server.stop(grace_seconds)

    def _run(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
            try:
                self._servicer.cut_banned()
            except Exception:  # the ledger may be busy for a moment: the next look is soon
                log.exception("the list of the banned could not be read")


def serve(
    backend: Backend,
    address: str,
    server_key_pem: bytes,
    server_cert_pem: bytes,
    client_ca_pem: bytes,
    max_workers: int = 64,
    first_word_seconds: float = FIRST_WORD_SECONDS,
    *,
    reload: Callable[[], TlsFiles | None] | None = None,
    max_connections: int = 8192,
    max_connections_per_address: int | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> TransferServer:
    """Start serving on ``address`` (``host:port``); stop it with ``.stop(grace_seconds)``.

    A quarter of the worker threads is kept for short calls, whatever the transfers do. Clients
    must show a certificate that ``client_ca_pem`` signed. A call that says nothing for
    ``first_word_seconds`` is ended.

    Args:
        reload: asked at every handshake for other TLS files; None means the same as before.
        max_connections: of everybody together.
        max_connections_per_address: of one address (IPv6: of one /64); None for no cap.
        stall_seconds: a transfer that moved next to nothing for so long loses its place to who
            needs it.

    Raises:
        StateError: the address is in use, or key and certificate are unusable.
    """
    spare = max(1, max_workers // 4)
    servicer = TransferServicer(
        backend, max_streams=max(1, max_workers - spare), stall_seconds=stall_seconds
    )
    per_node = min(MAX_SILENT_PER_NODE, spare)
    silent = SilentCalls(
        first_word_seconds,
        per_node,
        time.monotonic,
        total=max(per_node, max_workers // SILENT_SHARE),
    )
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers, thread_name_prefix="transfer"),
        options=(*OPTIONS, ("grpc.max_allowed_incoming_connections", max_connections)),
        maximum_concurrent_rpcs=4 * max_workers,
        interceptors=[FirstWord(silent, _peer_name), FetchAsBytes()],
    )
    add_TransferServicer_to_server(servicer, server)

    def configuration(files: TlsFiles) -> Any:
        key, certificate, authorities = files
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)

    def fetch() -> Any:
        files = reload() if reload is not None else None
        return None if files is None else configuration(files)

    credentials = grpc.dynamic_ssl_server_credentials(
        configuration((server_key_pem, server_cert_pem, client_ca_pem)),
        fetch,
        require_client_authentication=True,
    )
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as err:
        raise StateError(
            f"The data plane cannot listen on {address}: stop what uses that address or choose "
            "another, and check the server's key and certificate.",
            code="address-in-use",
        ) from err
    server.start()
    guard = None
    if max_connections_per_address is not None:
        guard = PortGuard(port, max_connections_per_address)
    return TransferServer(server, port, servicer, guard)


def _read(found: Slice, offset: int) -> Iterator[bytes]:
    """The artifact from ``offset`` on, in chunks; one empty chunk if there is nothing left."""
    try:
        file = found.path.open("rb", buffering=0)
    except FileNotFoundError as err:
        raise _unknown() from err
    with file:
        file.seek(found.offset + offset)
        left = found.length - offset
        if left == 0:
            yield b""
        pace = ChunkPace(time.monotonic())
        while left:
            data = file.read(min(left, pace.size(time.monotonic())))
            if not data:
                raise UnavailableError("The artifact is shorter than it was: try again later.")
            left -= len(data)
            yield data
            pace.took(len(data))


def _claim(request: PushStatusRequest | PushChunk) -> _Claim:
    if not _LEASE_ID.fullmatch(request.lease_id):
        raise ProtocolError("A lease id is 32 lower-case hexadecimal digits.", code="malformed")
    return _Claim(request.lease_id, check_digest(request.digest), check_size(request.size))


def _check_chunk(chunk: PushChunk, data: bytes, claim: _Claim) -> None:
    if len(data) > limits.TRANSFER_CHUNK:
        raise ProtocolError(
            f"A chunk of {len(data)} bytes is over the cap of {limits.TRANSFER_CHUNK}.",
            code="too-large",
        )
    repeated = (
        chunk.lease_id or claim.lease_id,
        chunk.digest or claim.digest,
        chunk.size or claim.size,
    )
    if repeated != claim:
        raise ProtocolError("An upload changed its name on the way.", code="malformed")


def _signed(request: Envelope, kind: str) -> Signed:
    signed = parse(Signed, request.body)
    if signed.kind != kind:
        raise ProtocolError(f"A signed {kind} is wanted here.", code="wrong-kind")
    return signed


def _envelope(message: Message) -> Envelope:
    body = canonical_bytes(message)
    if len(body) > limits.MAX_CONTROL_MESSAGE:
        raise ValueError(f"the answer {type(message).__name__} has {len(body)} bytes")
    return Envelope(body=body)


def _insist(verdict: Verdict) -> None:
    if not verdict.accepted:
        raise RefusedError(verdict.sentence, code=verdict.code)


def _unknown() -> RefusedError:
    return RefusedError(
        "The coordinator does not offer this artifact (any more): ask for the current version.",
        code="unknown-artifact",
    )
