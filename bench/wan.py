"""The line that transfers are measured over; it is ``talkoot.sims.wan``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from talkoot.sims.wan import FAR, NEAR, Direction, Line, Wan, insist_possible

__all__ = ["FAR", "NEAR", "ROOT", "Direction", "Line", "Wan", "insist_possible"]

ROOT: Final = Path(__file__).resolve().parent.parent
