"""Every node's part in every round, as a table for pandas."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import numpy as np

from talkoot.sims.planning.result import PlanResult

COLUMNS: Final = (
    *("round", "node", "class", "tokens", "leased_s", "fetched_s", "trained_s", "encoded_s"),
    *("pushed_s", "arrived_s", "committed"),
)
"""Moments are seconds since the plan's beginning; empty for what would never have been."""


def write_events(result: PlanResult, path: Path) -> int:
    """Write events.csv; how many rows there are."""
    names = [row.name for row in result.classes]
    kinds = np.repeat(np.arange(len(names)), [row.nodes for row in result.classes])
    rows = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        for number, leased, course, done in result.events:
            moments = np.stack(
                [course.fetched, course.trained, course.encoded, course.pushed, course.arrived], 1
            )
            for place, node in enumerate(course.nodes.tolist()):
                told = [f"{m:.1f}" if np.isfinite(m) else "" for m in moments[place].tolist()]
                who = (number, node, names[kinds[node]], int(course.tokens[place]))
                out.writerow([*who, f"{leased:.1f}", *told, int(done[place])])
            rows += len(course.nodes)
    return rows
