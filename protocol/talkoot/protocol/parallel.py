"""The same work on many pieces, by a few threads, with the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``function`` of each item, in the order of the items, by ``workers`` threads.

    At most two items a worker are under way or wait to be taken, so memory does not follow their
    number. The first exception ends it, once what is under way is done. With one worker no thread
    is started.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque(
            pool.submit(function, item) for item in islice(left, 2 * workers)
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                for item in islice(left, 1):
                    waiting.append(pool.submit(function, item))
                yield result
        finally:
            for future in waiting:
                future.cancel()
