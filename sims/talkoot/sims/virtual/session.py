"""The engine's session: all that it and Ray start is in it, whoever is its parent by then.

Ray's own clean-up leaves helpers for half a minute when the engine is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Final

import psutil

LOOK_SECONDS: Final = 0.2
GONE_SECONDS: Final = 10.0
"""How long the killed may take to be gone."""


def members(session: int) -> list[int]:
    """Process ids of a session's living processes."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session:
                found.append(pid)
    return found


def end(session: int) -> None:
    """Kill all of a session but this process, and wait until they are gone."""
    until = time.monotonic() + GONE_SECONDS
    while time.monotonic() < until:
        left = [pid for pid in members(session) if pid != os.getpid() and _alive(pid)]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).status()) != psutil.STATUS_ZOMBIE
    return False


def end_with_parent(rubbish: Path) -> None:
    """Have a thread end this process's own session, and it, when its parent is gone.

    ``rubbish`` is a directory that the parent would have deleted.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        end(os.getsid(0))
        shutil.rmtree(rubbish, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
