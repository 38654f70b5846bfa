"""The data plane's client: fetch and push artifacts over any line that works now and then.

A dropped connection costs the bytes in flight and no more. What arrives is verified against its
digest before it has a name. Trust comes from the pinned CA, not from the address. Progress decides
when a transfer is given up, never the clock: a slow line that moves is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import grpc

from talkoot.client.mirrors import MirrorFetcher, MirrorLimits
from talkoot.client.pace import (
    Meter,
    Patience,
    RateLimit,
    Stopped,
    StopSignal,
    TransferOptions,
    Watch,
    wait,
)
from talkoot.protocol import limits
from talkoot.protocol.ahead import read_ahead
from talkoot.protocol.artifacts import ArtifactStore, sha256_file
from talkoot.protocol.chunks import PUSH, as_it_is, push_chunk
from talkoot.protocol.errors import (
    IntegrityError,
    ProtocolError,
    RefusedError,
    StateError,
    TalkootError,
    UnavailableError,
)
from talkoot.protocol.files import explain_os_error
from talkoot.protocol.flow import SMALLEST, ChunkPace
from talkoot.protocol.ingest import BAD_PIECE, Ingest
from talkoot.protocol.messages import (
    ArtifactRef,
    NodeReport,
    NodeReportReply,
    RenewReply,
    Signed,
    Verdict,
    canonical_bytes,
    parse,
)
from talkoot.protocol.pieces import Pieces
from talkoot.protocol.refusals import from_status
from talkoot.protocol.wire.transfer_pb2 import (
    Envelope,
    FetchRequest,
    PushChunk,
    PushState,
    PushStatusRequest,
)
from talkoot.protocol.wire.transfer_pb2_grpc import TransferStub

__all__ = ["Meter", "Stopped", "TransferClient", "TransferOptions"]

R = TypeVar("R")
Progress = Callable[[int, int], None]
"""Called with (bytes transferred, bytes in all)."""

SERVER_NAME: Final = "talkoot-coordinator"
"""The name in the coordinator's certificate."""
FETCH_OWNER: Final = "fetch"
"""Whose parts downloads are, in the store's ``incoming``."""

OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", limits.MAX_TRANSFER_MESSAGE),
    ("grpc.max_send_message_length", limits.MAX_TRANSFER_MESSAGE),
    # Nothing of ours compresses on this layer, so nothing of a peer's is decompressed.
    ("grpc.per_message_decompression", 0),
    # For NAT tables. An answer may have to queue behind megabytes on a slow line, so a missing one
    # ends the connection late; stalls are noticed by `Watch`.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 300_000),
    # Our own back-off decides when to try; the channel must be ready to by then.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


MESSAGE_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    *OPTIONS,
    # A connection of its own: a report must not wait behind what a slow upload has in its buffers.
    ("grpc.use_local_subchannel_pool", 1),
)


class TransferClient:
    """A node's way to the coordinator's data plane. Thread-safe; close it when done.

    Bulk and messages have a connection each, which opens when it is first needed.

    Every method raises what the coordinator answered, as the same class with the same code
    (:class:`RefusedError`, :class:`ProtocolError`, :class:`CapacityError` …), and
    :class:`UnavailableError` when there was no answer.

    Args:
        address: ``host:port``.
        ca_pem: the pinned CA.
        cert_pem: this node's certificate, which is its identity.
        key_pem: this node's private key.
        server_name: the name that the server's certificate must carry; None: that of ``address``.
        meter: counts the bytes of artifacts and messages.
        options: rates, patience, deadlines.
        mirror_limits: when to leave a mirror for the next.
    """

    def __init__(
        self,
        address: str,
        ca_pem: bytes,
        cert_pem: bytes,
        key_pem: bytes,
        *,
        server_name: str | None = SERVER_NAME,
        meter: Meter,
        options: TransferOptions | None = None,
        mirror_limits: MirrorLimits | None = None,
    ) -> None:
        self._peer = f"the coordinator's data plane at {address}"
        self._meter = meter
        self._options = options or TransferOptions()
        self._up = RateLimit(self._options.max_rate_up)
        self._down = RateLimit(self._options.max_rate_down)
        self._address = address
        self._key_pem = key_pem
        self._override = (
            () if server_name is None else (("grpc.ssl_target_name_override", server_name),)
        )
        self._channels: list[grpc.Channel] = []
        self._mirrors = MirrorFetcher(
            lambda watch, amount: self._account(watch, down=amount),
            self._options.max_rate_down,
            mirror_limits,
        )
        self._closed = False
        self.use_certificate(ca_pem, cert_pem)

    def use_certificate(self, ca_pem: bytes, cert_pem: bytes) -> None:
        """Go on with a renewed certificate of the same key; what is under way ends as it began."""
        credentials = grpc.ssl_channel_credentials(ca_pem, self._key_pem, cert_pem)
        messages, bulk = (
            grpc.secure_channel(self._address, credentials, options=options + self._override)
            for options in (MESSAGE_OPTIONS, OPTIONS)
        )
        self._stub, self._bulk = TransferStub(messages), TransferStub(bulk)
        self._push: grpc.StreamUnaryMultiCallable[bytes, PushState] = bulk.stream_unary(
            PUSH, request_serializer=as_it_is, response_deserializer=PushState.FromString
        )
        self._channels += (messages, bulk)
        while len(self._channels) > 4:  # by the renewal after next it is long over
            self._channels.pop(0).close()
        if self._closed:  # somebody closed us meanwhile
            self.close()

    def close(self) -> None:
        """Drop the connections; transfers that run end with :class:`Stopped`."""
        self._closed = True
        for channel in list(self._channels):
            channel.close()

    @property
    def mirrors(self) -> MirrorFetcher:
        """Where artifacts are asked for before the coordinator is; nowhere, to begin with."""
        return self._mirrors

    def __enter__(self) -> TransferClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Bulk ----------------------------------------------------------------------

    def fetch(
        self,
        ref: ArtifactRef,
        store: ArtifactStore,
        *,
        on_progress: Progress | None = None,
        should_stop: StopSignal | None = None,
    ) -> Path:
        """Bring an artifact into ``store`` and return its path; at once if it is there.

        Mirrors are asked first, as far as there are any (:attr:`mirrors`). Goes on where an earlier
        attempt, or an earlier process, ended. If the bytes turn out wrong and some of them were
        there before, they are fetched once more.

        Raises:
            UnavailableError: ``options.attempts`` attempts in a row moved no byte.
            Stopped: ``should_stop`` said so; the part is kept.
            RefusedError: the coordinator does not offer it.
            IntegrityError: the bytes are not what the digest names; nothing is kept.
            CapacityError: this machine's disk is full; the part is kept.
        """
        resumed = False
        stop = self._stop_signal(should_stop)

        def attempt(reached: Callable[[int], None]) -> Path:
            nonlocal resumed
            if store.has(ref.digest):
                return _stored(ref, store)
            pieces = self._pieces(ref) if self._mirrors.usable() else None
            with store.ingest(FETCH_OWNER, ref.digest, ref.size_bytes, pieces) as ingest:
                resumed = ingest.offset() > 0
                reached(ingest.offset())

                def moved(offset: int) -> None:
                    reached(offset)
                    if on_progress is not None:
                        on_progress(offset, ref.size_bytes)

                if pieces is not None:
                    self._mirrors.fetch(ref, ingest, moved, stop)
                    wait(0, stop)
                if ingest.offset() < ref.size_bytes or ref.size_bytes == 0:
                    self._fetch_into(ingest, ref, moved, stop)
                return ingest.finish()

        return self._persist(attempt, lambda: resumed, stop)

    def _fetch_into(
        self, ingest: Ingest, ref: ArtifactRef, moved: Callable[[int], None], stop: StopSignal
    ) -> None:
        """Take the rest of an artifact from the coordinator."""
        try:
            call = self._bulk.Fetch(FetchRequest(digest=ref.digest, offset=ingest.offset()))
        except ValueError as err:  # gRPC's answer to a call on a closed channel
            raise Stopped from err
        with Watch(call.cancel, stop, self._options.stall_seconds) as watch:
            try:
                for chunk in read_ahead(call):
                    data = chunk.data  # each look at it is a copy
                    _check_chunk(chunk.total_size, data, ref)
                    moved(ingest.append(ingest.offset(), data))
                    self._account(watch, down=len(data))
            except grpc.RpcError as err:
                raise self._broken(err, watch) from err
            except IntegrityError as err:
                if err.code != BAD_PIECE:
                    ingest.discard()
                raise
            finally:
                call.cancel()
        if ingest.offset() < ref.size_bytes:
            raise UnavailableError(f"{self._peer} ended a transfer early: try again.")

    def _pieces(self, ref: ArtifactRef) -> Pieces:
        """The coordinator's word on each piece of an artifact, to hold mirrors against."""
        if ref.size_bytes <= limits.PIECE:  # one piece, and its digest is the artifact's
            return Pieces(ref.size_bytes, bytes.fromhex(ref.digest) if ref.size_bytes else b"")
        request = FetchRequest(digest=ref.digest)
        told = self._call(self._stub.Pieces, request, self._options.judge_seconds)
        _check_size(told.total_size, ref)
        return Pieces(ref.size_bytes, told.digests)

    def push(
        self,
        lease_id: str,
        ref: ArtifactRef,
        path: Path,
        *,
        on_progress: Progress | None = None,
        should_stop: StopSignal | None = None,
    ) -> None:
        """Send the file at ``path`` as ``ref`` under a lease; harmless if it is there already.

        Raises:
            UnavailableError, Stopped: as for :meth:`fetch`; the coordinator keeps the part.
            RefusedError: the coordinator does not take it (lease closed, not this node's …).
            IntegrityError: ``path`` is not what ``ref`` says, or the bytes were damaged on the way.
            CapacityError: the coordinator's disk is full.
        """
        _check_size_of(path, ref)
        resumed = False
        stop = self._stop_signal(should_stop)

        def attempt(reached: Callable[[int], None]) -> None:
            nonlocal resumed
            request = PushStatusRequest(lease_id=lease_id, digest=ref.digest, size=ref.size_bytes)
            # On the connection that the upload will take: its handshakes are paid for once.
            state = self._call(self._bulk.PushStatus, request, self._options.call_seconds)
            if state.complete:
                return
            if state.offset > ref.size_bytes:
                raise ProtocolError(f"{self._peer} claims to hold more than was ever sent.")
            resumed = state.offset > 0
            reached(state.offset)
            state = self._push_from(state.offset, lease_id, ref, path, on_progress, stop)
            if not state.complete:
                raise UnavailableError(f"{self._peer} ended a transfer early: try again.")

        try:
            self._persist(attempt, lambda: resumed, stop)
        except IntegrityError as err:
            # The receiver hashes every upload; here it is hashed only to say whose fault it is.
            if sha256_file(path) != (ref.digest, ref.size_bytes):
                raise _wrong_file(path) from err
            raise

    def _push_from(
        self,
        offset: int,
        lease_id: str,
        ref: ArtifactRef,
        path: Path,
        on_progress: Progress | None,
        stop: StopSignal,
    ) -> PushState:
        rate = self._up.rate
        largest = limits.TRANSFER_CHUNK
        if rate is not None:  # several chunks a second, so that a limit is a flow and not bursts
            largest = min(largest, max(SMALLEST, int(rate / 8)))
        running: list[grpc.Future[PushState]] = []
        status = PushStatusRequest(lease_id=lease_id, digest=ref.digest, size=ref.size_bytes)

        def there() -> int | None:
            try:
                return self._call(self._stub.PushStatus, status, self._options.call_seconds).offset
            except TalkootError:
                return None

        watch = Watch(
            lambda: [call.cancel() for call in running],
            stop,
            self._options.stall_seconds,
            (there, offset),
        )
        # The generator runs in gRPC's thread, which tells of its errors as UNKNOWN.
        failure: list[Exception] = []

        def sent(length: int, now_at: int) -> None:
            self._account(watch, up=length)
            if on_progress is not None:
                on_progress(now_at, ref.size_bytes)

        def chunks() -> Iterator[bytes]:
            try:
                yield from _chunks(offset, largest, lease_id, ref, path, sent)
            except Exception as err:
                failure.append(err)
                raise

        try:
            call = self._push.future(chunks())
        except ValueError as err:  # gRPC's answer to a call on a closed channel
            raise Stopped from err
        running.append(call)
        with watch:
            try:
                return call.result()
            except (grpc.RpcError, grpc.FutureCancelledError) as err:
                if failure:
                    raise _local(failure[0], path) from failure[0]
                raise self._broken(err, watch) from err
            finally:
                call.cancel()

    def _persist(
        self,
        attempt: Callable[[Callable[[int], None]], R],
        resumed: Callable[[], bool],
        stop: StopSignal,
    ) -> R:
        """Try until it works, patience runs out, or something other than the line fails."""
        patience = Patience(self._options)
        best = 0
        second_chance = True

        def reached(offset: int) -> None:
            nonlocal best
            best = max(best, offset)

        while True:
            wait(0, stop)
            try:
                return attempt(reached)
            except Stopped:
                raise
            except UnavailableError as err:
                wait(patience.delay(best, err), stop)
            except IntegrityError:
                # A power cut can damage a part that an earlier process left.
                if not (second_chance and resumed()):
                    raise
                second_chance = False
                best = 0
                patience.restart()

    def _stop_signal(self, should_stop: StopSignal | None) -> StopSignal:
        return lambda: self._closed or (should_stop is not None and should_stop())

    def _account(self, watch: Watch, *, up: int = 0, down: int = 0) -> None:
        self._meter.add(up=up, down=down)
        if up or down:
            watch.touch()
        now = time.monotonic()
        watch.pay(max(self._up.take(up, now), self._down.take(down, now)))

    def _broken(self, err: Exception, watch: Watch) -> TalkootError:
        if watch.stopped:
            return Stopped()
        if watch.stalled:
            return UnavailableError(
                f"{self._peer} moved nothing for {self._options.stall_seconds:.0f} s: "
                "check the network, then try again."
            )
        return self._explained(err)

    def _explained(self, err: Exception) -> TalkootError:
        if isinstance(err, grpc.Call) and isinstance(err, grpc.RpcError):
            return from_status(err.code(), err.details() or "", peer=self._peer)
        return UnavailableError(f"The connection to {self._peer} was closed: try again.")

    # Messages ----------------------------------------------------------------------

    def submit(self, contribution: Signed) -> Verdict:
        """Claim work that was pushed (a signed Contribution); the coordinator judges it."""
        body = canonical_bytes(contribution)
        return parse(Verdict, self._send(self._stub.Submit, body, self._options.judge_seconds))

    def prove(self, proof: Signed) -> Verdict:
        """Send a signed Proof; the verdict says whether this node is admitted."""
        body = canonical_bytes(proof)
        return parse(Verdict, self._send(self._stub.Prove, body, self._options.judge_seconds))

    def challenge(self) -> bytes:
        """What the next proof must be made for: canonical JSON of ``messages.ProofChallenge``."""
        return self._send(self._stub.Challenge, b"")

    def report(self, report: NodeReport) -> NodeReportReply:
        """Send a heartbeat."""
        return parse(NodeReportReply, self._send(self._stub.Report, canonical_bytes(report)))

    def run_spec(self) -> Signed:
        """The signed RunSpec. The caller verifies the signature."""
        return parse(Signed, self._send(self._stub.GetRun, b""))

    def mirror_list(self) -> Signed:
        """The signed MirrorList. The caller verifies the signature."""
        return parse(Signed, self._send(self._stub.GetMirrors, b""))

    def task(self) -> Signed | None:
        """The signed RoundTask that is open for this node, or None. The caller verifies it."""
        try:
            return parse(Signed, self._send(self._stub.GetTask, b""))
        except RefusedError as err:
            if err.code == "no-task":
                return None
            raise

    def renew(self, request: Signed) -> RenewReply:
        """Ask for a new certificate (a signed RenewRequest). The caller checks what comes."""
        return parse(RenewReply, self._send(self._stub.Renew, canonical_bytes(request)))

    def _send(
        self,
        method: grpc.UnaryUnaryMultiCallable[Envelope, Envelope],
        body: bytes,
        seconds: float | None = None,
    ) -> bytes:
        if len(body) > limits.MAX_CONTROL_MESSAGE:
            raise ProtocolError(
                f"A message of {len(body)} bytes is over the cap of {limits.MAX_CONTROL_MESSAGE}.",
                code="too-large",
            )
        self._meter.add(up=len(body))
        reply = self._call(method, Envelope(body=body), seconds or self._options.call_seconds).body
        self._meter.add(down=len(reply))
        if len(reply) > limits.MAX_CONTROL_MESSAGE:
            raise ProtocolError(f"{self._peer} answered with too much.", code="too-large")
        return reply

    def _call(self, method: grpc.UnaryUnaryMultiCallable[Q, A], request: Q, seconds: float) -> A:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as err:
            raise self._explained(err) from err
        except ValueError as err:  # gRPC's answer to a call on a closed channel
            raise UnavailableError(f"The connection to {self._peer} was closed.") from err


Q = TypeVar("Q")
A = TypeVar("A")


def _stored(ref: ArtifactRef, store: ArtifactStore) -> Path:
    if store.size(ref.digest) != ref.size_bytes:
        raise IntegrityError(
            f"Artifact {ref.digest} is here with {store.size(ref.digest)} bytes and was announced "
            f"with {ref.size_bytes}: whoever announced it is wrong."
        )
    return store.path(ref.digest)


def _check_size(total_size: int, ref: ArtifactRef) -> None:
    if total_size != ref.size_bytes:
        raise IntegrityError(
            f"Artifact {ref.digest} was announced with {ref.size_bytes} bytes and is served with "
            f"{total_size}: it is not what was announced."
        )


def _check_chunk(total_size: int, data: bytes, ref: ArtifactRef) -> None:
    _check_size(total_size, ref)
    if len(data) > limits.TRANSFER_CHUNK:
        raise ProtocolError(
            f"A chunk of {len(data)} bytes is over the cap of {limits.TRANSFER_CHUNK}.",
            code="too-large",
        )


def _chunks(
    offset: int,
    largest: int,
    lease_id: str,
    ref: ArtifactRef,
    path: Path,
    sent: Callable[[int, int], None],
) -> Iterator[bytes]:
    """The file from ``offset`` on; the first chunk names it. ``sent(bytes, offset after them)``."""
    pace = ChunkPace(time.monotonic(), largest)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        yield PushChunk(
            lease_id=lease_id, digest=ref.digest, size=ref.size_bytes, offset=offset, data=b""
        ).SerializeToString()
        while offset < ref.size_bytes:
            size = pace.size(time.monotonic())
            data = file.read(min(size, ref.size_bytes - offset))
            if not data:
                return
            yield push_chunk(offset, data)
            offset += len(data)
            pace.took(len(data))
            sent(len(data), offset)


def _check_size_of(path: Path, ref: ArtifactRef) -> None:
    try:
        if path.stat().st_size != ref.size_bytes:
            raise _wrong_file(path)
    except OSError as err:
        raise explain_os_error(err, "reading an artifact", path) from err


def _wrong_file(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path} is not the artifact that it should be: it was changed or damaged after it "
        "was made; make it again."
    )


def _local(err: Exception, path: Path) -> TalkootError:
    if isinstance(err, TalkootError):
        return err
    if isinstance(err, OSError):
        return explain_os_error(err, "sending an artifact", path)
    return StateError(f"Sending {path} failed on this machine: {err}.")
