"""A joiner's checkpoint, fetched by a client that is killed again and again."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Final

from bench.plane import ROOT, WAIT_SECONDS, Plane
from bench.registry import Row, Run, benchmark
from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.errors import IntegrityError, UnavailableError
from talkoot.protocol.limits import MIB

KILLS: Final = 20
RATE: Final = 60e6
"""Bytes a second of the line. One that is faster than its client, as loopback is, fills the
kernel's buffers with some ten megabytes, which a kill loses; a volunteer's line does not."""
READ: Final = 64 * 1024
LOOK_SECONDS: Final = 0.002


class Relay:
    """TCP from a port of its own to another one, paced, with the bytes that came down counted.

    What was on its way to a client when it died counts, as it does on a volunteer's line.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.down = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, counts in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._copy, args=(source, sink, counts), daemon=True
                ).start()

    def _copy(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        due = time.monotonic()
        try:
            while data := source.recv(READ):
                sink.sendall(data)
                if counts:
                    self.down += len(data)
                    due += len(data) / RATE
                    time.sleep(max(due - time.monotonic(), 0.0))
                    due = max(due, time.monotonic() - 0.05)
        except OSError:
            pass  # one of the two is gone, and so is the other
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@benchmark("checkpoint", quick=False)
def checkpoint(run: Run) -> Iterator[Row]:
    """A client killed 20 times at random offsets of a fetch: what came down, to what there is."""
    size = 4096 * MIB
    with (
        Plane(run.scratch / "plane", size) as plane,
        closing(Relay(plane.ports["transfer"])) as relay,
    ):
        ports = json.dumps({**plane.ports, "transfer": relay.port})
        chance = random.Random(7)
        command = [sys.executable, "-m", "bench.plane", "run", str(plane.root), plane.host]
        command += ["fetch-on", ports, str(size)]
        for offset in sorted(chance.randrange(size) for _ in range(KILLS)):
            client = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            _wait(relay, offset, client)
            client.kill()
            client.wait()
        subprocess.run(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=WAIT_SECONDS, check=True
        )
        if not ArtifactStore(plane.root / "client").verify(plane.ref.digest):
            raise IntegrityError("What was fetched is not what was asked for.")
        ratio = relay.down / size
    yield Row(
        name="checkpoint_20_kills",
        value=relay.down / 1e6,
        unit="MB",
        baseline=size / 1e6,
        ratio=ratio,
        bar="ratio <= 1.02",
        holds=ratio <= 1.02,
        note=f"at {RATE / 1e6:.0f} MB/s, client killed at {KILLS} offsets; the file is right",
    )


def _wait(relay: Relay, offset: int, client: subprocess.Popen[bytes]) -> None:
    """Until so much came down."""
    deadline = time.monotonic() + WAIT_SECONDS
    while relay.down < offset:
        if client.poll() is not None:
            raise UnavailableError(f"A client ended by itself, with status {client.returncode}.")
        if time.monotonic() > deadline:
            raise UnavailableError(f"Only {relay.down} of {offset} bytes came in time.")
        time.sleep(LOOK_SECONDS)
