"""Rounds, leases, contributions and versions in a real ledger, and what never becomes of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from talkoot.protocol.errors import RefusedError
from talkoot.protocol.messages import ArtifactRef, NodeReport, RoundTask, Verdict
from talkoot.server.book import MAX_LOSS
from talkoot.server.ledger.schema import (
    CommittedBlock,
    ContributionRecord,
    Event,
    JudgementRecord,
    LeaseRecord,
    Node,
    NodeState,
    Round,
    Version,
)
from talkoot.server.status import status, status_json

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_kind(request: pytest.FixtureRequest) -> str:
    """Every test here runs on both."""
    kind: str = request.param
    return kind


NOW = 1_800_000_000.0


def payload(name: object) -> ArtifactRef:
    """The name of a payload: the book sees no bytes."""
    return ArtifactRef(digest=hashlib.sha256(repr(name).encode()).hexdigest(), size_bytes=1000)


def opened(site: Site, *node_ids: str, now: float = NOW) -> Round:
    current = site.book.open_round(site.online(*node_ids), 0.25, now=now)
    assert current is not None
    return current


def give(site: Site, task: RoundTask, name: object = None, **changes: object) -> Verdict:
    """The node's contribution, as the desk hands it over once its payload was verified."""
    claim = site.claim(task, payload(name or task.lease.lease_id), **changes)
    return site.book.accept(claim, site.sign(claim), l2_norm=1.0, now=NOW)


def publish(site: Site, number: int, *, checkpoint: bool = False) -> Version:
    return site.book.publish(
        weights_digest=payload(("weights", number)).digest,
        directory=f"v{number:08d}",
        update=payload(("update", number)),
        checkpoint=payload(("checkpoint", number)) if checkpoint else None,
        now=NOW,
    )


def blocks(site: Site) -> set[tuple[int, int]]:
    with site.coordinator.ledger.read() as session:
        rows = session.execute(select(CommittedBlock.epoch, CommittedBlock.block))
        found = list(rows)
    assert len(found) == len(set(found))
    return set(found)


def blocks_of(*tasks: RoundTask) -> set[tuple[int, int]]:
    return {(ref.epoch, ref.block) for task in tasks for ref in task.lease.blocks}


def contributions(site: Site) -> list[ContributionRecord]:
    with site.coordinator.ledger.read() as session:
        return list(session.scalars(select(ContributionRecord)))


def said(
    site: Site,
    node_id: str,
    *,
    seen: float = NOW,
    state: str = "idle",
    version: int | None = 0,
) -> None:
    """The node was last heard of then, doing this, with a replica of this version."""
    report = NodeReport.model_validate(
        {
            **dict.fromkeys(("weights_digest", "lease_id", "loss")),
            "version": version,
            **dict.fromkeys(("step", "steps", "bytes_up", "bytes_down", "healed"), 0),
            **{"state": state, "tokens_per_second": 0.0, "started_unix": 1.0},
        }
    )
    site.registry.report(node_id, report)
    with site.coordinator.ledger.write() as session:
        session.get_one(NodeState, node_id).seen_unix = seen


# Opening ----------------------------------------------------------------------


def test_a_round_gives_each_node_blocks_of_its_own_in_proportion_to_its_speed(site: Site) -> None:
    slow, fast = site.add_node("slow", speed=500.0), site.add_node("fast", speed=1500.0)
    current = opened(site)
    a, b = site.task(slow), site.task(fast)
    assert (current.round, current.attempt, current.base_version) == (1, 0, 0)
    assert not blocks_of(a) & blocks_of(b)
    assert (a.lease.tokens, b.lease.tokens) == (512, 1536)
    assert a.tokens_before == 0
    assert a.tokens_round == b.tokens_round == 2048
    assert a.deadline_unix == NOW + 100


def test_too_few_nodes_open_no_round(site: Site) -> None:
    site.reopen(round={"min_nodes": 2})
    site.add_node("anna")
    assert site.book.open_round(site.online(), 0.25, now=NOW) is None
    site.add_node("bert")
    assert site.book.open_round(site.online(), 0.25, now=NOW) is not None


def test_only_admitted_nodes_that_are_online_heard_of_and_not_paused_get_a_lease(
    site: Site,
) -> None:
    there, offline, silent, paused, banned = (
        site.add_node(name) for name in ("there", "offline", "silent", "paused", "banned")
    )
    online = site.online(there, silent, paused, banned)
    said(site, silent, seen=NOW - 60)
    said(site, paused, state="paused")
    site.registry.ban(banned, "No.")
    site.book.open_round(online, 0.25, now=NOW)
    assert [task.node_id for task in site.book.open_tasks()] == [there]
    assert site.desk.task(offline) is None


def test_a_node_that_is_far_behind_catches_up_before_it_is_leased(site: Site) -> None:
    site.reopen(round={"max_behind": 1})
    near, joiner = site.add_node("near"), site.add_node("joiner")
    said(site, near)
    said(site, joiner, version=None)  # it fetches its first checkpoint
    for number in (1, 2):
        opened(site)
        assert [task.node_id for task in site.book.open_tasks()] == [near]
        assert give(site, site.task(near)).accepted
        site.book.close_round("done", now=NOW)
        publish(site, number)
        said(site, near, version=number)
    said(site, joiner, version=0)  # two behind
    opened(site)
    assert [task.node_id for task in site.book.open_tasks()] == [near]
    said(site, joiner, version=1)  # one behind will do
    assert site.book.open_round(site.online(), 0.25, now=NOW) is not None
    assert {task.node_id for task in site.book.open_tasks()} == {near, joiner}


def test_what_was_signed_at_init_decides_and_not_a_file_that_was_edited_since(
    site: Site,
) -> None:
    node_id = site.add_node("anna")
    site.reopen(corpus={"block_tokens": 4096}, run={"seed": 99})
    opened(site)
    task = site.task(node_id)
    assert task.lease.tokens == len(task.lease.blocks) * 512


# Contributions ----------------------------------------------------------------------


def test_an_accepted_contribution_commits_its_blocks_and_doing_it_again_changes_nothing(
    site: Site,
) -> None:
    node_id = site.add_node("anna")
    opened(site)
    task = site.task(node_id)
    assert give(site, task).accepted
    before = (blocks(site), site.node(node_id).tokens_per_second)
    assert before[0] == blocks_of(task)
    assert give(site, task).accepted
    assert (blocks(site), site.node(node_id).tokens_per_second) == before
    assert len(contributions(site)) == 1
    assert site.desk.task(node_id) is None


def test_another_payload_for_a_committed_lease_is_refused(site: Site) -> None:
    node_id = site.add_node("anna")
    opened(site)
    task = site.task(node_id)
    assert give(site, task, "first").accepted
    assert give(site, task, "second").code == "committed"
    assert [c.payload_digest for c in contributions(site)] == [payload("first").digest]


def test_after_the_close_a_contribution_is_late_and_its_blocks_are_free_again(site: Site) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    opened(site)
    done, late = site.task(anna), site.task(bert)
    assert give(site, done).accepted
    site.book.close_round("enough", now=NOW)
    verdict = give(site, late)
    assert (verdict.accepted, verdict.code) == (False, "late")
    assert "the round was closed" in verdict.sentence
    assert blocks(site) == blocks_of(done)
    publish(site, 1)
    assert give(site, late).code == "late"
    opened(site)
    assert blocks_of(late) & (blocks_of(site.task(anna)) | blocks_of(site.task(bert)))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"base_weights_digest": "0" * 64}, "wrong-base"),
        ({"tokens": 1}, "not-as-leased"),
        ({"tokens": 2**40}, "not-as-leased"),
        ({"round": 2}, "not-as-leased"),
        ({"lease_id": "0" * 32}, "unknown-lease"),
        ({"loss": -0.1}, "impossible-loss"),
        ({"loss": 1e308}, "impossible-loss"),
    ],
)
def test_a_claim_that_is_not_what_was_leased_is_refused_and_commits_nothing(
    site: Site, changes: dict[str, object], code: str
) -> None:
    node_id = site.add_node("anna")
    opened(site)
    task = site.task(node_id)
    assert give(site, task, **changes).code == code
    assert (blocks(site), contributions(site)) == (set(), [])
    assert give(site, task).accepted, "the lease is open still"


def test_the_lease_of_another_node_is_unknown_to_who_claims_it(site: Site) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    opened(site)
    task = site.task(anna)
    assert give(site, task, node_id=bert).code == "unknown-lease"
    assert give(site, task).accepted
    assert give(site, task, node_id=bert).code == "unknown-lease", "committed or not"


def test_a_payload_counts_for_one_lease_whoever_sends_it_and_whenever(site: Site) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    opened(site)
    assert give(site, site.task(anna), "the work").accepted
    copy = site.task(bert)
    assert give(site, copy, "the work").code == "copied"
    assert give(site, copy, "own work").accepted
    site.book.close_round("all", now=NOW)
    publish(site, 1)
    opened(site)
    assert give(site, site.task(anna), "the work").code == "copied"


def test_a_node_that_gives_its_lease_back_is_late_afterwards_and_its_reason_is_on_record(
    site: Site,
) -> None:
    anna = site.add_node("anna")
    opened(site)
    task = site.task(anna)
    site.book.decline(anna, task.lease.lease_id, "out of \x1b[31mmemory\x00" + "!" * 2000)
    assert give(site, task).code == "late"
    with site.coordinator.ledger.read() as session:
        sentence = session.scalars(select(Event.sentence).where(Event.kind == "declined")).one()
    assert "out of" in sentence
    assert sentence.isprintable(), "it is shown in the operator's terminal"
    assert len(sentence) < 600


def test_nobody_gives_back_the_lease_of_another_or_what_is_committed(site: Site) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    opened(site)
    task = site.task(anna)
    site.book.decline(bert, task.lease.lease_id, "mine now")
    assert give(site, task).accepted
    site.book.decline(anna, task.lease.lease_id, "too late for that")
    assert site.lease(task.lease.lease_id).state == "committed"


def test_a_ban_takes_the_lease_and_leaves_what_is_committed(site: Site) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    opened(site)
    a, b = site.task(anna), site.task(bert)
    assert give(site, a).accepted
    site.registry.ban(anna, "No.")
    site.registry.ban(bert, "No.")
    assert give(site, b).code == "late"
    assert blocks(site) == blocks_of(a)
    assert site.book.open_tasks() == []


@pytest.mark.parametrize(("largest", "times"), [(1.0, 1), (4.0, 4), (7.0, 7), (1000.0, 10)])
def test_a_fast_node_gets_as_much_more_as_the_operator_lets_it(
    site: Site, largest: float, times: int
) -> None:
    site.reopen(round={"largest_lease": largest})
    nodes = [site.add_node(name) for name in ("anna", "bert", "carl")]
    with site.coordinator.ledger.write() as session:
        for node, speed in zip(nodes, (100.0, 100.0, 1000.0), strict=True):
            session.get_one(Node, node).tokens_per_second = speed
    opened(site)
    usual, _, fast = (site.task(node).lease.tokens for node in nodes)
    assert fast == times * usual


@pytest.mark.parametrize("seconds", [0.0, 5e-324, 1e-9, 1e300])
def test_no_claimed_time_of_training_makes_a_speed_that_is_no_number(
    site: Site, seconds: float
) -> None:
    anna = site.add_node("anna")
    opened(site)
    assert give(site, site.task(anna), training_seconds=seconds, loss=MAX_LOSS).accepted
    site.book.close_round("all", now=NOW)
    publish(site, 1)
    assert status_json(site.coordinator), "JSON has no infinity"
    opened(site)
    assert 1 <= site.task(anna).lease.tokens <= 4 * 1024


def test_a_round_with_most_of_its_tokens_closes_and_who_is_late_is_told(site: Site) -> None:
    site.reopen(round={"quorum": 2, "min_nodes": 2, "close_at_share": 0.6})
    nodes = [site.add_node(name) for name in ("anna", "bert", "carl")]
    opened(site, *nodes)
    tasks = [site.task(node) for node in nodes]
    for task, expected in zip(tasks[:2], ("wait", "close"), strict=True):
        assert give(site, task).accepted
        decision = site.book.decide(site.online(*nodes), NOW + 1)
        assert decision is not None
        assert decision.action == expected
    assert decision is not None
    assert decision.code == "enough"
    site.book.close_round(decision.sentence, now=NOW + 1)
    verdict = give(site, tasks[2])
    assert verdict.code == "late"
    assert "its blocks went back to the pool" in verdict.sentence


def test_who_holds_up_round_after_round_is_waited_for_less_and_less_until_it_delivers(
    site: Site,
) -> None:
    names = ("anna", "bert", "loris")
    *honest, loris = nodes = [site.add_node(name) for name in names]
    leased: list[int] = []
    for number in range(1, 12):
        opened(site)
        with site.coordinator.ledger.read() as session:
            has = site.book.holds_lease(session, loris)
        assert has == any(t.node_id == loris for t in site.book.open_tasks())
        for node in honest:
            assert give(site, site.task(node)).accepted
        decision = site.book.decide(site.online(*nodes), NOW + 1)
        assert decision is not None
        assert decision.action == ("wait" if has else "close")
        if has:
            leased.append(number)
        if number == 8:
            assert give(site, site.task(loris)).accepted  # it was the line, and not the node
        site.book.close_round("the deadline", now=NOW + 101, waited_for=site.online(*nodes))
        publish(site, number)
    assert leased == [1, 2, 4, 8, 9, 10]


def test_who_was_paused_or_away_at_the_deadline_has_held_up_nobody(site: Site) -> None:
    anna, away = site.add_node("anna"), site.add_node("away")
    paused = site.add_node("paused")
    for number in (1, 2, 3):
        opened(site)
        assert len(site.book.open_tasks()) == 3
        assert give(site, site.task(anna)).accepted
        said(site, paused, state="paused", version=number - 1)
        site.book.close_round("deadline", now=NOW, waited_for=site.online(anna, paused))
        publish(site, number)
        said(site, paused, version=number)
    assert away


def test_a_network_of_laggards_alone_is_leased_nevertheless(site: Site) -> None:
    only = site.add_node("only")
    for number in range(1, 5):
        opened(site)
        site.book.close_round("deadline", now=NOW, waited_for=site.online(only))
        publish(site, number)
    opened(site)
    assert site.task(only).round == 5


def test_tokens_of_what_was_set_aside_do_not_move_the_schedule_on(site: Site) -> None:
    anna, liar = site.add_node("anna"), site.add_node("liar")
    opened(site)
    first, second = site.task(anna), site.task(liar)
    assert give(site, first).accepted
    assert give(site, second).accepted
    site.book.close_round("all", now=NOW)
    with site.coordinator.ledger.write() as session:
        for task, influence in ((first, 1.0), (second, 0.0)):
            session.add(
                JudgementRecord(
                    lease_id=task.lease.lease_id,
                    run_id=task.run_id,
                    round=1,
                    node_id=task.lease.node_id,
                    scaled_norm=1.0,
                    sketch=None,
                    shares=None,
                    influence=influence,
                    agreement=None,
                    code="counted",
                    sentence="Judged.",
                )
            )
    publish(site, 1)
    opened(site)
    assert site.task(anna).tokens_before == first.lease.tokens


# Reopening ----------------------------------------------------------------------


def test_a_round_leased_anew_keeps_what_was_committed_and_who_contributed_rests(
    site: Site,
) -> None:
    site.reopen(round={"quorum": 2, "min_nodes": 2})
    anna, bert, carl = (site.add_node(name) for name in ("anna", "bert", "carl"))
    opened(site, anna, bert)
    done, lost = site.task(anna), site.task(bert)
    assert give(site, done).accepted
    decision = site.book.decide(site.online(anna), NOW + 100)
    assert decision is not None
    assert decision.action == "reopen"

    again = opened(site, anna, carl, now=NOW + 100)
    assert (again.round, again.attempt, again.deadline_unix) == (1, 1, NOW + 200)
    assert [task.node_id for task in site.book.open_tasks()] == [carl]
    assert give(site, lost).code == "late"
    task = site.task(carl)
    assert (task.round, task.lease.attempt, task.tokens_before) == (1, 1, 0)
    assert task.tokens_round == done.lease.tokens + task.lease.tokens
    assert not blocks_of(task) & blocks_of(done)
    assert give(site, task).accepted
    site.book.close_round("all", now=NOW + 101)
    publish(site, 1)
    assert {c.version for c in contributions(site)} == {1}
    assert len(contributions(site)) == 2
    assert blocks(site) == blocks_of(done, task)


def test_without_anybody_new_a_round_past_its_deadline_waits_for_the_lost_one(site: Site) -> None:
    site.reopen(round={"quorum": 2, "min_nodes": 2})
    anna, bert = site.add_node("anna"), site.add_node("bert")
    opened(site)
    assert give(site, site.task(anna)).accepted
    task = site.task(bert)
    assert site.book.open_round(site.online(anna), 0.25, now=NOW + 200) is None
    assert give(site, task).accepted, "it came back with its work, and that counts"


def test_the_schedule_counts_the_tokens_before_the_round_whatever_was_leased_anew(
    site: Site,
) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    opened(site)
    first, second = site.task(anna), site.task(bert)
    assert give(site, first).accepted
    assert give(site, second).accepted
    site.book.close_round("all", now=NOW)
    publish(site, 1)
    opened(site)
    before = first.lease.tokens + second.lease.tokens
    assert site.task(anna).tokens_before == before
    assert give(site, site.task(anna)).accepted
    opened(site)
    assert site.task(bert).tokens_before == before


# Publishing ----------------------------------------------------------------------


def test_a_version_is_reached_from_the_newest_checkpoint_or_by_updates_from_the_one_before(
    site: Site,
) -> None:
    node_id = site.add_node("anna")
    for number in (1, 2, 3):
        opened(site)
        assert give(site, site.task(node_id), number).accepted
        site.book.close_round("all", now=NOW)
        version = publish(site, number, checkpoint=number == 2)
    with site.coordinator.ledger.read() as session:
        ref = site.book.version_ref(session, version)
    assert (ref.version, ref.checkpoint_version) == (3, 2)
    assert ref.checkpoint == payload(("checkpoint", 2))
    assert ref.updates_from == 0, "who has kept up since the checkpoint before needs no checkpoint"
    assert ref.updates == tuple(payload(("update", n)) for n in (1, 2, 3))
    assert site.book.finished(), "the run has three rounds"
    assert status(site.coordinator)["phase"] == "finished"


def test_only_a_closing_round_can_be_published(site: Site) -> None:
    site.add_node("anna")
    with pytest.raises(RuntimeError):
        publish(site, 1)
    opened(site)
    with pytest.raises(RuntimeError):
        publish(site, 1)
    with site.coordinator.ledger.read() as session:
        assert site.book.latest_version(session).version == 0


def test_closing_twice_closes_once(site: Site) -> None:
    node_id = site.add_node("anna")
    opened(site)
    assert give(site, site.task(node_id)).accepted
    site.book.close_round("first", now=NOW + 1)
    site.book.close_round("second", now=NOW + 2)
    with site.coordinator.ledger.read() as session:
        current = site.book.current_round(session)
    assert current is not None
    assert (current.reason, current.closed_unix) == ("first", NOW + 1)


@pytest.mark.parametrize("keep", [1, 2])
def test_what_a_node_may_still_ask_for_is_kept(site: Site, keep: int) -> None:
    node_id = site.add_node("anna")
    for number in range(1, 6):
        opened(site)
        assert give(site, site.task(node_id), number).accepted
        if number < 5:
            site.book.close_round("all", now=NOW)
            publish(site, number, checkpoint=number % 2 == 0)
    kept = site.book.kept_digests(keep)
    spec = site.coordinator.spec
    with site.coordinator.ledger.read() as session:
        ref = site.book.version_ref(session, site.book.latest_version(session))
    wanted = {spec.model.digest, spec.manifest.digest, spec.corpus.digest}
    wanted |= {ref.checkpoint.digest, *(update.digest for update in ref.updates)}
    assert wanted <= kept
    assert payload(5).digest in kept, "not aggregated yet"
    assert payload(4).digest not in kept
    assert payload(("update", 1)).digest not in kept
    kept_checkpoints = {payload(("checkpoint", number)).digest for number in (2, 4)} & kept
    assert len(kept_checkpoints) == keep


# Everything at once ----------------------------------------------------------------------


HAPPENINGS = (
    *("the loop turns",) * 6,
    *("a node delivers",) * 5,
    *("the deadline passes",) * 2,
    *("a node goes or comes back",) * 2,
    *("a node joins", "a node delivers something old", "a node copies", "a node declines"),
    *("the operator bans or forgives", "the coordinator dies and starts again"),
)
"""One rule draws from these: as rules of their own, most runs would lack half of them."""


class Network(RuleBasedStateMachine):
    """Nodes come, go, are banned, contribute in and out of time; the coordinator may die anywhere.

    The machine does what the round loop and the desk do, in any order.
    """

    def __init__(self, site: Site, quorum: int) -> None:
        super().__init__()
        site.reopen(round={"quorum": quorum, "min_nodes": quorum}, run={"rounds": 1000})
        self.site = site
        self.quorum = quorum
        self.now = NOW
        self.tasks: list[RoundTask] = []
        """Every task that was ever given."""
        self.accepted: dict[str, RoundTask] = {}
        self.there = {site.add_node("n0", speed=500.0), site.add_node("n1", speed=2000.0)}

    def _online(self) -> frozenset[int]:
        flower = self.site.flower.nodes
        keys = self.site.keys
        return frozenset(flower[pem] for n in self.there if (pem := keys[n].public_pem) in flower)

    def _current(self) -> Round | None:
        with self.site.coordinator.ledger.read() as session:
            return self.site.book.current_round(session)

    def _collect(self) -> None:
        known = {task.lease.lease_id for task in self.tasks}
        for node_id in self.site.keys:
            if self.site.desk.task(node_id) is not None:
                task = self.site.task(node_id)
                if task.lease.lease_id not in known:
                    self.tasks.append(task)

    @rule(what=st.sampled_from(HAPPENINGS), which=st.integers(0, 2**16))
    def it_happens_that(self, what: str, which: int) -> None:
        nodes = sorted(self.site.keys)
        node_id = nodes[which % len(nodes)]
        if what == "the loop turns":
            self._turn()
        elif what == "the deadline passes":
            self.now += 100
        elif what == "a node goes or comes back":
            self.there ^= {node_id}
        elif what == "a node joins":
            if len(nodes) < 4:
                self.there.add(self.site.add_node(f"n{len(nodes)}"))
        elif what == "the operator bans or forgives":
            if self.site.node(node_id).status == "banned":
                self.site.registry.approve(node_id)
            else:
                self.site.registry.ban(node_id, "No.")
        elif what == "the coordinator dies and starts again":
            self.site.reopen()
        elif self.tasks:
            old = what == "a node delivers something old"
            among = self.tasks if old else self.tasks[-len(nodes) :]
            task = among[which % len(among)]
            if what == "a node declines":
                self.site.book.decline(task.lease.node_id, task.lease.lease_id, "no time")
            else:
                self._deliver(task, copied=what == "a node copies")

    def _turn(self) -> None:
        """What the round loop does in one turn."""
        current, book = self._current(), self.site.book
        if current is None:
            book.open_round(self._online(), 0.25, now=self.now)
        elif current.state == "closing":
            publish(self.site, current.round, checkpoint=current.round % 3 == 0)
        else:
            decision = book.decide(self._online(), self.now)
            assert decision is not None
            if decision.action == "close":
                late = self._online() if decision.code == "deadline" else frozenset()
                book.close_round(decision.sentence, now=self.now, waited_for=late)
            elif decision.action == "reopen":
                book.open_round(self._online(), 0.25, now=self.now)
        self._collect()
        assert status_json(self.site.coordinator), "it can always be shown"

    def _deliver(self, task: RoundTask, *, copied: bool) -> None:
        """A contribution for some lease that there once was, or is."""
        lease_id = task.lease.lease_id
        current = self._current()
        in_time = self.site.lease(lease_id).state == "open"
        assert not in_time or (current is not None and current.state == "open")
        name = next(iter(self.accepted), lease_id) if copied else lease_id
        verdict = give(self.site, task, name)
        if lease_id in self.accepted:
            assert verdict.accepted == (name == lease_id)
        elif not in_time:
            assert verdict.code == "late"
        elif name in self.accepted:
            assert verdict.code == "copied"
        else:
            assert verdict.accepted
        if verdict.accepted:
            self.accepted[lease_id] = task

    @invariant()
    def every_accepted_contribution_is_in_one_version_or_waits_for_one(self) -> None:
        current = self._current()
        found = contributions(self.site)
        assert {c.lease_id for c in found} == set(self.accepted)
        for contribution in found:
            if contribution.version is None:
                assert current is not None
                assert contribution.round == current.round
            else:
                assert contribution.version == contribution.round

    @invariant()
    def a_node_is_in_a_version_at_most_once(self) -> None:
        pairs = Counter((c.round, c.node_id) for c in contributions(self.site))
        assert all(times == 1 for times in pairs.values())

    @invariant()
    def a_block_is_committed_at_most_once_an_epoch_and_only_by_what_was_accepted(self) -> None:
        promised = [
            (ref.epoch, ref.block) for task in self.accepted.values() for ref in task.lease.blocks
        ]
        assert len(promised) == len(set(promised))
        assert blocks(self.site) == set(promised)

    @invariant()
    def no_open_lease_holds_a_block_that_is_committed_or_anothers(self) -> None:
        with self.site.coordinator.ledger.read() as session:
            ids = session.scalars(
                select(LeaseRecord.lease_id).where(LeaseRecord.state == "open")
            ).all()
        held = [t for t in self.tasks if t.lease.lease_id in ids]
        assert len(held) == len(ids)
        every = [(ref.epoch, ref.block) for task in held for ref in task.lease.blocks]
        assert len(every) == len(set(every))
        assert not set(every) & blocks(self.site)

    @invariant()
    def versions_form_one_chain_and_each_has_its_quorum(self) -> None:
        with self.site.coordinator.ledger.read() as session:
            versions = list(session.scalars(select(Version.version).order_by(Version.version)))
            unpublished = list(session.scalars(select(Round).where(Round.state != "published")))
        assert versions == list(range(len(versions)))
        assert len(unpublished) <= 1
        assert all(current.round == len(versions) for current in unpublished)
        sizes = Counter(c.version for c in contributions(self.site))
        assert all(sizes[version] >= self.quorum for version in versions[1:])


@pytest.mark.parametrize("quorum", [1, 2])
def test_whatever_happens_in_whatever_order_the_promises_hold(
    make_site: Callable[[], Site], quorum: int, ledger_kind: str
) -> None:
    class Here(Network):
        def __init__(self) -> None:
            super().__init__(make_site(), quorum)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=12 if ledger_kind == "sqlite" else 2,  # each makes a database
            stateful_step_count=60,
            deadline=None,
            phases=(Phase.reuse, Phase.generate),  # shrinking would take minutes of real ledgers
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_node_that_the_coordinator_does_not_know_holds_no_key(site: Site) -> None:
    with pytest.raises(RefusedError):
        site.registry.public_key_pem("0" * 16)
