"""Starts, watches and restarts the parts of a coordinator, and keeps the round loop submitted.

Parts: the SuperLink (Flower's own program), the gateway, the transfer service, the evaluator and,
with an object store, what copies to it. The round loop is a ServerApp, which the SuperLink starts;
the supervisor submits it and submits it again when Flower says that its run has ended while ours
has not. Every part may die at any time: a part that dies is started again after a pause that grows
with every early death.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from talkoot.protocol.errors import StateError, TalkootError, UnavailableError
from talkoot.protocol.files import write_atomic
from talkoot.server.app import STATE_VARIABLE
from talkoot.server.book import Book
from talkoot.server.ca import SERVER_DAYS
from talkoot.server.coordinator import Coordinator
from talkoot.server.flower import (
    ControlApi,
    drop_damaged_bundles,
    quiet_environment,
    superlink_command,
    superlink_environment,
)
from talkoot.server.registry import Registry
from talkoot.server.room import free_bytes, shortage
from talkoot.server.setup import issue_loopback_certificate, issue_server_certificate
from talkoot.server.trust import settle

log = logging.getLogger(__name__)

HEALTHY_SECONDS = 30.0
"""A part that lived so long has its back-off forgiven."""
MAX_BACKOFF_SECONDS = 30.0
STOP_SECONDS = 3.0
"""Parts that take longer are killed: all that they keep is crash-safe."""
RUN_CHECK_SECONDS = 1.0
MAX_OPEN_FILES = 65_536
"""Each node holds two to four connections; many systems begin with 1,024 open files a process."""
LOOP_SECONDS = 0.2


@dataclass
class Part:
    """One child process and its restarts."""

    name: str
    command: list[str]
    env: dict[str, str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    backoff: float = 0.0
    due: float = 0.0

    def start(self) -> None:
        """Start the process; its output goes to its log. Raises ``OSError``."""
        self.started = time.monotonic()
        with self.log_path.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the supervisor's to handle
            )

    def died(self) -> bool:
        """Whether the process has ended."""
        return self.process is not None and self.process.poll() is not None

    def schedule(self, now: float) -> float:
        """After a death: when to start again; returns the pause in seconds."""
        if now - self.started > HEALTHY_SECONDS:
            self.backoff = 0.0
        pause = self.backoff
        self.backoff = min(MAX_BACKOFF_SECONDS, max(0.25, 2 * self.backoff))
        self.due = now + pause
        self.process = None
        return pause

    def last_words(self) -> str:
        """The end of the part's log, on one line."""
        try:
            lines = self.log_path.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""


def allow_open_files(most: int) -> None:
    """Let this process and those that it starts hold more connections, as far as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _optional(coordinator: Coordinator) -> tuple[str, ...]:
    """Parts that the operator may switch off."""
    config = coordinator.config
    parts = ("evaluator",) if config.evaluation.every else ()
    if coordinator.spec.model_parameters <= config.belief.validate_up_to_parameters:
        return (*parts, "validator")
    return parts


class Supervisor:
    """Runs one coordinator in the foreground.

    Args:
        coordinator: open state, locked by the caller.
        say: tells the operator one line.
    """

    def __init__(self, coordinator: Coordinator, say: Callable[[str], None]) -> None:
        allow_open_files(MAX_OPEN_FILES)
        self._c = coordinator
        self._say = say
        self._stop = threading.Event()
        self._book = Book(coordinator)
        network = coordinator.config.network
        check_ports_free(coordinator)
        state = coordinator.state
        settle(state.ca, now=time.time())
        issue_server_certificate(state, coordinator.config)
        self._serving_serial = coordinator.trust().serial
        self._issued_unix = time.time()
        certificate, key = issue_loopback_certificate(state)
        env = quiet_environment(os.environ)
        env["PYTHONUNBUFFERED"] = "1"
        env["OMP_NUM_THREADS"] = "1"  # verifying a payload must not take the whole machine
        parts = [sys.executable, "-m", "talkoot.server.parts"]
        superlink_env = superlink_environment(os.environ, state.flower)
        superlink_env[STATE_VARIABLE] = str(state.root)
        self._parts = [
            Part(
                "superlink",
                [
                    *(sys.executable, "-m", "talkoot.server.leash"),
                    *superlink_command(
                        port=network.superlink_port,
                        database=state.root / "flower.db",
                        certificate=certificate,
                        key=key,
                        ca=state.loopback_ca,
                    ),
                ],
                superlink_env,
                state.logs / "superlink.log",
            ),
            Part(
                "superexec",
                [*parts, "superexec", "--state", str(state.root)],
                superlink_env,
                state.logs / "superexec.log",
            ),
            *(
                Part(
                    name,
                    [*parts, name, "--state", str(state.root)],
                    env,
                    state.logs / f"{name}.out.log",
                )
                for name in (
                    *("gateway", "transfer"),
                    *_optional(coordinator),
                    *self._store_part(),
                )
            ),
        ]
        self._control = ControlApi(network.superlink_port, coordinator.loopback_ca_pem)
        self._registry = Registry(coordinator, self._control)
        self._flower_run: int | None = None
        self._check_run = 0.0
        self._announced = False
        self._disk_full = False

    def _store_part(self) -> tuple[str, ...]:
        """The part that copies to the operator's object store, if there is one that can be used."""
        if not self._c.config.store.url:
            return ()
        from talkoot.server.copier import Copier, open_store

        Copier(self._c, open_store(self._c))  # what is wrong with it is said at once
        return ("store",)

    def stop(self) -> None:
        """Ask :meth:`run` to end."""
        self._stop.set()

    def run(self) -> None:
        """Keep everything running until :meth:`stop`."""
        try:
            while not self._stop.wait(LOOP_SECONDS):
                self._tend()
        finally:
            self._stop_parts()

    def _tend(self) -> None:
        now = time.monotonic()
        for part in self._parts:
            if part.died():
                code = part.process.returncode if part.process is not None else None
                pause = part.schedule(now)
                self._say(
                    f"{part.name} ended ({_cause(code)}); starting it again in {pause:.1f} s. "
                    f"{part.last_words() if code and code > 0 else ''}".rstrip()
                )
                with contextlib.suppress(TalkootError):
                    self._book.note("restart", f"The {part.name} ended ({_cause(code)}).")
                if part.name == "superlink":
                    self._flower_run = None
            if part.process is None and now >= part.due:
                try:
                    part.start()
                except OSError as err:  # a full disk or process table: it may pass
                    pause = part.schedule(now)
                    self._say(f"{part.name} cannot be started ({err}); again in {pause:.1f} s.")
                self._write_pids()
        if now >= self._check_run:
            self._check_run = now + RUN_CHECK_SECONDS
            self._watch_disk()
            self._watch_trust()
            self._keep_submitted()

    def _watch_disk(self) -> None:
        """Say once that the disk is full, and once that it is not any more."""
        root = self._c.state.root
        told = shortage(root, free_bytes(root), self._c.spec.parameters)
        if (told is not None) != self._disk_full:
            self._disk_full = told is not None
            self._say(told or f"There is room again on the disk that holds {root}.")

    def _watch_trust(self) -> None:
        """Let the next CA take over when it is due, and renew the servers' certificate.

        Gateway and transfer service take it up by themselves.
        """
        now = time.time()
        try:
            if settle(self._c.state.ca, now=now):
                self._say("The next CA has taken over; the old one is not accepted any more.")
                self._book.note("ca", "The next CA has taken over.")
            serial = self._c.trust().serial
            old = now - self._issued_unix > SERVER_DAYS * 86400 * 2 / 3
            if serial != self._serving_serial or old:
                issue_server_certificate(self._c.state, self._c.config, keep_key=True)
                self._serving_serial, self._issued_unix = serial, now
        except (TalkootError, OSError) as err:  # a full disk, say: it is tried again in a second
            log.warning("the certificates could not be renewed: %s", err)

    def _keep_submitted(self) -> None:
        """Make sure that Flower runs our ServerApp while there are rounds to do."""
        try:
            try:
                runs = self._control.runs()
            except UnavailableError:
                self._check_run = time.monotonic() + 0.1  # it is starting
                return
            if not self._announced:
                self._announced = True
                self._say(
                    f"Serving run {self._c.run_id}: gateway on port "
                    f"{self._c.config.network.gateway_port}, transfer on port "
                    f"{self._c.config.network.transfer_port}."
                )
            if self._flower_run is None:
                lost = self._registry.register_lost()
                if lost:
                    self._say(
                        f"Nodes that Flower's database had forgotten, registered anew: {lost}."
                    )
                # Runs that an earlier SuperLink process began have lost their ServerApp.
                for run_id, (status, _, _) in runs.items():
                    if status != "finished":
                        self._control.stop_run(run_id)
            elif runs.get(self._flower_run, ("finished",))[0] != "finished":
                if not self._round_loop_died():
                    return
                self._control.stop_run(self._flower_run)  # Flower would notice in a minute
                runs[self._flower_run] = ("finished", "killed", "or crashed")
            if self._book.finished():
                return
            if self._flower_run is not None:
                _, sub_status, details = runs.get(self._flower_run, ("", "unknown", ""))
                self._say(f"The round loop ended ({sub_status} {details}); submitting it again.")
            self._c.state.round_loop_pid.unlink(missing_ok=True)
            drop_damaged_bundles(self._c.state.flower)
            self._flower_run = self._control.start_run()
        except TalkootError as err:
            log.warning("the round loop could not be submitted: %s", err.sentence)

    def _round_loop_died(self) -> bool:
        """Whether the process that the round loop ran in is gone."""
        try:
            pid = int(self._c.state.round_loop_pid.read_text("ascii"))
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except (OSError, ValueError):
            return False  # it is starting, or could not say who it is
        except psutil.NoSuchProcess:
            return True

    def _write_pids(self) -> None:
        lines = [f"supervisor {os.getpid()}"]
        lines += [f"{p.name} {p.process.pid}" for p in self._parts if p.process is not None]
        try:
            write_atomic(self._c.state.run / "pids", ("\n".join(lines) + "\n").encode("ascii"))
        except OSError as err:  # read after a crash only, and parts end with their supervisor
            log.warning("the process ids could not be written: %s", err)

    def _stop_parts(self) -> None:
        for part in reversed(self._parts):
            if part.process is not None and part.process.poll() is None:
                _signal_group(part.process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for part in self._parts:
            if part.process is None:
                continue
            try:
                part.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(part.process, signal.SIGKILL)
                part.process.wait()
            # What a part started may be slower than the part itself.
            _signal_group(part.process, signal.SIGKILL)
        (self._c.state.run / "pids").unlink(missing_ok=True)


def check_ports_free(coordinator: Coordinator) -> None:
    """Refuse to start on a port that somebody has, with the port's name."""
    network = coordinator.config.network
    wanted = (
        ("gateway_port", network.bind, network.gateway_port),
        ("transfer_port", network.bind, network.transfer_port),
        ("superlink_port", "127.0.0.1", network.superlink_port),
    )
    for name, host, port in wanted:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as err:
                raise StateError(
                    f"Port {port} on {host} cannot be used ({err.strerror}): another program has "
                    f"it, perhaps another coordinator; stop that, or change network.{name} in "
                    f"{coordinator.state.config}.",
                    code="port-taken",
                ) from err


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _cause(code: int | None) -> str:
    if code is None:
        return "unknown"
    if code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"
