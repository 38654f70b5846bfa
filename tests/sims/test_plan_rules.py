"""The planner's arrays say what the production rules say, one node at a time."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol.blocks import CommittedBlocks
from talkoot.protocol.leases import Member, plan_leases, tokens_wanted
from talkoot.server.book import LEASE_SHARE
from talkoot.server.rounds import LeaseView, RoundView, decide
from talkoot.sims.planning.many import fair_rate, lease_tokens, one_after_another
from talkoot.sims.planning.passing import Course, Rule, settle
from talkoot.sims.planning.timeline import DAY, Timelines, drops, intervals, schedule

speeds = st.lists(
    st.one_of(st.just(0.0), st.floats(min_value=0.01, max_value=1e5)), min_size=1, max_size=12
)


@given(
    speeds,
    st.integers(1, 10**9),
    st.floats(1, 1e6),
    st.sampled_from([256, 65_536, 131_072]),
    st.sampled_from([1.0, 4.0, 30.0]),
)
def test_lease_sizes_are_those_of_the_ledgers_book(
    given_speeds: list[float], nominal: int, deadline: float, block: int, largest: float
) -> None:
    known = [speed for speed in given_speeds if speed > 0]
    median = statistics.median(known) if known else 0.0
    members = [
        Member(
            f"{n:016x}",
            tokens_wanted(
                speed,
                median,
                nominal,
                max_ratio=largest,
                longest_seconds=LEASE_SHARE * deadline,
            ),
        )
        for n, speed in enumerate(given_speeds)
    ]
    leases = plan_leases(
        seed=0,
        run_id="run-0",
        round=1,
        attempt=0,
        block_tokens=block,
        committed=CommittedBlocks(10_000),
        members=members,
    )
    found = lease_tokens(np.array(given_speeds), nominal, deadline, block, max_ratio=largest)
    assert found.tolist() == [lease.tokens for lease in leases]


@given(
    st.lists(st.floats(0.1, 1000), min_size=1, max_size=20),
    st.floats(0.5, 5000),
)
def test_a_fair_rate_fills_the_line_and_no_more(caps: list[float], capacity: float) -> None:
    each = np.minimum(np.array(caps), fair_rate(np.array(caps), capacity))
    assert each.sum() == pytest.approx(min(sum(caps), capacity))


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=20))
def test_a_queue_takes_jobs_one_after_another(jobs: list[tuple[float, float]]) -> None:
    ready, takes = np.array([job[0] for job in jobs]), np.array([job[1] for job in jobs])
    done = one_after_another(ready, takes)
    free = 0.0
    for place in np.argsort(ready, kind="stable"):
        free = max(free, ready[place]) + takes[place]
        assert done[place] == pytest.approx(free)


def test_what_never_comes_keeps_nobody_in_the_queue() -> None:
    done = one_after_another(np.array([np.inf, 1.0, 2.0]), 5.0)
    assert done.tolist() == [np.inf, 6.0, 11.0]


# Timelines ------------------------------------------------------------------------------


def made(on: list[list[tuple[float, float]]], off: list[list[tuple[float, float]]]) -> Timelines:
    def arrays(rows: list[list[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
        width = max(len(row) for row in rows)
        begins, ends = np.full((len(rows), width), np.inf), np.full((len(rows), width), np.inf)
        for place, row in enumerate(rows):
            for column, (begin, end) in enumerate(row):
                begins[place, column], ends[place, column] = begin, end
        return begins, ends

    begins, ends, counts = intervals(arrays(on), arrays(off))
    return Timelines(begins, ends, np.concatenate([[0], np.cumsum(counts)]))


spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 40)).map(
        lambda pair: (float(pair[0]), float(pair[0] + pair[1]))
    ),
    max_size=5,
)


@settings(max_examples=60)
@given(st.lists(st.tuples(spans, spans), min_size=1, max_size=4))
def test_a_node_is_online_in_its_hours_unless_it_dropped(
    nodes: list[tuple[list[tuple[float, float]], list[tuple[float, float]]]],
) -> None:
    lines = made([on for on, _ in nodes], [off for _, off in nodes])
    everybody = np.arange(len(nodes))
    passed = np.zeros(len(nodes))
    for tick in range(110):
        moment = tick + 0.5
        expected = [
            any(a <= moment < b for a, b in on) and not any(a <= moment < b for a, b in off)
            for on, off in nodes
        ]
        assert lines.is_online(everybody, moment).tolist() == expected
        assert lines.online_seconds(everybody, float(tick)).tolist() == passed.tolist()
        passed += expected
    for seconds in (1.0, 7.0, 30.0):
        moments = lines.when(everybody, np.full(len(nodes), seconds))
        for node, moment in enumerate(moments.tolist()):
            assert math.isfinite(moment) == (passed[node] >= seconds)
            if math.isfinite(moment):
                one = np.array([node])
                assert lines.online_seconds(one, moment)[0] == pytest.approx(seconds)


def test_absences_are_told_with_their_returns() -> None:
    lines = made([[(0, 100)], [(0, 50)]], [[(10, 20), (30, 90)], []])
    who, gone, back = lines.absences(np.array([0, 1]), 5.0, 80.0)
    assert sorted(zip(who.tolist(), gone.tolist(), back.tolist(), strict=True)) == [
        (0, 10.0, 20.0),
        (0, 30.0, 90.0),
        (1, 50.0, math.inf),
    ]


def test_hours_across_midnight_follow_the_time_zone() -> None:
    begins, ends = schedule([(22, 7)], np.array([0.0, 2.0]), np.zeros(2), 3 * DAY)
    off = drops(np.random.default_rng(0), 2, 0.0, 1.0, 3 * DAY)
    found, until, counts = intervals((begins, ends), off)
    lines = Timelines(found, until, np.concatenate([[0], np.cumsum(counts)]))
    both = np.array([0, 1])
    assert lines.is_online(both, DAY + 6.5 * 3600).tolist() == [True, False]
    assert lines.is_online(both, DAY + 21 * 3600).tolist() == [False, True]
    assert lines.online_seconds(both, 2 * DAY).tolist() == [18 * 3600.0, 18 * 3600.0]


# Deciding -------------------------------------------------------------------------------

moments = st.one_of(st.just(math.inf), st.integers(1, 100).map(float))


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(moments, st.one_of(st.none(), st.tuples(st.integers(1, 60), st.integers(1, 60)))),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 5),
    st.integers(0, 2),
    st.sampled_from([1.0, 0.9, 0.5]),
)
def test_a_round_ends_when_the_production_rules_end_it(
    members: list[tuple[float, tuple[int, int] | None]], quorum: int, already: int, share: float
) -> None:
    """Second by second, ``decide`` is asked about each lease; the planner must find the same."""
    lost_after, deadline = 5.0, 80.0
    arrived = np.array([arrival for arrival, _ in members])
    away = [
        (place, float(span[0]), float(span[0] + span[1]))
        for place, (_, span) in enumerate(members)
        if span is not None
    ]

    def view(moment: float) -> RoundView:
        leases = [LeaseView("done", "committed", True, 3)] * already
        for place, arrival in enumerate(arrived):
            gone = any(p == place and a + lost_after <= moment < b for p, a, b in away)
            state = "committed" if arrival <= moment else "open"
            leases.append(LeaseView(str(place), state, not gone, tokens=place + 1))  # type: ignore[arg-type]
        return RoundView(7, deadline, quorum, leases, share)

    count = len(members)
    course = Course(np.arange(count), np.arange(count) + 1, *[arrived] * 5)
    index, gone, back = (np.array([one[k] for one in away]) for k in range(3))
    rule = Rule(7, deadline, quorum, lost_after, already, 3 * already, share)
    found = settle(rule, course, (index.astype(np.int64), gone, back), 0.0, (math.inf, math.inf))
    for second in range(81):
        decision = decide(view(float(second)), float(second))
        if decision.action != "wait":
            break
    assert (found.moment, found.decision) == (float(second), decision)
    assert found.committed.tolist() == (arrived <= second).tolist()
