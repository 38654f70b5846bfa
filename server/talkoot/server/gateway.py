"""The public face of a coordinator: enrolment, status, and the Flower calls that a node needs.

Flower's SuperLink has one port for everything, and its Control API starts runs (executes code) for
whoever reaches it. So it is bound to loopback, and this gateway, which is what the world reaches,
forwards an exact list of paths compared as raw bytes: nothing is decoded or normalised here that
the SuperLink might decode or normalise in another way. What is forwarded is built anew: our own
path constant, listed headers, a capped body.
"""

from __future__ import annotations

import binascii
import hashlib
import logging
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from talkoot.protocol import limits
from talkoot.protocol.errors import (
    IntegrityError,
    ProtocolError,
    RefusedError,
    TalkootError,
    VersionError,
)
from talkoot.protocol.identity import load_public_key
from talkoot.protocol.messages import (
    CoordinatorInfo,
    EnrolReply,
    EnrolRequest,
    RenewReply,
    Signed,
    canonical_bytes,
    parse,
)
from talkoot.server.dashboard import load_dashboard
from talkoot.server.fleet_proxy import (
    FLEET_PATHS,
    PUBLIC_KEY_HEADER,
    FleetProxy,
    fleet_headers,
)
from talkoot.server.http_edge import (
    ClientGoneError,
    HttpRefusal,
    TimedCache,
    declared_length,
    read_body,
    respond,
    single_headers,
)
from talkoot.server.rates import RateLimiter, rate_key

log = logging.getLogger(__name__)
T = TypeVar("T")

BAN_CACHE_SECONDS: Final = 1.0
PAGE_CACHE_SECONDS: Final = 0.5
CLOSE: Final = {"connection": "close"}
JSON: Final = "application/json"


class Backend(Protocol):
    """What the gateway asks of the coordinator. Calls may block: they run in worker threads."""

    def info(self) -> CoordinatorInfo:
        """What anybody may know."""

    def ca_pem(self) -> bytes:
        """The certificate of the CA that the gateway's own comes from."""

    def trust(self) -> Signed:
        """The signed TrustBundle."""

    def enrol(self, request: EnrolRequest, peer: str) -> EnrolReply:
        """Admit a node that comes from address ``peer``.

        Raises:
            RefusedError: no; a ``code`` that begins with ``invite-used`` means used up (409).
            VersionError: another protocol version (426).
            ProtocolError: a request that makes no sense (400).
        """

    def renew(self, signed: Signed, peer_node_id: str | None) -> RenewReply:
        """A new certificate for who signed this RenewRequest. Raises as :meth:`enrol`."""

    def is_banned(self, public_key: bytes) -> str | None:
        """Why the holder of this key (canonical PEM) is shut out, as a sentence; None if not."""

    def status(self) -> bytes:
        """The dashboard's JSON."""


class _AnyProtocol(BaseModel):
    """The one field that a request of every protocol version has."""

    model_config = ConfigDict(extra="ignore", strict=True)
    protocol: int


@dataclass(frozen=True)
class GatewayLimits:
    """How often one source may ask. ``burst`` at once, then ``rate`` a second.

    Attributes:
        page: of the pages that anybody may read, by address.
        join: enrolments and renewals, by address.
        join_total: enrolments and renewals of everybody together.
        flower: Flower calls by address.
        flower_node: Flower calls by address and key. (By the key alone, somebody who knows
            another's public key could use up its share.)
    """

    page: tuple[float, float] = (60.0, 10.0)
    join: tuple[float, float] = (30.0, 0.5)
    join_total: tuple[float, float] = (200.0, 20.0)
    flower: tuple[float, float] = (500.0, 150.0)
    flower_node: tuple[float, float] = (150.0, 30.0)


@dataclass(frozen=True)
class _Exchange:
    """One request that is about to be answered."""

    path: bytes
    peer: str
    headers: dict[bytes, bytes]
    receive: Receive
    send: Send


class Gateway:
    """The ASGI application.

    Args:
        backend: the coordinator.
        upstream: base URL of the SuperLink, ``https://127.0.0.1:<port>``.
        upstream_ca_pem: the only CA that the SuperLink's certificate may come from.
        caps: how often one source may ask.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        backend: Backend,
        upstream: str,
        upstream_ca_pem: bytes,
        caps: GatewayLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._upstream = upstream
        self._upstream_ca_pem = upstream_ca_pem
        caps = caps or GatewayLimits()
        self._page_rate = RateLimiter(*caps.page)
        self._join_rate = RateLimiter(*caps.join)
        self._join_total = RateLimiter(*caps.join_total)
        self._flower_rate = RateLimiter(*caps.flower)
        self._flower_node_rate = RateLimiter(*caps.flower_node)
        self._clock = clock
        self._dashboard = load_dashboard()
        self._bans: TimedCache[bytes, str | None] = TimedCache(BAN_CACHE_SECONDS, clock)
        self._pages: TimedCache[bytes, bytes] = TimedCache(PAGE_CACHE_SECONDS, clock)
        self._superlink: FleetProxy | None = None
        self._pages_by_path: dict[bytes, tuple[str, Callable[[], bytes]]] = {
            b"/api/v1/info": (JSON, lambda: canonical_bytes(backend.info())),
            b"/api/v1/ca": ("application/x-pem-file", backend.ca_pem),
            b"/api/v1/trust": (JSON, lambda: canonical_bytes(backend.trust())),
            b"/api/v1/status": (JSON, backend.status),
        }
        self.routes: Mapping[tuple[str, bytes], Callable[[_Exchange], Awaitable[None]]] = {
            ("GET", b"/"): self._get,
            **{("GET", path): self._get for path in self._pages_by_path},
            ("POST", b"/api/v1/enrol"): self._enrol,
            ("POST", b"/api/v1/renew"): self._renew,
            **{("POST", path): self._forward for path in FLEET_PATHS},
        }
        """All that there is: method and path as raw bytes, and who answers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; or the server's life, with which the way to the SuperLink is opened."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        try:
            await self._route(scope, receive, send)
        except HttpRefusal as refusal:
            headers = {**CLOSE, "upgrade": "talkoot"} if refusal.status == 426 else CLOSE
            await respond(send, refusal.status, refusal.body(), JSON, headers)
        except ClientGoneError:
            pass  # nobody is left to answer

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["http_version"] not in {"1.0", "1.1"}:
            # h11 reads any "HTTP/d.d" as if it were 1.1.
            raise HttpRefusal(400, "bad-version", "This server speaks HTTP/1.1.")
        handle = self.routes.get((scope["method"], scope["raw_path"]))
        if handle is None or scope["query_string"]:
            raise _not_found()
        peer = scope["client"][0] if scope["client"] else "unknown"
        headers = single_headers(scope)
        await handle(_Exchange(scope["raw_path"], peer, headers, receive, send))

    def _ration(self, limiter: RateLimiter, key: str, what: str) -> None:
        if not limiter.allow(key, self._clock()):
            raise HttpRefusal(429, "too-many", f"Too many {what}: wait a minute, then try again.")

    async def _get(self, asked: _Exchange) -> None:
        self._ration(self._page_rate, rate_key(asked.peer), "requests from this address")
        if declared_length(asked.headers, limits.MAX_CONTROL_MESSAGE) != 0:
            raise HttpRefusal(400, "unexpected-body", "A GET request has no body.")
        if asked.path == b"/":
            page = self._dashboard
            await respond(
                asked.send,
                200,
                page.html,
                "text/html; charset=utf-8",
                {"content-security-policy": page.csp},
            )
            return
        content_type, ask = self._pages_by_path[asked.path]
        body = await self._pages.get(asked.path, lambda: _blocking(ask))
        await respond(asked.send, 200, body, content_type, {})

    # Enrolment ----------------------------------------------------------------------

    async def _join_body(self, asked: _Exchange) -> bytes:
        self._ration(self._join_rate, rate_key(asked.peer), "enrolments from this address")
        self._ration(self._join_total, "", "enrolments at this time")
        declared_length(asked.headers, limits.MAX_CONTROL_MESSAGE)
        return await read_body(asked.receive, limits.MAX_CONTROL_MESSAGE)

    async def _enrol(self, asked: _Exchange) -> None:
        request = _enrol_request(await self._join_body(asked))
        reply = await _blocking(lambda: self._backend.enrol(request, asked.peer))
        await respond(asked.send, 200, canonical_bytes(reply), JSON, {})

    async def _renew(self, asked: _Exchange) -> None:
        try:
            signed = parse(Signed, await self._join_body(asked))
        except ProtocolError as err:
            raise HttpRefusal(400, err.code, err.sentence) from err
        reply = await _blocking(lambda: self._backend.renew(signed, None))
        await respond(asked.send, 200, canonical_bytes(reply), JSON, {})

    # The SuperLink ----------------------------------------------------------------------

    async def _forward(self, asked: _Exchange) -> None:
        if self._superlink is None:
            raise HttpRefusal(503, "starting", "The coordinator is starting: try again.")
        address = rate_key(asked.peer)
        self._ration(self._flower_rate, address, "calls from this address")
        forwarded = fleet_headers(asked.headers)
        public_key = _public_key(asked.headers)
        who = f"{address} {hashlib.sha256(public_key).hexdigest()}"
        self._ration(self._flower_node_rate, who, "calls of this node")
        await self._refuse_banned(public_key)
        declared_length(asked.headers, limits.MAX_CONTROL_MESSAGE)
        body = await read_body(asked.receive, limits.MAX_CONTROL_MESSAGE)
        await self._refuse_banned(public_key)  # the body may have taken its time
        status, answer_headers, answer = await self._superlink.forward(asked.path, forwarded, body)
        content_type = answer_headers.pop("content-type", "application/octet-stream")
        await respond(asked.send, status, answer, content_type, answer_headers)

    async def _refuse_banned(self, public_key: bytes) -> None:
        why = await self._bans.get(
            public_key, lambda: _blocking(lambda: self._backend.is_banned(public_key))
        )
        if why is not None:
            raise HttpRefusal(403, "banned", why)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        try:
            self._superlink = FleetProxy(self._upstream, self._upstream_ca_pem)
        except (TalkootError, OSError, ValueError) as err:
            await send({"type": "lifespan.startup.failed", "message": str(err)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        await self._superlink.close()
        self._superlink = None
        await send({"type": "lifespan.shutdown.complete"})


async def _blocking(call: Callable[[], T]) -> T:
    """Run a backend's call in a thread; its errors become refusals."""
    try:
        return await run_in_threadpool(call)
    except VersionError as err:
        raise HttpRefusal(426, err.code, err.sentence) from err
    except ProtocolError as err:
        raise HttpRefusal(400, err.code, err.sentence) from err
    except RefusedError as err:
        status = 409 if err.code.startswith("invite-used") else 403
        raise HttpRefusal(status, err.code, err.sentence) from err
    except TalkootError as err:
        # Its sentence is meant for the operator (paths, disks), not for whoever asked.
        log.error("the coordinator cannot answer: %s", err.sentence)
        raise HttpRefusal(
            503, "unavailable", "The coordinator cannot do this now: try again later."
        ) from err
    except Exception as err:
        log.exception("the coordinator failed")
        raise HttpRefusal(
            500, "internal", "The coordinator failed; its operator's log says why."
        ) from err


def _public_key(headers: Mapping[bytes, bytes]) -> bytes:
    try:
        public_key = b64decode(headers.get(PUBLIC_KEY_HEADER, b""), validate=True)
        # One spelling a key: else a banned one could come back with a line break more.
        load_public_key(public_key)
    except (binascii.Error, IntegrityError) as err:
        raise HttpRefusal(
            401, "no-key", f"The {PUBLIC_KEY_HEADER.decode()} header holds no EC P-384 key."
        ) from err
    return public_key


def _enrol_request(body: bytes) -> EnrolRequest:
    try:
        version = _AnyProtocol.model_validate_json(body).protocol
    except ValidationError as err:
        raise HttpRefusal(400, "malformed", "Not an enrolment request.") from err
    if version != limits.PROTOCOL_VERSION:
        # Before anything else is read: the rest of another version's message may look different.
        raise HttpRefusal(
            426,
            VersionError.default_code,
            f"This coordinator speaks protocol {limits.PROTOCOL_VERSION} and the node speaks "
            f"{version}: install the version of talkoot that the operator names.",
        )
    try:
        return parse(EnrolRequest, body)
    except ProtocolError as err:
        raise HttpRefusal(400, err.code, err.sentence) from err


def _not_found() -> HttpRefusal:
    return HttpRefusal(
        404,
        "not-found",
        "There is nothing here. An invite is for the command 'talkoot join', not for a browser.",
    )
