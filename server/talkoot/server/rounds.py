"""The round state machine: a pure function of (round, leases, now).

    (none) ──open──► open ──close──► closing ──publish──► published
                      │  ▲
                      └──┘ reopen: new leases under the next attempt number

``closing`` means that the set of contributions is fixed; aggregation may then run, die and run
again, and always gives the same version. Nothing here reads a clock or a database.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

MIN_REPORT_SECONDS: Final = 1.0
"""How often a node of a small network reports; stretched as the network grows."""
MISSED_REPORTS: Final = 3
"""Reports that may be missing before a node counts as gone."""

LeaseState = Literal["open", "committed", "released"]


@dataclass(frozen=True)
class LeaseView:
    """A lease as the state machine sees it."""

    node_id: str
    state: LeaseState
    live: bool
    """Whether the node has been heard of lately, so that waiting for it makes sense."""
    tokens: int = 0


@dataclass(frozen=True)
class RoundView:
    """An open round as the state machine sees it."""

    round: int
    deadline_unix: float
    quorum: int
    leases: Sequence[LeaseView]
    close_at_share: float = 1.0
    """Of the tokens committed and awaited that is enough, once the quorum is there."""


@dataclass(frozen=True)
class Tally:
    """An open round's leases, counted."""

    committed: int
    awaited: int
    """Open, and their nodes are within reach."""
    lost: int
    """Open, and their nodes are not."""
    tokens_committed: int = 0
    tokens: int = 0
    """Of those that are committed or awaited."""


@dataclass(frozen=True)
class Decision:
    """What to do with the round now, and why."""

    action: Literal["wait", "close", "reopen"]
    code: str
    sentence: str


def decide(view: RoundView, now_unix: float) -> Decision:
    """Whether an open round waits, closes, or is leased anew; see :func:`decide_tally`."""
    tally = Tally(
        committed=sum(lease.state == "committed" for lease in view.leases),
        awaited=sum(lease.state == "open" and lease.live for lease in view.leases),
        lost=sum(lease.state == "open" and not lease.live for lease in view.leases),
        tokens_committed=sum(lease.tokens for lease in view.leases if lease.state == "committed"),
        tokens=sum(
            lease.tokens
            for lease in view.leases
            if lease.state == "committed" or (lease.state == "open" and lease.live)
        ),
    )
    return decide_tally(
        view.round,
        view.deadline_unix,
        view.quorum,
        tally,
        now_unix,
        close_at_share=view.close_at_share,
    )


def decide_tally(
    number: int,
    deadline_unix: float,
    quorum: int,
    tally: Tally,
    now_unix: float,
    *,
    close_at_share: float = 1.0,
) -> Decision:
    """Whether open round ``number`` waits, closes, or is leased anew.

    A round closes when nobody is left to wait for and the quorum is met, or at its deadline if the
    quorum is met. With ``close_at_share`` below 1 it closes, too, when so much of the tokens that
    it can still get has arrived: the last few of many nodes keep all others waiting. When the
    quorum can no longer come (everybody left, declined or missed the deadline), the blocks that
    were not committed go back to the pool and the round is leased anew; what was committed stays
    committed and counts towards the quorum of the next attempt.
    """
    committed, awaited, lost = tally.committed, tally.awaited, tally.lost
    told = f"{committed} contributed"
    told += f", {awaited} still at work" if awaited else ""
    told += f", {lost} out of reach" if lost else ""

    if committed >= quorum:
        if awaited == 0:
            code = "all-answered" if lost == 0 else "all-reachable-answered"
            return Decision("close", code, f"Round {number} closes: {told}.")
        if now_unix >= deadline_unix:
            return Decision("close", "deadline", f"Round {number} closes at its deadline: {told}.")
        if close_at_share < 1 and tally.tokens_committed >= close_at_share * tally.tokens > 0:
            share = 100 * tally.tokens_committed / tally.tokens
            return Decision(
                "close",
                "enough",
                f"Round {number} closes with {share:.0f} % of its tokens: {told}.",
            )
        return Decision("wait", "at-work", f"Round {number} waits for its nodes: {told}.")

    if now_unix >= deadline_unix:
        return Decision(
            "reopen",
            "no-quorum",
            f"Round {number} missed its quorum of {quorum} at the deadline: {told}.",
        )
    if awaited + committed < quorum and lost == 0:
        return Decision(
            "reopen",
            "nobody-left",
            f"Round {number} has nobody left to reach its quorum of {quorum}: {told}.",
        )
    return Decision("wait", "at-work", f"Round {number} waits for its nodes: {told}.")


def poll_seconds(nodes: int, max_pulls_per_second: float, minimum: float) -> float:
    """How often a node may ask for messages, so that all together stay under the cap.

    Flower's fixed 3 s would let a SuperLink that bears 84 pulls a second hold some 250 nodes.
    """
    return max(minimum, nodes / max_pulls_per_second)


def report_seconds(poll: float) -> float:
    """How often a node reports to the data plane, which writes to the ledger each time."""
    return max(MIN_REPORT_SECONDS, 4 * poll)


def patience_seconds(lost_after: float, poll: float) -> float:
    """How long a node may be silent before nobody waits for it: three of its reports at least.

    In a large network a node is told to report less often than ``round.lost_after_seconds``.
    """
    return max(lost_after, MISSED_REPORTS * report_seconds(poll))
