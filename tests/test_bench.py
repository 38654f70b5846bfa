"""The bench harness: how figures are judged, kept and drawn, and children watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import round7b
from bench.child import run_child
from bench.registry import all_benchmarks, compare, figure
from bench.report import save_json, save_plot


def test_a_ratio_is_the_median_of_pairs_and_is_held_against_its_bar() -> None:
    row = compare("x", "s", [1.0, 9.0, 3.0], [1.0, 3.0, 1.0], ratio_at_most=3.0)
    assert (row.ratio, row.bar, row.holds, row.samples) == (3.0, "ratio <= 3", True, 3)
    assert compare("x", "s", [1.0], [2.0], ratio_at_least=1.0).holds is False
    assert figure("x", "MB", 5.0).holds is None


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    save_json(path, [figure("a", "s", 1.0, at_most=2), figure("b", "s", 1.0)])
    save_json(path, [figure("b", "s", 7.0, at_least=8)])
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert {name: row["value"] for name, row in rows.items()} == {"a": 1.0, "b": 7.0}
    assert rows["b"]["holds"] is False
    assert {"name", "value", "unit", "baseline", "ratio", "bar", "holds"} <= rows["a"].keys()
    save_plot(tmp_path / "bench.png", list(rows.values()))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_every_benchmark_has_a_name_and_says_what_it_measures() -> None:
    known = all_benchmarks()
    assert "uplink" in known
    assert all(function.__doc__ for function, _ in known.values())


def hold(size: int) -> int:
    """For the test below: touch so many bytes."""
    return sum(bytearray(b"\1") * size) // size


def test_a_child_tells_its_result_and_its_peak_of_anonymous_memory() -> None:
    small = run_child("tests.test_bench:hold", {"size": 1})
    large = run_child("tests.test_bench:hold", {"size": 80_000_000})
    assert large.result == 1
    assert large.peak_anonymous - small.peak_anonymous > 70_000_000


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_child("tests.test_bench:hold", {"size": 0})


@pytest.mark.parametrize("parameters", [3e7, 3e8, 7.0e9])
def test_the_model_of_the_whole_round_has_the_parameters_that_were_asked_for(
    parameters: float,
) -> None:
    assert round7b.manifest_for(int(parameters)).parameters == pytest.approx(parameters, rel=1e-3)


def test_a_whole_round_is_not_begun_where_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--parameters", "1e11", "--scratch", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["round7b", *arguments])
    assert round7b.main() == 1
    assert "free some" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
