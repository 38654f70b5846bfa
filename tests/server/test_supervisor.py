"""The supervisor over small real processes: what dies comes back, what must end ends."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from sqlalchemy import select

from talkoot.protocol.errors import StateError
from talkoot.server import supervisor as supervisor_module
from talkoot.server.app import STATE_VARIABLE
from talkoot.server.ledger.schema import Event
from talkoot.server.serve import reap_leftovers
from talkoot.server.supervisor import MAX_BACKOFF_SECONDS, Part, Supervisor, check_ports_free

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
FAIL = [sys.executable, "-c", "import sys; print('no luck today'); sys.exit(3)"]
DEADLINE_SECONDS = 60.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"never came true: {what}")
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def part(site: Site, name: str, command: list[str]) -> Part:
    log = site.coordinator.state.logs / f"{name}.log"
    return Part(name, command, dict(os.environ), log)


@contextmanager
def supervised(site: Site, *parts: Part) -> Iterator[tuple[Supervisor, list[str]]]:
    """A real supervisor that minds these parts instead of its own, until the block ends."""
    lines: list[str] = []
    supervisor = Supervisor(site.coordinator, lines.append)
    supervisor._parts[:] = parts
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield supervisor, lines
    finally:
        supervisor.stop()
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()


def pids(site: Site) -> dict[str, int]:
    """What the supervisor wrote down for the one that comes after it."""
    path = site.coordinator.state.run / "pids"
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: int(pid) for name, pid in lines}


# Restarts ----------------------------------------------------------------------


def test_a_part_that_is_killed_is_started_again_and_the_others_are_left_alone(
    site: Site,
) -> None:
    parts = [part(site, "one", SLEEP), part(site, "two", SLEEP)]
    with supervised(site, *parts) as (_, lines):
        until(lambda: len(pids(site)) == 3, "both parts are up")
        before = pids(site)
        os.kill(before["one"], signal.SIGKILL)
        until(lambda: pids(site).get("one") not in {None, before["one"]}, "one is back")
        assert pids(site)["two"] == before["two"]
        assert pids(site)["supervisor"] == os.getpid()
        assert lines == ["one ended (SIGKILL); starting it again in 0.0 s."]
        with site.coordinator.ledger.read() as session:
            told = session.scalars(select(Event.sentence).where(Event.kind == "restart")).one()
        assert told == "The one ended (SIGKILL)."


def test_a_part_that_fails_tells_its_last_words_and_is_tried_ever_more_slowly(site: Site) -> None:
    with supervised(site, part(site, "bad", FAIL)) as (_, lines):
        until(lambda: len(lines) >= 3, "three deaths")
    assert lines[0] == "bad ended (exit status 3); starting it again in 0.0 s. no luck today"
    assert [line.split(" again in ")[1].split()[0] for line in lines[:3]] == ["0.0", "0.2", "0.5"]


def test_the_pause_doubles_up_to_a_cap_and_a_long_life_forgives(site: Site) -> None:
    dying = part(site, "dying", SLEEP)
    now, pauses = 1000.0, []
    for _ in range(12):
        dying.started = now
        now += 1.0
        pauses.append(dying.schedule(now))
        assert dying.due == now + pauses[-1]
        now = dying.due
    assert pauses[0] == 0.0
    assert all(
        later == min(2 * one, MAX_BACKOFF_SECONDS) for one, later in itertools.pairwise(pauses[1:])
    )
    assert pauses[-1] == MAX_BACKOFF_SECONDS
    dying.started = now
    assert dying.schedule(now + supervisor_module.HEALTHY_SECONDS + 1) == 0.0


def test_a_part_that_cannot_even_be_started_is_told_and_holds_nobody_up(site: Site) -> None:
    absent = part(site, "absent", ["/no/such/program"])
    with supervised(site, absent, part(site, "fine", SLEEP)) as (_, lines):
        until(lambda: "fine" in pids(site) and len(lines) >= 2, "fine is up, absent told twice")
        assert "absent" not in pids(site)
    assert "absent cannot be started" in lines[0]
    assert "No such file" in lines[0]
    assert "again in 0.2 s" in lines[1]


def test_a_disk_that_takes_no_process_ids_does_not_end_the_coordinator(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supervisor_module, "write_atomic", full)
    mine = part(site, "mine", SLEEP)
    with supervised(site, mine) as (_, lines):
        until(lambda: mine.process is not None, "the part is up")
        first = mine.process
        assert first is not None
        first.kill()
        until(lambda: mine.process not in {None, first}, "it is back")
        assert lines == ["mine ended (SIGKILL); starting it again in 0.0 s."]


# The end ----------------------------------------------------------------------


def test_stopping_ends_every_part_and_what_it_started_however_deaf(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor_module, "STOP_SECONDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {} time.sleep(600)"
    child = f"print(__import__('os').getpid(), file=open({str(tmp_path / 'child')!r}, 'w'));"
    # A leader that ends at once when asked, and leaves a child that does not.
    leader = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {deaf.format(child)!r}]); time.sleep(600)"
    )
    parts = [
        part(site, "deaf", [sys.executable, "-c", deaf.format("print('up', flush=True);")]),
        part(site, "leader", [sys.executable, "-c", leader]),
    ]
    with supervised(site, *parts):
        orphan = tmp_path / "child"
        until(lambda: orphan.exists() and orphan.read_text().strip(), "the child is up")
        until(lambda: "up" in parts[0].last_words(), "the deaf one is up")
        started = [pids(site)["deaf"], pids(site)["leader"], int(orphan.read_text())]
    until(lambda: all(gone(pid) for pid in started), "all have ended")
    assert pids(site) == {}


# Before the start ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gateway_port", "transfer_port", "superlink_port"])
def test_a_port_that_is_taken_is_named_with_the_setting_that_changes_it(
    site: Site, name: str
) -> None:
    port = getattr(site.coordinator.config.network, name)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(StateError) as caught:
            check_ports_free(site.coordinator)
    assert caught.value.code == "port-taken"
    assert f"Port {port} " in caught.value.sentence
    assert f"network.{name}" in caught.value.sentence
    check_ports_free(site.coordinator)


def test_the_parts_of_a_coordinator_that_was_killed_are_ended_with_their_orphans(
    site: Site, tmp_path: Path
) -> None:
    state = site.coordinator.state
    # What Flower starts for a part knows of our state by its environment alone.
    child = f"open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid()));"
    child += "import time; time.sleep(600)"
    leader = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    dead = subprocess.Popen(
        [sys.executable, "-c", leader],
        start_new_session=True,
        env={**os.environ, STATE_VARIABLE: str(state.root)},
    )
    dead.wait()
    alive = subprocess.Popen([*SLEEP, str(state.root)], start_new_session=True)
    # The number of a part that has ended went to somebody else's program.
    stranger = subprocess.Popen([*SLEEP, f"{state.root}-of-another"], start_new_session=True)
    try:
        orphan = tmp_path / "child"
        until(lambda: orphan.exists() and orphan.read_text(), "the orphan is up")
        (state.run / "pids").write_text(
            f"supervisor {os.getpid()}\nsuperexec {dead.pid}\ngateway {alive.pid}\n"
            f"transfer {stranger.pid}\nsuperlink 4194305\ngarbled x\n"
        )
        reap_leftovers(state)
        assert gone(int(orphan.read_text()))
        assert gone(alive.pid)
        assert stranger.poll() is None
        assert not (state.run / "pids").exists()
        reap_leftovers(state)  # nothing is left to do, and that is fine
    finally:
        for process in (alive, stranger):
            process.kill()
            process.wait()
