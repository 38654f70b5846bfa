"""The attack suite's quick form: the real coordinator, real trainers and liars among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from talkoot.server.aggregate import clip_factors, fair_norms
from talkoot.server.validator import Validator
from talkoot.sims.attacks.figures import table
from talkoot.sims.attacks.kinds import Actor, liars
from talkoot.sims.attacks.stage import Stage
from talkoot.sims.attacks.suite import QUICK, make_state, run_suite


def test_the_quick_suite_sets_liars_aside_and_no_honest_node(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = run_suite(tmp_path / "out", tmp_path / "work", QUICK, lambda _line: None)
    rows = {row["attack"]: row for row in data["attacks"]}
    # Two liars, four rounds each, then quarantine: with another Python's library as text, one of
    # the five rounds may be one in which the honest agree too little for anybody to be judged.
    assert rows["sign flip"]["judged"].get("set-aside", 0) == 8
    assert rows["copy"]["verdicts"].get("copied", 0) >= 2
    assert set(rows["NaN"]["verdicts"]) <= {"payload-malformed", "not-finite"}
    assert data["honest_nodes"]["quarantined"] == 0
    assert (tmp_path / "out" / "attacks.json").is_file()
    assert table(data).count("\n") == 3 + len(rows)
    (transfers,) = rows["slow-loris"]["transfers"]
    assert transfers["honest_failed"] == 0
    assert transfers["places"]["a_liar_held_at_most"] <= transfers["places"]["cap"]
    assert transfers["places_freed_at_the_end"]
    assert transfers["rounds_held_to_the_deadline"] == 3  # of the four: then it waits for nobody


def test_an_honest_first_lease_replays_to_the_same_bytes_and_helps(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    state = make_state(tmp_path / "made", QUICK, 0)
    wanted = {"replay_share": 1.0, "gain_share_probation": 1.0, "wait_seconds": 3600.0}
    with Stage(state, tmp_path / "stage", [Actor("anna")], belief=wanted) as stage:
        stage.work_round()
        validator = Validator(stage.coordinator)
        while validator.step():
            pass
        found = stage.site.conductor._belief.record_of(stage.hands[0].node_id)["validations"]
        told = {one["kind"]: one for one in found}
        assert told["replay"]["code"] == "replay-same"
        assert told["replay"]["figures"]["cosine"] == pytest.approx(1.0)
        assert told["gain"]["code"] != "gain-missing"


def test_a_liar_with_the_longest_lease_is_loud_by_the_root_of_it_and_no_more(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    state = make_state(tmp_path / "made", QUICK, 0)
    actors = [Actor(f"honest{number}") for number in range(4)] + liars("longest leases", 1, 1)
    with Stage(state, tmp_path / "stage", actors) as stage:
        stage.work_round()
        liar = stage.hands[-1].node_id
        came = stage.site.book.contributions(1)
        assert [c.tokens // QUICK.tokens for c in came if c.node_id == liar] == [4]
        assert all(c.tokens == QUICK.tokens for c in came if c.node_id != liar)
        norms = [c.l2_norm for c in came]
        factors = clip_factors(fair_norms(norms, [c.tokens for c in came]))
        heard = {c.node_id: n * f for c, n, f in zip(came, norms, factors, strict=True)}
        loudest = heard.pop(liar)
        assert len(heard) == 4
        assert max(heard.values()) < loudest <= 2.0 * max(heard.values()) * (1 + 1e-9)
