"""The figures of the attack suite: held against honest nodes, as JSON, as a table and as a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.files import write_atomic
from talkoot.server.standing import false_quarantine
from talkoot.sims.attacks.loris import SLOW_LORIS

HONEST: Final = "honest only"
"""Arms that begin so are what the others are held against."""
BAR: Final = 0.03
"""Held-out loss may be so much above that of the run with honest nodes only."""
CUT_PERCENT: Final = 60.0
"""Bars of the plot that are longer are cut, and say how long they are."""
Arm = Mapping[str, Any]
"""What ``suite.run_arm`` measured."""


def summarise(out: Path, rounds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """The figures of all arms that are done, also as ``attacks.json``.

    An arm is held against the mean of the honest runs of its own seed, and these ratios are
    averaged: seeds differ more among themselves than arms of one seed do.
    """
    found = [json.loads(path.read_bytes()) for path in sorted((out / "arms").glob("*.json"))]
    draws: dict[int, list[float]] = {}
    for one in found:
        if one["arm"].startswith(HONEST):
            draws.setdefault(one["seed"], []).append(one["final_loss"])
    honest = {seed: statistics.fmean(losses) for seed, losses in draws.items()}
    # Half the range of the honest runs of a seed, in the mean of the seeds.
    spread = [(max(d) - min(d)) / 2 / statistics.fmean(d) for d in draws.values() if len(d) > 1]
    odd = [one for one in found if one["arm"] == "odd but honest" and one["defended"]]
    data = {
        "format": 3,
        "rounds": rounds,
        "parameters": found[0]["parameters"],
        "bar": BAR,
        "seeds": sorted(honest),
        "chance": statistics.fmean(spread) if spread else 0.0,
        "honest_draws": {str(seed): losses for seed, losses in sorted(draws.items())},
        "attacks": [row for kind in kinds if (row := _row(kind, _of(kind, found, honest), honest))],
        "honest_nodes": _honest_nodes(found),
        "odd": {f"{name} ({one['seed']})": s for one in odd for name, s in one["nodes"].items()},
    }
    write_atomic(out / "attacks.json", json.dumps(data, indent=1).encode())
    return data


def _of(kind: str, found: Sequence[Arm], honest: Mapping[int, float]) -> list[Arm]:
    return [one for one in found if one["arm"] == kind and one["seed"] in honest]


def _row(kind: str, found: Sequence[Arm], honest: Mapping[int, float]) -> dict[str, Any] | None:
    arms = [one for one in found if one["defended"]]
    if not arms:
        return None
    plain = [one for one in found if not one["defended"]]
    bad = [s for one in arms for s in one["nodes"].values() if not s["honest"]]
    liars = {name for one in arms for name, s in one["nodes"].items() if not s["honest"]}
    ratios = _ratios(arms, honest)
    row = {
        "attack": kind,
        "seeds": len(arms),
        "liars": len(bad),
        "honest_only": statistics.fmean(honest[one["seed"]] for one in arms),
        "defended": statistics.fmean(one["final_loss"] for one in arms),
        "plain_mean": statistics.fmean(one["final_loss"] for one in plain) if plain else None,
        "plain_seeds": len(plain),
        "above_honest_only": statistics.fmean(ratios),
        "plain_above_honest_only": statistics.fmean(_ratios(plain, honest)) if plain else None,
        "above_by_seed": ratios,
        "within_bar": statistics.fmean(ratios) <= BAR,
        "liars_quarantined": sum(s["standing"] == "quarantined" for s in bad),
        "honest_quarantined": sum(
            s["standing"] == "quarantined" and s["honest"]
            for one in arms
            for s in one["nodes"].values()
        ),
        "verdicts": _sum([one["verdicts"].get(n, {}) for one in arms for n in sorted(liars)]),
        "judged": _sum([s["judged"] for s in bad]),
    }
    if kind == SLOW_LORIS:
        row["transfers"] = [one["transfers"] for one in arms]
    return row


def _ratios(arms: Sequence[Arm], honest: Mapping[int, float]) -> list[float]:
    return [one["final_loss"] / honest[one["seed"]] - 1 for one in arms]


def _honest_nodes(found: Sequence[Arm]) -> dict[str, Any]:
    everybody = [
        s for one in found if one["defended"] for s in one["nodes"].values() if s["honest"]
    ]
    judged = sum(sum(s["judged"].values()) for s in everybody)
    aside = sum(s["judged"].get("set-aside", 0) for s in everybody)
    return {
        "nodes": len(everybody),
        "contributions": judged,
        "set_aside": aside,
        "quarantined": sum(s["standing"] == "quarantined" for s in everybody),
        "agreements": sorted(a for s in everybody for a in s["agreements"]),
        "false_quarantine_in_1000_rounds": false_quarantine(aside / max(judged, 1), 1000),
    }


def _sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, number in one.items():
            total[key] = total.get(key, 0) + number
    return total


def plot(data: Mapping[str, Any], path: Path) -> None:
    """How far the last loss is above that of honest nodes: with defences, and by the plain mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = data["attacks"]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.6))
    places = range(len(rows))
    above = [100 * row["above_honest_only"] for row in rows]
    plain = [100 * row["plain_above_honest_only"] for row in rows if row["plain_mean"] is not None]
    at = [place for place, row in zip(places, rows, strict=True) if row["plain_mean"] is not None]
    most = max(10.0, *above, *(p for p in plain if p < CUT_PERCENT)) * 1.15
    chance = 100 * data["chance"]
    least = min(-chance, *above, *plain) * 1.15 - 0.2
    axes.barh([p - 0.2 for p in places], above, 0.4, label="with defences")
    if at:
        axes.barh([p + 0.2 for p in at], plain, 0.4, label="plain mean", color="#c9735f")
    for place, value in zip(at, plain, strict=True):
        if value > most:
            axes.text(most * 0.99, place + 0.2, f"+{value:.0f} %", ha="right", va="center", size=8)
    for place, row in zip(places, rows, strict=True):
        seeds = [100 * one for one in row["above_by_seed"]]
        axes.plot(seeds, [place - 0.2] * len(seeds), "k.", ms=4)
    told = "honest runs differ so much"
    axes.axvspan(-chance, chance, color="black", alpha=0.08, lw=0, zorder=0, label=told)
    axes.axvline(0, color="black", lw=1)
    axes.axvline(100 * data["bar"], color="black", lw=1, ls=":", label="bar")
    axes.set_yticks(list(places), [r["attack"] for r in rows])
    axes.invert_yaxis()
    axes.set_xlim(least, most)
    axes.set_xlabel("held-out loss above that of honest nodes only, per cent (dots: seeds)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=4, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(data: Mapping[str, Any]) -> str:
    """The table of the attacks, as Markdown."""
    lines = [
        "| attack | honest only | with defences | above it | plain mean | liars quarantined |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["attacks"]:
        plain = row["plain_mean"]
        told = "—" if plain is None else f"{plain:.3f} ({row['plain_above_honest_only']:+.1%})"
        by_seed = ", ".join(f"{one:+.1%}" for one in row["above_by_seed"])
        mark = "" if row["seeds"] == 1 else f" ({by_seed})"
        mark += "" if row["within_bar"] else ", over the bar"
        lines.append(
            f"| {row['attack']} | {row['honest_only']:.3f} | {row['defended']:.3f} | "
            f"{row['above_honest_only']:+.1%}{mark} | {told} | "
            f"{row['liars_quarantined']} of {row['liars']} |"
        )
    honest = data["honest_nodes"]
    lines.append(
        f"\nHonest nodes: {honest['contributions']} contributions, {honest['set_aside']} set "
        f"aside; {honest['quarantined']} of {honest['nodes']} nodes quarantined. Honest runs of "
        f"one seed differ by ±{data['chance']:.1%}."
    )
    return "\n".join(lines)
