"""The parts of the simulator without Ray: who the nodes are, what happens when, what is kept."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError, StateError, UnavailableError
from talkoot.protocol.messages import ArtifactRef, Verdict, VersionRef
from talkoot.server.flower import GridControl
from talkoot.sims.attacks.kinds import KINDS, liars
from talkoot.sims.cli import app
from talkoot.sims.planning.fit import fits_of
from talkoot.sims.planning.fleet import Fleet
from talkoot.sims.planning.sizes import model_config, sizes_of
from talkoot.sims.scenario import Scenario, load_scenario, parse_scenario
from talkoot.sims.virtual import command
from talkoot.sims.virtual.control import WATCHERS, lacks, surely_open
from talkoot.sims.virtual.population import key_of, profiles
from talkoot.sims.virtual.report import participation
from talkoot.sims.virtual.site import EPOCH, config_of
from talkoot.sims.virtual.timing import Course, Timing
from talkoot.sims.virtual.work import WINDOW, Task, Work
from talkoot.sims.virtual.world import ARRIVES, DEADLINE, TRAINED, Agenda, Held, NodeNow, World

DAY = 86_400.0
TEXT = """
name = "parts"
rounds = 3
seed = 5

[model]
preset = "nano"
sequence_length = 64

[corpus]
block_tokens = 256

[rules.round]
tokens_per_node = 512

[[population]]
name = "here"
device = "cpu-8"
count = 6
tokens_per_second = 10.0

[[population]]
name = "evenings"
device = "cpu-8"
link = "adsl"
count = 4
tokens_per_second = 5.0
hours = [[18, 24]]

[[attackers]]
kind = "sign flip"
count = 2
population = "here"

[[events]]
round = 2
leave = 0.5

[[events]]
day = 0.5
join = 2
population = "evenings"

[[events]]
day = 1
outage_minutes = 10
"""


def the(changed: dict[str, object] | None = None) -> Scenario:
    return parse_scenario(TEXT, overrides=changed)


def fleet_of(scenario: Scenario, days: float = 3) -> Fleet:
    config = model_config(scenario)
    sizes = sizes_of(scenario, config)
    return Fleet(scenario, fits_of(scenario, config, sizes.parameters), days * DAY)


def timing_of(scenario: Scenario, fleet: Fleet) -> Timing:
    return Timing(scenario, fleet, sizes_of(scenario, model_config(scenario)))


def test_the_seed_decides_keys_and_liars() -> None:
    scenario, other = the(), the({"seed": 6})
    assert key_of(scenario, "3").node_id == key_of(scenario, "3").node_id
    assert len({key_of(s, w).node_id for s in (scenario, other) for w in "0123"}) == 8
    found = profiles(scenario, fleet_of(scenario))
    assert found == profiles(scenario, fleet_of(scenario))
    assert [p.name for p in found if p.attack] != []
    assert all(p.population == "here" for p in found if p.attack)
    assert sum(p.attack == "sign flip" for p in found) == 2


def test_more_liars_than_nodes_are_refused_with_the_kind() -> None:
    crowd = the({"attackers.0.count": 7})
    with pytest.raises(ConfigError, match="7 attackers of kind 'sign flip'"):
        profiles(crowd, fleet_of(crowd))


def test_those_who_watch_others_are_kinds_of_liars_that_forge() -> None:
    assert set(KINDS) >= WATCHERS
    plain = liars("sign flip", 1, 1)[0].forge
    assert all(liars(kind, 1, 1)[0].forge is not plain for kind in WATCHERS)


def test_a_simulation_keeps_the_operators_rules_and_drops_what_needs_a_process() -> None:
    scenario = the({"rules.round.quorum": 1, "rules.belief.set_aside_below": 0.2})
    config = config_of(scenario)
    assert config.round == scenario.rules.round
    assert config.belief.set_aside_below == 0.2
    assert config.belief.gain_share == config.belief.replay_share == 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([ARRIVES, TRAINED, DEADLINE]))))
def test_things_happen_in_the_order_of_time_kind_and_node(entries: list[tuple[int, int]]) -> None:
    agenda = Agenda()
    for index, (moment, kind) in enumerate(entries):
        agenda.add(float(moment), kind, index)
    agenda.add(math.inf, ARRIVES, 99)
    taken = []
    while agenda.next() < math.inf:
        taken.append(agenda.pop()[:3])
    assert taken == sorted(
        (float(moment), kind, index) for index, (moment, kind) in enumerate(entries)
    )


class Hands(GridControl):
    """Flower's grid with workers that are done in the order that a test wants."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.done: list[tuple[int, str | None]] = []

    def send(self, tasks: Mapping[int, str], *, round_number: int, ttl_seconds: float) -> None:
        self.sent += tasks

    def replies(self) -> Iterable[tuple[int, str | None]]:
        found, self.done = self.done, []
        return found


VERDICT = Verdict(accepted=True, code="made", sentence="Made.").model_dump_json()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_world_may_go_on_up_to_the_earliest_lease_at_work(
    moments: list[float], random: Random
) -> None:
    hands = Hands()
    work = Work(hands, 2, lambda: None)
    made: list[int] = []
    work.on_done = lambda index, verdict: made.append(index)
    work.begin(Task(trained, index, 100 + index, 1, "") for index, trained in enumerate(moments))
    left = dict(enumerate(moments))
    while left:
        assert work.earliest == min(left.values())
        out = [number - 100 for number in hands.sent if number - 100 in left]
        assert len(out) == min(len(left), 2 * WINDOW)
        assert max(left[index] for index in out) <= min(
            [left[index] for index in left if index not in out], default=math.inf
        )
        index = random.choice(out)
        hands.done.append((100 + index, VERDICT))
        work.wait_for(index)
        assert made[-1] == index
        del left[index]
    assert work.earliest == math.inf
    assert not work


def test_a_worker_that_failed_ends_the_run_with_what_to_do() -> None:
    hands = Hands()
    work = Work(hands, 1, lambda: None)
    work.begin([Task(1.0, 0, 100, 1, "")])
    hands.done.append((100, None))
    with pytest.raises(UnavailableError, match="fewer --workers"):
        work.finish()


def test_a_world_that_was_saved_is_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    scenario = the()
    world = World(scenario, fleet_of(scenario), tmp_path / "world.json")
    world.nodes = {index: NodeNow(version=0) for index in range(10)}
    world.now = EPOCH + 100.0
    assert world.happen(0) == []  # half of them leave
    world.now = EPOCH + 0.5 * DAY
    came = world.happen(1)
    assert len(came) == 2
    world.nodes[3].held = Held(
        "ab" * 16, 2, 0, 512, EPOCH, EPOCH, EPOCH, EPOCH + 9, True, 4, 77, text="x", made=True
    )
    world.nodes[3].held.arrives = EPOCH + DAY
    world.save(2, 0, {"events": 12})
    again = World(scenario, fleet_of(scenario), tmp_path / "world.json")
    document = again.load()
    assert document is not None
    assert document["events"] == 12
    everybody = list(range(world.fleet.count))
    for moment in (EPOCH + 50.0, EPOCH + 200.0, EPOCH + 0.9 * DAY):
        assert again.online(everybody, moment) == world.online(everybody, moment)
    assert again.happen(0) == again.happen(1) == []  # nothing happens twice
    assert again.nodes[3].held is not None
    assert again.agenda.pop() == (EPOCH + DAY, ARRIVES, 3, "ab" * 16)


def test_what_falls_into_an_outage_happens_at_its_end(tmp_path: Path) -> None:
    world = World(the(), fleet_of(the()), tmp_path / "world.json")
    world.now = EPOCH + DAY
    world.happen(2)
    assert world.outage(EPOCH + DAY - 1) == EPOCH + DAY - 1
    assert world.outage(EPOCH + DAY + 5) == EPOCH + DAY + 600
    assert world.outage(EPOCH + DAY + 600) == EPOCH + DAY + 600


def test_a_lease_takes_fetching_training_and_pushing_at_the_nodes_own_pace() -> None:
    scenario = the()
    fleet = fleet_of(scenario)
    timing = timing_of(scenario, fleet)
    speed = float(fleet.speed[0])
    (course,) = timing.courses(
        10.0, {0: 10.0}, {0: 4096}, {0: 1}, {0: 2}, {0: 512}, {0: speed}
    ).values()
    assert course.steady
    assert course.stepped - course.fetched == pytest.approx(512 / speed)
    assert course.trained - course.stepped == pytest.approx(timing.sizes.encode_seconds)
    pushed = timing.arrival(0, course.trained, 5000, 1)
    assert pushed > course.trained
    assert timing.arrival(0, course.trained, 50_000_000, 1) > pushed


def test_work_goes_on_where_it_stopped_when_a_node_goes_away() -> None:
    scenario = the()
    fleet = fleet_of(scenario)
    timing = timing_of(scenario, fleet)
    evening = 8  # on from 18 to 24 h
    place = int(fleet.timelines.first[evening]) + 1  # the one before began the day before
    before_midnight = float(fleet.timelines.starts[place]) + 3600.0
    rest = float(fleet.timelines.ends[place]) - before_midnight
    assert timing.after(evening, before_midnight, rest / 2) == before_midnight + rest / 2
    assert timing.after(evening, before_midnight, rest + 60.0) > before_midnight + 18 * 3600


def ref(digit: str, size: int) -> ArtifactRef:
    return ArtifactRef(digest=digit * 64, size_bytes=size)


def test_a_node_fetches_updates_when_they_lead_there_and_a_checkpoint_when_not() -> None:
    base = VersionRef(
        version=7,
        weights_digest="a" * 64,
        checkpoint_version=5,
        checkpoint=ref("c", 1000),
        updates_from=4,
        updates=(ref("1", 10), ref("2", 20), ref("3", 30)),
    )
    assert lacks(7, base) == (0, 0)
    assert lacks(6, base) == (30, 1)
    assert lacks(4, base) == (60, 3)
    assert lacks(3, base) == (1050, 2)
    assert lacks(None, base) == (1050, 2)


def test_a_round_that_may_close_early_is_open_until_enough_can_have_arrived() -> None:
    courses = {n: Course(0.0, 1.0, 9.0, 10.0 * (n + 1), steady=n != 3) for n in range(4)}
    tokens = dict.fromkeys(range(4), 100)
    assert surely_open(courses, tokens, 1.0) == math.inf
    assert surely_open(courses, tokens, 0.9) == 30.0
    assert surely_open(courses, tokens, 0.3) == 10.0


def test_leases_are_counted_by_what_became_of_them() -> None:
    lease = {"round": 1, "attack": "", "answer": "accepted", "bytes_up": 1, "bytes_down": 2}
    rows = [lease, {**lease, "attack": "copy"}, {**lease, "answer": "late"}, {**lease, "round": 9}]
    assert participation([{"round": 1}], rows) == [
        {"accepted": 1, "accepted of liars": 1, "not accepted": 1, "bytes": 9}
    ]


def test_without_the_extra_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'talkoot\[sims\]'"):
        command.run(the())


def test_a_crowd_is_sent_to_the_planner() -> None:
    with pytest.raises(ConfigError, match="talkoot-sim plan"):
        command.run(the({"population.0.count": 6000}))


def test_a_model_that_cannot_be_trained_here_is_not_begun_and_not_timed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"One replica of this model takes .* GiB in training"):
        command.run(load_scenario("7b-thousand"), out=tmp_path)
    done = CliRunner().invoke(app, ["run", "7b-thousand", "--dry-run", "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "derived from a smaller model" in done.stdout
    assert "use talkoot-sim plan, or a smaller model" in done.stdout


def test_a_directory_of_another_scenario_is_not_touched(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "scenario.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StateError, match="another scenario"):
        command.run(the(), out=tmp_path / "out", work=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["scenario.json"]


def test_a_dry_run_says_time_memory_and_disk_and_starts_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "parts.toml"
    path.write_text(TEXT, encoding="utf-8")
    done = CliRunner().invoke(app, ["run", str(path), "--dry-run", "--json", "--workers", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["nodes"], found["rounds"], found["workers"]) == (10, 3, 2)
    assert min(found["seconds"], found["memory_bytes"], found["disk_bytes"]) > 0
    assert list(tmp_path.iterdir()) == [path]
