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
    moments, awaited, lost, committed = _changes(rule, course, away, begin)
    quorum_met = committed + rule.already >= rule.quorum
    settled = (quorum_met & (awaited == 0)) | (
        ~quorum_met & (awaited + committed + rule.already < rule.quorum) & (lost == 0)
    )
    for place in np.flatnonzero(settled):
        if moments[place] >= rule.deadline:
            break
        moment = float(moments[place])
        if blind[0] <= moment < blind[1]:
            continue
        decision = _ask(rule, int(committed[place]), int(awaited[place]), int(lost[place]), moment)
        if decision.action != "wait":
            return _outcome(rule, course, decision, moment, int(lost[place]))
    moment = rule.deadline
    if blind[0] <= moment < blind[1]:
        moment = blind[1]
    place = np.searchsorted(moments, moment, side="right") - 1
    decision = _ask(rule, int(committed[place]), int(awaited[place]), int(lost[place]), moment)
    return _outcome(rule, course, decision, moment, int(lost[place]))


def _changes(
    rule: Rule, course: Course, away: tuple[I64, F64, F64], begin: float
) -> tuple[F64, I64, I64, I64]:
    """Moments, and how many are awaited, lost and committed from each on."""
    members = len(course.nodes)
    index, gone, back = away
    # Short absences are not noticed; what is committed is not awaited.
    noticed = gone + rule.lost_after
    counts = (noticed < back) & (noticed < course.arrived[index])
    # A payload that was pushed may be accepted while its node is away.
    noticed, back = noticed[counts], np.minimum(back, course.arrived[index])[counts]
    returns = np.isfinite(back)
    arrivals = course.arrived[np.isfinite(course.arrived)]
    sizes = (1, len(arrivals), len(noticed), int(returns.sum()))
    moments = np.concatenate([[begin], arrivals, noticed, back[returns]])
    parts = ((members, -1, -1, 1), (0, 0, 1, -1), (0, 1, 0, 0))
    order = np.argsort(moments, kind="stable")
    sums = [np.cumsum(np.repeat(part, sizes)[order]) for part in parts]
    moments = moments[order]
    # Of several changes at one moment only the state after the last can be seen.
    last = np.append(moments[1:] > moments[:-1], True)
    return moments[last], sums[0][last], sums[1][last], sums[2][last]


def _ask(rule: Rule, committed: int, awaited: int, lost: int, moment: float) -> Decision:
    tally = Tally(committed + rule.already, awaited, lost)
    return decide_tally(rule.number, rule.deadline, rule.quorum, tally, moment)


def _outcome(rule: Rule, course: Course, decision: Decision, moment: float, lost: int) -> Outcome:
    return Outcome(decision, moment, course.arrived <= moment, lost)
