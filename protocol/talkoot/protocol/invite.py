"""The invite: one link that tells a volunteer where the coordinator is and how to know it.

``https://host:port/join#ca=<64 hex>&token=<url-safe>``. Both secrets sit in the fragment, which
no browser or proxy sends anywhere: the CA's fingerprint makes the first connection safe without any
public certificate authority, and the token lets one node in.

``https://host:port/ask#ca=<64 hex>`` has no token and may be shown to everybody: who comes with it
asks to be let in, and the operator decides. (Another path, since a shell cuts an unquoted link at
its ``&``, and half an invite must not pass for one of these.)
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from talkoot.protocol.errors import ConfigError

MAX_INVITE_CHARS: Final = 1024
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Invite:
    """Where to join, whom to trust and the right to do it.

    Attributes:
        host: DNS name (ASCII), IPv4 address, or IPv6 address without brackets.
        port: of the coordinator's gateway.
        ca_fingerprint: SHA-256 of the coordinator's CA certificate (DER), hexadecimal.
        token: the right to enrol; 16 to 128 URL-safe characters. None: to ask for it.
    """

    host: str
    port: int
    ca_fingerprint: str
    token: str | None

    def __post_init__(self) -> None:
        if not _is_host(self.host):
            raise _bad(f"{self.host!r} is not a host name or an IP address", "invite-host")
        if not 1 <= self.port <= 65535:
            raise _bad(f"{self.port} is not a port between 1 and 65535", "invite-port")
        if _FINGERPRINT.fullmatch(self.ca_fingerprint) is None:
            raise _bad(
                "the part after ca= is not a fingerprint of 64 hexadecimal digits", "invite-ca"
            )
        if self.token is not None and _TOKEN.fullmatch(self.token) is None:
            raise _bad(
                "the part after token= is not 16 to 128 letters, digits, '-' and '_'",
                "invite-token",
            )

    def __repr__(self) -> str:
        # The token is a secret, and representations end up in logs.
        return f"Invite(host={self.host!r}, port={self.port}, ca={self.ca_fingerprint[:8]}…)"

    @property
    def base_url(self) -> str:
        """``https://host:port``, an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"

    def url(self) -> str:
        """The link to give to a volunteer; :meth:`parse` reads it back."""
        token = "" if self.token is None else f"&token={self.token}"
        path = "ask" if self.token is None else "join"
        return f"{self.base_url}/{path}#ca={self.ca_fingerprint}{token}"

    @classmethod
    def parse(cls, url: str) -> Invite:
        """Read an invite link.

        Raises:
            ConfigError: says which part of the link is wrong, and what to do about it.
        """
        url = url.strip()
        if not url:
            raise _bad("it is empty", "invite-empty")
        if len(url) > MAX_INVITE_CHARS:
            raise _bad(f"it is longer than {MAX_INVITE_CHARS} characters", "invite-long")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise _bad("it has a space or another character that no link has", "invite-characters")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as err:
            raise _bad("its host or port cannot be read", "invite-port") from err
        if parts.scheme != "https":
            raise _bad("it does not begin with https://", "invite-scheme")
        if parts.username is not None or parts.password is not None:
            raise _bad("it has a user name before the host", "invite-host")
        if not host:
            raise _bad("it names no host", "invite-host")
        if port is None:
            raise _bad("it names no port after the host", "invite-port")
        if parts.path not in {"/join", "/ask"} or parts.query:
            raise _bad("the part after the port is not /join", "invite-path")
        if not parts.fragment:
            raise _bad(
                "everything from the # on is missing (quote the link in a shell)",
                "invite-fragment",
            )
        fields = _fields(parts.fragment, ("ca", "token") if parts.path == "/join" else ("ca",))
        return cls(host, port, fields["ca"].lower(), fields.get("token"))


def _fields(fragment: str, wanted: tuple[str, ...]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for pair in fragment.split("&"):
        key, equals, value = pair.partition("=")
        if not equals or key not in wanted:
            raise _bad(
                f"the part after # has {pair[:16]!r}, and only {'= and '.join(wanted)}= belong "
                "there",
                "invite-fragment",
            )
        if key in fields:
            raise _bad(f"the part after # has {key}= twice", "invite-fragment")
        fields[key] = value
    for key in wanted:
        if key not in fields:
            raise _bad(
                f"{key}= is missing after the # (quote the link in a shell, which otherwise cuts "
                "it at the &)",
                f"invite-{key}",
            )
    return fields


def _is_host(host: str) -> bool:
    try:
        # A scope id (fe80::1%eth0) means something on one machine only.
        return getattr(ipaddress.ip_address(host), "scope_id", None) is None
    except ValueError:
        pass
    labels = host.removesuffix(".").split(".")
    # A last label of digits only is a mistyped IPv4 address, which resolvers read in odd ways.
    return (
        len(host) <= 253
        and not labels[-1].isdigit()
        and all(_LABEL.fullmatch(label) for label in labels)
    )


def _bad(why: str, code: str) -> ConfigError:
    return ConfigError(
        f"This invite link does not work: {why}. Copy the whole link again, from https:// to its "
        "end, or ask the operator for a new one.",
        code=code,
    )
