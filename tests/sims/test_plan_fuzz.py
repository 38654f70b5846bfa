"""Any scenario that is valid has a plan, and its books balance."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from talkoot.sims.planning import PlanResult, Sizes, plan
from talkoot.sims.scenario import Scenario

seconds = st.sampled_from([0.0, 0.1, 30.0, 4000.0])
sizes = st.builds(
    Sizes,
    parameters=st.just(10**6),
    uplink_bytes=st.sampled_from([0.0, 1e6, 1e9]),
    update_bytes=st.sampled_from([0.0, 1e6, 1e10]),
    checkpoint_bytes=st.sampled_from([0.0, 1e9, 1e12]),
    bytes_per_token=st.sampled_from([0.0, 2.0]),
    verify_seconds=seconds,
    aggregate_seconds=seconds,
    publish_seconds=seconds,
    encode_seconds=seconds,
    apply_seconds=seconds,
)
hours = st.sampled_from([[[0, 24]], [[18, 6]], [[8, 12], [13, 20]], [[23.5, 0.5]]])
populations = st.lists(
    st.fixed_dictionaries(
        {
            "device": st.sampled_from(["rtx-4090", "cpu-8", "m1-ultra"]),
            "link": st.sampled_from(["adsl", "datacenter"]),
            "count": st.integers(0, 6),
            "tokens_per_second": st.sampled_from([0.5, 10.0, 1e5]),
            "hours": hours,
            "time_zones": st.sampled_from([[0], [-8, 5.5]]),
            "drops_per_day": st.sampled_from([0.0, 3.0, 200.0]),
            "drop_minutes": st.sampled_from([0.5, 90.0]),
            "disk_gib": st.sampled_from([0.001, 500.0]),
            "speed_noise": st.sampled_from([0.0, 0.5]),
        }
    ),
    min_size=1,
    max_size=3,
)
moment = st.one_of(
    st.fixed_dictionaries({"round": st.integers(1, 5)}),
    st.fixed_dictionaries({"day": st.sampled_from([0.0, 0.3, 5.0])}),
)
happening = st.one_of(
    st.fixed_dictionaries({"leave": st.sampled_from([0.3, 1.0])}),
    st.fixed_dictionaries({"leave": st.just(0.5), "back_after_hours": st.sampled_from([0.1, 30])}),
    st.fixed_dictionaries({"join": st.integers(1, 4), "population": st.just("class-0")}),
    st.fixed_dictionaries({"outage_minutes": st.sampled_from([1, 600])}),
)
events = st.lists(st.tuples(moment, happening).map(lambda two: {**two[0], **two[1]}), max_size=3)
rules = st.fixed_dictionaries(
    {
        "tokens_per_node": st.sampled_from([256, 10_000]),
        "deadline_seconds": st.sampled_from([5, 1800, 90_000]),
        "quorum": st.integers(1, 3),
        "min_nodes": st.integers(3, 4),
        "max_behind": st.integers(1, 3),
        "checkpoint_every": st.integers(1, 4),
        "close_at_share": st.sampled_from([1.0, 0.6]),
    }
)


def balanced(result: PlanResult) -> None:
    """What must hold of any plan."""
    figures = result.figures
    assert figures["tokens"] == sum(row.tokens for row in result.classes)
    assert all(value is None or math.isfinite(value) for value in figures.values())
    for phases in (result.phases, *(row.phases for row in result.classes)):
        assert all(share >= 0 for share in phases.values())
    if result.rounds:
        assert sum(result.phases.values()) == pytest.approx(1.0, abs=1e-6)
    numbers = [row.round for row in result.rounds]
    assert numbers == list(range(1, len(numbers) + 1))
    last = 0.0
    for row in result.rounds:
        assert last <= row.opened <= row.closed <= row.published
        assert row.contributions >= result.scenario.rules.round.quorum
        last = row.published


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(populations, events, rules, sizes, st.integers(0, 3))
def test_any_scenario_has_a_plan_whose_books_balance(
    classes: list[dict[str, Any]],
    happenings: list[dict[str, Any]],
    rule: dict[str, Any],
    moved: Sizes,
    mirrors: int,
) -> None:
    for place, entry in enumerate(classes):
        entry["name"] = f"class-{place}"
    scenario = Scenario.model_validate(
        {
            "name": "any",
            "rounds": 6,
            "days": 4,
            "model": {"preset": "nano", "sequence_length": 64},
            "corpus": {"block_tokens": 256},
            "rules": {"round": rule},
            "coordinator": {"mirrors": mirrors, "up_mbit": 10.0},
            "population": classes,
            "events": happenings,
        }
    )
    balanced(plan(scenario, sizes=moved))
