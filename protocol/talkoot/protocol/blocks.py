"""The order in which an epoch visits the blocks, and the set of blocks that are committed.

Pure: no clock, no disk, no network, no random number generator.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from talkoot.protocol import limits
from talkoot.protocol.errors import CorpusError, StateError
from talkoot.protocol.messages import BlockRef

Blocks = npt.NDArray[np.uint32]
Keys = npt.NDArray[np.uint64]

_SLICE: Final = 2**20
"""Blocks looked at together: bounds the memory of a plan over the largest corpus (a multiple of 8,
so that a slice starts on a byte of the bitmap)."""
_MAGIC: Final = b"TKBLOCK1"
_HEADER: Final = struct.Struct("<8sQQII")  # magic, block count, first open, complete, open epochs
_EPOCH: Final = struct.Struct("<Q")

# Splitmix64's increment and multipliers (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
# Generators, OOPSLA 2014, section 5, variant 13 of Stafford's mixers).
_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


# The order of an epoch ----------------------------------------------------------------------


def _sort_keys(seed: int, epoch: int, blocks: Blocks) -> Keys:
    """Sort keys of ``blocks`` (n,) -> (n,): distinct for distinct blocks, so ties cannot occur.

    A counter times an odd constant is a bijection of 64-bit integers and so is the mixer.
    """
    start = hashlib.sha256(b"talkoot block order\0" + struct.pack("<QQ", seed, epoch)).digest()
    # The whole computation is on arrays, where NumPy wraps modulo 2**64 without a warning.
    keys = blocks.astype(np.uint64)
    keys *= _GAMMA
    keys += np.frombuffer(start, dtype="<u8", count=1).astype(np.uint64)
    keys ^= keys >> np.uint64(30)
    keys *= _MIX_1
    keys ^= keys >> np.uint64(27)
    keys *= _MIX_2
    keys ^= keys >> np.uint64(31)
    return keys


def _first_blocks(
    seed: int,
    epoch: int,
    block_count: int,
    bitmap: npt.NDArray[np.uint8] | None,
    limit: int,
) -> Blocks:
    """The first ``limit`` blocks, in the epoch's order, whose bit in ``bitmap`` is not set.

    Linear in ``block_count``; holds at most ``limit`` plus two slices of candidates.
    """
    keys: list[Keys] = []
    blocks: list[Blocks] = []
    held = 0
    for start in range(0, block_count, _SLICE):
        stop = min(start + _SLICE, block_count)
        if bitmap is None:
            fresh = np.arange(start, stop, dtype=np.uint32)
        else:
            bits = np.unpackbits(
                bitmap[start // 8 : -(-stop // 8)], count=stop - start, bitorder="little"
            )
            fresh = np.flatnonzero(bits == 0).astype(np.uint32) + np.uint32(start)
        blocks.append(fresh)
        keys.append(_sort_keys(seed, epoch, fresh))
        held += len(fresh)
        if held >= limit + _SLICE:
            all_keys, all_blocks = np.concatenate(keys), np.concatenate(blocks)
            best = np.argpartition(all_keys, limit - 1)[:limit]
            keys, blocks, held = [all_keys[best]], [all_blocks[best]], limit
    all_keys, all_blocks = np.concatenate(keys), np.concatenate(blocks)
    if len(all_keys) > limit:
        best = np.argpartition(all_keys, limit - 1)[:limit]
        all_keys, all_blocks = all_keys[best], all_blocks[best]
    order: Blocks = all_blocks[np.argsort(all_keys)]
    return order


def block_order(seed: int, epoch: int, block_count: int) -> Blocks:
    """The order in which ``epoch`` visits the blocks: (block_count,) uint32, a permutation.

    It rests on SHA-256 and on 64-bit integer arithmetic alone, so it is the same on every platform
    and with every NumPy. While it runs it needs about 36 bytes of memory a block;
    :meth:`CommittedBlocks.next_blocks` draws from the same order without building it.

    Raises:
        CorpusError: no block, or more than ``limits.MAX_BLOCKS``.
    """
    _check_block_count(block_count)
    return _first_blocks(seed, epoch, block_count, None, block_count)


def _check_block_count(block_count: int) -> None:
    if not 1 <= block_count <= limits.MAX_BLOCKS:
        raise CorpusError(
            f"A corpus of {block_count} blocks cannot be leased: it must have 1 to "
            f"{limits.MAX_BLOCKS}; build it again with another block size.",
            code="block-count",
        )


# What is committed ----------------------------------------------------------------------


class CommittedBlocks:
    """The blocks whose contributions were accepted, epoch by epoch: one bit a block.

    An epoch that is whole costs nothing once every epoch before it is whole too. Equal sets have
    equal bytes, whatever the order in which they came about.
    """

    def __init__(self, block_count: int) -> None:
        """Nothing committed yet, of ``block_count`` blocks an epoch."""
        _check_block_count(block_count)
        self._block_count = block_count
        self._first_open = 0  # every earlier epoch is complete
        self._complete: set[int] = set()  # complete, but after one that is not
        self._bitmaps: dict[int, npt.NDArray[np.uint8]] = {}
        self._counts: dict[int, int] = {}

    @property
    def block_count(self) -> int:
        """Blocks in one epoch."""
        return self._block_count

    @property
    def first_open_epoch(self) -> int:
        """The oldest epoch that still has an uncommitted block."""
        return self._first_open

    @property
    def total(self) -> int:
        """Committed (epoch, block) pairs."""
        whole = self._first_open + len(self._complete)
        return whole * self._block_count + sum(self._counts.values())

    def remaining(self, epoch: int) -> int:
        """Blocks of ``epoch`` that are not committed."""
        if self._is_complete(epoch):
            return 0
        return self._block_count - self._counts.get(epoch, 0)

    def _is_complete(self, epoch: int) -> bool:
        return epoch < self._first_open or epoch in self._complete

    def __contains__(self, ref: BlockRef) -> bool:
        if ref.block >= self._block_count:
            return False
        if self._is_complete(ref.epoch):
            return True
        bitmap = self._bitmaps.get(ref.epoch)
        return bitmap is not None and bool(bitmap[ref.block >> 3] >> (ref.block & 7) & 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CommittedBlocks) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # mutable, so not hashable

    def add(self, refs: Iterable[BlockRef]) -> None:
        """Commit ``refs``, all of them or, when one is refused, none.

        Raises:
            StateError: a block lies outside the corpus, is committed already or comes twice.
        """
        wanted = list(refs)
        seen: set[tuple[int, int]] = set()
        for ref in wanted:
            if ref.block >= self._block_count:
                raise StateError(
                    f"Block {ref.block} is not in this corpus of {self._block_count} blocks: "
                    "the lease belongs to another corpus.",
                    code="unknown-block",
                )
            if ref in self or (ref.epoch, ref.block) in seen:
                raise StateError(
                    f"Block {ref.block} of epoch {ref.epoch} is committed already: "
                    "no block may count twice, so this contribution cannot be committed.",
                    code="block-committed",
                )
            seen.add((ref.epoch, ref.block))
        for epoch, block in seen:
            if epoch not in self._bitmaps:
                self._bitmaps[epoch] = np.zeros(-(-self._block_count // 8), dtype=np.uint8)
                self._counts[epoch] = 0
            self._bitmaps[epoch][block >> 3] |= np.uint8(1 << (block & 7))
            self._counts[epoch] += 1
        for epoch in {epoch for epoch, _ in seen}:
            if self._counts[epoch] == self._block_count:
                del self._bitmaps[epoch], self._counts[epoch]
                self._complete.add(epoch)
        while self._first_open in self._complete:
            self._complete.remove(self._first_open)
            self._first_open += 1

    def next_blocks(self, seed: int, epoch: int, limit: int) -> Blocks:
        """The first uncommitted blocks of ``epoch`` in its order: (<= limit,) uint32."""
        if limit <= 0 or self._is_complete(epoch):
            return np.empty(0, dtype=np.uint32)
        bitmap = self._bitmaps.get(epoch)
        return _first_blocks(seed, epoch, self._block_count, bitmap, limit)

    def to_bytes(self) -> bytes:
        """The set as bytes for the ledger: a header, then one bitmap for each open epoch."""
        parts = [
            _HEADER.pack(
                _MAGIC,
                self._block_count,
                self._first_open,
                len(self._complete),
                len(self._bitmaps),
            )
        ]
        parts += [_EPOCH.pack(epoch) for epoch in sorted(self._complete)]
        for epoch in sorted(self._bitmaps):
            parts += [_EPOCH.pack(epoch), self._bitmaps[epoch].tobytes()]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            StateError: the bytes are not such a set; nothing is allocated for a false length.
        """
        broken = StateError(
            "The stored set of committed blocks is damaged: restore the ledger from its backup, "
            "or rebuild the set from the committed leases.",
            code="committed-blocks",
        )
        if len(data) < _HEADER.size:
            raise broken
        magic, block_count, first_open, complete, opened = _HEADER.unpack_from(data)
        width = -(-block_count // 8)
        whole = _HEADER.size + complete * _EPOCH.size + opened * (_EPOCH.size + width)
        if magic != _MAGIC or not 1 <= block_count <= limits.MAX_BLOCKS or len(data) != whole:
            raise broken
        made = cls(block_count)
        made._first_open = first_open
        at = _HEADER.size
        previous = first_open
        for _ in range(complete):
            (epoch,) = _EPOCH.unpack_from(data, at)
            at += _EPOCH.size
            if epoch <= previous:
                raise broken
            made._complete.add(epoch)
            previous = epoch
        previous = first_open - 1
        for _ in range(opened):
            (epoch,) = _EPOCH.unpack_from(data, at)
            bitmap = np.frombuffer(data, np.uint8, count=width, offset=at + _EPOCH.size).copy()
            at += _EPOCH.size + width
            count = int(np.bitwise_count(bitmap).sum())
            spare = int(bitmap[-1]) >> ((block_count - 1) % 8 + 1)
            if epoch <= previous or epoch in made._complete or spare:
                raise broken
            if not 1 <= count < block_count:
                raise broken
            made._bitmaps[epoch], made._counts[epoch] = bitmap, count
            previous = epoch
        return made
