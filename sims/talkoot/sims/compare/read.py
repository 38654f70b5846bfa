"""Finished runs and plans from their files, those of one scenario taken together."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import ConfigError

FILES: Final = ("run.json", "plan.json")
MAX_FILE: Final = 512 * 2**20
"""Bytes."""


@dataclass(frozen=True)
class Curve:
    """One run over its rounds; the lists are as long as each other."""

    seed: int
    days: tuple[float, ...]
    tokens: tuple[float, ...]
    """Of all rounds so far."""
    bytes_up: tuple[float, ...]
    """Likewise."""
    loss: tuple[float, ...]
    """Held out if that was measured, of training if not; NaN in a plan."""
    contributions: tuple[float, ...]
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Line:
    """What is drawn as one line: a scenario, over its seeds."""

    name: str
    kind: str
    """``run`` or ``plan``."""
    curves: tuple[Curve, ...]

    def figure(self, name: str) -> float | None:
        """Mean over the seeds; None if none of them has it."""
        found = [v for curve in self.curves if (v := curve.figures.get(name)) is not None]
        return statistics.fmean(found) if found else None

    def spread(self, name: str) -> float | None:
        """Half of the range over the seeds."""
        found = [v for curve in self.curves if (v := curve.figures.get(name)) is not None]
        return (max(found) - min(found)) / 2 if len(found) > 1 else None


def read_lines(paths: Sequence[Path]) -> list[Line]:
    """What the paths hold: directories of ``run`` or ``plan --out``, or their JSON files.

    Runs of one scenario with other seeds become one line.

    Raises:
        ConfigError: a path holds neither.
    """
    groups: dict[str, tuple[str, str, list[Curve]]] = {}
    for path in paths:
        document = _document(path)
        kind = "plan" if "runs" in document else "run"
        for one in document["runs"] if kind == "plan" else [document]:
            scenario = dict(one["scenario"])
            seed = int(scenario.pop("seed", 0))
            apart = ("expect", "sentence")
            same = {key: value for key, value in scenario.items() if key not in apart}
            key = kind + json.dumps(same, sort_keys=True)
            group = groups.setdefault(key, (_name(path, scenario), kind, []))
            group[2].append(_curve(one, seed))
    lines = [Line(name, kind, tuple(curves)) for name, kind, curves in groups.values()]
    return _apart(lines)


def _document(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(
            f"There is nothing at {path}: give a directory that `talkoot-sim run` or "
            "`talkoot-sim plan --out` wrote."
        )
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise ConfigError(
                f"{path} holds neither {' nor '.join(FILES)}: give a directory that "
                "`talkoot-sim run` or `talkoot-sim plan --out` wrote."
            )
        path = found[0]
    try:
        if path.stat().st_size > MAX_FILE:
            raise ConfigError(f"{path} is larger than any result.")
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"{path} cannot be read as a result: {err}.") from err
    whole = isinstance(document, dict)
    if whole and document.get("kind") == "sweep":
        raise ConfigError(f"{path} is a sweep, which compares its points already.")
    if not whole or not ("runs" in document or {"scenario", "figures", "rounds"} <= set(document)):
        raise ConfigError(f"{path} is not a result of `talkoot-sim run` or `talkoot-sim plan`.")
    return dict(document)


def _name(path: Path, scenario: dict[str, Any]) -> str:
    return str(scenario.get("name") or path.stem)


def _curve(one: dict[str, Any], seed: int) -> Curve:
    try:
        rounds = one["rounds"]
        return Curve(
            seed=seed,
            days=tuple(float(row["published"]) / 86_400 for row in rounds),
            tokens=_running([float(row["tokens"]) for row in rounds]),
            bytes_up=_running([float(row["bytes_up"]) for row in rounds]),
            loss=tuple(_loss(row) for row in rounds),
            contributions=tuple(float(row["contributions"]) for row in rounds),
            figures=dict(one["figures"]),
        )
    except (KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"A result is not whole ({err!r}): run or plan it again.") from err


def _loss(row: dict[str, Any]) -> float:
    for key in ("heldout", "loss"):
        if row.get(key) is not None:
            return float(row[key])
    return math.nan


def _running(values: Sequence[float]) -> tuple[float, ...]:
    total, found = 0.0, []
    for value in values:
        total += value
        found.append(total)
    return tuple(found)


def _apart(lines: list[Line]) -> list[Line]:
    """Lines with names of their own: the second ``campus`` is ``campus (2)``."""
    seen: dict[str, int] = {}
    named = []
    for line in lines:
        name = line.name if len({one.kind for one in lines}) == 1 else f"{line.name} ({line.kind})"
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name = f"{name} ({seen[name]})"
        named.append(Line(name, line.kind, line.curves))
    return named
