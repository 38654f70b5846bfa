"""Who agrees with whom in a round: a pure function of sketches and weights to an influence each.

When a round closes, all that was accepted is there, and each contribution can be held against the
others. Honest ones, trained on different blocks from the same weights, have a little in common, and
all about equally much; noise has nothing in common with anybody, and a reversed one less than
nothing. Colluders have a lot in common with each other only: hence medians, which a minority cannot
move, and never sums.

What comes out is an *influence* from 0 to 1. It multiplies a contribution's weight in each mean,
and the contribution itself: with sparse updates most coordinates are sent by few nodes, and a small
weight alone would still have the whole say where nobody else spoke.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from talkoot.server.sketch import F32, F64, NOISE

MIN_MEMBERS: Final = 4
"""With three, one that lies and two that do not look alike from every side."""
MIN_AGREEMENT: Final = 4 * NOISE
"""A usual cosine below this cannot be told from none by sketches."""
SET_ASIDE: Final = 0.12
"""Of the usual agreement. Honest nodes were seen at 0.16 of it and above, liars at 0.11 and below
(``docs/trust.md``)."""
CLIQUE_SIGMAS: Final = 10.0
CLIQUE_MARGIN: Final = 0.15
"""Cosines that are so much above the usual one belong to the same hand, or the same text."""


@dataclass(frozen=True)
class Member:
    """An accepted contribution of the closing round."""

    node_id: str
    weight: float
    """Above 0: tokens."""
    sketch: F32
    established: bool
    """False on probation."""


@dataclass(frozen=True)
class Judgement:
    """How much a contribution counts, and why."""

    node_id: str
    influence: float
    """0 to 1."""
    agreement: float | None
    """Median cosine with the others relative to the usual one; None when it cannot be told."""
    code: str
    sentence: str


def cosines_of(members: Sequence[Member]) -> F64:
    """(n, n) cosines between the members' sketches."""
    sketches = np.stack([member.sketch for member in members]).astype(np.float64)
    cosines: F64 = sketches @ sketches.T
    return cosines


def weighted_median(values: F64, weights: F64) -> float:
    """The middle of ``values`` by weight; the mean of the two in the middle when they tie."""
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    half = 0.5 * sums[-1]
    low = int(np.searchsorted(sums, half * (1 - 1e-12)))
    high = int(np.searchsorted(sums, half * (1 + 1e-12)))
    high = min(high, len(values) - 1)
    return 0.5 * (float(values[order[low]]) + float(values[order[high]]))


def probation_factor(members: Sequence[Member], share: float) -> float:
    """What the weights of nodes on probation are multiplied by, so that together they hold at most
    ``share`` of the round; 1 when nobody is established, since somebody has to begin."""
    old = sum(member.weight for member in members if member.established)
    new = sum(member.weight for member in members if not member.established)
    if old == 0 or new == 0:
        return 1.0
    return min(1.0, share / (1 - share) * old / new)


def judge(
    members: Sequence[Member], *, probation_share: float, set_aside: float = SET_ASIDE
) -> list[Judgement]:
    """The influence of each member, in the order given.

    Args:
        members: at least one; a node appears once.
        probation_share: of the round's weight that nodes on probation may hold, below 1.
        set_aside: of the usual agreement; who has less does not count.
    """
    factor = probation_factor(members, probation_share)
    weights = np.array([m.weight * (1.0 if m.established else factor) for m in members])
    start = np.array([1.0 if m.established else factor for m in members])
    cosines = cosines_of(members)
    n = len(members)
    agreements, usual = _agreements(cosines, weights)
    apart = usual is not None and usual >= MIN_AGREEMENT
    cliques = _cliques(cosines, weights, agreements, usual if apart else None)
    judged = []
    for i, member in enumerate(members):
        relative = float(agreements[i]) / usual if apart and usual is not None else None
        influence, code, sentence = float(start[i]), "counted", "Counted in full."
        if n < MIN_MEMBERS:
            sentence = "Counted in full: too few contributions to compare."
        elif relative is None:
            sentence = "Counted in full: the contributions have too little in common to compare."
        if relative is not None and relative < set_aside:
            influence, code = 0.0, "set-aside"
            sentence = (
                f"Set aside: it has {relative:.2f} of the agreement with the others that is usual "
                f"in this round, and {set_aside:.2f} is asked for."
            )
        elif cliques[i] > 1:
            influence, code = influence / cliques[i], "alike"
            sentence = (
                f"Counted as one of {cliques[i]} that are more alike than independent work is."
            )
        elif influence < 1:
            code = "on-probation"
            sentence = (
                f"Counted by {influence:.2f}: nodes on probation hold at most "
                f"{probation_share:.0%} of a round."
            )
        judged.append(
            Judgement(
                node_id=member.node_id,
                influence=influence,
                agreement=relative,
                code=code,
                sentence=sentence,
            )
        )
    if all(one.influence == 0 for one in judged):  # nothing to compare with: nothing is lost
        return [
            Judgement(j.node_id, float(start[i]), j.agreement, "counted", "Counted in full.")
            for i, j in enumerate(judged)
        ]
    return judged


def _agreements(cosines: F64, weights: F64) -> tuple[F64, float | None]:
    """Each member's median cosine with the others, and the median of those."""
    n = len(weights)
    if n < MIN_MEMBERS:
        return np.ones(n), None
    others = ~np.eye(n, dtype=bool)
    agreements = np.array(
        [weighted_median(cosines[i][others[i]], weights[others[i]]) for i in range(n)]
    )
    return agreements, weighted_median(agreements, weights)


def _cliques(cosines: F64, weights: F64, agreements: F64, usual: float | None) -> list[int]:
    """For each member, how many (itself too) are much more alike than they should be.

    After FoolsGold (arXiv 1808.04866, section 4): many hands of one adversary look alike. What two
    members should have in common follows from what each has with everybody: one that is near to
    all, and so near to each, is not taken for the twin of all.
    """
    n = len(weights)
    if n < MIN_MEMBERS:
        return [1] * n
    toward = np.maximum(agreements, 0.0)
    expected = np.outer(toward, toward) / usual if usual is not None else np.zeros((n, n))
    excess = cosines - expected
    rows, columns = np.triu_indices(n, k=1)
    pairs, both = excess[rows, columns], weights[rows] * weights[columns]
    middle = weighted_median(pairs, both)
    spread = 1.4826 * weighted_median(np.abs(pairs - middle), both)
    alike = excess > middle + max(CLIQUE_SIGMAS * spread, CLIQUE_MARGIN)
    np.fill_diagonal(alike, val=True)
    return [int(count) for count in alike.sum(axis=1)]
