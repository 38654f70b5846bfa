"""Lines between processes that are slow, lossy or cut: for tests and benchmarks.

``TcpRelay`` is a TCP relay with a rate, which counts the bytes that pass. It stands between two
sockets, so what it shapes is what one of them sends and the other has not yet been given.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType


class TcpRelay:
    """Listens on loopback and passes bytes on to ``target``, each way at its own rate.

    Args:
        target: ``host:port``.
        up: bytes per second from the client to the target; None is no limit.
        down: bytes per second from the target to the client.
    """

    def __init__(self, target: str, *, up: float | None = None, down: float | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.up = up
        self.down = down
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections; new ones are taken."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        """End everything."""
        self._closed = True
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                # Small buffers: what waits in them has not crossed the line.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
                server = socket.create_connection(self._target)
            except OSError:
                continue
            self.connections += 1
            with self._lock:
                self._sockets += [client, server]
            for source, sink, upwards in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pump, args=(source, sink, upwards), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        try:
            while True:
                rate = self.up if upwards else self.down
                most = 256 * 1024 if rate is None else max(512, int(rate / 50))
                data = source.recv(most)
                if not data:
                    break
                if rate is not None:
                    time.sleep(len(data) / rate)
                sink.sendall(data)
                if upwards:
                    self.bytes_up += len(data)
                else:
                    self.bytes_down += len(data)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> TcpRelay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
