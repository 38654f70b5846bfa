"""What a benchmark is, and how its figures become rows.

A benchmark is a function with a stable name that yields rows::

    @benchmark("encode")
    def encode(run: Run) -> Iterator[Row]:
        ours, theirs = [], []
        for _ in range(run.repeats):            # interleaved: both see the same machine
            ours.append(seconds_of(...))
            theirs.append(seconds_of(...))
        yield compare("encode_seconds", "s", ours, theirs, ratio_at_most=1.5)

Every figure of speed is a ratio to something that was measured in the same run, on the same
machine, in turn with it: seconds alone say nothing on another machine.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench.cases


@dataclass(frozen=True)
class Row:
    """One figure: a line of the table and an object of ``bench.json``."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    """What it is held against, in the same unit."""
    ratio: float | None = None
    """value / baseline."""
    bar: str = ""
    """Such as ``ratio <= 1.5``; empty when the figure is only reported."""
    holds: bool | None = None
    spread: float = 0.0
    """(largest - smallest) / median of the repeated figure that the bar is about."""
    samples: int = 1
    note: str = ""
    """What value and baseline are, in a few words."""

    def as_json(self) -> dict[str, Any]:
        """Ready for ``bench.json``."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Run:
    """What a benchmark is given."""

    quick: bool
    """A reduced table: the whole of it must take less than two minutes."""
    scratch: Path
    """An empty directory on the disk to measure; removed afterwards."""
    say: Callable[[str], None] = field(default=lambda _: None)

    @property
    def repeats(self) -> int:
        """How often to measure what is measured repeatedly."""
        return 3 if self.quick else 7


Benchmark = Callable[[Run], Iterator[Row]]

_REGISTRY: dict[str, tuple[Benchmark, bool]] = {}


def benchmark(name: str, *, quick: bool = True) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark under a stable name; ``quick=False`` leaves it out of ``--quick``."""

    def register(function: Benchmark) -> Benchmark:
        if name in _REGISTRY:
            raise ValueError(f"two benchmarks are called {name}")
        _REGISTRY[name] = (function, quick)
        return function

    return register


def all_benchmarks() -> dict[str, tuple[Benchmark, bool]]:
    """Name → (function, whether it is part of ``--quick``), in the order of the modules."""
    for module in sorted(info.name for info in pkgutil.iter_modules(bench.cases.__path__)):
        importlib.import_module(f"bench.cases.{module}")
    return dict(_REGISTRY)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spread_of(values: Sequence[float]) -> float:
    """(largest - smallest) / median; 0 for a single value."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / abs(middle) if middle else 0.0


def compare(
    name: str,
    unit: str,
    values: Sequence[float],
    baselines: Sequence[float],
    *,
    ratio_at_most: float | None = None,
    ratio_at_least: float | None = None,
    note: str = "",
) -> Row:
    """A figure against a baseline measured in turn with it: the medians, and the median ratio."""
    ratios = [a / b for a, b in zip(values, baselines, strict=True)]
    ratio = statistics.median(ratios)
    bar, holds = _judge("ratio", ratio, ratio_at_most, ratio_at_least)
    return Row(
        name=name,
        value=statistics.median(values),
        unit=unit,
        baseline=statistics.median(baselines),
        ratio=ratio,
        bar=bar,
        holds=holds,
        spread=spread_of(ratios),
        samples=len(ratios),
        note=note,
    )


def figure(
    name: str,
    unit: str,
    values: Sequence[float] | float,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    baseline: float | None = None,
    note: str = "",
) -> Row:
    """A figure that is judged by itself; ``baseline`` is shown beside it."""
    samples = [values] if isinstance(values, int | float) else list(values)
    value = float(statistics.median(samples))
    bar, holds = _judge("value", value, at_most, at_least)
    return Row(
        name=name,
        value=value,
        unit=unit,
        baseline=baseline,
        ratio=value / baseline if baseline else None,
        bar=bar,
        holds=holds,
        spread=spread_of(samples),
        samples=len(samples),
        note=note,
    )


def _judge(
    what: str, value: float, at_most: float | None, at_least: float | None
) -> tuple[str, bool | None]:
    if at_most is not None and at_least is not None:
        raise ValueError("a bar has one side")
    if at_most is not None:
        return f"{what} <= {at_most:g}", value <= at_most
    if at_least is not None:
        return f"{what} >= {at_least:g}", value >= at_least
    return "", None
