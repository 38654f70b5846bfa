"""A model of CUDA's caching allocator: what it reserves for a trace of allocations. Pure; no torch.

After ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch 2.13: sizes in steps of 512 B; requests up to
1 MiB come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, larger ones from segments
rounded to 2 MiB; the smallest free block that is large enough is taken, and split when enough is
left over; neighbours that are free become one. With expandable segments there is one range a pool,
which grows at its end by whole pages (2 and 20 MiB).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Final

ROUNDING: Final = 512  # bytes
SMALL: Final = 2**20
"""Largest request, in bytes, that the pool of small blocks serves."""
SMALL_SEGMENT: Final = 2 * 2**20
LARGE_SEGMENT: Final = 20 * 2**20
LARGE_REQUEST: Final = 10 * 2**20
"""Requests from here on get a segment of their own size."""
SEGMENT_ROUNDING: Final = 2 * 2**20


class OverTheCap(Exception):
    """What an allocation under a cap meets: torch's out-of-memory error."""


class _Block:
    """A part of a segment."""

    __slots__ = ("address", "after", "before", "free", "segment", "size")

    def __init__(self, segment: int, address: int, size: int) -> None:
        self.segment = segment
        self.address = address
        self.size = size
        self.free = False
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Pool:
    """Free blocks of one kind, by (size, address)."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self._keys: list[tuple[int, int, int]] = []
        self._blocks: dict[tuple[int, int, int], _Block] = {}

    @staticmethod
    def _key(block: _Block) -> tuple[int, int, int]:
        return (block.size, block.segment, block.address)

    def add(self, block: _Block) -> None:
        block.free = True
        key = self._key(block)
        bisect.insort(self._keys, key)
        self._blocks[key] = block

    def remove(self, block: _Block) -> None:
        block.free = False
        key = self._key(block)
        del self._keys[bisect.bisect_left(self._keys, key)]
        del self._blocks[key]

    def best(self, size: int) -> _Block | None:
        """The smallest block of at least ``size``."""
        at = bisect.bisect_left(self._keys, (size, -1, -1))
        return self._blocks[self._keys[at]] if at < len(self._keys) else None

    def all(self) -> list[_Block]:
        return list(self._blocks.values())


class Allocator:
    """Serves allocations and counts what it holds.

    Args:
        cap: most bytes that may be reserved; None is no cap. At the cap, segments that are wholly
            free are given back to the driver before an allocation fails, as torch does. (With
            expandable segments it gives back pages, which is not modelled.)
        expandable: ``expandable_segments:True``.

    Attributes:
        reserved: bytes held from the driver now.
        peak_reserved: the most.
        allocated: bytes given out now.
        peak_allocated: the most.
    """

    def __init__(self, cap: int | None = None, *, expandable: bool = False) -> None:
        self.reserved = self.peak_reserved = 0
        self.allocated = self.peak_allocated = 0
        self._cap = cap
        self._expandable = expandable
        self._pools = {True: _Pool(True), False: _Pool(False)}
        self._given: dict[int, _Block] = {}
        self._segments = 0
        # With expandable segments: the last block of each pool's range.
        self._ends: dict[bool, _Block] = {}

    def allocate(self, block: int, size: int) -> None:
        """Serve ``size`` bytes as number ``block``. Raises :class:`OverTheCap`."""
        size = max(-(-size // ROUNDING) * ROUNDING, ROUNDING)
        pool = self._pools[size <= SMALL]
        found = pool.best(size)
        if found is None:
            found = self._grow(pool, size)
        else:
            pool.remove(found)
        self._split(pool, found, size)
        self._given[block] = found
        self.allocated += found.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, block: int) -> None:
        """Take number ``block`` back."""
        freed = self._given.pop(block)
        self.allocated -= freed.size
        pool = self._pools[self._is_small(freed)]
        for neighbour in (freed.before, freed.after):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                freed = self._merge(freed, neighbour)
        pool.add(freed)

    def _is_small(self, block: _Block) -> bool:
        return block.segment % 2 == 1  # segments of the small pool have odd numbers

    def _merge(self, one: _Block, other: _Block) -> _Block:
        first, second = (one, other) if one.address < other.address else (other, one)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        for small, end in self._ends.items():
            if end is second:
                self._ends[small] = first
        return first

    def _split(self, pool: _Pool, block: _Block, size: int) -> None:
        rest = block.size - size
        # A large block is only split when more than a small request is left over.
        if rest < ROUNDING or (not pool.small and not self._expandable and rest <= SMALL):
            return
        tail = _Block(block.segment, block.address + size, rest)
        tail.before, tail.after = block, block.after
        if block.after is not None:
            block.after.before = tail
        block.after, block.size = tail, size
        if self._ends.get(pool.small) is block:
            self._ends[pool.small] = tail
        pool.add(tail)

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """A block of at least ``size`` from the driver; it belongs to nobody yet."""
        if self._expandable:
            return self._expand(pool, size)
        if pool.small:
            segment = SMALL_SEGMENT
        elif size < LARGE_REQUEST:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
        if self._cap is not None and self.reserved + segment > self._cap:
            self._give_back()
        self._reserve(segment)
        self._segments += 2
        return _Block(self._segments + pool.small, 0, segment)

    def _expand(self, pool: _Pool, size: int) -> _Block:
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        end = self._ends.get(pool.small)
        usable = end.size if end is not None and end.free else 0
        more = -(-(size - usable) // page) * page
        self._reserve(more)
        if end is not None and end.free:
            pool.remove(end)
            end.size += more
            return end
        block = _Block(int(pool.small), 0 if end is None else end.address + end.size, more)
        if end is not None:
            end.after, block.before = block, end
        self._ends[pool.small] = block
        return block

    def _give_back(self) -> None:
        """Segments that are wholly free go back to the driver."""
        for pool in self._pools.values():
            for block in pool.all():
                if block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _reserve(self, size: int) -> None:
        if self._cap is not None and self.reserved + size > self._cap:
            raise OverTheCap
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)


def replay(
    events: Iterable[tuple[int, int, str]], cap: int | None = None, *, expandable: bool = False
) -> Allocator:
    """Serve a trace of (number, bytes or 0 for its end, phase). Raises :class:`OverTheCap`."""
    allocator = Allocator(cap, expandable=expandable)
    for block, size, _ in events:
        if size:
            allocator.allocate(block, size)
        else:
            allocator.free(block)
    return allocator


def smallest_cap(events: Sequence[tuple[int, int, str]], *, step: int = 16 * 2**20) -> int:
    """The smallest cap, to within ``step`` bytes, under which the trace can be served.

    Below the peak that an allocator without a cap reserves, since it gives back what is wholly free
    before it fails.
    """
    free = replay(events)
    low, high = free.peak_allocated, free.peak_reserved
    while high - low > step:
        middle = (low + high) // 2
        try:
            replay(events, middle)
        except OverTheCap:
            low = middle
        else:
            high = middle
    return high
