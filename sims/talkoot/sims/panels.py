"""What the pictures of plans and runs share: paper, axes, the heat map and a round's timeline.

Draws with matplotlib's Agg and figures of its own, without pyplot. Nothing here knows where its
numbers come from.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from talkoot.protocol.errors import ConfigError
from talkoot.sims.figures import clean
from talkoot.sims.report_plot import LIGHT, Palette

WIDTH: Final = 9.6  # inches
DPI: Final = 130
SERIES: Final = ("#2563c9", "#c2620a", "#14733b", "#8b3fc4", "#b3261e", "#0e7490", "#927107")
SERIES_DARK: Final = ("#79adff", "#f5a352", "#5fd08e", "#c79bf2", "#ff8a80", "#5ecbe0", "#e0c04f")
RAMP: Final = ("#e6e9ef", "#6f9fe6", "#123a86")
RAMP_DARK: Final = ("#2b3340", "#4178c9", "#d6e6ff")
"""Of shares: none, half, all."""
Paint = Callable[[Any, Palette], None]
"""Draws on a figure of matplotlib's."""
F64 = npt.NDArray[np.float64]


def colours(palette: Palette) -> tuple[str, ...]:
    """Of series, apart for the colour-blind, on this paper."""
    return SERIES if palette is LIGHT else SERIES_DARK


def paint(what: Paint, palette: Palette, height: float = 3.6) -> bytes:
    """A picture of ``height`` inches as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError(
            "The report's pictures need matplotlib: install it with "
            "`pip install 'talkoot[sims]'` and run the same command again.",
            code="missing-extra",
        ) from err
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": palette.ink,
        "text.parse_math": False,
        "axes.labelcolor": palette.faint,
        "hatch.linewidth": 0.6,
    }
    with rc_context(style):
        figure = Figure(
            figsize=(WIDTH, height), dpi=DPI, facecolor=palette.paper, layout="constrained"
        )
        FigureCanvasAgg(figure)
        what(figure, palette)
        png = io.BytesIO()
        figure.savefig(png, format="png", facecolor=palette.paper, metadata={"Software": None})
    return png.getvalue()


def frame(axes: Any, palette: Palette, x: str = "days", y: str = "") -> None:
    """Axes, grid and labels as all our pictures have them."""
    axes.set_facecolor(palette.paper)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(colors=palette.faint, length=0, pad=5)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)


def ticks(axes: Any, words: Callable[[float], str], axis: str = "y") -> None:
    """Numbers of an axis as people read them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    chosen = axes.yaxis if axis == "y" else axes.xaxis
    chosen.set_major_locator(MaxNLocator(5))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def legend(axes: Any, palette: Palette, **where: Any) -> None:
    """A legend without a box."""
    axes.legend(
        frameon=True, framealpha=0.9, facecolor=palette.paper, edgecolor="none", fontsize=9, **where
    )


def unit_of(seconds: float) -> tuple[float, str]:
    """The unit in which a time axis of so many seconds is read: its seconds and its name."""
    if seconds > 2 * 86_400:
        return 86_400.0, "days"
    if seconds > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds > 180 else (1.0, "seconds")


# Who trains, when ---------------------------------------------------------------------------------


def heat_height(rows: int) -> float:
    """Inches of a heat map of so many rows."""
    return 1.3 + 0.42 * min(max(rows, 1), 24)


def heat(
    figure: Any, palette: Palette, bins: F64, shares: F64, labels: Sequence[str], when: str
) -> None:
    """Shares from 0 to 1 by row and time; NaN, where nobody was there, stays paper.

    Args:
        figure: to draw on.
        palette: of the paper.
        bins: (k + 1,) edges, in the unit ``when``.
        shares: (rows, k).
        labels: one a row.
        when: name of the time axis.
    """
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.add_subplot()
    rows = len(labels)
    mesh = axes.pcolormesh(
        bins,
        np.arange(rows + 1),
        np.clip(shares, 0, 1),
        cmap=LinearSegmentedColormap.from_list("share", RAMP if palette is LIGHT else RAMP_DARK),
        vmin=0,
        vmax=1,
    )
    for line in range(1, rows):
        axes.axhline(line, color=palette.paper, linewidth=2)
    axes.set_yticks(np.arange(rows) + 0.5)
    axes.set_yticklabels([clean(label, cap=34) for label in labels])
    axes.invert_yaxis()
    frame(axes, palette, when)
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=14, ticks=(0, 0.25, 0.5, 0.75, 1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=palette.faint, length=0)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


# A round, node by node ----------------------------------------------------------------------------

MOST_STRIPS: Final = 24
"""Nodes in a timeline, unless there are so many classes that three of each are more."""
FEWEST_OF_A_CLASS: Final = 3
"""The slowest, the one in the middle and the fastest."""
DOING: Final = {
    "fetch": "download and apply",
    "train": "train",
    "encode": "encode",
    "push": "upload",
    "wait": "wait",
    "away": "away",
}
"""What a node may be at, in words."""


AWAY_HATCH: Final = "////"


@dataclass(frozen=True)
class Strip:
    """One node's round. Times are seconds since it opened."""

    label: str
    parts: tuple[tuple[float, float, str], ...]
    """(begin, end, one of ``DOING``), one after the other."""
    counted: bool = True
    """Whether what it made was accepted."""
    lies: bool = False
    note: str = ""
    """What became of it, if it was not accepted."""
    first: bool = False
    """Of its class."""


def some_of(order: Sequence[int], groups: int) -> list[int]:
    """Of one class's nodes, fastest first, those that a timeline of ``groups`` classes shows.

    The fastest, the slowest and evenly spaced ones between them.
    """
    most = min(len(order), max(FEWEST_OF_A_CLASS, MOST_STRIPS // max(groups, 1)))
    if most <= 1:
        return list(order[:most])
    return [order[round(place)] for place in np.linspace(0, len(order) - 1, most).tolist()]


def strips_height(count: int) -> float:
    """Inches of a timeline of so many nodes."""
    return 1.5 + 0.21 * max(count, 3)


def timeline(
    figure: Any,
    palette: Palette,
    strips: Sequence[Strip],
    marks: Sequence[tuple[float, str]],
    what: str,
) -> None:
    """A round's Gantt: a bar a node, and lines where something happened to all.

    Args:
        figure: to draw on.
        palette: of the paper.
        strips: from above to below.
        marks: (seconds since the round opened, what happened); the last is the end.
        what: which round it is, for the axis.
    """
    axes = figure.add_subplot()
    end = marks[-1][0]
    size, name = unit_of(end)
    shades = _shades(palette)
    places, place = [], 0.0
    for number, strip in enumerate(strips):
        place += 1.45 if strip.first and number else 1.0
        places.append(place)
        for begin, until, doing in strip.parts:
            _bar(axes, palette, place, (begin / size, min(until, end) / size), doing, strip)
        if strip.note:
            busy = [until for _, until, doing in strip.parts if doing not in ("wait", "away")]
            last = max(busy, default=0.0)
            axes.annotate(
                strip.note,
                (min(last, end) / size, place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=palette.kill,
            )
    for moment, _ in marks:
        axes.axvline(moment / size, color=palette.ink, linewidth=0.9, linestyle=(0, (4, 3)))
    _name_marks(axes, palette, [(moment / size, words) for moment, words in marks], end / size)
    axes.set_yticks(places)
    axes.set_yticklabels([clean(strip.label, cap=34) for strip in strips], fontsize=8)
    for tick, strip in zip(axes.get_yticklabels(), strips, strict=True):
        if strip.lies:
            tick.set_color(palette.kill)
    axes.set_ylim(place + 0.6, 0.4)
    axes.set_xlim(0, 1.004 * end / size)  # the last line is seen whole
    frame(axes, palette, f"{name} of {what}")
    for tick, strip in zip(axes.get_yticklabels(), strips, strict=True):
        tick.set_color(palette.kill if strip.lies else palette.faint)
    axes.grid(visible=False)
    _strip_legend(figure, palette, shades, strips)


def _shades(palette: Palette) -> dict[str, str]:
    shades = colours(palette)
    picked = {"fetch": shades[1], "train": shades[0], "encode": shades[6], "push": shades[3]}
    return {**picked, "wait": palette.grid, "away": palette.paper}


def _bar(
    axes: Any, palette: Palette, place: float, span: tuple[float, float], doing: str, strip: Strip
) -> None:
    begin, end = span
    if end <= begin:
        return
    pale = not strip.counted and doing not in ("wait", "away")
    axes.barh(
        place,
        end - begin,
        left=begin,
        height=0.74,
        facecolor=_shades(palette)[doing],
        alpha=0.4 if pale else 1.0,
        linewidth=0,
        hatch=AWAY_HATCH if doing == "away" else None,
        edgecolor=palette.grid,
    )


def _name_marks(
    axes: Any, palette: Palette, marks: Sequence[tuple[float, str]], width: float
) -> None:
    """Words above the lines; lines that are close to each other share theirs."""
    named: list[tuple[float, str]] = []
    for moment, words in marks:
        if named and moment - named[-1][0] < 0.09 * width:
            named[-1] = (moment, f"{named[-1][1]}, {words}")
        else:
            named.append((moment, words))
    for moment, words in named:
        side = "left" if moment < 0.05 * width else "right" if moment > 0.9 * width else "center"
        axes.text(
            moment,
            1.01,
            words,
            transform=axes.get_xaxis_transform(),
            ha=side,
            va="bottom",
            fontsize=8,
            color=palette.faint,
        )


def _strip_legend(
    figure: Any, palette: Palette, shades: dict[str, str], strips: Sequence[Strip]
) -> None:
    from matplotlib.patches import Patch

    seen = {doing for strip in strips for begin, end, doing in strip.parts if end > begin}
    handles = [
        Patch(
            facecolor=shades[doing],
            label=words,
            hatch=AWAY_HATCH if doing == "away" else None,
            edgecolor=palette.grid if doing == "away" else shades[doing],
        )
        for doing, words in DOING.items()
        if doing in seen
    ]
    if not all(strip.counted for strip in strips):
        handles.append(Patch(color=shades["train"], alpha=0.4, label="not accepted"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8.5
    )
