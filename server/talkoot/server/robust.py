"""Rules of aggregation that bound what a liar can do; each is flat in memory and deterministic.

A rule has one or both of two places to act. *Weights* of whole contributions come from the pairwise
inner products of their sketches, before a tensor is read (geometric median). *Combining* happens
coordinate by coordinate, over a tensor or a slab of one (trimmed mean, sign majority). Clipping to
the median norm comes first, always.

In what a rule combines a coordinate that a node did not send is 0 for that node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Final, Literal

import numpy as np
from pydantic import Field

from talkoot.protocol.messages import Message
from talkoot.server.sketch import F64

if TYPE_CHECKING:
    from torch import Tensor

    from talkoot.protocol.codec import SparseTensor

Part = tuple["SparseTensor", float, float]
"""Values of one contribution, its weight, and what its values are multiplied by."""
Combine = Callable[[int, Sequence[Part]], "Tensor"]

WEISZFELD_STEPS: Final = 64
SMOOTHING: Final = 1e-3
"""Of the median norm: distances below it count as it (arXiv 1912.13445, algorithm 1)."""


class AggregationSpec(Message):
    """How contributions become one update: the operator's ``[aggregation]``."""

    rule: Literal["mean", "trimmed-mean", "geometric-median", "sign-majority"] = "mean"
    """``mean``: of each coordinate over those who sent it. ``trimmed-mean``: without its ``trim``
    largest and smallest values. ``geometric-median``: contributions far from the others weigh less.
    ``sign-majority``: only values with the sign that the majority by weight has."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.25
    """Share of the contributors that ``trimmed-mean`` drops at either end; the other rules do not
    read it."""


def geometric_median_weights(inner: F64, weights: F64) -> F64:
    """Weights (they sum to 1) whose weighted mean is the geometric median of the points.

    Weiszfeld's iteration, smoothed (RFA: Pillutla, Kakade and Harchaoui, arXiv 1912.13445,
    algorithm 1), in terms of inner products alone.

    Args:
        inner: (n, n) inner products of the points.
        weights: (n,) of the points, not negative, not all 0.
    """
    given = weights / weights.sum()
    squares = np.diag(inner).copy()
    floor = SMOOTHING * float(np.sqrt(np.median(squares))) or 1.0
    now = given.copy()
    for _ in range(WEISZFELD_STEPS):
        along = inner @ now
        distances = np.sqrt(np.maximum(squares - 2 * along + now @ along, 0.0))
        now = given / np.maximum(distances, floor)
        now /= now.sum()
    result: F64 = now
    return result


def geometric_influences(cosines: F64, norms: F64, weights: F64) -> F64:
    """(n,) influences from 0 to 1: 1 for whoever the geometric median gains the most weight."""
    if not (weights > 0).any():
        return np.ones_like(weights)
    gained = geometric_median_weights(cosines * np.outer(norms, norms), weights)
    ratio = np.divide(gained, weights, out=np.zeros_like(gained), where=weights > 0)
    result: F64 = ratio / ratio.max()
    return result


def _sorted_entries(parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor]:
    """All entries of all parts, by (position, value): positions, scaled values, weights."""
    import torch

    positions = torch.cat([sparse.indices for sparse, _, _ in parts])
    values = torch.cat([sparse.values * factor for sparse, _, factor in parts])
    weights = torch.cat([torch.full_like(sparse.values, weight) for sparse, weight, _ in parts])
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(positions[order], stable=True)]
    return positions[order], values[order], weights[order]


def _mean_of(
    numel: int, positions: Tensor, values: Tensor, weights: Tensor, kept: Tensor
) -> Tensor:
    """Weighted mean of the kept entries of each coordinate; 0 where none is kept."""
    import torch

    total = torch.zeros(numel, dtype=torch.float32)
    over = torch.zeros(numel, dtype=torch.float32)
    total.index_add_(0, positions[kept], (values * weights)[kept])
    over.index_add_(0, positions[kept], weights[kept])
    return torch.where(over > 0, total / over, 0.0)


def trimmed_mean(numel: int, parts: Sequence[Part], trim: float) -> Tensor:
    """Each coordinate without its ``floor(trim * n)`` largest and as many smallest of n values.

    Who did not send the coordinate has 0 there. What is left of those who sent it is averaged by
    weight, so the result lies between the smallest and the largest honest value (0 among them) as
    long as no more nodes lie than are trimmed at one end (Yin et al., arXiv 1803.01498, section 4).

    Returns (numel,) fp32.
    """
    import torch

    n = len(parts)
    cut = int(trim * n)
    positions, values, weights = _sorted_entries(parts)
    if positions.numel() == 0:
        return torch.zeros(numel, dtype=torch.float32)
    _, counts = torch.unique_consecutive(positions, return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    place = torch.arange(positions.numel()) - torch.repeat_interleave(starts, counts)
    # The n - count zeros lie between the negative and the positive entries.
    absent = n - torch.repeat_interleave(counts, counts)
    rank = torch.where(values < 0, place, place + absent)
    kept = (rank >= cut) & (rank < n - cut)
    return _mean_of(numel, positions, values, weights, kept)


def sign_majority(numel: int, parts: Sequence[Part]) -> Tensor:
    """Each coordinate over those who sent it with the sign that has more weight there.

    The election of TIES (arXiv 2306.01708, section 4), by weight and not by magnitude: a liar can't
    win it by shouting. A tie gives 0.

    Returns (numel,) fp32.
    """
    import torch

    positions, values, weights = _sorted_entries(parts)
    votes = torch.zeros(numel, dtype=torch.float32)
    votes.index_add_(0, positions, weights * torch.sign(values))
    kept = torch.sign(values) * torch.sign(votes[positions]) > 0
    return _mean_of(numel, positions, values, weights, kept)
