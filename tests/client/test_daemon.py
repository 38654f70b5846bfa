"""The daemon where nobody can help it: banned, hung up on, asked to leave. A real data plane."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from talkoot.client import daemon as daemon_module
from talkoot.client.daemon import Daemon
from talkoot.client.home import Home
from talkoot.client.trainer_host import TrainerHost
from talkoot.protocol.errors import RefusedError, TalkootError
from talkoot.protocol.messages import NodeReport, NodeReportReply, Signed
from talkoot.server.belief import Belief
from talkoot.server.desk import Desk
from talkoot.sims.in_process import InProcessCoordinator, nano_state

PATIENCE = 45  # seconds; gRPC's own deadline for a call is 60, and Flower's 30


class MuteDesk(Desk):
    """The real desk, which can stop answering in the middle of a call."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # whatever a Desk takes
        self.mute: set[str] = set()
        """The calls that get no answer."""
        self.asked = threading.Event()
        self.release = threading.Event()

    def _say_nothing(self, call: str) -> None:
        if call in self.mute:
            self.asked.set()
            self.release.wait(120)

    def report(self, node_id: str, report: NodeReport) -> NodeReportReply:
        self._say_nothing("report")
        return super().report(node_id, report)

    def task(self, node_id: str) -> Signed | None:
        self._say_nothing("task")
        return super().task(node_id)

    def run_spec(self, node_id: str) -> Signed:
        self._say_nothing("run_spec")
        return super().run_spec(node_id)


class Running:
    """A daemon in a thread of its own."""

    def __init__(self, home: Home) -> None:
        self.said: list[str] = []
        self.failure: TalkootError | None = None
        self.trainer = TrainerHost(home.work, "cpu", 1, home.logs / "trainer.log")
        self.daemon = Daemon(home, self._say, self.trainer)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _say(self, sentence: str) -> None:
        with self._changed:
            self.said.append(sentence)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self.daemon.run()
        except TalkootError as err:
            self.failure = err

    def until(self, words: str) -> None:
        """Wait until it has said something with these words."""
        with self._changed:
            heard: Callable[[], bool] = lambda: any(words in line for line in self.said)  # noqa: E731
            assert self._changed.wait_for(heard, PATIENCE), self.said

    def ended(self) -> None:
        """Wait for its end, which leaves no thread and no trainer."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), self.said
        assert self.trainer.pid is None
        names = {thread.name for thread in threading.enumerate()}
        assert not names & {"worker", "reporter", "trainer-replies", "fleet-heartbeat"}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano_state(tmp_path_factory.mktemp("operator"))


@pytest.fixture
def site(state: Path, tmp_path: Path) -> Iterator[InProcessCoordinator]:
    with InProcessCoordinator(state, tmp_path / "state", MuteDesk) as site:
        yield site
        assert isinstance(site.desk, MuteDesk)
        site.desk.release.set()


@pytest.fixture
def home(site: InProcessCoordinator, tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    site.enrol(home, "ada")
    return home


def hanging(site: InProcessCoordinator, home: Home) -> tuple[Running, MuteDesk, str]:
    """A node whose work hangs, so that all that can tell it anything is the answer to a report; its
    desk, and its id."""
    desk = site.desk
    assert isinstance(desk, MuteDesk)
    desk.mute = {"run_spec"}
    running = Running(home)
    assert desk.asked.wait(PATIENCE)
    (node,) = site.registry.nodes()
    return running, desk, node.node_id


def test_a_daemon_whose_node_is_banned_ends_with_the_operators_reason(
    site: InProcessCoordinator, home: Home
) -> None:
    running, desk, node_id = hanging(site, home)
    site.registry.ban(node_id, "Sent nonsense.")
    running.ended()
    assert isinstance(running.failure, RefusedError)
    assert running.failure.code == "banned"
    assert "Sent nonsense." in running.failure.sentence
    status = json.loads(home.status_path.read_bytes())
    assert (status["state"], status["last"]) == ("stopped", running.failure.sentence)

    # And coming back is refused in the same words.
    desk.mute = set()
    again = Running(home)
    again.ended()
    assert isinstance(again.failure, RefusedError)
    assert "Sent nonsense." in again.failure.sentence


def test_a_daemon_ends_when_asked_though_the_coordinator_hangs_in_the_middle_of_a_call(
    site: InProcessCoordinator, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = site.desk
    assert isinstance(desk, MuteDesk)
    # Nothing but hanging up can end the wait in time.
    monkeypatch.setattr(daemon_module, "STOP_SECONDS", 3600.0)
    running = Running(home)
    running.until("not ready")
    desk.mute = {"report", "task", "run_spec"}
    assert desk.asked.wait(PATIENCE)
    running.daemon.stop()
    running.ended()
    assert running.failure is None


def test_a_daemon_that_is_asked_to_leave_ends_and_an_old_wish_is_forgotten(
    site: InProcessCoordinator, home: Home
) -> None:
    home.leave.touch()  # of a daemon that had ended by itself
    running = Running(home)
    running.until("not ready")
    assert not home.leave.exists()
    home.leave.touch()
    running.ended()
    assert running.failure is None
    assert "Leaving, as asked." in running.said


def test_a_node_that_goes_on_after_a_pause_says_so_and_its_status_does_not_say_paused(
    home: Home,
) -> None:
    home.pause.touch()
    running = Running(home)
    running.until("Paused by its owner")
    home.pause.unlink()
    running.until("Going on after the pause.")
    running.daemon.stop()
    running.ended()
    assert "Paused" not in json.loads(home.status_path.read_bytes())["last"]


def test_a_node_that_is_quarantined_while_it_runs_is_told_why(
    site: InProcessCoordinator, home: Home
) -> None:
    running, desk, node_id = hanging(site, home)
    Belief(site.coordinator).quarantine(node_id, "Looks odd.", now=time.time())
    running.until("Quarantined: Looks odd.")
    desk.release.set()
    running.daemon.stop()
    running.ended()
