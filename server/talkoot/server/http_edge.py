"""The parts of a public HTTP server that assume the worst of whoever connects.

Nothing here knows what the gateway serves: capped bodies, refusals, rate limits, small caches, and
a uvicorn protocol that gives every exchange a deadline.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any, Final, Generic, TypeVar

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from talkoot.protocol import limits
from talkoot.protocol.messages import Refusal, canonical_bytes

HANDSHAKE_SECONDS: Final = 10.0
"""For a TLS handshake."""
HEADER_SECONDS: Final = 10.0
"""From the end of the handshake to the end of the first request's headers."""
BODY_SECONDS: Final = 10.0
"""From the headers to the end of the body (64 KiB)."""
EXCHANGE_SECONDS: Final = 60.0
"""From the headers to the last byte of the answer."""
KEEP_ALIVE_SECONDS: Final = 20
"""An idle connection's life; nodes poll every few seconds and keep theirs."""
MAX_HEADERS: Final = 16 * limits.KIB
"""Bytes of request line and headers."""
PIECE: Final = 4 * limits.KIB
"""Bytes that are parsed at a time, and by which headers may be over their cap."""
MAX_CACHE_ENTRIES: Final = 4096

COMMON_HEADERS: Final[Mapping[str, str]] = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

_CODE = re.compile(r"[a-z0-9-]{1,64}")
_LENGTH = re.compile(rb"[0-9]{1,15}")

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class HttpRefusal(Exception):
    """Ends a request with a status and a :class:`Refusal`; the connection is then closed.

    It is closed because a refused request may still be sending, and what follows on the same
    connection can't be trusted to begin where we think it does.
    """

    def __init__(self, status: int, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code if _CODE.fullmatch(code) else "refused"
        self.sentence = sentence[: limits.MAX_SENTENCE_CHARS]

    def body(self) -> bytes:
        """The JSON to send."""
        return canonical_bytes(Refusal(code=self.code, sentence=self.sentence))


class ClientGoneError(Exception):
    """The peer hung up before its request was complete."""


async def respond(
    send: Send, status: int, body: bytes, content_type: str, headers: Mapping[str, str]
) -> None:
    """Send one whole answer."""
    fields = {"content-type": content_type, "content-length": str(len(body)), **COMMON_HEADERS}
    fields.update(headers)
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def single_headers(scope: Scope) -> dict[bytes, bytes]:
    """Request headers by lower-case name. A name that comes twice is joined by NUL.

    NUL can't occur in a header, so that a doubled one is recognisable by whoever uses it, and a
    harmless double (``accept``, ``via``) bothers nobody.
    """
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers[name] = headers[name] + b"\x00" + value if name in headers else value
    return headers


def declared_length(headers: Mapping[bytes, bytes], cap: int) -> int | None:
    """The body's length as claimed, None when it is chunked.

    Raises :class:`HttpRefusal` for a length that is unreadable, over ``cap``, or contradicted by a
    Transfer-Encoding (RFC 9112, section 6.3: the two together are a smuggling attempt).
    """
    length = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        if length is not None:
            raise HttpRefusal(
                400,
                "conflicting-length",
                "Content-Length and Transfer-Encoding exclude each other.",
            )
        return None
    if length is None:
        return 0
    if _LENGTH.fullmatch(length) is None:
        raise HttpRefusal(400, "bad-length", "The Content-Length is not one number.")
    if int(length) > cap:
        raise too_large(cap)
    return int(length)


def too_large(cap: int) -> HttpRefusal:
    """413, with the cap."""
    return HttpRefusal(413, "too-large", f"The request's body is over the cap of {cap} bytes.")


async def read_body(receive: Receive, cap: int) -> bytes:
    """Read a body of at most ``cap`` bytes within :data:`BODY_SECONDS`.

    Raises:
        HttpRefusal: 413 as soon as the cap is passed, 408 when the time is up.
        ClientGoneError: the peer hung up.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk: bytes = event.get("body", b"")
                if len(body) + len(chunk) > cap:
                    raise too_large(cap)
                body += chunk
                more = event.get("more_body", False)
    except TimeoutError as err:
        raise HttpRefusal(
            408, "too-slow", f"The request's body did not arrive in {BODY_SECONDS:.0f} seconds."
        ) from err
    return bytes(body)


class TimedCache(Generic[K, V]):
    """Remembers what a coroutine returned, for ``seconds``, for a bounded number of keys.

    Two callers that miss at once both ask; a failure is not remembered.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    async def get(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        """The remembered value of ``key``, or what ``ask`` says now."""
        entry = self._entries.get(key)
        if entry is not None and self._clock() < entry[0]:
            return entry[1]
        value = await ask()
        self._entries[key] = (self._clock() + self._seconds, value)
        self._entries.move_to_end(key)
        if len(self._entries) > MAX_CACHE_ENTRIES:
            self._entries.popitem(last=False)
        return value


class DeadlineProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with an end to patience.

    uvicorn itself waits for ever for a first request's headers, for a body, and for a peer that
    doesn't read its answer; each would hold one of the ``limit_concurrency`` places.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._watched: object | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """The headers must come soon."""
        super().connection_made(transport)
        self._arm(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Give a request that has just begun its time.

        In small pieces: h11 counts headers only while they are not whole, and a TLS connection can
        deliver a quarter of a megabyte at once.
        """
        for start in range(0, len(data), PIECE):
            super().data_received(data[start : start + PIECE])
            self._watch()
            if self.transport.is_closing():
                return

    def on_response_complete(self) -> None:
        """The next headers may take the idle time and then as long as the first ones."""
        self._arm(KEEP_ALIVE_SECONDS + HEADER_SECONDS)
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing left to watch."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not self._watched:
            self._watched = self.cycle
            if not self.cycle.response_complete:
                self._arm(EXCHANGE_SECONDS)

    def _arm(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)
