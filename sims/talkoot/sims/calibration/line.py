"""What a line is really like: two plain TCP streams and an echo, between two processes.

``python -m talkoot.sims.calibration.line near ADDRESS PORT`` at a volunteer's end, ``… far`` at the
coordinator's. What is measured is what is simulated, not what the scenario says.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from talkoot.protocol.errors import UnavailableError

ECHOES: Final = 5
MOST_BYTES: Final = 64 * 2**20
SECONDS: Final = 1.0
"""What a stream takes, about."""
PATIENCE_SECONDS: Final = 60.0
PIECE: Final = 64 * 1024


@dataclass(frozen=True)
class Found:
    """A line as it was measured, content of a TCP stream."""

    up_mbit: float
    down_mbit: float
    rtt_ms: float


def stream_bytes(mbit: float) -> int:
    """How much to send over a line of about this rate."""
    return int(min(MOST_BYTES, max(PIECE, mbit * 1e6 / 8 * SECONDS)))


def measure(
    near: Sequence[str], far: Sequence[str], address: str, up_mbit: float, down_mbit: float
) -> Found:
    """Measure a line between two ends, given as command prefixes.

    Args:
        near, far: of the volunteer's end and the coordinator's.
        address: of the far end.
        up_mbit, down_mbit: what it is said to be, so that a measurement takes about a second.

    Raises:
        UnavailableError: the ends did not reach each other.
    """
    module = [sys.executable, "-m", "talkoot.sims.calibration.line"]
    sizes = [str(stream_bytes(mbit)) for mbit in (up_mbit, down_mbit)]
    with subprocess.Popen(
        [*far, *module, "far", address, *sizes], stdout=subprocess.PIPE, text=True
    ) as there:
        try:
            assert there.stdout is not None
            port = there.stdout.readline().strip()
            done = subprocess.run(
                [*near, *module, "near", address, port, *sizes],
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=True,
            )
            return Found(**json.loads(done.stdout))
        except (subprocess.SubprocessError, ValueError) as err:
            raise UnavailableError("The line between the ends could not be measured.") from err
        finally:
            there.kill()


def _take(sock: socket.socket, count: int) -> None:
    while count > 0:
        data = sock.recv(min(count, PIECE))
        if not data:
            raise ConnectionError
        count -= len(data)


def far(address: str, up: int, down: int) -> None:
    """Wait for the near end, echo, take a stream and send one."""
    with socket.create_server((address, 0)) as server:
        server.settimeout(PATIENCE_SECONDS)
        print(server.getsockname()[1], flush=True)
        sock, _ = server.accept()
    with sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ECHOES):
            _take(sock, 1)
            sock.sendall(b"e")
        _take(sock, up)
        sock.sendall(b"e")
        _take(sock, 1)
        sock.sendall(bytes(down))
        _take(sock, 1)


def near(address: str, port: int, up: int, down: int) -> Found:
    """The near end of it."""
    with socket.create_connection((address, port), PATIENCE_SECONDS) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ECHOES):
            began = time.monotonic()
            sock.sendall(b"e")
            _take(sock, 1)
            trips.append(time.monotonic() - began)
        trip = min(trips)
        began = time.monotonic()
        sock.sendall(bytes(up))
        _take(sock, 1)
        sent = time.monotonic() - began - trip
        began = time.monotonic()
        sock.sendall(b"e")
        _take(sock, down)
        taken = time.monotonic() - began - trip
        sock.sendall(b"e")
    rates = [size * 8e-6 / max(seconds, 1e-6) for size, seconds in ((up, sent), (down, taken))]
    return Found(rates[0], rates[1], trip * 1e3)


def main() -> None:
    """Entry point."""
    end, address, *numbers = sys.argv[1:]
    if end == "far":
        far(address, *(int(number) for number in numbers))
    else:
        found = near(address, *(int(number) for number in numbers))
        print(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
