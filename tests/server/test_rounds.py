"""The round state machine, over all rounds that hypothesis can think of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.server.rounds import LeaseView, RoundView, decide, poll_seconds

DEADLINE = 1000.0

leases = st.lists(
    st.builds(
        LeaseView,
        node_id=st.just("0123456789abcdef"),
        state=st.sampled_from(["open", "committed", "released"]),
        live=st.booleans(),
        tokens=st.integers(1, 100),
    ),
    max_size=6,
)
views = st.builds(
    RoundView,
    round=st.integers(1, 5),
    deadline_unix=st.just(DEADLINE),
    quorum=st.integers(1, 5),
    leases=leases,
    close_at_share=st.sampled_from([1.0, 0.95, 0.5]),
)
times = st.floats(0, 2 * DEADLINE)


def committed(view: RoundView) -> int:
    return sum(lease.state == "committed" for lease in view.leases)


def awaited(view: RoundView) -> int:
    return sum(lease.state == "open" and lease.live for lease in view.leases)


def lost(view: RoundView) -> int:
    return sum(lease.state == "open" and not lease.live for lease in view.leases)


@given(views, times)
def test_a_round_never_closes_below_its_quorum(view: RoundView, now: float) -> None:
    if decide(view, now).action == "close":
        assert committed(view) >= view.quorum


@given(views, times)
def test_a_round_with_its_quorum_is_never_leased_anew(view: RoundView, now: float) -> None:
    if committed(view) >= view.quorum:
        assert decide(view, now).action in {"close", "wait"}


@given(views, times)
def test_a_round_with_its_quorum_waits_for_nobody_who_is_lost(view: RoundView, now: float) -> None:
    if committed(view) >= view.quorum and awaited(view) == 0:
        assert decide(view, now).action == "close"


def enough(view: RoundView) -> bool:
    """Whether so much has arrived that the rest is not waited for."""
    there = sum(lease.tokens for lease in view.leases if lease.state == "committed")
    coming = sum(lease.tokens for lease in view.leases if lease.state == "open" and lease.live)
    return there >= view.close_at_share * (there + coming) and coming > 0


@given(views, st.floats(0, DEADLINE, exclude_max=True))
def test_before_the_deadline_a_round_with_its_quorum_waits_for_who_is_at_work_unless_it_has_enough(
    view: RoundView, now: float
) -> None:
    if awaited(view):
        closes = decide(view, now).action == "close"
        assert closes == (committed(view) >= view.quorum and enough(view))
        assert not (closes and view.close_at_share == 1)


def test_a_round_that_has_enough_says_how_much() -> None:
    there = [LeaseView(str(n), "committed", live=True, tokens=10) for n in range(19)]
    late, gone = LeaseView("a", "open", True, 10), LeaseView("b", "open", False, 90)
    decision = decide(RoundView(3, DEADLINE, 2, [*there, late, gone], close_at_share=0.95), 1.0)
    assert (decision.action, decision.code) == ("close", "enough")
    assert decision.sentence == (
        "Round 3 closes with 95 % of its tokens: 19 contributed, 1 still at work, 1 out of reach."
    )


@given(views, st.floats(DEADLINE, 2 * DEADLINE))
def test_at_its_deadline_a_round_always_decides(view: RoundView, now: float) -> None:
    assert decide(view, now).action != "wait"


@given(views, times, times)
def test_what_is_decided_stays_decided_as_time_goes_on(view: RoundView, a: float, b: float) -> None:
    early, late = decide(view, min(a, b)).action, decide(view, max(a, b)).action
    assert early in {"wait", late}


@given(views, st.floats(0, DEADLINE, exclude_max=True))
def test_a_round_is_leased_anew_early_only_if_no_answer_can_make_its_quorum(
    view: RoundView, now: float
) -> None:
    if decide(view, now).action == "reopen":
        assert committed(view) + awaited(view) + lost(view) < view.quorum
    elif committed(view) + awaited(view) + lost(view) < view.quorum and lost(view) == 0:
        pytest.fail("nobody is left who could answer, and the round waits")


@given(views, times)
def test_released_leases_have_no_voice(view: RoundView, now: float) -> None:
    without = [lease for lease in view.leases if lease.state != "released"]
    assert decide(view, now) == decide(replace(view, leases=without), now)


@given(views, times)
def test_another_committed_lease_never_takes_a_close_back(view: RoundView, now: float) -> None:
    more = [*view.leases, LeaseView("fedcba9876543210", "committed", True)]
    if decide(view, now).action == "close":
        grown = replace(view, leases=more)
        assert decide(grown, now).action == "close"


@pytest.mark.parametrize(
    ("states", "now", "action", "code"),
    [
        ("CC", 0.0, "close", "all-answered"),
        ("CL", 0.0, "wait", "at-work"),  # quorum 2: the lost node may come back
        ("CCL", 0.0, "close", "all-reachable-answered"),
        ("CCO", 0.0, "wait", "at-work"),
        ("CCO", DEADLINE, "close", "deadline"),
        ("COO", DEADLINE, "reopen", "no-quorum"),
        ("C", 0.0, "reopen", "nobody-left"),
        ("", 0.0, "reopen", "nobody-left"),
    ],
)
def test_each_decision_names_its_reason(states: str, now: float, action: str, code: str) -> None:
    kinds = {
        "C": LeaseView("0123456789abcdef", "committed", True),
        "O": LeaseView("0123456789abcdef", "open", True),
        "L": LeaseView("0123456789abcdef", "open", False),
    }
    view = RoundView(7, DEADLINE, 2, [kinds[letter] for letter in states])
    decision = decide(view, now)
    assert (decision.action, decision.code) == (action, code)
    assert decision.sentence.startswith("Round 7 ")
    assert decision.sentence.endswith(".")
    assert f"{states.count('C')} contributed" in decision.sentence
    lost = states.count("L")
    assert (f", {lost} out of reach" if lost else "contributed") in decision.sentence
    assert ("out of reach" in decision.sentence) == (lost > 0)


@given(st.integers(0, 10**6), st.floats(0.1, 1000), st.floats(0.01, 60))
def test_all_nodes_together_stay_under_the_cap_on_polls(
    nodes: int, cap: float, minimum: float
) -> None:
    seconds = poll_seconds(nodes, cap, minimum)
    assert seconds >= minimum
    assert nodes / seconds <= cap * (1 + 1e-9)
