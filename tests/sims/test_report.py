"""The report says what the data says, whatever is in the data, and fetches nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol.errors import StateError
from talkoot.sims.report import write_report
from talkoot.sims.report_data import Kill, NodeRow, ReportData, RoundRow
from talkoot.sims.report_html import page
from talkoot.sims.report_plot import draw_loss, tokens_at

PNG = b"\x89PNG\r\n\x1a\n"

PROMISED = {
    "rounds",
    "nodes",
    "model",
    "parameters",
    "heldout_loss_before",
    "heldout_loss_after",
    "bits_per_parameter_up",
    "bits_per_parameter_down",
    "nontraining_seconds_per_round",
    "kills",
    "replicas_agree",
    "export_dir",
    "wall_seconds",
}
PROMISED_OF_A_ROUND = {
    "round",
    "loss",
    "tokens",
    "contributions",
    "bytes_up",
    "update_bytes",
    "seconds",
    "training_seconds",
    "version",
}


def report(**changed: object) -> ReportData:
    history = tuple(
        RoundRow(
            round=number,
            version=number,
            loss=5.0 / number,
            tokens=1000,
            contributions=3,
            bytes_up=60_000,
            update_bytes=20_000,
            seconds=10.0,
            training_seconds=7.0,
        )
        for number in range(1, 5)
    )
    nodes = tuple(
        NodeRow(node_id=f"{number:016x}", name=f"node {number}", contributions=4, bytes_up=80_000)
        for number in range(3)
    )
    data = ReportData(
        run_id="demo",
        model="tiny",
        parameters=1_000_000,
        rounds=4,
        nodes=3,
        heldout_loss_before=5.5,
        heldout_loss_after=1.25,
        bits_per_parameter_up=0.148,
        bits_per_parameter_down=0.149,
        nontraining_seconds_per_round=3.0,
        replicas_agree=True,
        wall_seconds=52.0,
        export_dir="/somewhere/export",
        history=history,
        node_rows=nodes,
        kills=(Kill("a node", 17.0, 4.0), Kill("the coordinator", 33.0, None)),
        first_round_seconds=2.0,
        sample_prompt="def ",
        sample_text="main():",
        software={"torch": "2.13.0"},
    )
    return dataclasses.replace(data, **changed)  # type: ignore[arg-type]  # keywords of any field


class Inventory(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in {"src", "srcset", "href", "action"}]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_report_is_three_files_and_the_json_has_the_promised_keys(tmp_path: Path) -> None:
    index = write_report(report(), tmp_path / "a" / "report")
    assert index == tmp_path / "a" / "report" / "index.html"
    assert {f.name for f in index.parent.iterdir()} == {"report.json", "loss.png", "index.html"}
    assert (index.parent / "loss.png").read_bytes().startswith(PNG)
    told = json.loads((index.parent / "report.json").read_text())
    assert told.keys() >= PROMISED
    assert told["kills"][0] == {"what": "a node", "when_seconds": 17.0, "recovery_seconds": 4.0}
    assert told["kills"][1]["recovery_seconds"] is None
    assert told["history"][0].keys() == PROMISED_OF_A_ROUND
    assert told["heldout_loss_after"] == 1.25
    assert told["replicas_agree"] is True
    assert told["tokens"] == 4000


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    html = page(report(), PNG, PNG)
    found = Inventory(html)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert found.addresses
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html


HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>"


def test_text_from_the_network_stays_text() -> None:
    data = report(
        run_id=HOSTILE,
        model=HOSTILE,
        export_dir=HOSTILE,
        sample_prompt=HOSTILE,
        sample_text=HOSTILE,
        node_rows=(NodeRow(node_id=HOSTILE, name=HOSTILE, status=HOSTILE, weights_digest=HOSTILE),),
        kills=(Kill(HOSTILE, 1.0, 1.0),),
        software={HOSTILE: HOSTILE},
    )
    plain, hostile = Inventory(page(report(), PNG, PNG)), Inventory(page(data, PNG, PNG))
    assert set(hostile.tags) == set(plain.tags)
    assert hostile.words.count(HOSTILE) >= 5


def test_names_that_matplotlib_would_read_as_mathematics_are_drawn_as_they_are() -> None:
    kills = (Kill(r"$\frac{1}{", 5.0, 1.0), Kill("$$ ^^ __ \\", 6.0, None))
    assert draw_loss(report(model="$x$ _{", kills=kills)).startswith(PNG)


@pytest.mark.parametrize(
    "changed",
    [
        {"history": (), "kills": (), "rounds": 0},
        {"history": (RoundRow(round=1, loss=None, tokens=0, seconds=0.0),)},
        {"heldout_loss_before": math.nan, "heldout_loss_after": math.inf},
        {"history": (RoundRow(round=1, loss=math.nan, tokens=5),), "heldout_loss_after": math.nan},
        {"kills": tuple(Kill(f"number {i}", 20.0 + i / 10, 1.0) for i in range(6))},
        {"kills": (Kill("x" * 500, 1e9, 1.0), Kill("before the start", 0.0, None))},
        {"parameters": 0, "node_rows": (), "nodes": 0, "software": {}},
    ],
)
def test_a_run_that_went_badly_still_gets_its_report(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    index = write_report(report(**changed), tmp_path)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert "</html>" in index.read_text()


def test_replicas_that_differ_and_kills_that_did_not_heal_are_said_in_so_many_words() -> None:
    words = Inventory(page(report(replicas_agree=False), PNG, PNG)).words
    assert "differ" in words
    assert "1 not back" in words
    good = Inventory(page(report(kills=(Kill("a", 1.0, 2.0),)), PNG, PNG)).words
    assert "identical" in good
    assert "1 of 1 back" in good


def test_a_model_that_learnt_nothing_is_not_praised() -> None:
    assert "nothing was learnt" in page(report(heldout_loss_after=5.6), PNG, PNG)


def test_a_place_that_cannot_be_written_is_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateError, match="file"):
        write_report(report(), tmp_path / "file" / "report")


def test_a_row_takes_what_it_knows_from_a_status_and_leaves_the_rest() -> None:
    row = RoundRow.from_status({"round": 3, "loss": 1.5, "published_unix": 99.0, "unheard": 1})
    assert row == RoundRow(round=3, loss=1.5)
    assert NodeRow.from_status({"node_id": "a", "online": True}).node_id == "a"


@settings(max_examples=60)
@given(
    rounds=st.lists(
        st.tuples(st.integers(0, 10**9), st.floats(0, 1e4, allow_nan=False)), max_size=8
    ),
    a=st.floats(-10, 1e5, allow_nan=False),
    b=st.floats(-10, 1e5, allow_nan=False),
)
def test_a_later_kill_never_stands_left_of_an_earlier_one(
    rounds: list[tuple[int, float]], a: float, b: float
) -> None:
    history = [RoundRow(round=i, tokens=t, seconds=s) for i, (t, s) in enumerate(rounds, start=1)]
    total = sum(tokens for tokens, _ in rounds)
    first, second = (tokens_at(history, seconds) for seconds in sorted((a, b)))
    assert 0 <= first <= second * (1 + 1e-9) + 1e-6
    assert second <= total * (1 + 1e-9)
