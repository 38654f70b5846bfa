"""Whole plans: what they say follows from what they are told."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from talkoot.protocol.errors import ConfigError
from talkoot.sims import plan
from talkoot.sims.planning import PHASES, PlanResult, Sizes
from talkoot.sims.planning.sizes import bits_per_parameter, payload_bytes, sizes_of
from talkoot.sims.scenario import broken, library, load_scenario, parse_scenario

BASE = """
name = "base"
rounds = 6
[model]
preset = "llama-2-7b"
sequence_length = 2048
[corpus]
block_tokens = 131072
[rules.round]
tokens_per_node = 4194304
deadline_seconds = 14400
quorum = 4
min_nodes = 4
[[population]]
name = "cards"
device = "rtx-4090"
link = "fibre-1000"
count = 8
speed_spread = 0.0
"""
FREE = Sizes(
    parameters=6_738_415_616,
    uplink_bytes=0.0,
    update_bytes=0.0,
    checkpoint_bytes=0.0,
    bytes_per_token=0.0,
    verify_seconds=0.0,
    aggregate_seconds=0.0,
    publish_seconds=0.0,
    encode_seconds=0.0,
    apply_seconds=0.0,
)
"""Nothing travels and nothing is computed but training."""


def figure(result: PlanResult, name: str) -> float:
    value = result.figures[name]
    assert value is not None
    return value


def planned(text: str, **sizes: Any) -> PlanResult:
    return plan(parse_scenario(text), sizes=dataclasses.replace(FREE, **sizes))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    text = BASE + "drops_per_day = 3.0\n"
    first, again = planned(text), planned(text)
    assert first.to_json() == again.to_json()
    other = planned("seed = 1\n" + text)
    assert other.figures != first.figures


def test_equal_nodes_with_nothing_to_move_train_all_the_time() -> None:
    result = planned(BASE)
    assert result.figures["rounds"] == 6
    assert result.figures["utilization"] == pytest.approx(1.0, abs=0.06)  # noise of a round
    assert result.figures["reopened"] == 0


def test_a_round_takes_as_long_as_its_parts() -> None:
    """8 nodes at one speed: fetch, train, push and close, by hand."""
    result = planned(BASE, uplink_bytes=5e8, update_bytes=1e9, publish_seconds=100.0)
    row = result.rounds[3]
    trained = 4_194_304 / result.classes[0].tokens_per_second
    fetched = 8 * 1e9 * 1.04 * 8 / 1e9  # the coordinator's gigabit, shared by eight
    pushed = 8 * 5e8 * 1.04 * 8 / 1e9
    assert row.published - row.opened == pytest.approx(fetched + trained + pushed + 100, rel=0.06)
    assert row.bytes_up == 8 * 5e8
    assert row.bytes_down == 8 * 1e9


def test_time_online_is_spent_on_something_and_never_twice() -> None:
    text = BASE + "drops_per_day = 4.0\nhours = [[8, 22]]\ntime_zones = [0, 3]\n"
    result = planned(text, uplink_bytes=1e8, update_bytes=5e8, publish_seconds=300.0)
    assert set(result.phases) == set(PHASES)
    assert sum(result.phases.values()) == pytest.approx(1.0, abs=1e-6)
    assert min(result.phases.values()) >= 0
    for row in result.classes:
        assert sum(row.phases.values()) == pytest.approx(1.0, abs=1e-6)


def test_tokens_are_those_of_the_contributions() -> None:
    result = plan(parse_scenario(BASE + "drops_per_day = 6.0\n"), sizes=FREE, events=True)
    counted = sum(int(course.tokens[done].sum()) for _, _, course, done in result.events)
    assert counted == result.figures["tokens"] == sum(row.tokens for row in result.rounds)
    assert sum(row.tokens for row in result.classes) == counted


@pytest.mark.parametrize(
    ("more", "name", "larger"),
    [
        ("up_mbit = 2.0", "round_seconds", True),
        ("down_mbit = 2.0", "round_seconds", True),
        ("count = 6", "tokens_per_day", False),
    ],
)
def test_fewer_nodes_or_a_worse_line_never_help(more: str, name: str, larger: bool) -> None:
    sizes: dict[str, Any] = {"uplink_bytes": 1e8, "update_bytes": 4e8}
    before = figure(planned(BASE, **sizes), name)
    text = BASE.replace("count = 8", more) if more.startswith("count") else BASE + more
    assert (figure(planned(text, **sizes), name) > before) is larger


def test_a_mirror_takes_the_way_down_from_the_coordinator() -> None:
    thin = "\n[coordinator]\nup_mbit = 50.0\n"
    without = planned(BASE + thin, update_bytes=1e9)
    mirrored = planned(BASE + thin + "mirrors = 1\n", update_bytes=1e9)
    egress = "coordinator_egress_gb_per_day"
    assert figure(mirrored, egress) < 0.2 * figure(without, egress)
    assert figure(mirrored, "round_seconds") < figure(without, "round_seconds")


def test_nodes_that_leave_in_a_round_are_not_waited_for_until_its_deadline() -> None:
    event = "\n[[events]]\nround = 3\nleave = 0.25\n"
    result = planned(BASE + event)
    row = result.rounds[2]
    assert row.code == "all-reachable-answered"
    assert (row.lost, row.contributions) == (2, 6)
    assert result.rounds[3].members == 6


def test_nodes_that_come_back_take_part_again() -> None:
    event = "\n[[events]]\nround = 2\nleave = 0.25\nback_after_hours = 1.0\n"
    result = planned(BASE + event)
    assert [row.contributions for row in result.rounds][-1] == 8


def test_newcomers_fetch_a_checkpoint_before_they_get_a_lease() -> None:
    text = BASE + '\n[[events]]\nround = 2\njoin = 4\npopulation = "cards"\n'
    quick = planned(text, checkpoint_bytes=1e9)
    slow = planned(text, checkpoint_bytes=1e12)
    assert quick.rounds[-1].members == 12
    assert slow.rounds[2].members == 8
    assert quick.figures["nodes"] == 12


def test_an_outage_holds_the_round_up_and_loses_nothing() -> None:
    plain = planned(BASE)
    text = BASE + "\n[[events]]\nround = 3\noutage_minutes = 180\n"
    result = planned(text)
    assert figure(result, "tokens") == pytest.approx(figure(plain, "tokens"), rel=0.1)
    assert [row.contributions for row in result.rounds] == [8] * 6
    held = result.rounds[2].published - result.rounds[2].opened
    assert held >= 180 * 60


def test_without_a_quorum_a_round_is_leased_anew() -> None:
    text = BASE.replace("quorum = 4", "quorum = 7").replace("min_nodes = 4", "min_nodes = 7")
    result = planned(text + "\n[[events]]\nround = 2\nleave = 0.5\nback_after_hours = 6\n")
    assert figure(result, "reopened") > 0
    assert result.rounds[1].attempts > 1
    assert result.rounds[1].contributions >= 7


def test_what_does_not_fit_does_not_train_and_says_why() -> None:
    result = planned(BASE + '\n[[population]]\nname = "small"\ndevice = "rtx-3060"\ncount = 3\n')
    small = result.classes[1]
    assert small.recipe is None
    assert small.contributions == 0
    assert "rtx-3060 has" in small.why
    assert result.figures["nodes_that_fit"] == 8


def test_a_plan_in_which_nobody_fits_says_so() -> None:
    result = planned(BASE.replace("rtx-4090", "rtx-3060"))
    assert result.figures["rounds"] == 0
    assert result.figures["tokens_per_day"] is None
    assert "No node can hold a replica" in result.bottleneck


def test_the_bottleneck_is_the_largest_part_that_is_not_training() -> None:
    result = planned(BASE, publish_seconds=7200.0)
    assert "closing of rounds" in result.bottleneck


def test_payload_sizes_are_the_codecs_own() -> None:
    import torch

    from talkoot.protocol.codec import encode_tensor
    from talkoot.protocol.messages import CodecSpec

    spec = CodecSpec(keep=32, value_bits=3)
    noise = torch.randn(2**21, generator=torch.Generator().manual_seed(7))
    real = encode_tensor(noise, spec).size_bytes
    assert payload_bytes(spec, 2**21) == pytest.approx(real, rel=0.03)
    assert bits_per_parameter(CodecSpec(kind="dense").model_dump_json()) == 32


def test_sizes_follow_the_model() -> None:
    sizes = sizes_of(parse_scenario(BASE))
    assert sizes.parameters == 6_738_415_616
    assert sizes.checkpoint_bytes == 4 * sizes.parameters
    assert 8 * sizes.uplink_bytes / sizes.parameters == pytest.approx(0.15, abs=0.01)


def test_days_to_the_target_are_at_the_pace_found() -> None:
    result = planned("target_tokens = 1_000_000_000\n" + BASE)
    pace = result.figures["tokens_per_day"]
    assert pace is not None
    assert result.figures["days_to_target"] == pytest.approx(1e9 / pace)
    assert math.isfinite(pace)


def test_a_config_that_is_not_there_is_one_sentence() -> None:
    text = BASE.replace('preset = "llama-2-7b"', 'config = "/nowhere/config.json"')
    with pytest.raises(ConfigError, match="cannot be read at /nowhere"):
        plan(parse_scenario(text))


@pytest.mark.parametrize("name", library())
def test_what_a_library_scenario_expects_holds_in_its_plan(name: str) -> None:
    scenario = load_scenario(name)
    assert broken(scenario.expect, plan(scenario).figures) == []
