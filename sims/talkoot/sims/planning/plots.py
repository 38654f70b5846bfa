"""The pictures of a plan. Draws with matplotlib's Agg and figures of its own, without pyplot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from talkoot.sims.figures import bytes_text, clean, count_text
from talkoot.sims.panels import (
    Strip,
    colours,
    frame,
    heat,
    heat_height,
    legend,
    paint,
    strips_height,
    ticks,
    timeline,
)
from talkoot.sims.planning.result import PHASE_WORDS, PHASES, Bar, PlanResult, RoundRow
from talkoot.sims.report_plot import DARK, LIGHT, Palette

__all__ = ["DARK", "LIGHT", "PICTURES", "Draw", "colours", "draw", "frame", "legend"]
__all__ += ["sweep_picture", "ticks"]

Draw = Callable[[Any, Palette, Sequence[PlanResult]], None]


def draw(what: Draw, results: Sequence[PlanResult], palette: Palette, height: float = 3.6) -> bytes:
    """A picture as a PNG. Raises :class:`ConfigError` when matplotlib is not installed."""
    return paint(lambda figure, paper: what(figure, paper, results), palette, height)


def unit(results: Sequence[PlanResult]) -> tuple[float, str]:
    """Seconds in the unit of the time axis, and its name."""
    longest = max((row.published for one in results for row in one.rounds), default=0.0)
    return (86_400.0, "days") if longest > 2 * 86_400 else (3600.0, "hours")


def nothing(axes: Any) -> None:
    """What stands where there is nothing to draw."""
    axes.text(0.5, 0.5, "no round was published", transform=axes.transAxes, ha="center")
    axes.set_axis_off()


# The pictures ---------------------------------------------------------------------------


def tokens(figure: Any, palette: Palette, results: Sequence[PlanResult]) -> None:
    """Tokens against time, a line a seed."""
    axes = figure.add_subplot()
    size, name = unit(results)
    for one in results:
        times = [0.0, *(row.published / size for row in one.rounds)]
        done = np.cumsum([0, *(row.tokens for row in one.rounds)])
        axes.plot(times, done, color=colours(palette)[0], linewidth=2, drawstyle="steps-post")
    frame(axes, palette, name, "tokens")
    ticks(axes, count_text)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)


def utilization(figure: Any, palette: Palette, results: Sequence[PlanResult]) -> None:
    """Share of their time online that each class trains, over time."""
    one = results[0]
    if not one.rounds:
        return nothing(figure.add_subplot())
    size, name = unit(results)
    shown = _able(one)
    train = np.array([row.train_by_class for row in one.rounds])[:, shown]
    online = np.array([row.online_by_class for row in one.rounds])[:, shown]
    edges = np.array([0.0, *(row.published for row in one.rounds)])
    bins = np.linspace(0.0, edges[-1], min(len(edges), 121))
    values = np.stack([_rebin(edges, bins, train), _rebin(edges, bins, online)])
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(values[1] > 0, values[0] / values[1], np.nan)
    labels = [f"{one.classes[place].name} ({one.classes[place].nodes:,})" for place in shown]
    return heat(figure, palette, bins / size, shares.T, labels, name)


def _able(one: PlanResult) -> list[int]:
    """Classes that hold a replica."""
    return [place for place, row in enumerate(one.classes) if row.recipe is not None]


def _rebin(edges: Any, bins: Any, amounts: Any) -> Any:
    """Amounts of the intervals between ``edges`` spread evenly and summed between ``bins``."""
    total = np.concatenate([np.zeros((1, amounts.shape[1])), np.cumsum(amounts, axis=0)])
    at = np.stack([np.interp(bins, edges, total[:, k]) for k in range(amounts.shape[1])], 1)
    return np.diff(at, axis=0)


def a_round(figure: Any, palette: Palette, results: Sequence[PlanResult]) -> None:
    """One round of some nodes: fetching, training, encoding, pushing, waiting."""
    one = results[0]
    if not one.bars:
        return nothing(figure.add_subplot())
    row, bars = _middle(one)
    marks = [(row.closed - row.opened, "closed"), (row.published - row.opened, "published")]
    strips = [
        _strip(one, bar, row, first=place == 0 or bars[place - 1].kind != bar.kind)
        for place, bar in enumerate(bars)
    ]
    return timeline(figure, palette, strips, [(0.0, "opened"), *marks], f"round {row.round}")


def _middle(one: PlanResult) -> tuple[RoundRow, tuple[Bar, ...]]:
    """The round in the middle of those whose timelines were kept."""
    number, bars = one.bars[len(one.bars) // 2]
    return next(row for row in one.rounds if row.round == number), bars


def _strip(one: PlanResult, bar: Bar, row: RoundRow, *, first: bool) -> Strip:
    last = row.closed - row.opened
    parts = [(0.0, bar.leased, "wait")]
    begin = bar.leased
    for end, doing in (
        (bar.fetched, "fetch"),
        (bar.trained, "train"),
        (bar.encoded, "encode"),
        (bar.arrived, "push"),
    ):
        until = last if end is None else min(end, last)
        parts.append((begin, max(begin, until), doing))
        begin = max(begin, until)
    parts.append((begin, row.published - row.opened, "wait"))
    label = f"{one.classes[bar.kind].name}-{bar.node:05d}"
    note = "" if bar.committed else "too late"
    return Strip(label, tuple(parts), bar.committed, note=note, first=first)


def _heat_inches(one: PlanResult) -> float:
    return heat_height(len(_able(one)))


def _round_inches(one: PlanResult) -> float:
    return strips_height(len(_middle(one)[1]) if one.bars else 0)


def participation(figure: Any, palette: Palette, results: Sequence[PlanResult]) -> None:
    """Leases and contributions of each round."""
    one = results[0]
    axes = figure.add_subplot()
    if not one.rounds:
        return nothing(axes)
    size, name = unit(results)
    times = [row.published / size for row in one.rounds]
    shades = colours(palette)
    leases = [row.members for row in one.rounds]
    done = [row.contributions for row in one.rounds]
    axes.fill_between(times, leases, color=palette.grid, step="pre", label="leased")
    axes.plot(times, done, color=shades[0], drawstyle="steps-pre", label="contributed")
    frame(axes, palette, name, "nodes")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, times[-1])
    legend(axes, palette, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return None


def traffic(figure: Any, palette: Palette, results: Sequence[PlanResult]) -> None:
    """Bytes of each round."""
    one = results[0]
    axes = figure.add_subplot()
    if not one.rounds:
        return nothing(axes)
    size, name = unit(results)
    times = [row.published / size for row in one.rounds]
    shades = colours(palette)
    lines = (
        ("fetched by nodes", [row.bytes_down for row in one.rounds]),
        ("out of the coordinator", [row.egress for row in one.rounds]),
        ("pushed by nodes", [row.bytes_up for row in one.rounds]),
    )
    for place, (label, values) in enumerate(lines):
        style = ":" if place == 1 else "-"  # without mirrors it lies on the first
        shade = shades[(0, 1, 2)[place]]
        axes.plot(times, values, color=shade, ls=style, drawstyle="steps-pre", label=label)
    frame(axes, palette, name, "bytes a round")
    ticks(axes, bytes_text)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, times[-1])
    legend(axes, palette, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return None


def sweep_picture(labels: Sequence[str], points: Sequence[Sequence[PlanResult]]) -> Draw:
    """Where the time goes, a bar for each combination of values."""

    def bars(figure: Any, palette: Palette, _results: Sequence[PlanResult]) -> None:
        axes = figure.add_subplot()
        shades = dict(zip(PHASES, (*colours(palette), palette.faint), strict=True))
        begins = np.zeros(len(points))
        for phase in PHASES:
            parts = np.array(
                [np.mean([one.phases[phase] for one in results]) for results in points]
            )
            axes.barh(
                range(len(points)),
                parts,
                left=begins,
                height=0.7,
                color=shades[phase],
                label=PHASE_WORDS[phase],
            )
            begins += parts
        for place, results in enumerate(points):
            paces = [pace for one in results if (pace := one.figures["tokens_per_day"])]
            words = count_text(float(np.mean(paces))) if paces else "no round"
            axes.text(1.01, place, words, va="center", color=palette.ink)
        axes.set_yticks(range(len(labels)))
        axes.set_yticklabels([clean(label, cap=100) for label in labels])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        frame(axes, palette, "")
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)

    return bars


def _inches(height: float) -> Callable[[PlanResult], float]:
    return lambda _one: height


PICTURES: Final[tuple[tuple[str, str, str, Draw, Callable[[PlanResult], float]], ...]] = (
    ("tokens", "Tokens against time", "A step is a published round.", tokens, _inches(3.2)),
    (
        "utilization",
        "Who trains, when",
        "Share of a class's time online that goes into training that counted, round by round; in "
        "brackets its nodes. A gap is when nobody was there.",
        utilization,
        _heat_inches,
    ),
    (
        "timeline",
        "A round, node by node",
        "The round in the middle of the plan: of each class the fastest node, the slowest and some "
        "between them.",
        a_round,
        _round_inches,
    ),
    (
        "participation",
        "Who takes part",
        "Leases given out, and contributions.",
        participation,
        _inches(3.0),
    ),
    ("bytes", "What moves", "By round.", traffic, _inches(3.0)),
)
"""(file, heading, sentence, how to draw it, inches)."""
