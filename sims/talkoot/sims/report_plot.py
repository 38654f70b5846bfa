"""The report's figure: loss over tokens, what was killed and when. Draws with matplotlib's Agg.

Uses figures of its own instead of ``pyplot``: no global state, no window, safe in any thread.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from talkoot.protocol.errors import ConfigError
from talkoot.sims.figures import clean, count_text, many, seconds_text
from talkoot.sims.report_data import Kill, ReportData, RoundRow

WIDTH, HEIGHT, DPI = 9.6, 5.4, 150  # inches, inches, dots per inch
LANE = 0.062  # height of a row of labels above the axes, as a share of the axes' height
MAX_LABEL_CHARS = 48


@dataclass(frozen=True)
class Palette:
    """Colours that stay apart for the colour-blind, on paper or on a dark page."""

    paper: str
    ink: str
    faint: str
    grid: str
    training: str
    heldout: str
    kill: str


LIGHT = Palette("#ffffff", "#1c2330", "#667085", "#e6e9ef", "#2563c9", "#c2620a", "#b3261e")
DARK = Palette("#151a22", "#e6e9ef", "#98a2b3", "#2b3340", "#79adff", "#f5a352", "#ff8a80")


def tokens_at(history: Sequence[RoundRow], seconds: float) -> float:
    """How many tokens the network had done ``seconds`` after its first round opened.

    Linear inside a round; rounds are taken to follow each other without a pause.
    """
    done = 0.0
    seconds = max(0.0, seconds)
    for row in history:
        length = row.seconds or 0.0
        if seconds < length:
            return done + row.tokens * (seconds / length)
        seconds -= length
        done += row.tokens
    return done


def kill_label(kill: Kill) -> str:
    """What stands above a kill's line."""
    what = clean(kill.what, cap=MAX_LABEL_CHARS)
    if kill.recovery_seconds is None:
        return f"{what}: not back"
    return f"{what}: back in {seconds_text(kill.recovery_seconds)}"


def draw_loss(data: ReportData, palette: Palette = LIGHT) -> bytes:
    """Draw the figure and answer it as a PNG.

    A round's training loss is a mean, so it stands at the middle of the round's tokens. Raises
    :class:`ConfigError` when matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError(
            "The report's figure needs matplotlib: install it with "
            "`pip install 'talkoot[report]'` and run the same command again.",
            code="missing-extra",
        ) from err
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": palette.ink,
        "text.parse_math": False,  # a name with dollar signs is a name
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=palette.paper)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.075, 0.115, 0.895, 0.70), facecolor=palette.paper)
        _frame(axes, data, palette)
        _curves(axes, data, palette)
        lanes = _kills(axes, canvas.get_renderer(), data, palette)
        # The labels get the room that they need; the title stands above them.
        top = 0.895 - LANE * 0.72 * lanes
        axes.set_position((0.075, 0.115, 0.895, top - 0.115))
        figure.text(
            0.075, 0.94, f"Loss of {clean(data.model, cap=40)}", fontsize=14, fontweight="bold"
        )
        figure.text(
            0.97,
            0.94,
            f"{many(data.nodes, 'node')} · {many(data.rounds, 'round')} · "
            f"{count_text(data.parameters)} parameters",
            color=palette.faint,
            ha="right",
        )
        png = io.BytesIO()
        figure.savefig(png, format="png", facecolor=palette.paper, metadata={"Software": None})
    return png.getvalue()


def _frame(axes: Any, data: ReportData, palette: Palette) -> None:
    """Axes, grid and labels."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, max(1, data.tokens) * 1.06)  # room for the last point's label
    axes.set_xlabel("tokens trained on", color=palette.faint)
    axes.set_ylabel("loss (nats per token)", color=palette.faint)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.tick_params(colors=palette.faint, length=0, pad=6)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)


def _tick(tokens: float) -> str:
    """A round number of tokens, without the decimals that say nothing: ``1.5 M``."""
    number, _, unit = count_text(tokens).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


def _curves(axes: Any, data: ReportData, palette: Palette) -> None:
    """The training loss of each round; the held-out loss before the first and after the last."""
    ends = list(accumulate(row.tokens for row in data.history))
    points = [
        (end - row.tokens / 2, row.loss)
        for end, row in zip(ends, data.history, strict=True)
        if row.loss is not None and math.isfinite(row.loss)
    ]
    if points:
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=palette.training,
            linewidth=2.2,
            marker="o",
            markersize=5 if len(points) <= 60 else 0,
            markeredgecolor=palette.paper,
            markeredgewidth=1,
            label="training, mean of a round",
            zorder=3,
        )
    heldout = [
        (x, y)
        for x, y in ((0, data.heldout_loss_before), (data.tokens, data.heldout_loss_after))
        if math.isfinite(y)
    ]
    if heldout:
        axes.plot(
            [x for x, _ in heldout],
            [y for _, y in heldout],
            color=palette.heldout,
            linestyle="none",  # nothing was measured between the two
            marker="D",
            markersize=8.5,
            markeredgecolor=palette.paper,
            markeredgewidth=1.2,
            clip_on=False,
            label="held out, before and after",
            zorder=4,
        )
    for x, y in heldout:
        axes.annotate(
            f"{y:.3f}",
            (x, y),
            textcoords="offset points",
            xytext=(-4, 10) if x == 0 else (0, 10),
            ha="left" if x == 0 else "center",
            color=palette.heldout,
            fontweight="bold",
            zorder=5,
        )
    if not points and not heldout:
        axes.text(0.5, 0.5, "no round was finished", transform=axes.transAxes, ha="center")
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.04 * (high - low), high + 0.06 * (high - low))
    axes.legend(
        loc="upper right", frameon=True, framealpha=0.9, facecolor=palette.paper, edgecolor="none"
    )


def _kills(axes: Any, renderer: Any, data: ReportData, palette: Palette) -> int:
    """A line and a label for each kill. Answers how many rows the labels take.

    Labels that would overlap go to different rows above the axes, found from right to left, so
    that no line crosses the label of another, with the widths that the font really has.
    """
    row_starts: list[float] = []  # per row, where its leftmost label starts, in axes' widths
    width = axes.get_window_extent(renderer).width
    last_x = axes.get_xlim()[1]
    for kill in sorted(data.kills, key=lambda kill: -kill.when_seconds):
        x = tokens_at(data.history, kill.when_seconds - data.first_round_seconds) / last_x
        label = axes.text(0, 1, kill_label(kill), color=palette.kill, fontsize=8.5, va="center")
        size = label.get_window_extent(renderer).width / width + 0.015
        left = max(0.0, min(x - 0.004, 1.0 - size))  # inside the figure
        row = next((i for i, start in enumerate(row_starts) if left + size < start), None)
        if row is None:
            row = len(row_starts)
            row_starts.append(left)
        row_starts[row] = left
        height = 1 + LANE * (row + 0.6)
        label.set_transform(axes.transAxes)
        label.set_position((left, height))
        axes.plot(
            [x, x],
            [0, height - LANE * 0.4],
            transform=axes.transAxes,
            color=palette.kill,
            linewidth=1.1,
            linestyle=(0, (5, 3)),
            clip_on=False,
            zorder=2,
        )
    return len(row_starts)
