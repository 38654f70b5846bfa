"""From curves to captured share, table and ``parity.json``. Pure.

Captured share = (L_one - L_net) / (L_one - L_ddp): 1 is a data centre, 0 is "the volunteer might as
well have trained alone".
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from talkoot.sims.parity.options import Arm, Nodes, ParityOptions

MIN_SHARE = 0.85
MIN_SHARE_TEN_TIMES = 0.95
"""Of an arm that may send ten times as much."""
MIN_SHARE_UNEQUAL = 0.75
"""Of an arm whose nodes differ, or are not always there."""
MAX_BITS_UP = 0.15
MIN_INNER_STEPS = 15
MAX_LOSS_RATIO = 1.02
EARLY_ROUND = 5
"""From this round on a network must not be worse than a node alone."""


@dataclass(frozen=True)
class Point:
    """A held-out loss."""

    horizon: int
    """Rounds of the base configuration."""
    tokens: int
    """That the network had really committed: at least those of so many rounds."""
    loss: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        """Inverse of :meth:`to_json`."""
        return cls(**data)


@dataclass(frozen=True)
class Curve:
    """One run of one network or measure."""

    kind: str
    parameters: int
    points: tuple[Point, ...]
    bits_up: tuple[float, ...]
    """Bits per parameter of a contribution, mean over the nodes, by round."""
    bits_down: tuple[float, ...]
    """Bits per parameter of the published update, by round."""
    steps: int
    """Most inner steps in a lease."""
    seconds: float
    training_seconds: float
    """Of the inner steps alone; 0 for a measure."""

    def loss(self, horizon: int) -> float:
        """The loss at a horizon; NaN where none was measured."""
        return next((p.loss for p in self.points if p.horizon == horizon), math.nan)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """Inverse of :meth:`to_json`."""
        points = tuple(Point.from_json(point) for point in data["points"])
        bits = {key: tuple(data[key]) for key in ("bits_up", "bits_down")}
        return cls(**{**data, "points": points, **bits})


@dataclass(frozen=True)
class Measured:
    """The three curves of one arm and seed."""

    arm: Arm
    seed: int
    curves: Mapping[str, Curve]

    def share(self, horizon: int) -> float:
        """Captured share at a horizon; NaN when the data centre was no better than one node."""
        one, ddp, net = (self.curves[kind].loss(horizon) for kind in ("one", "ddp", "net"))
        gap = one - ddp
        return (one - net) / gap if gap > 0 else math.nan


def summarise(options: ParityOptions, measured: Sequence[Measured]) -> dict[str, Any]:
    """The content of ``parity.json``."""
    base = options.base
    arms = []
    for arm in options.arms:
        runs = [m for m in measured if m.arm == arm]
        arms.append(
            {
                "name": arm.name,
                "values": dict(arm.values),
                "nodes": arm.nodes.model_dump(mode="json"),
                "seeds": [m.seed for m in runs],
                "bits_up": _mean([b for m in runs for b in m.curves["net"].bits_up]),
                "bits_down": _mean([b for m in runs for b in m.curves["net"].bits_down]),
                "rounds": [len(m.curves["net"].bits_up) for m in runs],
                "inner_steps": max(m.curves["net"].steps for m in runs),
                "overhead": _overhead(runs),
                "horizons": [_horizon(runs, h, options.round_tokens) for h in options.horizons],
            }
        )
    return {
        "format": 1,
        "model": base.model.preset or base.model.pretrained or base.model.config,
        "from_scratch": base.model.pretrained is None,
        "parameters": measured[0].curves["net"].parameters,
        "sources": list(base.corpus.sources),
        "nodes": options.nodes,
        "rounds": options.rounds,
        "tokens": options.rounds * options.round_tokens,
        "sequence_length": base.model.sequence_length,
        "micro_batch": base.model.micro_batch,
        "inner": base.inner.model_dump(mode="json"),
        "arms": arms,
        "bars": _bars(arms),
    }


def _horizon(runs: Sequence[Measured], horizon: int, round_tokens: int) -> dict[str, Any]:
    losses = {
        f"loss_{kind}": _spread([m.curves[kind].loss(horizon) for m in runs])
        for kind in ("one", "ddp", "net")
    }
    return {
        "round": horizon,
        "tokens": horizon * round_tokens,
        **losses,
        "share": _spread([m.share(horizon) for m in runs]),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return {"mean": None, "low": None, "high": None, "by_seed": [None] * len(values)}
    by_seed = [value if math.isfinite(value) else None for value in values]
    return {"mean": _mean(finite), "low": min(finite), "high": max(finite), "by_seed": by_seed}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _overhead(runs: Sequence[Measured]) -> float | None:
    """Time of a network's rounds over that of its inner steps alone, minus 1."""
    steps = sum(m.curves["net"].training_seconds for m in runs)
    return sum(m.curves["net"].seconds for m in runs) / steps - 1 if steps > 0 else None


def _bars(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What issue 7 asks: all of it of the first arm, which is the default, and a share of those
    others whose nodes are unequal or which send more than the default may, up to ten times."""
    first, *others = arms
    last = first["horizons"][-1]
    early = [
        h["share"]["low"]
        for h in first["horizons"]
        if h["round"] >= EARLY_ROUND and h["share"]["low"] is not None
    ]
    share, net, ddp = (last[key]["mean"] for key in ("share", "loss_net", "loss_ddp"))
    up, steps = first["bits_up"], first["inner_steps"]
    rows = [
        ("captured-share", share, MIN_SHARE, share is not None and share >= MIN_SHARE),
        ("bits-up", up, MAX_BITS_UP, up <= MAX_BITS_UP),
        ("inner-steps", steps, MIN_INNER_STEPS, steps >= MIN_INNER_STEPS),
        ("loss-over-ddp", net / ddp, MAX_LOSS_RATIO, net / ddp <= MAX_LOSS_RATIO),
    ]
    if early:
        rows.append(("lowest-share-from-round-5", min(early), 0.0, min(early) >= 0))
    made = [_bar(first, *row) for row in rows]
    for arm in others:
        bar = _other_share(arm)
        if bar is not None:
            share = arm["horizons"][-1]["share"]["mean"]
            made.append(_bar(arm, "captured-share", share, bar, share is not None and share >= bar))
    return made


def _bar(
    arm: Mapping[str, Any], name: str, value: float | None, bar: float, holds: bool
) -> dict[str, Any]:
    return {"arm": arm["name"], "name": name, "value": value, "bar": bar, "holds": holds}


def _other_share(arm: Mapping[str, Any]) -> float | None:
    """What is asked of an arm that is not the first; None of one that is only compared."""
    if Nodes.model_validate_json(json.dumps(arm["nodes"])) != Nodes():
        return MIN_SHARE_UNEQUAL if arm["bits_up"] <= MAX_BITS_UP else None
    return MIN_SHARE_TEN_TIMES if MAX_BITS_UP < arm["bits_up"] <= 10 * MAX_BITS_UP else None
