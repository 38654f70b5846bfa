"""The way to the SuperLink: which calls pass, with which headers, and how much comes back."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from typing import Final

import httpx

from talkoot.protocol import limits
from talkoot.server.http_edge import HttpRefusal

log = logging.getLogger(__name__)

FLEET_PATHS: Final = frozenset(
    b"/v1/fleet/" + call
    for call in (
        b"activate-node",
        b"deactivate-node",
        b"send-node-heartbeat",
        b"pull-messages",
        b"push-messages",
        b"get-run",
        b"get-fab",
        b"push-object",
        b"pull-object",
        b"confirm-message-received",
    )
)
"""All that is forwarded. register-node and unregister-node are not: enrolment registers nodes."""

PUBLIC_KEY_HEADER: Final = b"flwr-public-key"
REQUEST_HEADERS: Final = (
    b"content-type",
    b"accept",
    PUBLIC_KEY_HEADER,
    b"flwr-signature",
    b"flwr-timestamp",
    b"flwr-package-name",
    b"flwr-package-version",
    b"flwr-component-name",
)
"""What flwr 1.41's fleet client sends (``flwr.supernode.node_auth_http_interceptor``,
``flwr.supercore.interceptors.http.runtime_version``). Task tokens and SuperExec headers, which
open other doors, are not among them."""
RESPONSE_HEADERS: Final = ("content-type", "flwr-version-incompatibility-message")

TIMEOUT: Final = httpx.Timeout(25.0, connect=5.0)  # seconds; flwr's client gives up at 30


class FleetProxy:
    """A pool of TLS connections to one SuperLink on loopback.

    Args:
        base_url: ``https://127.0.0.1:<port>``.
        ca_pem: the only CA that the SuperLink's certificate may come from.
    """

    def __init__(self, base_url: str, ca_pem: bytes) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        self._base_url = base_url
        self._client = httpx.AsyncClient(
            verify=context,
            timeout=TIMEOUT,
            # uvicorn, which the SuperLink is, drops idle connections after 5 seconds.
            limits=httpx.Limits(
                max_connections=64, max_keepalive_connections=32, keepalive_expiry=2.0
            ),
            follow_redirects=False,
            trust_env=False,  # a proxy between us and our own loopback would be a hole
            headers={"user-agent": "talkoot-gateway", "accept-encoding": "identity"},
        )

    async def close(self) -> None:
        """Close the pool."""
        await self._client.aclose()

    async def forward(
        self, path: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """POST ``body`` to a path of :data:`FLEET_PATHS`; returns status, headers and body.

        Raises:
            HttpRefusal: 502 for an answer that is too big or broken, 503 when the SuperLink is
                down, 504 when it is slow: the three that flwr's client tries again.
        """
        request = self._client.build_request(
            "POST", self._base_url + path.decode("ascii"), content=body, headers=headers
        )
        answer = bytearray()
        try:
            response = await self._client.send(request, stream=True)
            try:
                # Raw: what was compressed would have to be inflated to know its size.
                async for chunk in response.aiter_raw():
                    if len(answer) + len(chunk) > limits.MAX_CONTROL_MESSAGE:
                        raise _bad_answer("is over the cap of a control message")
                    answer += chunk
            finally:
                await response.aclose()
        except (httpx.ConnectTimeout, httpx.PoolTimeout) as err:
            raise _superlink_down() from err
        except httpx.TimeoutException as err:
            raise HttpRefusal(
                504, "superlink-slow", "The coordinator's SuperLink did not answer in time."
            ) from err
        except httpx.RemoteProtocolError as err:
            raise _bad_answer("broke off") from err
        except httpx.TransportError as err:
            log.warning("the SuperLink cannot be reached: %s", err)
            raise _superlink_down() from err
        if 300 <= response.status_code < 400 or "content-encoding" in response.headers:
            raise _bad_answer("is a redirect or compressed")
        kept = {
            name: response.headers[name] for name in RESPONSE_HEADERS if name in response.headers
        }
        return response.status_code, kept, bytes(answer)


def fleet_headers(headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Those of :data:`REQUEST_HEADERS` that a request has; doubled ones are refused."""
    forwarded: list[tuple[bytes, bytes]] = []
    for name in REQUEST_HEADERS:
        value = headers.get(name)
        if value is None:
            continue
        # The SuperLink might believe the other one of two.
        if not value.isascii() or b"\x00" in value:
            raise HttpRefusal(
                400, "bad-header", f"The header {name.decode('ascii')} comes twice or isn't ASCII."
            )
        forwarded.append((name, value))
    return forwarded


def _superlink_down() -> HttpRefusal:
    return HttpRefusal(
        503, "superlink-down", "The coordinator's SuperLink does not answer: try again later."
    )


def _bad_answer(why: str) -> HttpRefusal:
    return HttpRefusal(502, "bad-answer", f"The answer of the coordinator's SuperLink {why}.")
