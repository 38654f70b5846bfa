"""Tables for pandas: CSV and Parquet say the same."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError
from talkoot.sims import tables
from talkoot.sims.cli import app
from talkoot.sims.tables import Columns, rows_of, write_table
from talkoot.sims.virtual.result import NODE_COLUMNS, ROUND_COLUMNS, NodeFound, RoundFound

COLUMNS: Columns = {"n": int, "x": float, "word": str, "yes": bool}
CELLS = st.tuples(
    st.none() | st.integers(-(2**62), 2**62),
    st.none() | st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1),
    st.booleans(),
)


def read(path: Path) -> Any:
    return pytest.importorskip("pyarrow.parquet").read_table(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(CELLS, max_size=9))
def test_csv_and_parquet_say_the_same(tmp_path: Path, rows: list[tuple[Any, ...]]) -> None:
    pytest.importorskip("pyarrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BATCH", 4)  # several row groups
        write_table(tmp_path / "t", COLUMNS, rows, parquet=True)
    found = read(tmp_path / "t.parquet")
    assert [str(kind) for kind in found.schema.types] == ["int64", "double", "string", "bool"]
    assert [tuple(row.values()) for row in found.to_pylist()] == rows
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        told = list(csv.DictReader(file))
    assert [row["word"] for row in told] == [row[2] for row in rows]
    assert [row["yes"] for row in told] == [str(int(row[3])) for row in rows]
    assert [float(row["x"]) if row["x"] else None for row in told] == [row[1] for row in rows]


def test_what_a_row_lacks_is_empty() -> None:
    assert rows_of(COLUMNS, [{"x": 1.0, "more": 2}]) == [[None, 1.0, None, None]]


def test_a_runs_tables_have_all_that_is_known_of_rounds_and_nodes() -> None:
    assert list(ROUND_COLUMNS) == [field.name for field in fields(RoundFound)]
    assert list(NODE_COLUMNS) == [field.name for field in fields(NodeFound)]


@pytest.fixture
def no_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pyarrow" else find(name, *a)
    )


@pytest.mark.usefixtures("no_pyarrow")
def test_without_the_extra_one_sentence_says_so_before_anything_runs(tmp_path: Path) -> None:
    for words in (
        ("run", "attack-25", "--parquet", "--out", str(tmp_path / "out")),
        ("plan", "attack-25", "--events", "--parquet", "--out", str(tmp_path / "out")),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'talkoot\[parquet\]'"):
            CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_a_plans_events_are_what_is_written_as_parquet(tmp_path: Path) -> None:
    pytest.importorskip("simpy")
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="--parquet needs --events"):
        CliRunner().invoke(app, ["plan", "campus", "--parquet"], catch_exceptions=False)
    pytest.importorskip("pyarrow")
    words = ["plan", "attack-25", "--out", str(tmp_path), "--events", "--parquet"]
    assert CliRunner().invoke(app, words).exit_code == 0
    found = read(tmp_path / "events.parquet").to_pylist()
    with (tmp_path / "events.csv").open(encoding="utf-8", newline="") as file:
        told = list(csv.DictReader(file))
    assert [str(row["arrived_s"]) for row in found] == [row["arrived_s"] for row in told]
    tokens = json.loads((tmp_path / "plan.json").read_text())["runs"][0]["figures"]["tokens"]
    assert sum(row["tokens"] for row in found if row["committed"]) == tokens
