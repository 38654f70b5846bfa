"""Whether the operator's disk has room for what comes next, and the sentence to say if not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from talkoot.protocol.limits import MIB
from talkoot.protocol.memory import format_size

VERSION_BYTES: Final = 12  # a parameter: master and published weights, and an outer optimizer's
SPARE: Final = 4 * MIB
"""For the ledger, the SuperLink's database, uploads and logs."""


def shortage(root: Path, free_bytes: int, parameters: int) -> str | None:
    """What to tell the operator when a version and its round no longer fit, or None."""
    needed = VERSION_BYTES * parameters + SPARE
    if free_bytes >= needed:
        return None
    return (
        f"The disk that holds {root} is full or nearly so ({format_size(free_bytes)} free; a round "
        f"takes about {format_size(needed)}): free some space. Nothing is lost, and the run goes "
        "on by itself when there is room."
    )


def free_bytes(root: Path) -> int:
    """Bytes that this process may still write below ``root``."""
    return shutil.disk_usage(root).free
