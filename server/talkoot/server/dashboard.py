"""The dashboard: one HTML page that needs nothing but itself and ``/api/v1/status``."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Dashboard:
    """The page and the Content-Security-Policy that lets exactly its own code run."""

    html: bytes
    csp: str


def load_dashboard() -> Dashboard:
    """Read the page from the package and pin its inline script and style by hash.

    With no ``unsafe-inline``, a node's name or an event that holds markup could not run even if the
    page forgot to escape it (it writes text nodes only).
    """
    html = resources.files("talkoot.server").joinpath("dashboard.html").read_bytes()
    csp = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(html, b'script')}",
            f"style-src {_hash(html, b'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return Dashboard(html, csp)


def _hash(html: bytes, tag: bytes) -> str:
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(content).digest()).decode('ascii')}'"
