"""A secret on our command line, out of sight of whoever lists processes.

An invite is typed as an argument, and a daemon runs for weeks: its command line is readable by all
users of the machine in ``/proc``. Linux keeps the bytes in the process's own memory, where they may
be written over (proc(5), ``/proc/pid/stat``, fields 48 and 49).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Final

_ARG_START: Final = 48 - 3  # of the fields after the command's name, which is in parentheses
_ARG_END: Final = 49 - 3


def hide(secret: str) -> bool:
    """Write ``x`` over every place where ``secret`` is on this process's command line.

    Returns whether it is (now) nowhere there; False where that can't be told, as off Linux.
    """
    if not secret or sys.platform != "linux":
        return False
    try:
        fields = Path("/proc/self/stat").read_text("ascii", "replace").rpartition(") ")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        shown = _command_line()
    except (OSError, ValueError, IndexError):
        return False
    if start == 0 or len(shown) != end - start:
        return False  # somebody has moved it: nothing is where it should be
    wanted = secret.encode()
    place = shown.find(wanted)
    while place >= 0:
        ctypes.memset(start + place, ord("x"), len(wanted))
        place = shown.find(wanted, place + len(wanted))
    return wanted not in _command_line()


def _command_line() -> bytes:
    return Path("/proc/self/cmdline").read_bytes()
