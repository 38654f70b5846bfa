"""``talkoot-sim plan``: its answers, its files, its exit status."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError, TalkootError
from talkoot.sims.cli import app
from talkoot.sims.planning.sweep import parse_changes, parse_sweep, points_of

SMALL = """
name = "small"
rounds = 3
[model]
preset = "nano"
sequence_length = 64
[corpus]
block_tokens = 256
[rules.round]
tokens_per_node = 4096
deadline_seconds = 900
[[population]]
name = "desks"
device = "cpu-8"
count = 4
tokens_per_second = 12.0
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_json_is_the_whole_plan_and_nothing_else(small: str) -> None:
    found = json.loads(run(small, "--json", "--seeds", "2"))
    assert found["kind"] == "plan"
    assert [one["scenario"]["seed"] for one in found["runs"]] == [0, 1]
    assert found["runs"][0]["figures"]["rounds"] == 3
    assert len(found["runs"][0]["rounds"]) == 3


def test_words_fit_eighty_columns(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(small)
    assert "tokens a day" in text
    assert "training that counted" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_report_is_one_page_with_everything_in_it(small: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small, "--out", str(out), "--events")
    page = (out / "index.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert 'src="http' not in page
    assert page.count("data:image/png;base64,") == 10
    for name in ("tokens", "utilization", "timeline", "participation", "bytes"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "events.csv").open()))
    assert len(rows) == 12
    counted = sum(int(row["tokens"]) for row in rows if row["committed"] == "1")
    assert counted == json.loads((out / "plan.json").read_text())["runs"][0]["figures"]["tokens"]


def test_a_sweep_plans_every_combination(small: str, tmp_path: Path) -> None:
    arguments = (
        "--sweep",
        "rules.round.tokens_per_node=2048,4096",
        "--sweep",
        "population.0.count=2,3",
    )
    found = json.loads(run(small, "--json", *arguments))
    assert [list(point["values"].values()) for point in found["points"]] == [
        [2048, 2],
        [2048, 3],
        [4096, 2],
        [4096, 3],
    ]
    out = tmp_path / "out"
    assert "4 plans of small" in run(small, "--out", str(out), *arguments)
    assert "tokens_per_node" in (out / "index.html").read_text()


def test_a_change_is_validated_like_the_file(small: str) -> None:
    assert (
        json.loads(run(small, "--json", "--set", "population.0.count=7"))["runs"][0]["figures"][
            "nodes"
        ]
        == 7
    )
    with pytest.raises(ConfigError, match=r"population\.0\.count"):
        points_of(small, ["population.0.count=7,-1"], {}, 1)


def test_a_dry_run_says_what_it_would_cost(small: str) -> None:
    assert "One plan of 4 nodes: about" in run(small, "--dry-run")
    assert json.loads(run(small, "--dry-run", "--json", "--seeds", "3"))["plans"] == 3


def test_an_expectation_that_does_not_hold_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "wish.toml"
    path.write_text(SMALL + "[expect]\nutilization = { min = 0.1 }\nrounds = { min = 4 }\n")
    with pytest.raises(TalkootError, match="rounds is 3 and was expected to be 4 or more"):
        CliRunner().invoke(app, ["plan", str(path)], catch_exceptions=False)


def test_words_that_are_no_key_and_value_are_told() -> None:
    assert parse_sweep("a.b=1,2.5,x") == ("a.b", [1, 2.5, "x"])
    assert parse_changes(["a=true", "b=[1]"]) == {"a": True, "b": [1]}
    for text in ("a", "=1", "a="):
        with pytest.raises(ConfigError, match="is not key="):
            parse_sweep(text)
    with pytest.raises(ConfigError, match="is not key=value"):
        parse_changes(["a"])


def test_too_many_plans_are_refused_before_the_first(small: str) -> None:
    many = ",".join(str(n) for n in range(1, 102))
    with pytest.raises(ConfigError, match="1010 plans, over 1000"):
        points_of(small, [f"population.0.count={many}"], {}, 10)


def test_events_need_a_place(small: str) -> None:
    with pytest.raises(ConfigError, match="--events needs --out"):
        CliRunner().invoke(app, ["plan", small, "--events"], catch_exceptions=False)


def test_a_section_that_a_sentence_names_in_brackets_is_shown() -> None:
    assert "compress [downlink]" in run("loopback-2")
