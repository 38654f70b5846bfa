"""The pictures of a run: what was learnt, who trained when, a round's nodes, what the liars did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from talkoot.sims.figures import clean, seconds_text
from talkoot.sims.panels import (
    Paint,
    colours,
    frame,
    heat,
    heat_height,
    legend,
    strips_height,
    timeline,
    unit_of,
)
from talkoot.sims.report_plot import Palette
from talkoot.sims.virtual.scenes import (
    LIED,
    liars_shares,
    shares_by_class,
    shut_out,
    strips,
    typical,
)

HONEST: Final = "accepted"
LIARS: Final = "accepted of liars"
NOT: Final = "not accepted"


@dataclass(frozen=True)
class Picture:
    """One, and the words around it."""

    name: str
    """Of its file."""
    title: str
    words: str
    paint: Paint
    inches: float


def pictures(
    data: Mapping[str, Any],
    parts: Sequence[Mapping[str, int]],
    leases: Sequence[Mapping[str, Any]],
    present: Sequence[Mapping[str, Any]],
) -> list[Picture]:
    """Those that this run has something to say in; the first says what was learnt."""
    found = [_learnt(data, parts)]
    if data["rounds"]:
        found.append(_who_trains(data, leases, present))
        found += _a_round(data, leases, present)
    if any(node["attack"] for node in data["nodes"]):
        found.append(_lies(data, leases))
    return found


# What was learnt ----------------------------------------------------------------------------------


def _learnt(data: Mapping[str, Any], parts: Sequence[Mapping[str, int]]) -> Picture:
    """Held-out loss above, in three measures; participation below."""

    def paint(figure: Any, palette: Palette) -> None:
        figure.set_layout_engine("none")
        _losses(figure, data, parts, palette)
        _bars(figure, data, parts, palette)
        name = clean(data["scenario"]["name"], cap=60)
        figure.text(0.075, 0.955, f"Simulation {name}", fontsize=14, fontweight="bold")

    words = "Held-out loss against tokens, time and bytes; leases by round."
    return Picture("report", "", words, paint, 7.2)


def _losses(
    figure: Any, data: Mapping[str, Any], parts: Sequence[Mapping[str, int]], palette: Palette
) -> None:
    rounds = data["rounds"]
    moved, total = [], 0
    for part in parts:
        total += part["bytes"]
        moved.append(total / 1e6)
    measures = (
        ("tokens (millions)", [row["tokens_so_far"] / 1e6 for row in rounds]),
        ("virtual hours", [row["published"] / 3600 for row in rounds]),
        ("bytes moved (MB)", moved),
    )
    first = data.get("first_loss")
    for column, (label, places) in enumerate(measures):
        axes = figure.add_axes((0.075 + 0.31 * column, 0.52, 0.275, 0.38), facecolor=palette.paper)
        shown = [(x, row) for x, row in zip(places, rounds, strict=True)]
        training = [(x, row["loss"]) for x, row in shown]
        heldout = [(x, row["heldout"]) for x, row in shown if row["heldout"] is not None]
        if first is not None:
            heldout.insert(0, (0.0, first))
        axes.plot(*_columns(training), color=palette.training, linewidth=1.2, label="training")
        axes.plot(*_columns(heldout), color=palette.heldout, linewidth=1.8, label="held-out")
        if column == 0:
            axes.legend(frameon=False, labelcolor=palette.ink)
        frame(axes, palette, label, "" if column else "loss (nats per token)")


def _bars(
    figure: Any, data: Mapping[str, Any], parts: Sequence[Mapping[str, int]], palette: Palette
) -> None:
    axes = figure.add_axes((0.075, 0.09, 0.895, 0.31), facecolor=palette.paper)
    numbers = [row["round"] for row in data["rounds"]]
    floor = [0] * len(numbers)
    colours = {HONEST: palette.training, LIARS: palette.kill, NOT: palette.grid}
    for kind, colour in colours.items():
        heights = [part[kind] for part in parts]
        if any(heights):
            axes.bar(numbers, heights, 0.85, bottom=floor, color=colour, label=kind)
        floor = [low + high for low, high in zip(floor, heights, strict=True)]
    if numbers:
        axes.legend(frameon=False, labelcolor=palette.ink, loc="upper right", ncols=3)
    axes.set_ylim(0, max([*floor, 1]) * 1.2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    frame(axes, palette, "round", "leases")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# Who trains, when ---------------------------------------------------------------------------------


def _who_trains(
    data: Mapping[str, Any],
    leases: Sequence[Mapping[str, Any]],
    present: Sequence[Mapping[str, Any]],
) -> Picture:
    here = [node for node in data["nodes"] if node["status"] != "refused"]
    classes = list(dict.fromkeys(node["population"] for node in here))
    end = data["rounds"][-1]["published"]
    size, when = unit_of(end)
    bins, shares = shares_by_class(classes, leases, present, end)
    labels = []
    for name in classes:
        mine = [node for node in here if node["population"] == name]
        online = sum(node["online_seconds"] for node in mine)
        share = sum(node["train_seconds"] for node in mine) / online if online else 0.0
        labels.append(f"{clean(name, cap=22)} ({len(mine):,}), {share:.0%}")

    def paint(figure: Any, palette: Palette) -> None:
        heat(figure, palette, bins / size, shares, labels, when)

    return Picture(
        "utilization",
        "Who trains, when",
        "Share of a class's time online that goes into training that counted, moment by moment; in "
        "brackets its nodes, behind them the share over the whole run. A gap is when nobody was "
        "there.",
        paint,
        heat_height(len(classes)),
    )


# A round, node by node ----------------------------------------------------------------------------


def _a_round(
    data: Mapping[str, Any],
    leases: Sequence[Mapping[str, Any]],
    present: Sequence[Mapping[str, Any]],
) -> list[Picture]:
    row = typical(data["rounds"])
    if row is None:
        return []
    shown = strips(row, leases, present)
    if not shown:
        return []
    marks = [
        (0.0, "opened"),
        (row["closed"] - row["opened"], "closed"),
        (row["published"] - row["opened"], "published"),
    ]

    def paint(figure: Any, palette: Palette) -> None:
        timeline(figure, palette, shown, marks, f"round {row['round']}")

    took = seconds_text(row["published"] - row["opened"])
    some = len({lease["node"] for lease in leases if lease["round"] == row["round"]})
    which = f"{len(shown)} of its {some} nodes" if len(shown) < some else "all its nodes"
    return [
        Picture(
            "timeline",
            "A round, node by node",
            f"Round {row['round']}, with {took} neither a short nor a long one: {which}, by class "
            "from the fastest to the slowest. Names in red are liars'.",
            paint,
            strips_height(len(shown)),
        )
    ]


# Liars --------------------------------------------------------------------------------------------

LIED_WORDS: Final = {
    "leased": "given to liars",
    "accepted": "accepted of them",
    "counted": "their weight in the sum",
}


def _lies(data: Mapping[str, Any], leases: Sequence[Mapping[str, Any]]) -> Picture:
    rounds = data["rounds"]
    shares = liars_shares(rounds, leases)
    out = {liars: shut_out(rounds, data["nodes"], liars=liars) for liars in (True, False)}
    liars = sum(bool(node["attack"]) for node in data["nodes"])
    numbers = [row["round"] for row in rounds]

    def paint(figure: Any, palette: Palette) -> None:
        left, right = figure.subplots(1, 2)
        shades = colours(palette)
        for key, shade, style in zip(
            LIED, (palette.faint, shades[1], palette.kill), ((0, (2, 2)), "-", "-"), strict=True
        ):
            left.plot(
                numbers,
                [100 * share for share in shares[key]],
                color=shade,
                linestyle=style,
                marker="o",
                markersize=3,
                linewidth=1.8,
                label=LIED_WORDS[key],
            )
        frame(left, palette, "round", "% of a round's tokens")
        left.set_ylim(0, max(5.0, *(120 * share for key in LIED for share in shares[key])))
        right.axhline(liars, color=palette.faint, linestyle=(0, (2, 2)), label="liars")
        lines = ((True, palette.kill, "liars shut out"), (False, shades[0], "honest shut out"))
        for who, shade, label in lines:
            right.step(numbers, out[who], where="mid", color=shade, linewidth=1.8, label=label)
        frame(right, palette, "round", "nodes")
        right.set_ylim(0, max(liars, *out[False], 1) * 1.15)
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
            legend(axes, palette, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return Picture(
        "liars",
        "What the liars did",
        "Left: of each round's tokens those that liars were given and those that were accepted of "
        "them; weight in the sum is tokens times what the coordinator believed. Right: who is "
        "quarantined when a round is published.",
        paint,
        3.3,
    )
