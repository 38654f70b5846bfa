"""Named places where a process may be told to die, for proving that it may.

The environment names a directory (:data:`VARIABLE`). A file in it with a place's name arms that
place: the next process that comes by takes the file away and sends itself SIGKILL, as the kernel's
out-of-memory killer or a power cut would, with nothing flushed or released. One file, one death.
Without the variable, which is read once, a place costs one comparison.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

VARIABLE: Final = "TALKOOT_FAULTS"
PLACES: Final = frozenset(
    {
        # the coordinator's round loop
        "open.before-commit",
        "open.after-commit",
        "close.after-commit",
        "aggregate.tensor",
        "aggregate.between-files",
        "aggregate.before-rename",
        "publish.update-stored",
        "publish.before-commit",
        "publish.in-transaction",
        "publish.after-commit",
        # its transfer service
        "push.mid",
        "push.whole",
        "accept.payload-stored",
        "accept.in-transaction",
        "accept.after-commit",
        # a volunteer's daemon
        "node.before-push",
        "node.before-submit",
        "node.after-verdict",
        "node.before-settle",
        # its trainer
        "trainer.mid-checkpoint",
        "trainer.mid-encode",
        "trainer.before-done",
        "trainer.mid-sync",
        "trainer.before-settled",
    }
)
"""Every place there is."""

_directory: Path | None = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def place(name: str) -> None:
    """Die here if this place is armed."""
    if _directory is None:
        return
    try:
        (_directory / name).unlink()
    except OSError:  # not armed, or another process was first
        return
    (_directory / f"{name}.hit").write_text(str(os.getpid()), encoding="ascii")
    os.kill(os.getpid(), signal.SIGKILL)


def arm(directory: Path, name: str) -> None:
    """Arm a place for the next process that comes by with ``directory`` in its environment.

    Raises:
        ValueError: there is no such place.
    """
    if name not in PLACES:
        raise ValueError(f"there is no place {name!r}")
    (directory / f"{name}.hit").unlink(missing_ok=True)
    (directory / name).touch()


def hit(directory: Path, name: str) -> int | None:
    """The process that died at an armed place; None if none has yet."""
    try:
        return int((directory / f"{name}.hit").read_text("ascii") or 0) or None
    except (FileNotFoundError, ValueError):
        return None


def disarm(directory: Path, name: str) -> bool:
    """Take an armed place back; False when a process has died there already."""
    try:
        (directory / name).unlink()
    except FileNotFoundError:
        return False
    return True
