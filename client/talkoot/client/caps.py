"""What a volunteer lets talkoot have of the machine. No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from talkoot.protocol.errors import CapacityError
from talkoot.protocol.files import bytes_below
from talkoot.protocol.sizes import format_size

OVER_MAX_DISK: Final = "over-max-disk"


@dataclass(frozen=True)
class Caps:
    """Bytes; None is no cap. A cap counts as the size of the machine."""

    vram: int | None = None
    """Of an accelerator's memory."""
    ram: int | None = None
    """Of host memory, which is all that a CPU node has."""
    disk: int | None = None
    """Of all that is below the node's home."""

    def of_device(self, kind: str) -> int | None:
        """The cap on the memory of a kind of device."""
        return self.ram if kind == "cpu" else self.vram

    def as_arguments(self) -> list[str]:
        """For a child process that :func:`add_arguments` was told to."""
        given = (("--max-vram", self.vram), ("--max-ram", self.ram), ("--max-disk", self.disk))
        return [part for name, size in given if size is not None for part in (name, str(size))]


def require_room(home: Path, size: int, max_disk: int | None) -> None:
    """See that ``size`` more bytes below ``home`` stay under the volunteer's cap.

    Raises:
        CapacityError: code ``"over-max-disk"``: they do not.
    """
    if max_disk is None:
        return
    held = bytes_below(home)
    if held + size > max_disk:
        raise CapacityError(
            f"The node at {home} takes {format_size(held)} of disk, and {format_size(size)} more "
            f"would be over its cap of {format_size(max_disk)}: raise it with 'talkoot join "
            "--max-disk'; nothing is lost.",
            code=OVER_MAX_DISK,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a child process be told of caps."""
    for name in ("--max-vram", "--max-ram", "--max-disk"):
        parser.add_argument(name, type=int, help="bytes; see caps.py")


def told(options: argparse.Namespace) -> Caps:
    """The caps in a child's arguments."""
    return Caps(options.max_vram, options.max_ram, options.max_disk)
