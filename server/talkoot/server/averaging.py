"""The mean of sparse contributions, in blocks that stay in a core's own cache. For ``closing.py``.

A section's sums and weights are 8 MB, and every contribution goes all over them: where several
threads do so at once, memory is what they wait for. Block by block they are 1 MB, written and read
where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Final

import numpy as np

from talkoot.protocol import codec_bits as bits
from talkoot.protocol.codec import SparseTensor
from talkoot.protocol.kernels import KERNELS

Weighted = tuple[SparseTensor, float, float]
"""Values of one contribution, its weight, and what its values are multiplied by."""

BLOCK_ELEMENTS: Final = 2**17
AT_ONCE: Final = 32
"""Contributions that are held decoded: memory does not follow their number."""


def mean_by_block(elements: int, parts: Iterator[Weighted]) -> Iterator[tuple[slice, bits.F32]]:
    """``sum(w * f * v) / sum(w)`` of each coordinate over those who sent it; 0 where nobody did.

    Contributions are added up in the order given. Yields blocks in order, each good until the next
    is asked for: where it lies, and its means, which the caller may change.
    """
    first, following = _some(parts), _some(parts)
    edges = np.append(np.arange(0, elements, BLOCK_ELEMENTS), elements)
    room = BLOCK_ELEMENTS if not following else elements
    total, weights = np.zeros((2, min(room, elements)), dtype=np.float32)
    spans = [slice(start, end) for start, end in pairwise(edges)]
    if not following:
        held = _cut(first, edges)
        for number, span in enumerate(spans):
            some, sums = total[: span.stop - span.start], weights[: span.stop - span.start]
            if number:
                some.fill(0.0)
                sums.fill(0.0)
            _add(some, sums, held, number, span.start)
            yield span, _divided(some, sums)
        return
    while first:
        held = _cut(first, edges)
        for number, span in enumerate(spans):
            _add(total[span], weights[span], held, number, span.start)
        first, following = following, _some(parts)
    for span in spans:
        yield span, _divided(total[span], weights[span])


def _some(parts: Iterator[Weighted]) -> list[Weighted]:
    return list(islice(parts, AT_ONCE))


_Cut = tuple[bits.I64, bits.F32, bits.I64, float, float]


def _cut(parts: Sequence[Weighted], edges: bits.I64) -> list[_Cut]:
    """Positions, values, where among them each block begins, weight, factor."""
    found = []
    for sparse, weight, factor in parts:
        indices = sparse.indices.numpy()
        cuts = np.searchsorted(indices, edges)
        found.append((indices, sparse.values.numpy(), cuts, weight, factor))
    return found


def _add(
    total: bits.F32, weights: bits.F32, parts: Sequence[_Cut], number: int, start: int
) -> None:
    """Add what lies in one block, which begins at element ``start``."""
    compiled = KERNELS.after(0)
    for indices, values, cuts, weight, factor in parts:
        here = slice(cuts[number], cuts[number + 1])
        if compiled:
            compiled.accumulate(
                total, weights, indices[here], values[here], weight * factor, weight, start
            )
            continue
        local = indices[here] - start
        np.add.at(total, local, values[here] * np.float32(weight * factor))
        np.add.at(weights, local, np.float32(weight))


def _divided(total: bits.F32, weights: bits.F32) -> bits.F32:
    if compiled := KERNELS.after(0):
        compiled.divide(total, weights)
        return total
    # Where nobody sent anything both are 0, and what they are divided by may be anything.
    np.maximum(weights, np.finfo(np.float32).tiny, out=weights)
    np.divide(total, weights, out=total)
    return total
