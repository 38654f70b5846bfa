"""The rules that the engine asks for thousands of nodes at once, as arrays.

Each says which production function it is; tests hold that they give the same numbers.
"""

from __future__ import annotations

import numpy as np

from talkoot.protocol.limits import MAX_LEASE_BLOCKS
from talkoot.server.book import LEASE_SHARE, SPEED_MEMORY
from talkoot.sims.planning.timeline import F64, I64


def lease_tokens(
    speeds: F64,
    nominal_tokens: int,
    deadline_seconds: float,
    block_tokens: int,
    *,
    min_ratio: float = 0.25,
    max_ratio: float = 4.0,
) -> I64:
    """Tokens of each lease: ``leases.tokens_wanted`` for each speed, then whole blocks.

    ``speeds`` (nodes,) are what the coordinator has measured, tokens a second; 0 is unknown.
    """
    longest = LEASE_SHARE * deadline_seconds
    known = speeds[speeds > 0]
    median = float(np.median(known)) if len(known) else 0.0
    nominal = float(nominal_tokens)
    ratio = np.ones(len(speeds))
    if median > 0:
        nominal = float(max(1, round(min(nominal_tokens, median * longest))))
        ratio = np.where(speeds > 0, np.clip(speeds / median, min_ratio, max_ratio), min_ratio)
    wanted = nominal * ratio
    wanted = np.where(speeds > 0, np.minimum(wanted, speeds * longest), wanted)
    tokens = np.maximum(1, np.rint(wanted)).astype(np.int64)
    blocks = (2 * tokens + block_tokens) // (2 * block_tokens)
    return np.clip(blocks, 1, MAX_LEASE_BLOCKS) * block_tokens


def measured_speeds(before: F64, now: F64) -> F64:
    """What the coordinator holds for a node's speed after a contribution (``Book.accept``)."""
    old = np.where(before > 0, before, now)
    return (1 - SPEED_MEMORY) * old + SPEED_MEMORY * now


def fair_rate(caps: F64, capacity: float) -> float:
    """The most that one stream gets when all share ``capacity``: max-min fairness (water-filling).

    ``caps`` (streams,) is what each stream's own line bears, bytes a second. A stream then moves at
    ``min(cap, fair_rate)``.
    """
    if caps.sum() <= capacity:
        return float("inf")
    rising = np.sort(caps)
    before = np.concatenate([[0.0], np.cumsum(rising)[:-1]])
    shares = (capacity - before) / np.arange(len(rising), 0, -1)
    # The first stream whose own line bears more than its share: from there on all get the share.
    return float(shares[int(np.argmax(rising > shares))])


def one_after_another(ready: F64, seconds: F64 | float) -> F64:
    """When each job is done in a queue of one place, in the order in which they are ready.

    With ``seconds`` a job takes. The recursion ``done = max(done before, ready) + seconds`` as a
    running maximum. ``ready`` may be inf (never comes).
    """
    order = np.argsort(ready, kind="stable")
    takes = np.broadcast_to(np.asarray(seconds, dtype=np.float64), ready.shape)[order]
    total = np.cumsum(takes)
    done = total + np.maximum.accumulate(ready[order] - (total - takes))
    result = np.empty_like(ready)
    result[order] = done
    return result
