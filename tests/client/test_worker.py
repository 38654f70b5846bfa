"""A worker and its trainer child against a real coordinator's data plane over mTLS."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from talkoot.client.current import worker_for
from talkoot.client.home import Home
from talkoot.client.trainer_host import Progress, ShouldStop, TrainerHost
from talkoot.client.worker import Worker
from talkoot.protocol.errors import (
    IntegrityError,
    ProtocolError,
    StateError,
    TalkootError,
    UnavailableError,
    VersionError,
)
from talkoot.protocol.files import DirectoryLock
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.messages import (
    BlockRef,
    RoundTask,
    RunSpec,
    Signed,
    Verdict,
    canonical_bytes,
    parse,
)
from talkoot.server.config import MirrorsSection
from talkoot.server.desk import Desk
from talkoot.sims.in_process import InProcessCoordinator, lease_of, nano_state, task_of

OTHER_NODE = "0123456789abcdef"


class FaultyDesk(Desk):
    """The real desk, whose answers can be lost or changed on their way."""

    lost_submits = 0
    before_submit: Callable[[], None] | None = None
    other_spec: Signed | None = None

    def submit(self, node_id: str, signed: Signed) -> Verdict:
        if self.before_submit is not None:
            act, self.before_submit = self.before_submit, None
            act()
        verdict = super().submit(node_id, signed)
        if self.lost_submits:
            self.lost_submits -= 1
            raise UnavailableError("The line broke.")
        return verdict

    def run_spec(self, node_id: str) -> Signed:
        return self.other_spec or super().run_spec(node_id)


class WatchedTrainer(TrainerHost):
    """The real trainer host; notes what is asked of it."""

    calls: list[tuple[str, dict[str, Any]]]
    on_first_progress: Callable[[], None] | None = None

    def call(
        self,
        op: str,
        on_progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        def progress(report: dict[str, Any]) -> None:
            if on_progress is not None:
                on_progress(report)
            if self.on_first_progress is not None:
                act, self.on_first_progress = self.on_first_progress, None
                act()

        self.calls.append((op, arguments))
        return super().call(op, progress, should_stop, **arguments)

    def settled(self) -> list[tuple[str, bool]]:
        return [(call["lease_id"], call["accepted"]) for op, call in self.calls if op == "settle"]

    def count(self, op: str) -> int:
        return sum(1 for called, _ in self.calls if called == op)


@dataclass
class Rig:
    """A coordinator, one admitted node, and its worker, which can be replaced by another."""

    site: InProcessCoordinator
    desk: FaultyDesk
    home: Home
    trainer: WatchedTrainer
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker = Worker(self.home, self.trainer, self.said.append)
        self.node_id = self.worker.enrolment.node_id

    def again(self) -> Worker:
        """The worker of a new process, in the same home."""
        self.worker.close()
        self.worker = Worker(self.home, self.trainer, self.said.append)
        return self.worker

    def lease(self) -> Signed:
        """The lease that is open, or the next round's."""
        return self.site.lease(self.node_id)

    def feedback(self) -> str:
        """The file of the error feedback: another one when something was given back."""
        return str(json.loads((self.home.work / "state.json").read_bytes())["feedback"])


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano_state(tmp_path_factory.mktemp("operator"))


@pytest.fixture(scope="module")
def rig(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One for all tests of this module: each goes on where the last one left the run."""
    root = tmp_path_factory.mktemp("rig")
    with InProcessCoordinator(state, root / "state", FaultyDesk) as site:
        home = Home(root / "home")
        site.enrol(home, "ada")
        log = home.logs / "trainer.log"
        trainer = WatchedTrainer(home.work, "cpu", 1, log, checkpoint_seconds=0.01)
        trainer.calls = []
        with trainer:
            trainer.start()
            assert isinstance(site.desk, FaultyDesk)
            rig = Rig(site, site.desk, home, trainer)
            rig.worker.prepare()
            yield rig
            rig.worker.close()


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    rig: Rig = request.getfixturevalue("rig")
    rig.trainer.calls.clear()
    rig.said.clear()
    yield
    rig.desk.lost_submits, rig.desk.before_submit, rig.desk.other_spec = 0, None, None
    rig.trainer.on_first_progress = None


# A lease -----------------------------------------------------------------------------------------


def test_a_lease_is_trained_delivered_and_settled(rig: Rig) -> None:
    task = rig.lease()
    verdict = rig.worker.execute(task)
    assert verdict.accepted, verdict.sentence
    lease = lease_of(task)
    assert rig.site.contributions(rig.node_id) == [lease.lease_id]
    assert rig.trainer.settled() == [(lease.lease_id, True)]
    assert rig.trainer.call("state")["lease"] is None
    assert not rig.home.pending.exists()
    assert rig.home.counters().contributions == 1
    # What it has counted and answered lasts.
    assert rig.home.counters() == rig.worker.counters


def test_a_task_that_comes_again_over_the_other_plane_is_not_trained_again(rig: Rig) -> None:
    task = rig.lease()
    rig.worker.execute(task)
    contributions = rig.home.counters().contributions
    feedback = rig.feedback()
    for worker in (rig.worker, rig.again()):
        rig.trainer.calls.clear()
        verdict = worker.execute(task)
        assert verdict.accepted
        assert verdict.code == "settled"
        assert rig.trainer.count("train") == rig.trainer.count("settle") == 0
    assert rig.home.counters().contributions == contributions
    assert rig.feedback() == feedback


def test_a_contribution_whose_answer_was_lost_is_settled_as_accepted(rig: Rig) -> None:
    task = rig.lease()
    rig.desk.lost_submits = 1
    verdict = rig.worker.execute(task)
    assert verdict.accepted
    assert rig.trainer.settled() == [(lease_of(task).lease_id, True)]
    assert any("The line broke." in sentence for sentence in rig.said)


def test_a_contribution_accepted_as_the_process_died_is_settled_as_accepted_by_the_next(
    rig: Rig,
) -> None:
    first = rig.lease()
    rig.desk.lost_submits = 1
    rig.desk.before_submit = rig.worker.stop
    with pytest.raises(UnavailableError) as stopped:
        rig.worker.execute(first)
    assert stopped.value.code == "stopped"
    assert rig.trainer.settled() == []
    assert lease_of(first).lease_id in rig.site.contributions(rig.node_id)
    second = rig.lease()
    feedback = rig.feedback()
    verdict = rig.again().execute(second)
    assert verdict.accepted
    assert rig.trainer.settled() == [
        (lease_of(first).lease_id, True),
        (lease_of(second).lease_id, True),
    ]
    # An accepted payload is dropped; nothing of it is sent a second time.
    given_back = rig.home.work / "tensors" / feedback
    assert not given_back.exists()  # only because the second lease wrote its own


def test_a_late_contribution_goes_back_into_the_feedback(rig: Rig) -> None:
    task = rig.lease()
    kept: list[str] = []

    def too_late() -> None:
        kept.append(rig.feedback())
        rig.site.lease_anew()

    rig.desk.before_submit = too_late
    verdict = rig.worker.execute(task)
    assert not verdict.accepted
    assert verdict.code == "late"
    assert rig.trainer.settled() == [(lease_of(task).lease_id, False)]
    assert rig.feedback() not in kept
    # The work goes on with the lease that took its place.
    assert rig.worker.execute(rig.lease()).accepted


def test_a_lease_that_an_earlier_process_left_is_settled_before_the_next(rig: Rig) -> None:
    left = rig.lease()
    rig.trainer.on_first_progress = rig.worker.stop
    with pytest.raises(UnavailableError) as stopped:
        rig.worker.execute(left)
    assert stopped.value.code == "stopped"
    held = rig.trainer.call("state")["lease"]
    assert held["lease_id"] == lease_of(left).lease_id
    assert 0 < held["step"] < held["steps"]
    rig.site.lease_anew()
    rig.trainer.calls.clear()
    task = rig.lease()
    assert rig.again().execute(task).accepted
    assert rig.trainer.settled() == [
        (lease_of(left).lease_id, False),
        (lease_of(task).lease_id, True),
    ]
    operations = [op for op, _ in rig.trainer.calls]
    assert operations.index("settle") < operations.index("train")


def test_a_lease_that_was_stopped_goes_on_at_its_step_in_the_next_process(rig: Rig) -> None:
    task = rig.lease()
    rig.trainer.on_first_progress = rig.worker.stop
    with pytest.raises(UnavailableError):
        rig.worker.execute(task)
    step = rig.trainer.call("state")["lease"]["step"]
    worker = rig.again()
    first: list[int] = []
    rig.trainer.on_first_progress = lambda: first.append(worker.step)
    assert worker.execute(task).accepted
    assert first == [step + 1]


def test_a_trainer_that_is_killed_goes_on_by_itself(rig: Rig) -> None:
    task = rig.lease()
    rig.trainer.on_first_progress = rig.trainer.kill
    verdict = rig.worker.execute(task)
    assert verdict.accepted
    assert rig.trainer.count("train") == 2
    assert any("signal 9" in sentence for sentence in rig.said)


def test_a_pause_stops_a_lease_and_keeps_it(rig: Rig) -> None:
    task = rig.lease()
    rig.trainer.on_first_progress = rig.home.pause.touch
    with pytest.raises(UnavailableError) as stopped:
        rig.worker.execute(task)
    assert stopped.value.code == "stopped"
    assert rig.trainer.call("state")["lease"]["lease_id"] == lease_of(task).lease_id
    rig.home.pause.unlink()
    assert rig.worker.execute(task).accepted


# Tasks that are not for doing --------------------------------------------------------------------


def _forged(rig: Rig, task: RoundTask) -> Signed:
    return NodeKey.generate().sign("RoundTask", canonical_bytes(task))


def _own(rig: Rig, task: RoundTask) -> Signed:
    """Signed by the node itself, whose key is at least known here."""
    return rig.worker.key.sign("RoundTask", canonical_bytes(task))


def _changed(rig: Rig, task: RoundTask) -> Signed:
    body = canonical_bytes(task.model_copy(update={"tokens_before": task.tokens_before + 1}))
    return rig.site.sign(task).model_copy(update={"body": body.decode("ascii")})


def _as_another_kind(rig: Rig, task: RoundTask) -> Signed:
    return rig.site.coordinator.key.sign("VersionRef", canonical_bytes(task))


def _lease(**changes: Any) -> Callable[[Rig, RoundTask], Signed]:
    def make(rig: Rig, task: RoundTask) -> Signed:
        lease = task.lease.model_copy(update=changes)
        return rig.site.sign(task.model_copy(update={"lease": lease}))

    return make


def _for_another_run(rig: Rig, task: RoundTask) -> Signed:
    lease = task.lease.model_copy(update={"run_id": "another"})
    return rig.site.sign(task.model_copy(update={"run_id": "another", "lease": lease}))


def _old(rig: Rig, task: RoundTask) -> Signed:
    number = rig.worker.counters.newest_round - 1
    lease = task.lease.model_copy(update={"round": number})
    return rig.site.sign(task.model_copy(update={"round": number, "lease": lease}))


def _of_two_rounds(rig: Rig, task: RoundTask) -> Signed:
    return rig.site.sign(task.model_copy(update={"round": task.round + 1}))


def _without_a_link(rig: Rig, task: RoundTask) -> Signed:
    base = task.base.model_copy(update={"updates": task.base.updates[1:]})
    return rig.site.sign(task.model_copy(update={"base": base}))


def _of_no_such_block(rig: Rig, task: RoundTask) -> Signed:
    blocks = (*task.lease.blocks[1:], BlockRef(epoch=0, block=2**20))
    return _lease(blocks=blocks)(rig, task)


@pytest.mark.parametrize(
    ("make", "kind", "code"),
    [
        (_forged, IntegrityError, "bad-signature"),
        (_own, IntegrityError, "bad-signature"),
        (_changed, IntegrityError, "bad-signature"),
        (_as_another_kind, IntegrityError, "wrong-kind"),
        (_lease(node_id=OTHER_NODE), IntegrityError, "wrong-task"),
        (_for_another_run, IntegrityError, "wrong-task"),
        (_old, IntegrityError, "replayed-task"),
        (_of_two_rounds, IntegrityError, "wrong-task"),
        (_without_a_link, ProtocolError, "malformed"),
        (_of_no_such_block, ProtocolError, "malformed"),
        (_lease(tokens=1), ProtocolError, "malformed"),
    ],
)
def test_a_task_that_is_not_this_nodes_to_do_is_refused_and_nothing_moves(
    rig: Rig, make: Callable[[Rig, RoundTask], Signed], kind: type[TalkootError], code: str
) -> None:
    signed = make(rig, task_of(rig.lease()))
    with pytest.raises(kind) as refused:
        rig.worker.execute(signed)
    assert refused.value.code == code
    assert rig.trainer.calls == []
    assert rig.worker.lease_id is None


# Versions ----------------------------------------------------------------------------------------


def test_following_goes_forward_and_never_back(rig: Rig) -> None:
    rig.worker.execute(rig.lease())
    old = rig.site.version_ref()
    rig.site.publish()
    new = rig.site.version_ref()
    rig.worker.follow(rig.site.sign(new))
    assert (rig.worker.version, rig.worker.weights_digest) == (new.version, new.weights_digest)
    # An old reference is as validly signed as it ever was.
    for worker in (rig.worker, rig.again()):
        worker.prepare()
        rig.trainer.calls.clear()
        worker.follow(rig.site.sign(old))
        assert rig.trainer.count("sync") == 0
    assert rig.trainer.call("verify")["weights_digest"] == new.weights_digest


def test_a_version_that_the_coordinator_did_not_sign_is_not_followed(rig: Rig) -> None:
    ref = rig.site.version_ref()
    statement = rig.site.sign(ref)
    forged = NodeKey.generate().sign("VersionStatement", statement.body.encode("ascii"))
    with pytest.raises(IntegrityError):
        rig.worker.follow(forged)
    assert rig.trainer.calls == []


def test_a_replica_that_differs_is_healed_from_a_checkpoint_and_said_so(rig: Rig) -> None:
    rig.worker.prepare()
    rig.worker.execute(rig.lease())
    name = json.loads((rig.home.work / "state.json").read_bytes())["published"]["file"]
    path = rig.home.work / "tensors" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    healed = rig.worker.counters.healed
    rig.site.publish()
    ref = rig.site.version_ref()
    rig.worker.follow(rig.site.sign(ref))
    assert rig.worker.weights_digest == ref.weights_digest
    assert rig.home.counters().healed == healed + 1
    assert any("differs" in sentence for sentence in rig.said)


# The run -----------------------------------------------------------------------------------------


def _spec(rig: Rig, **changes: Any) -> Signed:
    spec = rig.site.coordinator.spec.model_copy(update=changes)
    return rig.site.coordinator.key.sign("RunSpec", canonical_bytes(spec))


def test_a_coordinator_that_offers_another_run_is_refused(rig: Rig) -> None:
    rig.desk.other_spec = _spec(rig, seed=rig.site.coordinator.spec.seed + 1)
    with pytest.raises(IntegrityError, match="talkoot leave") as refused:
        rig.again().prepare()
    assert refused.value.code == "other-run"
    rig.desk.other_spec = None
    rig.worker.prepare()


def test_a_run_of_another_protocol_is_refused_with_the_way_out(rig: Rig) -> None:
    rig.desk.other_spec = _spec(rig, protocol=99)
    with pytest.raises(VersionError, match="upgrade"):
        rig.again().prepare()


def test_a_run_that_the_coordinator_did_not_sign_is_refused(rig: Rig) -> None:
    spec = parse(RunSpec, rig.site.coordinator.signed_spec.body.encode("ascii"))
    rig.desk.other_spec = NodeKey.generate().sign("RunSpec", canonical_bytes(spec))
    with pytest.raises(IntegrityError):
        rig.again().prepare()


# Without a daemon --------------------------------------------------------------------------------


def test_under_a_stock_supernode_the_last_report_says_that_silence_follows(
    rig: Rig, tmp_path: Path
) -> None:
    def leased_to_in_an_hour() -> set[str]:
        online = frozenset(rig.site.register.nodes.values())
        with rig.site.coordinator.ledger.read() as session:
            members = rig.site.book.members(session, online, time.time() + 3600)
            return {node.name for node in members}

    home = Home(tmp_path / "stock")
    node_id = rig.site.enrol(home, "stock").node_id
    with worker_for(str(home.root)) as worker:
        worker.report()
        assert rig.site.state_of(node_id) == "idle"
        assert "stock" not in leased_to_in_an_hour()  # silence would mean that it is lost
        # One process at a time, as with the daemon.
        with pytest.raises(StateError), worker_for(str(home.root)):
            pass
    assert rig.site.state_of(node_id) == "leaving"
    assert "stock" in leased_to_in_an_hour()
    with DirectoryLock(home.root, who="test"):
        pass


def test_mirrors_of_the_signed_list_are_asked_first_and_one_that_stays_away_costs_nothing(
    rig: Rig, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Static(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    copy = tmp_path / "copy"
    shutil.copytree(rig.site.coordinator.state.store, copy)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Static, directory=str(copy)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    urls = ("http://127.0.0.1:9/nobody", f"http://127.0.0.1:{server.server_port}")
    config = rig.site.coordinator.config
    object.__setattr__(
        rig.site.coordinator,
        "config",
        config.model_copy(update={"mirrors": MirrorsSection(urls=urls)}),
    )
    try:
        shutil.rmtree(rig.home.store)
        worker = rig.again()
        worker.prepare()
        assert worker.transfer.mirrors.bytes_received > 0
        assert len(asked) >= 3  # model, manifest, corpus manifest
        assert worker.execute(rig.lease()).accepted
    finally:
        server.shutdown()
        server.server_close()
        object.__setattr__(rig.site.coordinator, "config", config)
        rig.again()
