"""Runs a program that dies with its parent: ``python -m talkoot.server.leash PROGRAM ARG…``.

For programs that are not ours (the SuperLink). On Linux the kernel sends SIGTERM when the parent is
gone, even by SIGKILL; a new coordinator then finds its ports free.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent thread ends (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we had asked
        sys.exit(0)


if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - the supervisor's own command line
