"""Runs the gateway: uvicorn over TLS 1.3 in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import uvicorn

from talkoot.protocol.errors import ConfigError, StateError, UnavailableError
from talkoot.protocol.identity import read_small
from talkoot.server.door import Doorkeeper, GuardedSocket
from talkoot.server.gateway import Backend, Gateway, GatewayLimits
from talkoot.server.http_edge import (
    HANDSHAKE_SECONDS,
    KEEP_ALIVE_SECONDS,
    MAX_HEADERS,
    DeadlineProtocol,
)

log = logging.getLogger(__name__)

STOP_SECONDS: Final = 5
"""For requests that are under way when the gateway stops."""
START_SECONDS: Final = 30.0


@dataclass(frozen=True)
class GatewaySettings:
    """Where the gateway listens, with what certificate, and in front of whom.

    Attributes:
        host: address to listen on, ``0.0.0.0`` or ``::`` for all.
        port: TCP port; 0 takes a free one.
        certificate: PEM of a certificate from :meth:`CertificateAuthority.issue_server`.
        key: PEM of its key.
        superlink_port: where the SuperLink listens on 127.0.0.1.
        superlink_ca: PEM of the CA that the SuperLink's certificate comes from.
        max_connections: open connections; each node keeps one or two.
        max_connections_per_address: of them from one address.
        caps: how often one source may ask.
    """

    host: str
    port: int
    certificate: Path
    key: Path
    superlink_port: int
    superlink_ca: Path
    max_connections: int = 8192
    max_connections_per_address: int = 64
    caps: GatewayLimits | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535 or not 1 <= self.superlink_port <= 65535:
            raise ConfigError("A port is a number from 1 to 65535.", code="bad-port")
        if self.max_connections < 1 or self.max_connections_per_address < 1:
            raise ConfigError("The gateway's limits must be positive.", code="bad-limit")


class GatewayServer:
    """One listening gateway. ``with serve_gateway(...) as server: server.port``."""

    def __init__(self, backend: Backend, settings: GatewaySettings) -> None:
        self._settings = settings
        self._backend = backend
        self._server: _SignallingServer | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._socket: socket.socket | None = None
        self._context: ssl.SSLContext | None = None
        self.port = settings.port
        """The port listened on; known after :meth:`start`."""

    def start(self) -> None:
        """Listen, and return once requests are answered.

        Raises:
            ConfigError: the address is taken or not this machine's.
            StateError: the certificate or its key can't be used.
            UnavailableError: the server did not come up.
        """
        settings = self._settings
        self._context = context = _server_context(settings)
        superlink_ca = read_small(settings.superlink_ca, "starting the gateway")
        self._socket = _listen(settings)
        self.port = self._socket.getsockname()[1]
        upstream = f"https://127.0.0.1:{settings.superlink_port}"
        started = threading.Event()
        config = uvicorn.Config(
            Gateway(self._backend, upstream, superlink_ca, settings.caps),
            loop="asyncio",
            http=DeadlineProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nobody in front of us may say who a peer is
            server_header=False,
            limit_concurrency=settings.max_connections + 1,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADERS,
            ssl_context_factory=lambda _config, _default: context,
        )
        self._server = _SignallingServer(config, started)
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()
        if not started.wait(START_SECONDS) or not self._server.started:
            self.stop()
            raise UnavailableError(
                f"The gateway on port {self.port} did not start"
                + (f": {self._failure}." if self._failure else "; the log says why."),
                code="gateway-start",
            )

    def stop(self) -> None:
        """Finish what is under way, for at most a few seconds, and close. Harmless when stopped."""
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(STOP_SECONDS + 5)
        if self._socket is not None:
            self._socket.close()

    def reload_certificate(self) -> None:
        """Show the certificate that is in its file now to those who connect from now on."""
        if self._context is not None:
            self._context.load_cert_chain(self._settings.certificate, self._settings.key)

    def is_alive(self) -> bool:
        """Whether the gateway's thread still serves."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> GatewayServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        assert self._server is not None
        assert self._socket is not None
        try:
            self._server.run(sockets=[self._socket])
        except (Exception, SystemExit) as err:
            self._failure = err
            log.exception("the gateway died")
        finally:
            self._server.announce()


class _SignallingServer(uvicorn.Server):
    """Says when it has started, or has given up."""

    def __init__(self, config: uvicorn.Config, started: threading.Event) -> None:
        super().__init__(config)
        self._announced = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn leaves asyncio's minute for a handshake; a peer that says nothing gets less.
        loop = asyncio.get_running_loop()
        listen = loop.create_server
        loop.create_server = partial(listen, ssl_handshake_timeout=HANDSHAKE_SECONDS)  # type: ignore[method-assign]
        try:
            await super().startup(sockets)
        finally:
            loop.create_server = listen  # type: ignore[method-assign]
        self.announce()

    def announce(self) -> None:
        self._announced.set()


def serve_gateway(backend: Backend, settings: GatewaySettings) -> GatewayServer:
    """Start a gateway; it serves until :meth:`GatewayServer.stop`. Errors as of ``start``."""
    server = GatewayServer(backend, settings)
    server.start()
    return server


def _server_context(settings: GatewaySettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as err:
        raise StateError(
            f"The gateway's certificate {settings.certificate} and its key cannot be used "
            f"({err.strerror or err}): issue them again.",
            code="bad-certificate",
        ) from err
    return context


def _listen(settings: GatewaySettings) -> socket.socket:
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        plain = socket.create_server((host, port), family=family, backlog=512)
    except OSError as err:
        raise ConfigError(
            f"The gateway cannot listen on {host}, port {port} ({err.strerror or err}): stop what "
            "uses it or choose another port.",
            code="address-in-use",
        ) from err
    door = Doorkeeper(settings.max_connections, settings.max_connections_per_address)
    return GuardedSocket(plain, door)
