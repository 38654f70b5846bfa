"""What the operator's commands print, when strangers chose some of the words."""

from __future__ import annotations

from typing import Any

import pytest

from talkoot.server.tables import print_nodes, print_rounds, print_status


def node(name: str) -> dict[str, Any]:
    return {
        "node_id": "0123456789abcdef",
        "name": name,
        "status": "admitted",
        "standing": "established",
        "state": "training",
        "last_seen_unix": None,
        "contributions": 3,
        "tokens_per_second": 1500.0,
        "bytes_up": 1,
        "bytes_down": 2,
    }


@pytest.mark.parametrize(
    "name", ["[/]", "[red]x[/red]", "[link=https://example.org]x[/link]", "a[b"]
)
def test_markup_in_a_nodes_name_is_shown_and_not_obeyed(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_nodes([node(name)])
    assert name in capsys.readouterr().out


def test_a_nodes_id_is_whole_on_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_nodes([node("a machine with a name of some length, as people like them")])
    out = capsys.readouterr().out
    assert "0123456789abcdef" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


@pytest.mark.parametrize(("columns", "bytes_shown"), [("80", False), ("120", True)])
def test_a_round_is_one_line_with_its_reason_on_a_terminal_of_80_columns(
    columns: str,
    bytes_shown: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    row = {
        "round": 1234,
        "loss": 12.3456,
        "heldout_loss": 12.3456,
        "tokens": 123_456_789,
        "contributions": 999,
        "bytes_up": 123_456_789,
        "update_bytes": 123_456_789,
        "seconds": 12345.6,
        "reason": "Round 1234 closes: 999 contributed.",
    }
    print_rounds([row])
    head, line = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert line.endswith(" 999 contributed.")
    assert max(len(head), len(line)) <= int(columns)
    assert ("update" in head) == bytes_shown


def test_markup_and_control_characters_in_an_event_do_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_status(
        {
            "run_id": "run-1",
            "phase": "training",
            "round": 1,
            "rounds_total": 2,
            "version": 0,
            "weights_digest": "0" * 64,
            "parameters": 1,
            "tokens_committed": 0,
            "loss": None,
            "heldout": None,
            "nodes": [],
            "history": [],
            "events": [{"unix": 0.0, "sentence": "[/]\x9b2J enrolled."}],
        }
    )
    out = capsys.readouterr().out
    assert "[/] 2J enrolled." in out
    assert "\x9b" not in out
