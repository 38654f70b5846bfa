"""A plan on a terminal of 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from talkoot.sims.figures import bytes_text, count_text, many, seconds_text, sparkline
from talkoot.sims.planning.result import PHASE_WORDS, PHASES, PlanResult

if TYPE_CHECKING:
    from talkoot.sims.planning.sweep import Point

BAR = 24


def share(value: float | None) -> str:
    """``0.5134`` as ``51.3 %``."""
    return "–" if value is None else f"{100 * value:.1f} %"


def money(value: float | None, currency: str) -> str:
    """With as many digits as matter."""
    return (
        "–"
        if value is None
        else f"{value:,.0f} {currency}"
        if value >= 100
        else (f"{value:.2f} {currency}")
    )


def middle(results: Sequence[PlanResult], name: str) -> float | None:
    """Mean of a figure over the seeds."""
    values = [found for one in results if (found := one.figures[name]) is not None]
    return statistics.fmean(values) if values else None


def spread(results: Sequence[PlanResult], name: str) -> float | None:
    """Half of the range of a figure over the seeds; None for a single one."""
    values = [found for one in results if (found := one.figures[name]) is not None]
    return (max(values) - min(values)) / 2 if len(values) > 1 else None


def headline(results: Sequence[PlanResult]) -> list[tuple[str, str]]:
    """(what, how much) of the figures that matter first."""
    scenario = results[0].scenario

    def figure(name: str) -> float | None:
        return middle(results, name)

    rounds, days = figure("rounds") or 0, figure("virtual_days") or 0.0
    length = f"{days:.3g} days" if days >= 2 else seconds_text(86_400 * days)
    lines = [
        ("tokens a day", count_text(figure("tokens_per_day"))),
        ("utilization", share(figure("utilization"))),
        (
            "rounds",
            f"{rounds:.0f} in {length}, {seconds_text(figure('round_seconds'))} each",
        ),
        (
            "nodes that fit",
            f"{figure('nodes_that_fit') or 0:.0f} of {figure('nodes') or 0:.0f}, "
            f"{figure('contributions_per_round') or 0:.0f} contribute to a round",
        ),
        (
            "coordinator",
            f"{bytes_text(1e9 * (figure('coordinator_egress_gb_per_day') or 0.0))} out and "
            f"{bytes_text(1e9 * (figure('coordinator_ingress_gb_per_day') or 0.0))} in a day",
        ),
        (
            "energy, cost",
            f"{figure('kwh') or 0.0:,.0f} kWh, {money(figure('cost'), scenario.currency)}",
        ),
    ]
    if scenario.target_tokens is not None:
        needed = figure("days_to_target")
        text = "never" if needed is None else f"{needed:,.1f} days"
        lines.append((f"{count_text(scenario.target_tokens)} tokens", text))
    noise = spread(results, "tokens_per_day")
    if noise is not None:
        lines[0] = (lines[0][0], f"{lines[0][1]} ± {count_text(noise)} over {len(results)} seeds")
    return lines


def print_plan(results: Sequence[PlanResult], console: Any) -> None:
    """One scenario, over its seeds."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    first = results[0]
    console.print(Text(first.scenario.name, "bold"))
    console.print(Text(first.scenario.sentence, "dim"))
    console.print()
    for what, how in headline(results):
        console.print(Text.assemble((f"  {what:15}", "dim"), how), highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  class")
    table.add_column("nodes", justify="right")
    table.add_column("recipe")
    for head in ("tokens/s", "trains", "tokens"):
        table.add_column(head, justify="right")
    for row in first.classes:
        table.add_row(
            f"  {row.name}",
            f"{row.nodes:,}",
            row.recipe or Text("does not fit", "red"),
            count_text(row.tokens_per_second) if row.recipe else "–",
            share(row.utilization),
            count_text(row.tokens),
        )
    console.print()
    console.print(table)
    console.print()
    console.print("  where the nodes' time online goes", style="dim")
    for phase in PHASES:
        part = first.phases[phase]
        bar = "█" * round(BAR * part)
        console.print(
            Text.assemble(f"  {100 * part:5.1f} %  ", (f"{bar:{BAR}} ", "blue"), PHASE_WORDS[phase])
        )
    trend = [row.tokens for row in first.rounds]
    if len(trend) > 1:
        console.print(Text.assemble(("  tokens a round ", "dim"), sparkline(trend, 56)))
    console.print()
    refused = [f"{row.name}: {row.why}" for row in first.classes if row.recipe is None]
    told = [Text(first.bottleneck), *(Text(one, "dim") for one in (*first.notes, *refused))]
    for sentence in told:  # as they are: [downlink] is no markup
        console.print(Padding(sentence, (0, 0, 0, 2)))


def print_sweep(points: Sequence[Point], console: Any) -> None:
    """A table with a row for each combination of values."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for key in points[0].values:
        table.add_column(key.split(".")[-1], overflow="fold")
    single = len(points[0].values) == 1  # there is room for a bar
    for head in ("tokens/day", *([""] * single), "trains", "round", "out/day", "waits", "closing"):
        table.add_column(head, justify="left" if not head else "right", no_wrap=True)
    paces = [middle(point.results, "tokens_per_day") or 0.0 for point in points]
    best = max(paces) or 1.0
    for point, pace in zip(points, paces, strict=True):
        phases = point.results[0].phases
        egress = middle(point.results, "coordinator_egress_gb_per_day")
        table.add_row(
            *(str(value) for value in point.values.values()),
            count_text(pace),
            *(["█" * round(8 * pace / best)] * single),
            share(middle(point.results, "utilization")),
            seconds_text(middle(point.results, "round_seconds")),
            bytes_text(None if egress is None else 1e9 * egress),
            share(phases["others"]),
            share(phases["closing"]),
        )
    console.print(f"{many(len(points), 'plan')} of {points[0].scenario.name}", highlight=False)
    console.print()
    console.print(table)
