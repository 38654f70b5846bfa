"""Long lines between network namespaces that are made here: a rate, a delay and a loss.

A namespace for the coordinator's end and one for each volunteer's, TUN devices in them, and one
process that carries packets from one to the other: each direction of a line has a rate, a queue in
front of it that drops what does not fit (as a router's does), a delay, and a seeded loss. This is
what ``tc netem`` does; not every kernel has that, and this one drops the same packets in every run.
Both ends are the kernel's own TCP. Needs root, and takes nothing from the machine's own network.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from talkoot.protocol.errors import UnavailableError

NEAR, FAR = "10.77.0.2", "10.77.0.1"
"""Of the first line. All near ends reach the coordinator's by ``FAR``."""
MAX_LINES: Final = 64
MTU: Final = 1500
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x0001 | 0x1000
_CLONE_NEWNET: Final = 0x40000000


@dataclass(frozen=True)
class Line:
    """What the line is like, from the near end (the volunteer's)."""

    up_mbit: float = 20.0
    down_mbit: float = 100.0
    rtt_ms: float = 60.0
    loss: float = 0.01
    """Of the packets of each direction."""
    queue_ms: float = 100.0
    """What waits in front of each direction, at its rate."""
    congestion: str = ""
    """How TCP of both ends decides: a name of ``net.ipv4.tcp_allowed_congestion_control``; empty is
    the machine's own way."""
    seed: int = 0


def impossible() -> str | None:
    """Why no namespaces can be made here, and what to do; None where they can."""
    if os.geteuid() != 0:
        return "this user is not root: run it as root"
    if shutil.which("ip") is None:
        return "there is no `ip`: install iproute2"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun: load the kernel's module `tun`"
    return None


def insist_possible() -> None:
    """Raise :class:`UnavailableError` where no namespaces can be made."""
    missing = impossible()
    if missing is not None:
        raise UnavailableError(
            f"A slow line between network namespaces cannot be made here, as {missing}.",
            code="no-namespaces",
        )


class Wan:
    """Lines for as long as the context is open. ``near`` and ``far`` are command prefixes.

    Args:
        lines: one, or one for each volunteer.
    """

    def __init__(self, lines: Line | Sequence[Line]) -> None:
        self._lines = [lines] if isinstance(lines, Line) else list(lines)
        if not 1 <= len(self._lines) <= MAX_LINES:
            raise ValueError(f"{len(self._lines)} lines are not 1 to {MAX_LINES}")
        self._far = f"talkoot-far-{os.getpid()}"
        self._nears = [f"talkoot-near{n}-{os.getpid()}" for n in range(len(self._lines))]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def near(self) -> Sequence[str]:
        """Put before a command that is to run at the (first) volunteer's end."""
        return self.near_of(0)

    def near_of(self, place: int) -> Sequence[str]:
        """Put before a command that is to run at this volunteer's end."""
        return ("ip", "netns", "exec", self._nears[place])

    @property
    def far(self) -> Sequence[str]:
        """Put before a command that is to run at the coordinator's end."""
        return ("ip", "netns", "exec", self._far)

    def __enter__(self) -> Wan:
        insist_possible()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def _make(self) -> None:
        for name in (self._far, *self._nears):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        job = {"far": self._far, "nears": self._nears, "lines": [asdict(x) for x in self._lines]}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "talkoot.sims.wan", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise UnavailableError("The line between the namespaces did not come up.")
        for place, (line, near) in enumerate(zip(self._lines, self._nears, strict=True)):
            self._raise(near, "line", f"10.77.{place}.2", line)
            self._raise(self._far, _far_device(place), f"10.77.{place}.1", line)
            _run("ip", "-n", near, "route", "add", "default", "dev", "line")

    def _raise(self, name: str, device: str, address: str, line: Line) -> None:
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
        _run("ip", "-n", name, "link", "set", device, "mtu", str(MTU), "up")
        if line.congestion:
            setting = f"net.ipv4.tcp_congestion_control={line.congestion}"
            _run("ip", "netns", "exec", name, "sysctl", "-qw", setting)

    def _remove(self) -> None:
        if self._process is not None:
            self._process.communicate()
        for name in (self._far, *self._nears):
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()


def _far_device(place: int) -> str:
    return f"line{place}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


# The process that carries packets -------------------------------------------------------


class Direction:
    """One direction of the line. Pure: time is an argument, in seconds."""

    def __init__(self, mbit: float, delay: float, loss: float, queue: float, seed: int) -> None:
        self._rate = mbit * 1e6 / 8  # bytes per second
        self._delay = delay
        self._loss = loss
        self._queue = queue  # seconds of waiting that fit
        self._random = random.Random(seed)
        self._free = 0.0  # when the line has sent all that it was given
        self._flying: deque[tuple[float, bytes]] = deque()

    def offer(self, packet: bytes, now: float) -> bool:
        """Take a packet; False if it is lost."""
        if self._random.random() < self._loss or self._free - now > self._queue:
            return False
        self._free = max(self._free, now) + len(packet) / self._rate
        self._flying.append((self._free + self._delay, packet))
        return True

    def due(self, now: float) -> bytes | None:
        """The next packet that has arrived by now."""
        if self._flying and self._flying[0][0] <= now:
            return self._flying.popleft()[1]
        return None

    def next_at(self) -> float | None:
        """When the next packet arrives."""
        return self._flying[0][0] if self._flying else None


def _tun(namespace: str, device: str) -> int:
    """A TUN device in a namespace: its descriptor, which works from anywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}", "rb") as there:  # noqa: PTH123
        if libc.setns(there.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", device.encode("ascii"), _IFF_TUN_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


def _carry(lines: Sequence[tuple[int, int, Line]]) -> None:
    """Carry packets over lines, (near, far, what it is like), until standard input ends."""
    ways = []
    for near, far, line in lines:
        delay, queue = line.rtt_ms / 2000, line.queue_ms / 1000
        up = Direction(line.up_mbit, delay, line.loss, queue, 2 * line.seed)
        down = Direction(line.down_mbit, delay, line.loss, queue, 2 * line.seed + 1)
        ways += [(near, far, up), (far, near, down)]
    sources = [0, *(source for source, _, _ in ways)]
    while True:
        times = [at for *_, way in ways if (at := way.next_at()) is not None]
        patience = max(0.0, min(times) - time.monotonic()) if times else 1.0
        ready, _, _ = select.select(sources, [], [], patience)
        if 0 in ready:  # whoever started us has gone
            return
        for source, sink, way in ways:
            while source in ready:
                try:
                    packet = os.read(source, MTU + 64)
                except BlockingIOError:
                    break
                way.offer(packet, time.monotonic())
            while (arrived := way.due(time.monotonic())) is not None:
                with contextlib.suppress(OSError):  # that end is not up (any more)
                    os.write(sink, arrived)


def main() -> None:
    """The process of :class:`Wan`."""
    job = json.loads(sys.argv[1])
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a line does not wait for a processor
    lines = [
        (_tun(near, "line"), _tun(job["far"], _far_device(place)), Line(**line))
        for place, (near, line) in enumerate(zip(job["nears"], job["lines"], strict=True))
    ]
    print("ready", flush=True)
    _carry(lines)


if __name__ == "__main__":
    main()
