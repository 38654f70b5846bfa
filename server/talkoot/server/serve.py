"""``talkoot-coordinator serve``: one supervisor in the foreground."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from talkoot.protocol.files import DirectoryLock
from talkoot.server.app import STATE_VARIABLE
from talkoot.server.coordinator import Coordinator
from talkoot.server.logs import configure
from talkoot.server.state import StateDir
from talkoot.server.supervisor import Supervisor

LEFTOVER_SECONDS = 10.0


def serve_forever(root: Path, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; a second Ctrl-C ends everything now."""
    state = StateDir(root.absolute())
    state.check()
    with DirectoryLock(state.root, who="coordinator"):
        reap_leftovers(state)
        coordinator = Coordinator.open(state.root)
        configure(state.logs / "supervisor.log")
        try:
            supervisor = Supervisor(coordinator, say)
            _on_signals(supervisor, say)
            supervisor.run()
        finally:
            coordinator.close()
    say("Stopped. Nothing is lost: serve again to go on.")


def _on_signals(supervisor: Supervisor, say: Callable[[str], None]) -> None:
    asked = False

    def handle(_number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            os._exit(130)
        asked = True
        say("Stopping the parts; Ctrl-C again to kill them.")
        supervisor.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def reap_leftovers(state: StateDir) -> None:
    """End the parts of a coordinator that was killed; we hold the lock, so nobody needs them.

    A part's children count, too, when they have outlived it: they are in its process group.
    """
    path = state.run / "pids"
    try:
        lines = path.read_text("ascii").splitlines()
    except OSError:
        return
    pids = (line.partition(" ") for line in lines)
    groups = {int(pid) for name, _, pid in pids if name != "supervisor" and pid.isdigit()}
    left: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # The number may have gone to another program since.
            if os.getpgid(process.pid) in groups and _is_ours(process, state):
                left.append(process)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=LEFTOVER_SECONDS)
    path.unlink(missing_ok=True)
    if left:
        time.sleep(0.2)  # the kernel frees their ports a moment after they are gone


def _is_ours(process: psutil.Process, state: StateDir) -> bool:
    root = str(state.root)
    if any(part == root or part.startswith(root + os.sep) for part in process.cmdline()):
        return True
    return process.environ().get(STATE_VARIABLE) == root  # what Flower started for us
