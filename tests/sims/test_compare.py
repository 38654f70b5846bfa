"""``talkoot-sim compare``: results beside each other, seeds as bands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError
from talkoot.sims.cli import app
from talkoot.sims.compare.read import Curve, Line, read_lines
from talkoot.sims.compare.show import band, rows_of


def trained(path: Path, name: str, seed: int, losses: list[float], nodes: int = 2) -> Path:
    """What ``talkoot-sim run`` leaves, as far as a comparison reads it."""
    rounds = [
        {
            "round": place + 1,
            "published": 3600.0 * (place + 1),
            "tokens": 1000,
            "bytes_up": 10,
            "contributions": nodes,
            "loss": loss + 0.5,
            "heldout": loss,
        }
        for place, loss in enumerate(losses)
    ]
    document = {
        "scenario": {"name": name, "seed": seed, "nodes": nodes},
        "figures": {"rounds": len(losses), "loss": losses[-1], "tokens_per_day": 24_000.0},
        "rounds": rounds,
    }
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(document))
    return path


def test_runs_that_differ_by_their_seed_are_one_line(tmp_path: Path) -> None:
    paths = [trained(tmp_path / str(seed), "a", seed, [3.0, 2.0 + seed / 10]) for seed in (0, 1, 2)]
    paths.append(trained(tmp_path / "other", "a", 0, [3.0, 1.5], nodes=4))
    lines = read_lines(paths)
    assert [(line.name, len(line.curves)) for line in lines] == [("a", 3), ("a (2)", 1)]
    assert lines[0].figure("loss") == pytest.approx(2.1)
    assert lines[0].spread("loss") == pytest.approx(0.1)
    assert lines[0].curves[0].tokens == (1000.0, 2000.0)
    assert lines[0].curves[0].loss == (3.0, 2.0)


def test_a_table_says_what_differs_from_the_first(tmp_path: Path) -> None:
    first = trained(tmp_path / "a", "a", 0, [3.0, 2.0])
    second = trained(tmp_path / "b", "b", 0, [3.0, 1.0])
    rows = {row[0]: row[1:] for row in rows_of(read_lines([first, second]))}
    assert rows["held-out loss"] == ("2.000", "1.000 (-50 %)")
    assert rows["tokens a day"] == ("24.0 k", "24.0 k (+0 %)")
    assert "cost" not in rows


def test_a_band_is_where_all_seeds_are() -> None:
    def curve(seed: int, days: tuple[float, ...], tokens: tuple[float, ...]) -> Curve:
        return Curve(seed, days, tokens, tokens, (math.nan,) * len(days), tokens, {})

    line = Line("a", "plan", (curve(0, (1, 2, 3), (1, 2, 3)), curve(1, (2, 4), (4, 8))))
    grid, middle, low, high = band(line, lambda one: one.days, lambda one: one.tokens)
    assert (grid[0], grid[-1]) == (2.0, 3.0)
    assert np.allclose(low, grid)
    assert np.allclose(high, 2 * grid)
    assert np.allclose(middle, 1.5 * grid)
    assert len(band(line, lambda one: one.days, lambda one: one.loss)[0]) == 0


def test_plans_and_runs_are_compared_in_words_json_and_a_page(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "campus", 0, [3.0, 2.0])
    runner = CliRunner()
    made = runner.invoke(
        app,
        ["plan", "campus", "--seeds", "2", "--out", str(tmp_path / "plan")],
        catch_exceptions=False,
    )
    assert made.exit_code == 0
    both = [str(run), str(tmp_path / "plan")]
    said = runner.invoke(app, ["compare", *both], catch_exceptions=False)
    assert "2 seeds" in said.stdout
    found: dict[str, Any] = json.loads(
        runner.invoke(app, ["compare", *both, "--json"], catch_exceptions=False).stdout
    )
    assert [line["name"] for line in found["lines"]] == ["campus (run)", "campus (plan)"]
    out = tmp_path / "page"
    runner.invoke(app, ["compare", *both, "--out", str(out)], catch_exceptions=False)
    assert (out / "index.html").read_text().count("data:image/png;base64,") == 10
    assert (out / "loss-bytes.png").is_file()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as a result"),
        ("[]", "is not a result of"),
        ('{"kind": "sweep", "points": []}', "is a sweep"),
        ('{"scenario": {}, "figures": {}, "rounds": [{}]}', "is not whole"),
    ],
)
def test_what_is_no_result_is_told(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_lines([file])


def test_a_directory_without_a_result_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither run\.json nor plan\.json"):
        read_lines([tmp_path])


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is nothing at .*nowhere: give a directory"):
        read_lines([tmp_path / "nowhere"])
