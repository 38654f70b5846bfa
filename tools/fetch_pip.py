"""Install pip into the virtual environment that runs this file, which was made without it.

Debian's ``python3`` lacks ``ensurepip``. This asks the package index (PyPI's JSON simple API, PEP
691, or whatever ``PIP_INDEX_URL`` names) for one known wheel, checks its digest, and lets the wheel
install itself. ``PIP_CERT`` or ``SSL_CERT_FILE`` names a CA bundle. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin

WHEEL = "pip-25.3-py3-none-any.whl"
SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
MAX_INDEX = 16 << 20  # bytes
MAX_WHEEL = 16 << 20  # bytes
TIMEOUT = 60  # seconds


def _get(url: str, accept: str, cap: int, context: ssl.SSLContext) -> tuple[bytes, str]:
    """Fetch ``url``; answer the body (at most ``cap`` bytes) and the address it came from."""
    request = urllib.request.Request(url, headers={"Accept": accept})  # noqa: S310 - checked by main
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as reply:  # noqa: S310
        body: bytes = reply.read(cap + 1)
        if len(body) > cap:
            raise ValueError(f"{url} is larger than {cap} bytes")
        return body, reply.geturl()


def fetch_wheel(index: str, context: ssl.SSLContext) -> bytes:
    """Find :data:`WHEEL` in ``index`` and answer its bytes. Raises ``ValueError`` if it differs."""
    page, base = _get(
        f"{index.rstrip('/')}/pip/", "application/vnd.pypi.simple.v1+json", MAX_INDEX, context
    )
    addresses = [str(f["url"]) for f in json.loads(page)["files"] if f["filename"] == WHEEL]
    if not addresses:
        raise ValueError(f"{index} does not hold {WHEEL}")
    wheel, _ = _get(urljoin(base, addresses[0]), "*/*", MAX_WHEEL, context)
    if hashlib.sha256(wheel).hexdigest() != SHA256:
        raise ValueError(f"{WHEEL} from {index} is not the file that was expected")
    return wheel


def main() -> int:
    """Fetch, check, install. Answers the exit status."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    if not index.startswith(("https://", "http://")):
        print(f"talkoot: PIP_INDEX_URL={index} is not a web address: unset it.", file=sys.stderr)
        return 1
    bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    try:
        wheel = fetch_wheel(index, ssl.create_default_context(cafile=bundle or None))
    except (URLError, OSError, ValueError, KeyError, TypeError) as err:
        print(
            f"talkoot: Cannot fetch pip ({err}): check the network, or install it yourself "
            "(Debian, Ubuntu: 'apt install python3-venv'), and run the same command again.",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WHEEL
        path.write_bytes(wheel)
        # A wheel is a zip file that Python can run: pip installs pip.
        command = [sys.executable, str(path / "pip"), "install", "--quiet", "--no-index", str(path)]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
