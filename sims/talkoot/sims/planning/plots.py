"""The pictures of a plan. Draws with matplotlib's Agg and figures of its own, without pyplot."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from talkoot.protocol.errors import ConfigError
from talkoot.sims.figures import bytes_text, clean, count_text
from talkoot.sims.planning.result import PHASE_WORDS, PHASES, PlanResult
from talkoot.sims.report_plot import DARK, LIGHT, Palette

__all__ = ["DARK", "LIGHT", "PICTURES", "Draw", "draw", "sweep_picture"]

WIDTH: Final = 9.6  # inches
DPI: Final = 130
SERIES: Final = ("#2563c9", "#c2620a", "#14733b", "#8b3fc4", "#b3261e", "#0e7490", "#927107")
SERIES_DARK: Final = ("#79adff", "#f5a352", "#5fd08e", "#c79bf2", "#ff8a80", "#5ecbe0", "#e0c04f")
Draw = Callable[[Any, Palette, Sequence[PlanResult]], None]


def colours(palette: Palette) -> tuple[str, ...]:
    """Of series, apart for the colour-blind, on this paper."""
    return SERIES if palette is LIGHT else SERIES_DARK


def draw(what: Draw, results: Sequence[PlanResult], palette: Palette, height: float = 3.6) -> bytes:
    """A picture as a PNG. Raises :class:`ConfigError` when matplotlib is not installed."""
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
    }
    with rc_context(style):
        figure = Figure(
            figsize=(WIDTH, height), dpi=DPI, facecolor=palette.paper, layout="constrained"
        )
        FigureCanvasAgg(figure)
        what(figure, palette, results)
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
    from matplotlib.colors import LinearSegmentedColormap

    one = results[0]
    axes = figure.add_subplot()
    if not one.rounds:
        return nothing(axes)
    size, name = unit(results)
    shown = [place for place, row in enumerate(one.classes) if row.recipe is not None]
    train = np.array([row.train_by_class for row in one.rounds])[:, shown]
    online = np.array([row.online_by_class for row in one.rounds])[:, shown]
    edges = np.array([0.0, *(row.published for row in one.rounds)])
    bins = np.linspace(0.0, edges[-1], min(len(edges), 121))
    values = np.stack([_rebin(edges, bins, train), _rebin(edges, bins, online)])
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(values[1] > 0, values[0] / values[1], np.nan)
    ramp = (palette.grid, colours(palette)[0])
    mesh = axes.pcolormesh(
        bins / size,
        np.arange(len(shown) + 1),
        np.clip(shares.T, 0, 1),
        cmap=LinearSegmentedColormap.from_list("share", ramp),
        vmin=0,
        vmax=1,
    )
    axes.set_yticks(np.arange(len(shown)) + 0.5)
    axes.set_yticklabels([clean(one.classes[place].name, cap=20) for place in shown])
    axes.invert_yaxis()
    frame(axes, palette, name)
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=palette.faint, length=0)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return None


def _rebin(edges: Any, bins: Any, amounts: Any) -> Any:
    """Amounts of the intervals between ``edges`` spread evenly and summed between ``bins``."""
    total = np.concatenate([np.zeros((1, amounts.shape[1])), np.cumsum(amounts, axis=0)])
    at = np.stack([np.interp(bins, edges, total[:, k]) for k in range(amounts.shape[1])], 1)
    return np.diff(at, axis=0)


def timeline(figure: Any, palette: Palette, results: Sequence[PlanResult]) -> None:
    """One round of some nodes: fetching, training, pushing, waiting."""
    one = results[0]
    axes = figure.add_subplot()
    if not one.bars:
        return nothing(axes)
    number, bars = one.bars[len(one.bars) // 2]
    row = next(row for row in one.rounds if row.round == number)
    last = row.closed - row.opened
    shades = colours(palette)
    parts = (("fetch", shades[1]), ("train", shades[0]), ("encode and push", shades[3]))
    for place, bar in enumerate(bars):
        begin = 0.0
        for end, (_, shade) in zip((bar.fetched, bar.trained, bar.arrived), parts, strict=True):
            until = last if end is None else min(end, last)
            axes.barh(
                place,
                max(0.0, until - begin) / 60,
                left=begin / 60,
                height=0.72,
                color=shade,
                alpha=1.0 if bar.committed else 0.35,
            )
            begin = max(begin, until)
        axes.barh(place, (last - begin) / 60, left=begin / 60, height=0.72, color=palette.grid)
    names = [one.classes[bar.kind].name for bar in bars]
    firsts = [place for place, name in enumerate(names) if name not in names[:place]]
    axes.set_yticks(firsts)
    axes.set_yticklabels([clean(names[place], cap=20) for place in firsts])
    axes.invert_yaxis()
    axes.set_xlim(0, last / 60)
    frame(axes, palette, f"minutes of round {number}")
    axes.grid(visible=False)
    from matplotlib.patches import Patch

    handles = [Patch(color=shade, label=label) for label, shade in parts]
    handles.append(Patch(color=palette.grid, label="wait for the others"))
    handles.append(Patch(color=shades[0], alpha=0.35, label="came too late"))
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    return None


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

    def paint(figure: Any, palette: Palette, _results: Sequence[PlanResult]) -> None:
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

    return paint


PICTURES: Final[tuple[tuple[str, str, str, Draw, float], ...]] = (
    ("tokens", "Tokens against time", "A step is a published round.", tokens, 3.2),
    (
        "utilization",
        "Who trains, when",
        "Share of a class's time online that goes into training that counted.",
        utilization,
        3.2,
    ),
    (
        "timeline",
        "A round, node by node",
        "Some nodes of each class, in the round in the middle of the plan.",
        timeline,
        4.6,
    ),
    ("participation", "Who takes part", "Leases given out, and contributions.", participation, 3.0),
    ("bytes", "What moves", "By round.", traffic, 3.0),
)
"""(file, heading, sentence, how to draw it, inches)."""
