"""One attempt at a round: what each node does when, and when the real rules close it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from talkoot.server.rounds import Decision, Tally, decide_tally
from talkoot.sims.planning.timeline import F64, I64, Bools


@dataclass(frozen=True)
class Course:
    """What the members of a round do, if nobody closes it. All (members,) seconds; inf is never."""

    nodes: I64
    tokens: I64
    fetched: F64
    """The update and the blocks are there, and training begins."""
    trained: F64
    """The lease is trained."""
    encoded: F64
    """The payload is written."""
    pushed: F64
    """The payload is at the coordinator."""
    arrived: F64
    """It is verified and accepted."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    decision: Decision
    moment: float
    committed: Bools  # (members,)
    lost: int
    """Open leases whose nodes were out of reach."""


@dataclass(frozen=True)
class Rule:
    """What decides about an open round."""

    number: int
    deadline: float
    quorum: int
    lost_after: float
    already: int
    """Contributions of earlier attempts."""
    already_tokens: int = 0
    close_at_share: float = 1.0


def settle(
    rule: Rule, course: Course, away: tuple[I64, F64, F64], begin: float, blind: tuple[float, float]
) -> Outcome:
    """When the round closes or is leased anew: the production rules, asked at each moment at which
    their answer can change.

    Args:
        rule: of this round.
        course: of its members.
        away: (index of the member, gone, back), from ``Timelines.absences``.
        begin: when it opened.
        blind: from when to when the coordinator is away and decides nothing.
    """
    seen = _changes(rule, course, away, begin)
    moments, committed = seen.moments, seen.committed
    quorum_met = committed >= rule.quorum
    enough = seen.arrived >= rule.close_at_share * seen.tokens
    settled = (quorum_met & ((seen.awaited == 0) | enough)) | (
        ~quorum_met & (seen.awaited + committed < rule.quorum) & (seen.lost == 0)
    )
    for place in np.flatnonzero(settled):
        moment = float(moments[place])
        if moment >= rule.deadline:
            break
        if blind[0] <= moment < blind[1]:
            continue
        decision = seen.ask(rule, int(place), moment)
        if decision.action != "wait":
            return _outcome(course, decision, moment, int(seen.lost[place]))
    moment = rule.deadline
    if blind[0] <= moment < blind[1]:
        moment = blind[1]
    last = int(np.searchsorted(moments, moment, side="right")) - 1
    return _outcome(course, seen.ask(rule, last, moment), moment, int(seen.lost[last]))


@dataclass(frozen=True)
class _Seen:
    """What the coordinator sees from each moment on; all (moments,)."""

    moments: F64
    awaited: I64
    lost: I64
    committed: I64
    arrived: I64
    """Tokens."""
    tokens: I64
    """Arrived or awaited."""

    def ask(self, rule: Rule, place: int, moment: float) -> Decision:
        """The production rules' answer."""
        tally = Tally(
            committed=int(self.committed[place]),
            awaited=int(self.awaited[place]),
            lost=int(self.lost[place]),
            tokens_committed=int(self.arrived[place]),
            tokens=int(self.tokens[place]),
        )
        return decide_tally(
            rule.number,
            rule.deadline,
            rule.quorum,
            tally,
            moment,
            close_at_share=rule.close_at_share,
        )


def _changes(rule: Rule, course: Course, away: tuple[I64, F64, F64], begin: float) -> _Seen:
    members = len(course.nodes)
    index, gone, back = away
    # Short absences are not noticed; what is committed is not awaited.
    noticed = gone + rule.lost_after
    counts = (noticed < back) & (noticed < course.arrived[index])
    # A payload that was pushed may be accepted while its node is away.
    noticed, back = noticed[counts], np.minimum(back, course.arrived[index])[counts]
    returns = np.isfinite(back)
    comes = np.isfinite(course.arrived)
    sizes = (1, int(comes.sum()), len(noticed), int(returns.sum()))
    moments = np.concatenate([[begin], course.arrived[comes], noticed, back[returns]])
    order = np.argsort(moments, kind="stable")
    parts = ((members, -1, -1, 1), (0, 0, 1, -1), (rule.already, 1, 0, 0))
    sums = [np.cumsum(np.repeat(part, sizes)[order]) for part in parts]
    held = course.tokens[index][counts]  # of nodes that go and come back
    within = np.concatenate(
        [
            [rule.already_tokens + course.tokens.sum()],
            0 * course.tokens[comes],
            -held,
            held[returns],
        ]
    )
    arrived = np.concatenate(
        [[rule.already_tokens], course.tokens[comes], 0 * held, 0 * held[returns]]
    )
    sums += [np.cumsum(values[order]) for values in (arrived, within)]
    moments = moments[order]
    # Of several changes at one moment only the state after the last can be seen.
    last = np.append(moments[1:] > moments[:-1], True)
    return _Seen(moments[last], *(values[last] for values in sums))


def _outcome(course: Course, decision: Decision, moment: float, lost: int) -> Outcome:
    return Outcome(decision, moment, course.arrived <= moment, lost)
