"""A long line between two network namespaces that are made here: a rate, a delay and a loss.

Two namespaces, each with a TUN device, and one process that carries packets from one to the other:
each direction has a rate, a queue in front of it that drops what does not fit (as a router's does),
a delay, and a seeded loss. This is what ``tc netem`` does; not every kernel has that, and this one
drops the same packets in every run. Both ends are the kernel's own TCP. Needs root, and takes
nothing from the machine's own network.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from talkoot.protocol.errors import UnavailableError

ROOT: Final = Path(__file__).resolve().parent.parent
NEAR, FAR = "10.77.0.2", "10.77.0.1"
MTU: Final = 1500
_FIELDS: Final = (float, float, float, float, float, str, int)
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
    congestion: str = "cubic"
    """How TCP of both ends decides: a name of ``net.ipv4.tcp_available_congestion_control``."""
    seed: int = 0


def insist_possible() -> None:
    """Raise :class:`UnavailableError` where no namespaces can be made."""
    missing = None
    if os.geteuid() != 0:
        missing = "this user is not root: run it as root"
    elif shutil.which("ip") is None:
        missing = "there is no `ip`: install iproute2"
    elif not Path("/dev/net/tun").exists():
        missing = "there is no /dev/net/tun: load the kernel's module `tun`"
    if missing is not None:
        raise UnavailableError(
            f"A slow line between network namespaces cannot be made here, as {missing}.",
            code="no-namespaces",
        )


class Wan:
    """The line, for as long as the context is open. ``near`` and ``far`` are command prefixes."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._names = [f"talkoot-{end}-{os.getpid()}" for end in ("near", "far")]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def near(self) -> Sequence[str]:
        """Put before a command that is to run at the volunteer's end."""
        return ("ip", "netns", "exec", self._names[0])

    @property
    def far(self) -> Sequence[str]:
        """Put before a command that is to run at the coordinator's end."""
        return ("ip", "netns", "exec", self._names[1])

    def __enter__(self) -> Wan:
        insist_possible()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def _make(self) -> None:
        for name in self._names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        fields = [str(value) for value in vars(self._line).values()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.wan", *self._names, *fields],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise UnavailableError("The line between the namespaces did not come up.")
        for name, address in zip(self._names, (NEAR, FAR), strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "line")
            _run("ip", "-n", name, "link", "set", "line", "mtu", str(MTU), "up")
            setting = f"net.ipv4.tcp_congestion_control={self._line.congestion}"
            _run("ip", "netns", "exec", name, "sysctl", "-qw", setting)

    def _remove(self) -> None:
        if self._process is not None:
            self._process.communicate()
        for name in self._names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()


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


def _tun(namespace: str) -> int:
    """A TUN device ``line`` in a namespace: its descriptor, which works from anywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}", "rb") as there:  # noqa: PTH123
        if libc.setns(there.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"line", _IFF_TUN_NO_PI))
    return descriptor


def _carry(near: int, far: int, line: Line) -> None:
    delay, queue = line.rtt_ms / 2000, line.queue_ms / 1000
    up = Direction(line.up_mbit, delay, line.loss, queue, 2 * line.seed)
    down = Direction(line.down_mbit, delay, line.loss, queue, 2 * line.seed + 1)
    ways = ((near, far, up), (far, near, down))
    while True:
        times = [at for *_, way in ways if (at := way.next_at()) is not None]
        patience = max(0.0, min(times) - time.monotonic()) if times else 1.0
        ready, _, _ = select.select([near, far, 0], [], [], patience)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("near")
    parser.add_argument("far")
    parser.add_argument("line", nargs=7)
    args = parser.parse_args()
    line = Line(*(kind(text) for kind, text in zip(_FIELDS, args.line, strict=True)))
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a line does not wait for a processor
    near, far = _tun(args.near), _tun(args.far)
    print("ready", flush=True)
    _carry(near, far, line)


if __name__ == "__main__":
    main()
