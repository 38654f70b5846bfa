"""The live view shows what the status says on any terminal, and lines where there is none."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from talkoot.sims.figures import (
    bytes_text,
    clean,
    count_text,
    number_text,
    seconds_text,
    sparkline,
    times_smaller_text,
)
from talkoot.sims.view import LiveView, changes, render
from talkoot.sims.view_parts import style_of

START = 1_800_000_000.0


def node(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "node_id": f"{number:016x}",
        "name": f"node {number}",
        "status": "admitted",
        "state": "training",
        "online": True,
        "step": 8,
        "steps": 32,
        "loss": 2.345,
        "tokens_per_second": 4321.0,
        "bytes_up": 40_000,
        "bytes_down": 5_000_000,
        "version": 2,
        "weights_digest": "ab" * 32,
        "contributions": 2,
        "last_seen_unix": START,
        "restarts": 0,
        "healed": 0,
    } | changed


def row(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "version": number,
        "loss": 5.0 / number,
        "tokens": 1000,
        "contributions": 3,
        "bytes_up": 60_000,
        "update_bytes": 20_000,
        "seconds": 10.0,
        "training_seconds": 7.0,
        "published_unix": START + 10.0 * number,
    }


def event(unix: float, kind: str, sentence: str) -> dict[str, Any]:
    return {"unix": unix, "kind": kind, "sentence": sentence}


def status(**changed: Any) -> dict[str, Any]:
    return {
        "run_id": "demo",
        "phase": "training",
        "round": 3,
        "rounds_total": 8,
        "version": 2,
        "weights_digest": "cd" * 32,
        "deadline_unix": START + 60,
        "tokens_committed": 2000,
        "parameters": 1_000_000,
        "loss": 2.5,
        "history": [row(1), row(2)],
        "nodes": [node(1), node(2), node(3, online=False)],
        "events": [event(START + 5, "kill", "Node 3 was killed.")],
    } | changed


def drawn(
    told: dict[str, Any] | None,
    width: int = 100,
    *,
    phase_lines: Sequence[str] = (),
    model: str = "",
) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    picture = render(
        told, phase_lines=phase_lines, started_unix=START, now_unix=START + 42, model=model
    )
    with console.capture() as capture:
        console.print(picture)
    return capture.get()


def test_the_picture_shows_run_round_loss_nodes_and_events() -> None:
    text = drawn(status(), model="tiny", phase_lines=["starting the nodes"])
    for words in (
        "demo",
        "tiny",
        "1.00 M parameters",
        "42 s",
        "round 3 of 8",
        "closes in 18 s",
        "5.000 → 2.500",
        "2.00 k tokens",
        "node 1",
        "8/32",
        "2.345",
        "4.32 k",
        "40.0 kB",
        "5.00 MB",
        "×200 smaller",  # 2 contributions of 4 MB in 40 kB
        "offline",
        "Node 3 was killed.",
        "starting the nodes",
    ):
        assert words in text, words


def test_before_there_is_a_coordinator_the_demo_says_what_it_is_doing() -> None:
    text = drawn(None, phase_lines=[f"line {i}" for i in range(20)])
    assert "line 19" in text
    assert "line 13" not in text


@pytest.mark.parametrize("width", [200, 100, 98, 97, 80, 60, 40])
def test_no_line_is_wider_than_the_terminal_and_no_row_is_broken(width: int) -> None:
    told = status(
        run_id="r" * 63,
        nodes=[node(1, name="n" * 64), node(2, name="漢字" * 20)],
        events=[event(START, "kill", "s" * 2000)],
    )
    lines = drawn(told, width, model="m" * 80, phase_lines=["x" * 30]).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    heads = next(i for i, line in enumerate(lines) if " node" in line and " state" in line)
    assert "8/" in lines[heads + 1]
    if width >= 80:
        assert "training" in lines[heads + 1]
        assert "training" in lines[heads + 2]


def test_text_from_the_network_can_neither_style_nor_move_the_cursor() -> None:
    nasty = "\x1b[2J\x1b]0;title\x07[red]red[/red]\u202eback\r\nmore"
    told = status(nodes=[node(1, name=nasty)], events=[event(START, "kill", nasty)], phase=nasty)
    text = drawn(told, 200, phase_lines=[nasty], model=nasty)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]red[/red]" in text


json_values = st.one_of(st.none(), st.integers(0, 10**12), st.floats(0, 1e9))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_value_of_a_status_may_be_missing_or_null(data: st.DataObject) -> None:
    def damaged(thing: dict[str, Any]) -> dict[str, Any]:
        gone = data.draw(st.sets(st.sampled_from(sorted(thing))))
        nulled = data.draw(st.booleans())
        left = {key: value for key, value in thing.items() if key not in gone}
        return left | (dict.fromkeys(gone) if nulled else {})

    told = damaged(
        status(
            history=[damaged(row(1))],
            nodes=[damaged(node(1))],
            events=[damaged(event(START, "kill", "x"))],
        )
    )
    drawn(told, data.draw(st.sampled_from([80, 100])))
    changes(None, told)
    changes(status(), told)


def test_the_bar_counts_versions_when_the_history_is_only_the_last_few_rounds() -> None:
    text = drawn(status(version=250, round=250, rounds_total=300, phase="waiting"))
    assert "250 of 300 rounds done" in text


@pytest.mark.parametrize(
    ("words", "style"),
    [
        ("Killed node väinö (SIGKILL)", "bold red"),
        ("Node väinö is back after 8.2 s", "bold green"),
        ("returned", "bold green"),
        ("restart", "yellow"),
        ("round-published", ""),
        ("starting 4 nodes", ""),
    ],
)
def test_what_broke_is_red_and_what_was_mended_is_green(words: str, style: str) -> None:
    assert style_of(words) == style


def test_only_what_is_new_becomes_a_line() -> None:
    first = status()
    assert changes(first, first) == []
    back = event(START + 9, "returned", "Node 3 is back.")
    second = status(
        history=[row(1), row(2), row(3)],
        nodes=[node(1), node(2), node(3)],
        events=[*first["events"], back],
    )
    lines = changes(first, second)
    assert [line for _, line in lines[:2]] == ["Node 3 is back.", "node node 3 is online"]
    assert lines[0][0] == "bold green"
    assert lines[2][1].startswith("round 3 of 8: loss 1.667, 1.00 k tokens, 3 contributions")
    assert len(lines) == 3


def test_without_a_terminal_the_view_is_plain_lines() -> None:
    out = io.StringIO()
    now = [START]
    with LiveView(
        console=Console(file=out, width=80), started_unix=START, clock=lambda: now[0]
    ) as view:
        assert not view.is_live
        view.say("starting")
        now[0] += 75
        view.update(status())
        view.update(None)
        view.update(status())
    lines = out.getvalue().splitlines()
    assert lines[0] == "[       0.0 s] starting"
    assert "[ 1 min 15 s] Node 3 was killed." in [" ".join(line.split()) for line in lines]
    assert sum("round 2 of 8" in line for line in lines) == 1
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_the_last_picture_stays_on_the_screen() -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

    out = Terminal()
    console = Console(file=out, width=100, height=40, force_terminal=True, color_system=None)
    with LiveView(console=console, started_unix=START, clock=lambda: START + 1) as view:
        assert view.is_live
        view.update(status())
    assert out.getvalue().rindex("round 3 of 8") > 0


def test_a_terminal_that_cannot_draw_gets_lines() -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

    console = Console(file=Ascii(), width=100, force_terminal=True)
    assert not LiveView(console=console).is_live


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (129_000_000, "129 MB"),
        (28e9, "28.0 GB"),
    ],
)
def test_bytes_have_three_digits(value: float | None, told: str) -> None:
    assert bytes_text(value) == told


def test_counts_durations_and_ratios_read_well() -> None:
    assert count_text(4_120_832) == "4.12 M"
    assert seconds_text(4.21) == "4.2 s"
    assert seconds_text(59.96) == "1 min 00 s"
    assert seconds_text(185) == "3 min 05 s"
    assert seconds_text(7620) == "2 h 07 min"
    assert seconds_text(10 * 86_400) == "10 days"
    assert seconds_text(5e12) == "158,440 years"
    assert [number_text(value) for value in (0.76429, 2, 4.82064, 19_410, 9.86284e8)] == [
        *("0.7643", "2", "4.821", "19,410", "986 M"),
    ]
    assert times_smaller_text(4e6, 18_500) == "×216"
    assert times_smaller_text(4e6, 0) == "–"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=200), st.integers(0, 40))
def test_a_sparkline_fits_its_width_whatever_the_values(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) <= width


def test_a_sparkline_falls_as_its_values_fall() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([float(v) for v in range(80, 0, -1)], 8) == "█▇▆▅▄▃▂▁"


@given(st.text())
def test_clean_text_is_one_line_without_control_characters(text: str) -> None:
    line = clean(text)
    assert line.isprintable() or all(not char.isspace() or char == " " for char in line)
    assert "\x1b" not in line
    assert "\n" not in line
