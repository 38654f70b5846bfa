"""The pictures of a run: what they show is what the tables say, with few nodes and with many."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.sims.panels import DOING, MOST_STRIPS, some_of
from talkoot.sims.scenario import METRICS
from talkoot.sims.virtual.report import write_report
from talkoot.sims.virtual.scenes import (
    cut,
    gaps,
    liars_shares,
    seconds_in,
    shares_by_class,
    shut_out,
    strips,
    typical,
)

SPANS = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)), max_size=12).map(
    lambda pairs: [(float(a), float(a + b)) for a, b in pairs]
)
ROUND = {"round": 1, "opened": 100.0, "closed": 180.0, "published": 200.0}


def lease(node: str, **changed: Any) -> dict[str, Any]:
    row = {
        "round": 1,
        "attempt": 0,
        "node": node,
        "population": "homes",
        "attack": "",
        "tokens": 100,
        "sent": 100.0,
        "fetched": 110.0,
        "trained": 150.0,
        "encoded": 155.0,
        "arrived": 160.0,
        "answered": 160.0,
        "bytes_up": 1,
        "bytes_down": 2,
        "answer": "accepted",
        "influence": 1.0,
    }
    return {**row, **changed}


def there(node: str, came: float = 0.0, went: float = 200.0, kind: str = "homes") -> dict[str, Any]:
    return {"node": node, "population": kind, "came": came, "went": went}


@given(SPANS, SPANS)
def test_a_span_is_what_is_cut_out_of_it_and_what_is_not(
    spans: list[tuple[float, float]], others: list[tuple[float, float]]
) -> None:
    within = sorted(others)
    for begin, end in spans:
        missing = gaps((begin, end), within)
        seen = [t + 0.5 for t in range(int(begin), int(end))]
        for moment in seen:
            inside = any(a <= moment < b for a, b in within)
            assert inside != any(a <= moment < b for a, b in missing)
        merged = gaps((begin, end), missing)  # what lies in one of ``within``, without doubles
        assert sum(b - a for a, b in merged) + sum(b - a for a, b in missing) == end - begin
        assert all(begin <= a < b <= end for a, b in cut((begin, end), within))


@given(SPANS)
def test_no_second_is_lost_or_counted_twice_between_bins(spans: list[tuple[float, float]]) -> None:
    bins = np.linspace(0.0, 131.0, 17)
    found = seconds_in(bins, spans)
    assert found.sum() == pytest.approx(sum(b - a for a, b in spans))
    for k in range(16):
        low, high = bins[k], bins[k + 1]
        here = sum(max(0.0, min(b, high) - max(a, low)) for a, b in spans)
        assert found[k] == pytest.approx(here, abs=1e-6)


def test_a_class_trains_the_share_of_its_time_online_that_counted() -> None:
    present = [there("a"), there("b", 0.0, 130.0), there("b", 140.0, 150.0)]
    leases = [lease("a"), lease("b"), lease("a", answer="late"), lease("x", population="other")]
    bins, shares = shares_by_class(["homes", "nobody"], leases, present, 200.0)
    width = np.diff(bins)
    online = 200.0 + 130.0 + 10.0
    # a trains from 110 to 150; b too, but is away for ten seconds of it.
    trained = float((shares[0] * seconds_in(bins, [(0, 200), (0, 130), (140, 150)])).sum())
    assert trained == pytest.approx(40.0 + 30.0)
    assert trained / online < 1
    assert len(width) == shares.shape[1]
    assert np.isnan(shares[1]).all()  # of whom nobody was there


def test_a_nodes_round_has_no_gap_and_no_overlap() -> None:
    again = lease("a", attempt=1, sent=165.0, fetched=168.0, trained=175.0, encoded=176.0)
    first = lease("a", answer="given-up", answered=165.0, trained=None, encoded=None, arrived=None)
    again |= {"arrived": 177.0}
    (strip,) = strips(ROUND, [first, again], [there("a", 0.0, 120.0), there("a", 130.0)])
    ordered = sorted(part for part in strip.parts if part[1] > part[0])
    assert ordered[0][0] == 0.0
    assert ordered[-1][1] == 100.0
    assert all(before[1] == after[0] for before, after in pairwise(ordered))
    assert {part[2] for part in ordered} == set(DOING)
    assert (20.0, 30.0, "away") in ordered
    assert strip.counted


def test_a_timeline_shows_the_fastest_and_the_slowest_of_each_class_and_of_liars() -> None:
    kinds = [("homes", ""), ("homes", "copy"), ("lab", "")]
    leases = [
        lease(f"{kind}{lie}-{n:03d}", population=kind, attack=lie, arrived=160.0 + n)
        for kind, lie in kinds
        for n in range(256)
    ]
    found = strips(ROUND, leases, [])
    assert len(found) == MOST_STRIPS
    assert [strip.label for strip in found if strip.first] == [
        "homes-000",
        "homescopy-000 (copy)",
        "lab-000",
    ]
    assert {"homes-255", "homescopy-255 (copy)", "lab-255"} <= {strip.label for strip in found}
    assert [strip.lies for strip in found].count(True) == MOST_STRIPS // 3


@given(st.integers(0, 300), st.integers(1, 40))
def test_some_of_a_class_are_three_or_more_and_in_order(count: int, groups: int) -> None:
    found = some_of(range(count), groups)
    assert found == sorted(set(found))
    assert len(found) >= min(count, 3)
    assert len(found) * groups <= max(MOST_STRIPS, 3 * groups)
    if count > 1:
        assert (found[0], found[-1]) == (0, count - 1)


def test_liars_weigh_what_the_coordinator_believed_of_them() -> None:
    leases = [
        lease("a"),
        lease("b", attack="copy", influence=0.5),
        lease("c", attack="copy", answer="copied", influence=None),
    ]
    found = liars_shares([ROUND, {**ROUND, "round": 2}], leases)
    assert found["leased"] == pytest.approx([2 / 3, 0.0])
    assert found["accepted"] == pytest.approx([0.5, 0.0])
    assert found["counted"] == pytest.approx([1 / 3, 0.0])
    nodes: list[dict[str, Any]] = [
        {"attack": "copy", "quarantined": 150.0},
        {"attack": "", "quarantined": None},
    ]
    later: list[dict[str, Any]] = [ROUND, {**ROUND, "published": 100.0}]
    assert shut_out(later, nodes, liars=True) == [1, 0]
    assert shut_out(later, nodes, liars=False) == [0, 0]


def test_the_round_that_is_shown_is_neither_the_shortest_nor_the_longest() -> None:
    rounds = [{"round": n, "opened": 0.0, "published": float(n)} for n in (5, 1, 9)]
    assert typical(rounds) == rounds[0]
    assert typical([]) is None


def document(nodes: int, classes: int) -> dict[str, Any]:
    rounds = [
        {
            **{"round": n, "opened": 200.0 * n, "closed": 200.0 * n + 180, "attempts": 1},
            **{"published": 200.0 * n + 190, "leases": nodes, "contributions": nodes},
            **{
                "tokens": 100 * nodes,
                "tokens_so_far": 100 * nodes * n,
                "loss": 4.0,
                "heldout": 3.9,
            },
        }
        for n in range(3)
    ]
    found = dict.fromkeys(METRICS, 1.0)
    return {
        "scenario": {"name": "town", "sentence": "A town.", "seed": 0, "expect": {}},
        "figures": {**found, "rounds": 3, "nodes": nodes},
        "first_loss": 5.0,
        "broken": [],
        "refused": [],
        "weights_digest": "0" * 64,
        "rounds": rounds,
        "nodes": [
            {
                **{"name": f"n-{n:05d}", "population": f"class-{n % classes}"},
                **{"attack": "copy" if n == 3 else "", "status": "admitted", "contributions": 3},
                **{"tokens": 300, "train_seconds": 100.0, "online_seconds": 600.0},
                **{"bytes_up": 1, "bytes_down": 1, "quarantined": 300.0 if n == 3 else None},
            }
            for n in range(nodes)
        ],
    }


@pytest.mark.parametrize(("nodes", "classes"), [(8, 1), (256, 9)])
def test_pictures_stay_of_a_size_that_fits_a_page(tmp_path: Path, nodes: int, classes: int) -> None:
    pytest.importorskip("matplotlib")
    data = document(nodes, classes)
    leases = [
        lease(
            node["name"],
            round=row["round"],
            population=node["population"],
            attack=node["attack"],
            **{key: 200.0 * row["round"] + at for key, at in (("sent", 1), ("fetched", 9))},
            **{key: 200.0 * row["round"] + at for key, at in (("trained", 99), ("encoded", 110))},
            **{key: 200.0 * row["round"] + at for key, at in (("arrived", 130), ("answered", 130))},
        )
        for row in data["rounds"]
        for node in data["nodes"]
    ]
    present = [there(n["name"], 0.0, 600.0, n["population"]) for n in data["nodes"]]
    page = write_report(data, leases, present, tmp_path).read_text()
    for name in ("report", "utilization", "timeline", "liars"):
        png = (tmp_path / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert width == 1248
        assert 200 < height < 1000
    assert page.count("data:image/png;base64,") == 8
    assert "What the liars did" in page


def test_a_run_that_published_nothing_has_a_page_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = {**document(2, 1), "rounds": []}
    data["figures"] = {**data["figures"], "rounds": 0, "loss": None, "utilization": None}
    write_report(data, [], [], tmp_path)
    assert not (tmp_path / "timeline.png").exists()
