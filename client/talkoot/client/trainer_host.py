"""The daemon's handle on the trainer, a child process with torch. This module imports no torch.

The child speaks JSON lines (``trainer/__main__.py``). It is started early and kept across rounds,
since importing torch and transformers costs seconds. When it dies, whoever waits for an answer gets
an error, and the next call starts a new child in the same work directory, which carries on from the
last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

from talkoot.client.caps import Caps
from talkoot.client.home import Home
from talkoot.protocol import errors
from talkoot.protocol.errors import TalkootError, UnavailableError
from talkoot.protocol.files import explain_os_error

Progress = Callable[[dict[str, Any]], None]
ShouldStop = Callable[[], bool]

POLL_SECONDS: Final = 0.2
"""How often a call in flight asks ``should_stop``."""
CLOSE_SECONDS: Final = 60.0
"""How long the child may take to finish a step and write its checkpoint before it is killed."""
EXIT_SECONDS: Final = 5.0
"""How long a child whose output has ended may take to be gone."""
CHECKPOINT_SECONDS: Final = 10.0

_ERROR_TYPES: Final[dict[str, type[TalkootError]]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, TalkootError)
}


class _Child:
    """One child process and the thread that reads its replies."""

    def __init__(self, command: list[str], log: BinaryIO) -> None:
        self.replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.opened = False
        self._write_lock = threading.Lock()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # Ctrl-C reaches the daemon, which then decides what the trainer does.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="trainer-replies", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                try:
                    reply = json.loads(line)
                except ValueError:
                    break  # a child that writes nonsense is as good as dead
                if isinstance(reply, dict):
                    self.replies.put(reply)
        finally:
            self.replies.put(None)

    def send(self, request: dict[str, Any]) -> bool:
        """Write one request; False when the child is gone."""
        assert self.process.stdin is not None
        data = json.dumps(request, separators=(",", ":")).encode("ascii") + b"\n"
        with self._write_lock:
            try:
                self.process.stdin.write(data)
                self.process.stdin.flush()
            except (OSError, ValueError):  # broken pipe, or closed by close()
                return False
        return True

    def end_input(self) -> None:
        assert self.process.stdin is not None
        with self._write_lock, contextlib.suppress(OSError):
            self.process.stdin.close()

    def alive(self) -> bool:
        return self.process.poll() is None

    def reap(self) -> None:
        """Wait for its end, kill what is left of it and free its pipes."""
        try:
            # Its output ends a moment before it does; its own exit status tells more than SIGKILL.
            self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.wait()
        self.end_input()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class TrainerHost:
    """Calls operations of the trainer child and restarts it when it died.

    One caller at a time (a lock holds others back); :meth:`close` and :meth:`kill` may come from
    another thread at any moment.

    Args:
        work: the trainer's own directory (replica, optimizer, feedback, leases).
        device: torch device name, or ``None`` for whatever works.
        threads: CPU threads of the child; ``None`` leaves the choice to torch.
        log_path: the child's stderr, appended.
        checkpoint_seconds: the most work, in seconds, that a crash can cost.
        caps: what the child may take of the machine.
    """

    def __init__(
        self,
        work: Path,
        device: str | None,
        threads: int | None,
        log_path: Path,
        *,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        caps: Caps | None = None,
    ) -> None:
        self._command = [
            *(sys.executable, "-m", "talkoot.client.trainer"),
            *("--work", str(work), "--parent", str(os.getpid())),
            *("--checkpoint-seconds", str(checkpoint_seconds)),
        ]
        if device is not None:
            self._command += ["--device", device]
        if threads is not None:
            self._command += ["--threads", str(threads)]
        self._command += (caps or Caps()).as_arguments()
        self._work = work
        self._log_path = log_path
        self._call_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._child: _Child | None = None
        self._closed = False
        self._next_id = 0
        self._open_arguments: dict[str, Any] | None = None

    @classmethod
    def of(cls, home: Home) -> TrainerHost:
        """The trainer of a node, as its owner wants it."""
        chosen = home.settings()
        return cls(
            home.work,
            chosen.device,
            chosen.threads,
            home.logs / "trainer.log",
            checkpoint_seconds=chosen.checkpoint_seconds,
            caps=chosen.caps,
        )

    @property
    def pid(self) -> int | None:
        """Process id of the living child."""
        child = self._child
        return child.process.pid if child is not None and child.alive() else None

    def start(self) -> None:
        """Start the child now, so that its imports run while the caller does something else."""
        self._living_child()

    def _living_child(self) -> _Child:
        with self._state_lock:
            if self._closed:
                raise UnavailableError("The trainer has been closed.", code="trainer-closed")
            if self._child is not None and not self._child.alive():
                self._child.reap()
                self._child = None
            if self._child is None:
                try:
                    self._work.mkdir(parents=True, exist_ok=True)
                    self._log_path.parent.mkdir(parents=True, exist_ok=True)
                    with self._log_path.open("ab") as log:
                        self._child = _Child(self._command, log)
                except OSError as err:
                    raise explain_os_error(err, "starting the trainer", self._work) from err
            return self._child

    def call(
        self,
        op: str,
        on_progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Run one operation and return its result.

        ``on_progress`` gets each progress report, in this thread. When ``should_stop`` answers true
        the operation ends at its next step boundary, checkpointed, and this raises
        :class:`UnavailableError` with code ``"stopped"``; the same call again carries on.

        A child that had to be restarted is first given the last successful ``open`` again.

        Raises:
            UnavailableError: ``trainer-died`` (try again), ``trainer-closed``, or ``stopped``.
            TalkootError: whatever the operation itself raised, of the same type and code.
        """
        with self._call_lock:
            child = self._living_child()
            if not child.opened and op != "open" and self._open_arguments is not None:
                self._exchange(child, "open", self._open_arguments, None, None)
                child.opened = True
            result = self._exchange(child, op, arguments, on_progress, should_stop)
            if op == "open":
                child.opened = True
                self._open_arguments = arguments
            return result

    def _exchange(
        self,
        child: _Child,
        op: str,
        arguments: dict[str, Any],
        on_progress: Progress | None,
        should_stop: ShouldStop | None,
    ) -> dict[str, Any]:
        self._next_id += 1
        call_id = self._next_id
        if not child.send({"id": call_id, "op": op, **arguments}):
            raise self._gone(child, op)
        asked_to_stop = False
        while True:
            try:
                reply = child.replies.get(timeout=POLL_SECONDS)
            except queue.Empty:
                reply = {}
            if reply is None:
                raise self._gone(child, op)
            if reply.get("id") == call_id:
                if "ok" in reply:
                    return dict(reply["ok"])
                if "error" in reply:
                    raise _rebuild(reply["error"])
                if "progress" in reply and on_progress is not None:
                    on_progress(dict(reply["progress"]))
            if not asked_to_stop and should_stop is not None and should_stop():
                asked_to_stop = True
                child.send({"id": call_id, "op": "cancel"})

    def _gone(self, child: _Child, op: str) -> UnavailableError:
        if self._closed:
            return UnavailableError(
                f"The trainer was closed during {op}; its work is checkpointed.",
                code="trainer-closed",
            )
        child.reap()
        status = child.process.returncode
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        hint = " (memory may have run out)" if status == -9 else ""
        return UnavailableError(
            f"The trainer process ended during {op} with {how}{hint}: the next call starts it "
            f"again from its last checkpoint; its log is {self._log_path}.",
            code="trainer-died",
        )

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """End the child at its next step boundary, checkpointed. May come from another thread."""
        with self._state_lock:
            self._closed = True
            child = self._child
        if child is None:
            return
        child.end_input()
        try:
            child.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pass
        child.reap()

    def kill(self) -> None:
        """SIGKILL the child, as a crash would. The next call starts another one."""
        child = self._child
        if child is not None and child.alive():
            child.process.kill()

    def __enter__(self) -> TrainerHost:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rebuild(error: dict[str, Any]) -> TalkootError:
    kind = _ERROR_TYPES.get(str(error.get("type")), TalkootError)
    return kind(str(error.get("sentence", "")), code=str(error.get("code", "error")))
