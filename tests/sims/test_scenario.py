"""Scenario files: what ships is right, and what is wrong is named with its key and its line."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError
from talkoot.server.config import Config
from talkoot.sims.cli import app
from talkoot.sims.scenario import broken, find, library, load_scenario, parse_scenario, schema
from talkoot.sims.scenario.devices import DEVICES
from talkoot.sims.scenario.lines import key_lines, line_of

SMALL = """
name = "small"
rounds = 3

[model]
preset = "nano"
sequence_length = 64

[rules.round]
tokens_per_node = 4096
quorum = 2
min_nodes = 2

[[population]]
name = "first"
device = "rtx-4090"
count = 3

[[population]]
name = "second"
device = "cpu-8"
link = "vdsl"
count = 4
"""
NAMES = (
    "campus",
    "home-fibre",
    "home-dsl",
    "global-100",
    "flash-crowd",
    "blackout",
    "attack-25",
    "hetero-vram",
    "7b-thousand",
    "loopback-2",
)


def fault(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(text, where="s.toml")
    return caught.value.sentence


def line(text: str, words: str) -> int:
    return next(n for n, found in enumerate(text.splitlines(), 1) if found.startswith(words))


@pytest.mark.parametrize("name", NAMES)
def test_each_library_scenario_is_right_and_makes_an_operators_configuration(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.sentence.endswith(".")
    assert isinstance(scenario.config(), Config)
    assert scenario.classes(10**9)


def test_the_library_is_what_the_names_say() -> None:
    assert set(library()) == set(NAMES)


def test_rules_are_the_operators_own_sections() -> None:
    config = parse_scenario(SMALL).config()
    assert config.round.quorum == 2
    assert config.run.rounds == 3
    assert config.model.preset == "nano"


def test_attack_kinds_are_those_of_the_attack_suite() -> None:
    from typing import get_args

    from talkoot.sims.attacks.kinds import KINDS
    from talkoot.sims.scenario.model import AttackKind

    assert get_args(AttackKind) == KINDS


@pytest.mark.parametrize(
    ("change", "begins", "said"),
    [
        (("count = 4", "cuont = 4"), "cuont", "population.1.cuont'; did you mean 'count'?"),
        (("count = 4", "count = -4"), "count = -4", "population.1.count: Input should be greater"),
        (('"vdsl"', '"vdls"'), "link", "population.1.link: there is no link 'vdls'; did you mean"),
        (('"rtx-4090"', '"rtx-4091"'), "device", "there is no device 'rtx-4091'; did you mean"),
        (("quorum = 2", 'quorum = "2"'), "quorum", "rules.round.quorum: Input should be a valid"),
        (("quorum = 2", "quorums = 2"), "quorums", "did you mean 'quorum'?"),
        (('"second"', '"first"'), 'name = "first"', "'first' is there twice"),
    ],
)
def test_an_error_names_the_key_and_the_line(
    change: tuple[str, str], begins: str, said: str
) -> None:
    text = SMALL.replace(*change)
    sentence = fault(text)
    assert said in sentence
    numbers = [n for n, found in enumerate(text.splitlines(), 1) if found.startswith(begins)]
    assert any(f"s.toml, line {number}:" in sentence for number in numbers)


def test_a_fault_of_several_sections_together_is_told() -> None:
    assert "quorum (9) is larger" in fault(SMALL.replace("quorum = 2", "quorum = 9"))


def test_a_simulation_must_end() -> None:
    assert "rounds, days or both" in fault(SMALL.replace("rounds = 3", ""))


def test_an_event_does_one_thing_at_one_moment() -> None:
    event = "\n[[events]]\nround = 2\nleave = 0.3\n"
    assert parse_scenario(SMALL + event).events[0].leave == 0.3
    assert "exactly one of round and day" in fault(SMALL + event + "day = 1\n")
    assert "exactly one of leave, join" in fault(SMALL + event + "outage_minutes = 5\n")
    assert "population 'thrid'" in fault(SMALL + event + 'population = "thrid"\n')


def test_what_is_expected_must_be_a_figure() -> None:
    text = SMALL + "\n[expect]\nutilisation = { min = 0.5 }\n"
    assert "did you mean 'utilization'?" in fault(text)
    assert f"line {line(text, 'utilisation')}" in fault(text)


def test_an_expectation_that_does_not_hold_is_a_sentence() -> None:
    scenario = parse_scenario(
        SMALL + "[expect]\nutilization = { min = 0.5 }\nrounds = { max = 3 }\nloss = { max = 1 }\n"
    )
    assert broken(scenario.expect, {"utilization": 0.5, "rounds": 3}) == []
    assert broken(scenario.expect, {"utilization": 0.4, "rounds": 4}) == [
        "utilization is 0.4 and was expected to be 0.5 or more.",
        "rounds is 4 and was expected to be 3 or less.",
    ]
    assert broken(scenario.expect, {"loss": float("nan")})
    assert broken(scenario.expect, {"loss": None})


def test_overrides_reach_any_key_and_say_what_they_cannot(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(SMALL)
    changed = load_scenario(file, {"rules.round.deadline_seconds": 60, "population.1.count": 9})
    assert changed.rules.round.deadline_seconds == 60
    assert changed.population[1].count == 9
    with pytest.raises(ConfigError, match="no number 7 among 2"):
        load_scenario(file, {"population.7.count": 9})


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    file = tmp_path / "mine.toml"
    file.write_text(
        SMALL.replace('preset = "nano"', 'config = "model.json"')
        + '[corpus]\nsources = ["text", "stdlib"]\n'
    )
    scenario = load_scenario(file)
    assert scenario.model.config == str(tmp_path / "model.json")
    assert scenario.corpus.sources == (str(tmp_path / "text"), "stdlib")


def test_a_scenario_that_is_nowhere_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean campus"):
        find("camps")
    with pytest.raises(ConfigError, match=r"no scenario at here\.toml"):
        find("here.toml")


def test_lines_are_right_through_strings_and_arrays_of_many_lines() -> None:
    text = (
        'a = """\n[b]\nc = 1\n"""\nd = [\n  1, # ]\n  "]",\n]\n[[e.f]]\ng = 1\n'
        "[[e.f]]\ng = 2\n[e.f.h]\ni.j = 3\n"
    )
    tomllib.loads(text)
    lines = key_lines(text)
    assert ("b",) not in lines
    assert lines[("d",)] == 5
    assert lines[("e", "f", 1, "g")] == 12
    assert lines[("e", "f", 1, "h", "i", "j")] == 14
    assert line_of(lines, ("e", "f", 1, "g", "deeper")) == 12
    assert line_of(lines, ("nowhere",)) is None


@given(st.text(alphabet="ab\"'[]{}#=\n .,1", max_size=80))
def test_line_finding_bears_any_text(text: str) -> None:
    assert all(number >= 1 for number in key_lines(text).values())


@given(st.text(max_size=200))
def test_any_text_is_a_scenario_or_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_scenario(text)


def test_the_schema_knows_every_section() -> None:
    found = schema()
    assert {"model", "rules", "population", "events", "expect"} <= set(found["properties"])
    json.dumps(found)


def test_every_device_has_a_source_and_a_plausible_speed() -> None:
    for device in DEVICES.values():
        assert device.source
        assert 0.1 < device.tokens_per_second(7 * 10**9) < 50_000


def test_the_command_lists_shows_and_checks(tmp_path: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["scenarios", "--json"])
    assert {one["name"] for one in json.loads(listed.stdout)} == set(NAMES)
    shown = runner.invoke(app, ["scenarios", "--show", "campus"])
    assert shown.stdout == library()["campus"].read_text()
    assert json.loads(runner.invoke(app, ["scenarios", "--schema"]).stdout)["type"] == "object"
    assert "GiB" in runner.invoke(app, ["scenarios", "--devices"]).stdout
    assert "120 nodes" in runner.invoke(app, ["scenarios", "home-dsl"]).stdout


def test_scenarios_need_no_torch() -> None:
    code = (
        "import sys; from talkoot.sims.scenario import load_scenario; load_scenario('campus'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
