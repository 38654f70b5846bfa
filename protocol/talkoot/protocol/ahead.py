"""Do two things at once along one stream: bytes come in while those before them are hashed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Final, TypeVar

T = TypeVar("T")
DEPTH: Final = 3
"""Items that may wait: chunks of a transfer, so that a stream holds that many MiB more."""


def read_ahead(items: Iterator[T], depth: int = DEPTH) -> Generator[T, None, None]:
    """What ``items`` gives, in order, taken by a thread that is up to ``depth`` items ahead.

    An error of ``items`` is raised here after what came before it. Whoever stops early must also
    end ``items`` (cancel the call), or its thread waits for as long as ``items`` does.
    """
    changed = threading.Condition()
    waiting: deque[T] = deque()
    ended: list[Exception | None] = []
    closed = False

    def take() -> None:
        failure: Exception | None = None
        try:
            for item in items:
                with changed:
                    changed.wait_for(lambda: closed or len(waiting) < depth)
                    if closed:
                        return
                    waiting.append(item)
                    changed.notify_all()
        except Exception as err:  # noqa: BLE001 - for the one who reads, not for this thread
            failure = err
        finally:
            with changed:
                ended.append(failure)
                changed.notify_all()

    threading.Thread(target=take, name="read-ahead", daemon=True).start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                item = waiting.popleft()
                changed.notify_all()
            yield item
        if ended[0] is not None:
            raise ended[0]
    finally:
        with changed:
            closed = True
            changed.notify_all()
