"""The round loop over a real ledger and real payloads; only the way to the nodes is in memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.identity import NodeKey, load_public_key, verify
from talkoot.protocol.messages import RoundTask, Signed, Verdict, canonical_bytes, parse
from talkoot.protocol.weights import WeightsReader, apply_update
from talkoot.server.book import Book
from talkoot.server.conductor import RUBBISH_SECONDS, Conductor
from talkoot.server.ledger.schema import Event, Round, Version

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any

NOW = 1_800_000_000.0


class Crash(BaseException):
    """The process is gone: nobody catches this."""


@dataclass
class Wire:
    """The way to the nodes (``conductor.ControlPlane``), and what went over it."""

    there: set[int] = field(default_factory=set)
    sent: list[tuple[int, str]] = field(default_factory=list)
    mail: list[tuple[int, str | None]] = field(default_factory=list)
    forgotten: int = 0

    def online(self) -> frozenset[int]:
        return frozenset(self.there)

    def send(self, tasks: Mapping[int, str], *, round_number: int, ttl_seconds: float) -> None:
        assert ttl_seconds >= 60
        for signed in tasks.values():
            body = parse(Signed, signed.encode("ascii")).body
            assert parse(RoundTask, body.encode("ascii")).round == round_number
        self.sent += tasks.items()

    def replies(self) -> Iterable[tuple[int, str | None]]:
        taken, self.mail = self.mail, []
        return taken

    def forget(self) -> None:
        self.forgotten += 1
        self.mail.clear()


class Stage:
    """A site, the wire to its nodes, a clock that moves by hand, and a round loop that may die."""

    def __init__(self, site: Site, keys: list[NodeKey] | None = None, nodes: int = 2) -> None:
        self.site = site
        self.wire = Wire()
        self.now = NOW
        given: list[NodeKey | None] = [*keys] if keys is not None else [None] * nodes
        self.nodes = [site.add_node(f"n{i}", key=key) for i, key in enumerate(given)]
        self.wire.there = {site.flower_id(node_id) for node_id in self.nodes}
        self.conductor = self.restart()

    def restart(self) -> Conductor:
        """The round loop in a new process: all that it knows is in the ledger."""
        self.conductor = Conductor(
            self.site.coordinator,
            self.site.registry,
            self.wire,
            clock=lambda: self.now,
            sleep=self._sleep,
        )
        return self.conductor

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, node_id: str, seed: int) -> Verdict:
        """A node does the task that it was last sent, as far as the coordinator sees."""
        site = self.site
        mine = [signed for number, signed in self.wire.sent if number == site.flower_id(node_id)]
        signed = parse(Signed, mine[-1].encode("ascii"))
        task = verify(signed, "RoundTask", site.coordinator.key.public_key, RoundTask)
        ref = site.push(node_id, task.lease.lease_id, seed)
        return site.desk.submit(node_id, site.sign(site.claim(task, ref)))

    def settle(self, most: int = 20) -> None:
        """Let the loop do all that can be done now."""
        for _ in range(most):
            if not self.conductor.step():
                return
        pytest.fail("the loop never comes to rest")

    def round(self, number: int, *, restart: bool = False) -> Version:
        """A whole round, with a new process before every turn of the loop if wanted."""
        self.turn(restart)
        for place, node_id in enumerate(self.nodes):
            assert self.work(node_id, 100 * number + place).accepted
        while self.version().version < number:
            self.turn(restart)
        return self.version()

    def turn(self, restart: bool) -> None:
        if restart:
            self.restart()
        self.conductor.step()

    def version(self) -> Version:
        with self.site.coordinator.ledger.read() as session:
            return self.site.book.latest_version(session)

    def current(self) -> Round | None:
        with self.site.coordinator.ledger.read() as session:
            return self.site.book.current_round(session)

    def events(self, kind: str) -> list[str]:
        with self.site.coordinator.ledger.read() as session:
            return list(session.scalars(select(Event.sentence).where(Event.kind == kind)))


@pytest.fixture
def stage(site: Site) -> Stage:
    return Stage(site)


# A whole round ----------------------------------------------------------------------


def test_a_round_ends_in_a_version_that_every_node_can_reach_bit_for_bit(
    stage: Stage, tmp_path: Path
) -> None:
    coordinator = stage.site.coordinator
    node = coordinator.state.versions / "v00000000" / "published.safetensors"
    mine = tmp_path / "v0"
    mine.write_bytes(node.read_bytes())
    for number in (1, 2):
        version = stage.round(number)
        with coordinator.ledger.read() as session:
            ref = stage.site.book.version_ref(session, version)
        assert version.update_digest is not None
        update = coordinator.store.path(version.update_digest)
        after = tmp_path / f"v{number}"
        digest = apply_update(coordinator.manifest, mine, update, coordinator.spec.downlink, after)
        assert digest == version.weights_digest == ref.weights_digest
        mine = after
    assert version.checkpoint_digest is not None, "every second version is a checkpoint"
    assert coordinator.store.path(version.checkpoint_digest).read_bytes() == mine.read_bytes()


def test_a_run_ends_after_its_rounds_with_a_checkpoint_and_only_its_newest_directories(
    stage: Stage,
) -> None:
    for number in (1, 2, 3):
        stage.round(number)
    stage.conductor.run()  # has nothing to do any more
    assert stage.version().version == 3
    assert stage.version().checkpoint_digest is not None
    assert stage.current() is None
    versions = stage.site.coordinator.state.versions
    assert sorted(path.name for path in versions.iterdir()) == ["v00000002", "v00000003"]


def test_each_node_is_sent_its_own_signed_task_once(stage: Stage) -> None:
    stage.settle()
    stage.settle()
    assert sorted(number for number, _ in stage.wire.sent) == sorted(stage.wire.there)
    key = load_public_key(stage.site.coordinator.key.public_pem)
    for number, text in stage.wire.sent:
        task = verify(parse(Signed, text.encode()), "RoundTask", key, RoundTask)
        assert stage.site.flower_id(task.lease.node_id) == number
        assert task.issued_unix == NOW


# Crashes ----------------------------------------------------------------------


def test_a_loop_that_dies_at_every_turn_makes_the_same_versions_as_one_that_lives(
    make_site: Callable[[], Site],
) -> None:
    keys = [NodeKey.generate() for _ in range(2)]
    calm, shaken = Stage(make_site(), keys), Stage(make_site(), keys)
    for number in (1, 2, 3):
        expected = calm.round(number)
        found = shaken.round(number, restart=True)
        assert found.weights_digest == expected.weights_digest
        assert found.update_digest == expected.update_digest
    assert shaken.site.book.finished()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("part", "name", "call"),
    [
        (Book, "close_round", 1),
        (ArtifactStore, "put_file", 1),  # the update
        (ArtifactStore, "put_file", 2),  # the checkpoint
        (Book, "publish", 1),
        (Conductor, "_clean", 1),
        (Book, "open_round", 1),
    ],
)
def test_a_loop_that_dies_between_any_two_writes_goes_on_to_the_same_version(
    make_site: Callable[[], Site],
    monkeypatch: pytest.MonkeyPatch,
    part: type,
    name: str,
    call: int,
    moment: str,
) -> None:
    keys = [NodeKey.generate() for _ in range(2)]
    calm, shaken = Stage(make_site(), keys), Stage(make_site(), keys)
    for stage in (calm, shaken):
        stage.site.reopen(round={"checkpoint_every": 1})
        stage.restart()
    expected = calm.round(1)

    whole = getattr(part, name)
    calls = 0

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and moment == "before":
            raise Crash
        done = whole(*args, **kwargs)
        if calls == call:
            raise Crash
        return done

    def until_it_dies() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(part, name, dies)
            shaken.settle()

    if name == "open_round":
        with pytest.raises(Crash):
            until_it_dies()
        shaken.restart()
        shaken.settle()
        for place, node_id in enumerate(shaken.nodes):
            assert shaken.work(node_id, 100 + place).accepted
    else:
        shaken.settle()
        for place, node_id in enumerate(shaken.nodes):
            assert shaken.work(node_id, 100 + place).accepted
        with pytest.raises(Crash):
            until_it_dies()
    shaken.restart()
    while shaken.version().version < 1:
        shaken.conductor.step()
    found = shaken.version()
    assert found.weights_digest == expected.weights_digest
    assert found.update_digest == expected.update_digest
    assert found.checkpoint_digest == expected.checkpoint_digest
    coordinator = shaken.site.coordinator
    published = coordinator.state.versions / found.directory / "published.safetensors"
    with WeightsReader(published, coordinator.manifest) as weights:
        assert weights.weights_digest() == found.weights_digest
    assert shaken.round(2).version == 2


def test_a_half_written_version_of_a_dead_loop_is_replaced(stage: Stage) -> None:
    stage.settle()
    for place, node_id in enumerate(stage.nodes):
        assert stage.work(node_id, place).accepted
    versions = stage.site.coordinator.state.versions
    for name in ("v00000001", ".v00000001.partial"):
        (versions / name).mkdir()
        (versions / name / "feedback.safetensors").write_bytes(b"half")
    while stage.version().version < 1:
        stage.conductor.step()
    with WeightsReader(
        versions / "v00000001" / "published.safetensors", stage.site.coordinator.manifest
    ) as weights:
        assert weights.weights_digest() == stage.version().weights_digest


def test_a_new_loop_sends_open_leases_again_word_for_word_and_no_settled_one(
    stage: Stage,
) -> None:
    stage.settle()
    before = dict(stage.wire.sent)
    assert stage.work(stage.nodes[0], 1).accepted
    stage.wire.sent.clear()
    stage.restart()
    stage.settle()
    other = stage.site.flower_id(stage.nodes[1])
    assert stage.wire.sent == [(other, before[other])]


# Who is there ----------------------------------------------------------------------


def test_without_nodes_the_loop_waits_and_says_so_once(stage: Stage) -> None:
    stage.wire.there.clear()
    for _ in range(20):
        stage.now += 1
        assert not stage.conductor.step()
    assert len(stage.events("waiting")) == 1
    assert stage.current() is None
    stage.wire.there = {stage.site.flower_id(stage.nodes[0])}
    stage.now += 2
    assert stage.conductor.step()


def test_a_node_that_was_away_when_the_round_opened_gets_its_task_when_it_comes_back(
    stage: Stage,
) -> None:
    stage.settle()
    away = stage.site.flower_id(stage.nodes[1])
    stage.wire.there.discard(away)
    stage.wire.sent.clear()
    stage.restart()
    stage.now += 2
    stage.settle()
    assert away not in dict(stage.wire.sent)
    stage.wire.there.add(away)
    stage.now += 2
    stage.settle()
    assert away in dict(stage.wire.sent)


def test_a_round_with_its_quorum_goes_on_without_a_node_that_is_lost(stage: Stage) -> None:
    stage.settle()
    assert stage.work(stage.nodes[0], 1).accepted
    assert not stage.conductor.step(), "the other one is at work"
    stage.wire.there.discard(stage.site.flower_id(stage.nodes[1]))
    stage.now += 2
    stage.settle()
    assert stage.version().version == 1
    assert stage.work(stage.nodes[1], 2).code == "late"


def test_at_the_deadline_a_round_closes_with_whom_it_has(stage: Stage) -> None:
    stage.settle()
    assert stage.work(stage.nodes[0], 1).accepted
    stage.now = NOW + 99.9
    stage.settle()
    assert stage.version().version == 0
    stage.now = NOW + 100
    assert stage.conductor.step()
    assert stage.conductor.step()
    assert stage.version().version == 1
    with stage.site.coordinator.ledger.read() as session:
        reason = session.scalars(select(Round.reason).where(Round.round == 1)).one()
    assert "deadline" in reason


def test_a_round_nobody_answers_is_leased_anew_at_its_deadline(stage: Stage) -> None:
    stage.settle()
    stage.wire.sent.clear()
    stage.now = NOW + 100
    stage.settle()
    current = stage.current()
    assert current is not None
    assert (current.round, current.attempt) == (1, 1)
    assert {number for number, _ in stage.wire.sent} == stage.wire.there
    assert len(stage.events("no-quorum")) == 1
    for place, node_id in enumerate(stage.nodes):
        assert stage.work(node_id, place).accepted


def test_leases_that_come_back_at_once_are_given_out_again_ever_more_slowly(stage: Stage) -> None:
    def attempt() -> int:
        current = stage.current()
        assert current is not None
        return current.attempt

    stage.settle()
    reopened = []
    for _ in range(200):  # ten minutes of nodes whose disks are full
        stage.now += 3
        before = attempt()
        stage.wire.mail += [(number, reply(accepted=False)) for number in stage.wire.there]
        stage.settle()
        if attempt() > before:
            reopened.append(stage.now)
    pauses = [after - before for before, after in itertools.pairwise(reopened)]
    assert 8 <= len(reopened) <= 20
    assert pauses == sorted(pauses)
    assert max(pauses) <= 63


def test_a_clock_that_is_set_back_does_not_blind_the_loop(stage: Stage) -> None:
    stage.settle()
    stage.now -= 86_400
    stage.wire.there.clear()
    assert not stage.conductor.step()
    assert stage.work(stage.nodes[0], 1).accepted
    stage.settle()
    assert stage.version().version == 1, "it saw that nobody else is there"


# Replies ----------------------------------------------------------------------


def reply(*, accepted: bool) -> str:
    verdict = Verdict(accepted=accepted, code="whatever", sentence="Out of memory.")
    return canonical_bytes(verdict).decode("ascii")


@pytest.mark.parametrize("text", [reply(accepted=False), None])
def test_a_node_that_says_no_is_not_waited_for(stage: Stage, text: str | None) -> None:
    stage.settle()
    assert stage.work(stage.nodes[0], 1).accepted
    stage.wire.mail.append((stage.site.flower_id(stage.nodes[1]), text))
    stage.now += 2
    stage.settle()
    assert stage.version().version == 1
    assert len(stage.events("declined")) == 1


@pytest.mark.parametrize("text", [reply(accepted=True), "", "{}", "[1]", '{"accepted": 1}'])
def test_a_reply_is_news_and_never_truth(stage: Stage, text: str) -> None:
    stage.settle()
    stage.wire.mail += [(number, text) for number in stage.wire.there]
    stage.wire.mail.append((12345, text))
    stage.now += 2
    assert not stage.conductor.step()
    assert stage.site.book.contributions(1) == []
    assert len(stage.site.book.open_tasks()) == 2


# What goes wrong ----------------------------------------------------------------------


def test_a_version_that_cannot_be_computed_is_not_published_and_nothing_is_lost(
    stage: Stage,
) -> None:
    stage.settle()
    for place, node_id in enumerate(stage.nodes):
        assert stage.work(node_id, place).accepted
    coordinator = stage.site.coordinator
    payload = coordinator.store.path(stage.site.book.contributions(1)[0].payload_digest)
    whole = payload.read_bytes()
    payload.write_bytes(whole[:-1])  # a failing disk
    with pytest.raises(ProtocolError):
        stage.settle()
    assert stage.version().version == 0
    current = stage.current()
    assert current is not None
    assert current.state == "closing"
    payload.write_bytes(whole)  # restored from a backup
    stage.restart()
    stage.conductor.step()
    assert stage.version().version == 1


def test_rubbish_goes_after_its_time_and_nothing_that_is_needed(stage: Stage) -> None:
    store = stage.site.coordinator.store
    first = stage.round(1)
    spec = stage.site.coordinator.spec
    rubbish = store.put_bytes(b"of a loop that died before its ledger knew")
    fresh = store.put_bytes(b"just arrived")
    old_payload = stage.site.book.contributions(1)[0].payload_digest
    for path in store.root.glob("[0-9a-f][0-9a-f]/*"):
        if path != store.path(fresh.digest):
            os.utime(path, (1.0, path.stat().st_mtime - 2 * RUBBISH_SECONDS))
    second = stage.round(2)
    assert not store.has(rubbish.digest)
    assert not store.has(old_payload)
    assert first.update_digest is not None
    assert store.has(first.update_digest), "the way from the checkpoint before the newest"
    assert store.has(fresh.digest)
    assert second.checkpoint_digest is not None
    needed = [spec.model, spec.manifest, spec.corpus]
    assert all(store.has(ref.digest) for ref in needed)
    assert store.verify(second.checkpoint_digest)
    assert stage.round(3).version == 3
