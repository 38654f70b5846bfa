"""The daemon: keeps one node at work, and the machine usable. It imports no torch.

One thread works (polls Flower, runs the ClientApp), one reports, one sends heartbeats; the main
thread waits for signals. Whatever fails outside is waited for with patience and said in one line.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from talkoot.client.app import HOME_KEY
from talkoot.client.current import DISK_FULL, set_current
from talkoot.client.fresh import PASSING
from talkoot.client.home import Home
from talkoot.client.reporter import Reporter
from talkoot.client.trainer_host import CLOSE_SECONDS, TrainerHost
from talkoot.client.worker import Worker
from talkoot.protocol.errors import (
    CapacityError,
    ProtocolError,
    RefusedError,
    TalkootError,
    UnavailableError,
)
from talkoot.protocol.files import DirectoryLock
from talkoot.protocol.messages import NodeReportReply
from talkoot.protocol.refusals import printable_lines

if TYPE_CHECKING:
    from talkoot.client.flower import FleetHost

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 5.0
IDLE_TASK_CHECK_SECONDS = 10.0
"""How often an idle node asks the data plane for a task that may have been lost on the way."""
REFUSED_SECONDS = 2.0
PAUSE_LOOK_SECONDS = 0.5
STATUS_SECONDS = 1.0
STOP_SECONDS = 10.0
"""What a thread may take to notice, once nothing that it waits for goes on."""
IDLE_TRAINER_SECONDS = 2.0
"""What a trainer that does not train may take to end: all that it writes is crash-safe."""
FOR_GOOD = frozenset({"banned", "unknown-node", "no-identity"})
"""Refusals that no patience helps against."""


class Daemon:
    """One volunteer's node, in the foreground.

    Args:
        home: an enrolled node's directory; the caller holds its lock.
        say: tells the volunteer one line.
        trainer: the child, perhaps started early by the caller.
    """

    def __init__(self, home: Home, say: Callable[[str], None], trainer: TrainerHost) -> None:
        self._home = home
        self._tell_owner = say
        self._trainer = trainer
        self._worker = Worker(home, trainer, self._say)
        self._reporter = Reporter(self._worker, self._heard)
        self._stop = threading.Event()
        self._failure: TalkootError | None = None
        self._thread = threading.Thread(target=self._guarded, name="worker", daemon=True)
        self._host: FleetHost | None = None
        self._host_trust = 0
        self._last_told = ""
        self._reachable = False
        self._finished = False
        self._status: str | None = None
        """What the coordinator said of this node last."""

    def run(self) -> None:
        """Work until asked to stop. Raises what ends the node for good (banned, wrong run …)."""
        self._home.leave.unlink(missing_ok=True)  # meant for a daemon that had ended by then
        self._trainer.start()
        set_current(self._worker)
        self._reporter.start()
        self._thread.start()
        try:
            while not self._stop.wait(STATUS_SECONDS) and self._thread.is_alive():
                self._write_status()
                if self._home.leave.exists():
                    self._home.leave.unlink(missing_ok=True)
                    self._tell("Leaving, as asked.")
                    break
        finally:
            self._shut_down()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ask :meth:`run` to end, with the work checkpointed."""
        self._stop.set()

    def _shut_down(self) -> None:
        """End everything in the time of a step and a checkpoint, whoever does not answer."""
        self._stop.set()
        self._worker.stop()
        self._reporter.stop()
        busy = self._worker.state == "training"
        self._trainer.close(CLOSE_SECONDS if busy else IDLE_TRAINER_SECONDS)
        # Training came first: its end may still be told to the SuperLink. Whoever waits for the
        # data plane's answer stops waiting; what was pushed by then is not pushed again.
        self._worker.transfer.close()
        self._thread.join(STOP_SECONDS)
        self._reporter.close()
        self._host_lost()
        self._worker.close()
        set_current(None)
        self._write_status(state="stopped")

    # The working thread ---------------------------------------------------------------------------

    def _guarded(self) -> None:
        try:
            self._work()
        except TalkootError as err:
            self._end(err)
        except Exception as err:
            log.exception("the daemon failed")
            self._end(
                TalkootError(
                    f"The daemon met an unexpected {type(err).__name__}: see {self._home.logs}."
                )
            )
        finally:
            self._stop.set()

    def _end(self, err: TalkootError) -> None:
        """End for good, with the first reason there was."""
        self._failure = self._failure or err
        self._last_told = printable_lines(self._failure.sentence)  # whoever runs us says it
        self._worker.stop()
        self._stop.set()

    def _work(self) -> None:
        pause = 0.25
        paused = False
        while not self._stop.is_set():
            try:
                if self._home.pause.exists():
                    paused = True
                    self._tell("Paused by its owner; 'talkoot resume' goes on.")
                    self._stop.wait(PAUSE_LOOK_SECONDS)
                    continue
                if paused:
                    self._tell("Going on after the pause.")
                if self._host is None:
                    self._join_in()
                elif paused:
                    self._resume()
                paused = False
                self._look_for_work()
                pause = 0.25
            except (UnavailableError, CapacityError) as err:
                if isinstance(err, CapacityError) and err.code != DISK_FULL:
                    raise
                if err.code in ("stopped", "trainer-closed") or self._stop.is_set():
                    continue
                self._tell(f"{err.sentence} Trying again; nothing is lost.")
                self._host_lost()
                self._stop.wait(pause * random.uniform(0.7, 1.3))
                pause = min(MAX_BACKOFF_SECONDS, 2 * pause)
            except RefusedError as err:
                if err.code in FOR_GOOD:
                    raise
                if err.code == "not-activated":
                    # Flower thinks that a node which was killed is still there, until its heartbeat
                    # has been missing for a while.
                    self._tell("Waiting for the SuperLink to let this node in.")
                else:  # an artifact that has gone in the meantime, say
                    self._tell(f"{err.sentence} Trying again.")
                self._host_lost()
                self._stop.wait(REFUSED_SECONDS)
            except ProtocolError as err:
                if err.code not in PASSING:
                    raise
                # Signed, and not of now: it is not done, and what is of now may come.
                self._tell(f"{err.sentence} It is left aside.")
                self._stop.wait(REFUSED_SECONDS)

    def _host_lost(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            host.close()

    def _join_in(self) -> None:
        """Get ready, prove, and connect; ends when the node is admitted and online."""
        self._worker.prepare()
        reply = self._worker.report()
        self._reachable = True
        while reply.status != "admitted" or not self._worker.is_proved:
            if self._stop.is_set():
                return
            if reply.status in ("proving", "refused", "admitted"):
                # Refused once is not refused for ever: its owner may have made room since. Who is
                # admitted shows it again when the machine, its caps, the model or the recipe are
                # not those of its last proof.
                verdict = self._worker.prove()
                self._tell(verdict.sentence)
                if not verdict.accepted and verdict.code not in ("awaits-approval", "stale-proof"):
                    raise CapacityError(verdict.sentence, code=verdict.code)
            else:
                self._tell(reply.sentence)
                self._stop.wait(reply.report_seconds)
            reply = self._worker.report()
        self._connect(reply.poll_seconds)
        self._resume()

    def _connect(self, poll_seconds: float) -> None:
        from talkoot.client.app import app
        from talkoot.client.flower import FleetHost

        enrolment = self._worker.enrolment
        name = f"[{enrolment.host}]" if ":" in enrolment.host else enrolment.host
        host = FleetHost(
            f"{name}:{enrolment.gateway_port}",
            enrolment.ca_pem.encode("ascii"),
            self._worker.key,
            app,
            {HOME_KEY: str(self._home.root)},
            self._worker.counters.flower_node_id,
        )
        try:
            node_id = host.connect(poll_seconds)
        except TalkootError:
            host.close()
            raise
        if node_id != self._worker.counters.flower_node_id:
            self._worker.save_counters(flower_node_id=node_id)
        self._host = host
        self._host_trust = enrolment.trust_serial
        self._tell("Connected; waiting for work.")

    def _resume(self) -> None:
        """Go on with the lease that is open for this node, whether or not Flower's message came."""
        task = self._worker.transfer.task()
        if task is not None:
            self._tell("Going on with an open lease.")
            self._worker.execute(task)

    def _look_for_work(self) -> None:
        assert self._host is not None
        reply = self._worker.reply
        poll = reply.poll_seconds if reply is not None else 1.0
        self._host.keep_pace(poll)
        idle_until = time.monotonic() + IDLE_TASK_CHECK_SECONDS
        while not self._stop.is_set() and not self._home.pause.exists():
            try:
                if self._host.poll():
                    return
            except ProtocolError as err:
                # Nothing of it was believed, and it does not come again.
                self._tell(f"{err.sentence} It is left aside.")
            if self._worker.enrolment.trust_serial != self._host_trust:
                self._host_lost()  # it trusts the CAs of before
                return
            reply = self._worker.reply
            if reply is not None and reply.latest is not None:
                self._worker.follow(reply.latest)
            if time.monotonic() > idle_until:
                self._resume()
                return
            self._stop.wait(poll * random.uniform(0.8, 1.2))

    # Telling --------------------------------------------------------------------------------------

    def _heard(self, reply: NodeReportReply | TalkootError) -> None:
        if isinstance(reply, TalkootError):
            if isinstance(reply, RefusedError) and reply.code in FOR_GOOD:
                self._end(reply)
            elif isinstance(reply, ProtocolError):
                self._tell(reply.sentence)
            elif self._reachable:
                self._reachable = False
                self._tell("The coordinator does not answer; waiting for it. Training goes on.")
            return
        if not self._reachable:
            self._reachable = True
            self._tell("The coordinator answers.")
        if reply.status != self._status and "quarantined" in (reply.status, self._status):
            self._tell(reply.sentence)  # a node that is shut out is idle, and should know why
        self._status = reply.status
        if reply.run_finished and not self._finished:
            self._finished = True
            self._tell("The run is finished. Thank you! Staying online; Ctrl-C ends.")

    def _tell(self, sentence: str) -> None:
        sentence = printable_lines(sentence)  # it may be the coordinator's
        if sentence != self._last_told:
            self._say(sentence)

    def _say(self, sentence: str) -> None:
        self._last_told = sentence
        self._tell_owner(sentence)

    def _write_status(self, state: str | None = None) -> None:
        worker = self._worker
        self._home.write_status(
            {
                "pid": os.getpid(),
                "unix": time.time(),
                "name": worker.enrolment.name,
                "node_id": worker.enrolment.node_id,
                "coordinator": f"{worker.enrolment.host}:{worker.enrolment.gateway_port}",
                "reachable": self._reachable,
                "status": worker.reply.status if worker.reply is not None else None,
                "state": state or ("paused" if self._home.pause.exists() else worker.state),
                "version": worker.version,
                "step": worker.step,
                "steps": worker.steps,
                "loss": worker.loss,
                "tokens_per_second": worker.tokens_per_second,
                "bytes_up": worker.meter.bytes_up,
                "bytes_down": worker.meter.bytes_down,
                "contributions": worker.counters.contributions,
                "healed": worker.counters.healed,
                "recipe": worker.recipe,
                "trainer_pid": self._trainer.pid,
                "last": self._last_told,
            }
        )


def configure_logging(home: Home) -> None:
    """Log to a file in the node's home."""
    handler = logging.handlers.RotatingFileHandler(
        home.logs / "daemon.log", maxBytes=4 * 2**20, backupCount=2
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.raiseExceptions = False  # a log that cannot be written is not worth a traceback
    root = logging.getLogger("talkoot")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def run_daemon(home: Home, say: Callable[[str], None], trainer: TrainerHost | None = None) -> None:
    """Run a node until Ctrl-C or SIGTERM (finishes cleanly); a second one ends it now.

    The caller holds the home's lock.
    """
    configure_logging(home)

    def tell(sentence: str) -> None:
        log.info("%s", sentence)
        say(sentence)

    child = trainer or TrainerHost.of(home)
    daemon = Daemon(home, tell, child)
    asked = False

    def handle(_number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            child.kill()
            os._exit(130)
        asked = True
        say("Finishing the step and saving; once more ends it now.")
        daemon.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    daemon.run()


def lock(home: Home) -> DirectoryLock:
    """The lock of a node's home."""
    return DirectoryLock(home.root, who="talkoot daemon")
