"""Which node trains on which blocks: a pure function of the seed, the round and what is committed.

An epoch is one pass over the corpus in an order of its own (``blocks.py``). A block of an
epoch is *committed* when the contribution that trained on it was accepted; until then it stays in
the pool, whoever held a lease on it before. So no block counts twice in an epoch and none is lost.
Both sides and any auditor can derive the same leases from the same ledger (the idea of Psyche's
``data_selection.rs``: assignment is computed, not negotiated).

Nothing here touches a clock, a disk, a network or a random number generator.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from talkoot.protocol import limits
from talkoot.protocol.blocks import CommittedBlocks, block_order
from talkoot.protocol.messages import BlockRef, Lease

__all__ = [
    "CommittedBlocks",
    "Member",
    "block_order",
    "lease_id",
    "plan_leases",
    "tokens_wanted",
]


@dataclass(frozen=True, slots=True)
class Member:
    """A node that takes part in a round."""

    node_id: str
    tokens_wanted: int  # tokens; see tokens_wanted()

    def __post_init__(self) -> None:
        if self.tokens_wanted < 0:
            raise ValueError(f"tokens_wanted must not be negative, not {self.tokens_wanted}")


def tokens_wanted(
    speed: float,
    median_speed: float,
    nominal_tokens: int,
    min_ratio: float = 0.25,
    max_ratio: float = 4.0,
    longest_seconds: float = math.inf,
) -> int:
    """Tokens for a node that trains ``speed`` tokens a second, so that all finish together.

    A node at the median gets ``nominal_tokens``. The ratio is clamped, so that a false or freak
    measurement can neither starve a node nor hand it the round. A node without a usable
    measurement gets the least; without a median everybody gets the nominal amount.

    No lease takes longer than ``longest_seconds`` at the measured speeds: where the nominal amount
    would, everybody's shrinks alike, and a node below the clamp gets what it can do.
    """
    if math.isfinite(median_speed) and median_speed > 0:
        nominal_tokens = max(1, round(min(nominal_tokens, median_speed * longest_seconds)))
    if not (math.isfinite(median_speed) and median_speed > 0):
        ratio = 1.0
    elif not (math.isfinite(speed) and speed > 0):
        ratio = min_ratio
    else:
        ratio = min(max(speed / median_speed, min_ratio), max_ratio)
    wanted = nominal_tokens * ratio
    if math.isfinite(speed) and speed > 0:
        wanted = min(wanted, speed * longest_seconds)
    return max(1, round(wanted))


def lease_id(
    run_id: str, round_number: int, attempt: int, node_id: str, blocks: Sequence[BlockRef]
) -> str:
    """Name of a lease: 32 hexadecimal digits of the SHA-256 of all that it promises."""
    content = [run_id, round_number, attempt, node_id, [[ref.epoch, ref.block] for ref in blocks]]
    encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return hashlib.sha256(b"talkoot lease\0" + encoded).hexdigest()[:32]


def plan_leases(
    *,
    seed: int,
    run_id: str,
    round: int,
    attempt: int,
    block_tokens: int,
    committed: CommittedBlocks,
    members: Sequence[Member],
) -> tuple[Lease, ...]:
    """Share out uncommitted blocks among ``members``: one lease each, sorted by node id.

    The oldest open epoch is drained first, in its order, and the next one continues where it runs
    short. A member gets ``tokens_wanted / block_tokens`` blocks, rounded half up, at least one and
    at most ``limits.MAX_LEASE_BLOCKS``. No block of an epoch is in two leases of a plan. The plan
    is the same whatever the order of ``members``.

    Blocks left over from a round that failed come first again, so members take turns at the head
    of the queue (by a hash of round and attempt): one node that never delivers can't hold the same
    blocks for ever.

    Raises:
        ValueError: the same node twice, or ``block_tokens`` below one.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
    if len({member.node_id for member in members}) != len(members):
        raise ValueError("a node appears twice among the members of a round")

    def turn(member: Member) -> tuple[bytes, str]:
        key = f"{seed}/{run_id}/{round}/{attempt}/{member.node_id}".encode()
        return hashlib.sha256(b"talkoot turn\0" + key).digest(), member.node_id

    queue = sorted(members, key=turn)
    shares = [_share(member.tokens_wanted, block_tokens) for member in queue]
    pool = _draw(seed, committed, sum(shares))
    leases: list[Lease] = []
    start = 0
    for member, share in zip(queue, shares, strict=True):
        blocks = tuple(pool[start : start + share])
        start += share
        leases.append(
            Lease(
                lease_id=lease_id(run_id, round, attempt, member.node_id, blocks),
                run_id=run_id,
                round=round,
                attempt=attempt,
                node_id=member.node_id,
                blocks=blocks,
                tokens=len(blocks) * block_tokens,
            )
        )
    return tuple(sorted(leases, key=lambda lease: lease.node_id))


def _share(tokens: int, block_tokens: int) -> int:
    """Blocks for ``tokens``, in integers: no rounding that depends on a float."""
    return min(max(1, (2 * tokens + block_tokens) // (2 * block_tokens)), limits.MAX_LEASE_BLOCKS)


def _draw(seed: int, committed: CommittedBlocks, wanted: int) -> list[BlockRef]:
    """Exactly ``wanted`` uncommitted blocks, oldest epoch first."""
    pool: list[BlockRef] = []
    epoch = committed.first_open_epoch
    while len(pool) < wanted:
        blocks = committed.next_blocks(seed, epoch, wanted - len(pool))
        pool += [BlockRef(epoch=epoch, block=block) for block in blocks.tolist()]
        epoch += 1
    return pool
