"""Every node's part in every round, as a table for pandas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from talkoot.sims.planning.result import PlanResult
from talkoot.sims.tables import Columns, write_table

MOMENTS: Final = ("fetched_s", "trained_s", "encoded_s", "pushed_s", "arrived_s")
COLUMNS: Final[Columns] = {
    **{"round": int, "node": int, "class": str, "tokens": int, "leased_s": float},
    **dict.fromkeys(MOMENTS, float),
    "committed": bool,
}
"""Moments are seconds since the plan's beginning; empty for what would never have been."""


class _Events:
    """All rows, made anew each time that they are gone through: there may be millions."""

    def __init__(self, result: PlanResult) -> None:
        self._result = result

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        result = self._result
        names = [row.name for row in result.classes]
        kinds = np.repeat(np.arange(len(names)), [row.nodes for row in result.classes])
        for number, leased, course, done in result.events:
            moments = np.stack(
                [course.fetched, course.trained, course.encoded, course.pushed, course.arrived], 1
            )
            for place, node in enumerate(course.nodes.tolist()):
                told = [round(m, 1) if np.isfinite(m) else None for m in moments[place].tolist()]
                who = (number, node, names[kinds[node]], int(course.tokens[place]))
                yield (*who, round(leased, 1), *told, bool(done[place]))


def write_events(result: PlanResult, stem: Path, *, parquet: bool = False) -> int:
    """Write ``stem.csv``, and ``stem.parquet`` if asked; how many rows there are."""
    write_table(stem, COLUMNS, _Events(result), parquet=parquet)
    return sum(len(course.nodes) for _, _, course, _ in result.events)
