"""A comparison as a table, pictures and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

import numpy as np

from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.sims.compare.read import Curve, Line
from talkoot.sims.figures import bytes_text, clean, count_text, loss_text, seconds_text
from talkoot.sims.page import document, picture, table
from talkoot.sims.planning.plots import DARK, LIGHT, colours, draw, frame, legend, ticks
from talkoot.sims.planning.words import share
from talkoot.sims.report_plot import Palette


def plain(value: float | None) -> str:
    """Three digits, with decimals where they say something."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else count_text(value)


GRID: Final = 200
"""Points of a band."""
SHOWN: Final[tuple[tuple[str, str, Callable[[float | None], str]], ...]] = (
    ("tokens_per_day", "tokens a day", count_text),
    ("utilization", "utilization", share),
    ("loss", "held-out loss", loss_text),
    ("rounds", "rounds", plain),
    ("round_seconds", "a round", seconds_text),
    ("contributions_per_round", "contributions a round", plain),
    ("reopened", "leased anew", plain),
    ("coordinator_egress_gb_per_day", "GB out a day", plain),
    ("coordinator_ingress_gb_per_day", "GB in a day", plain),
    ("kwh", "kWh", plain),
    ("cost", "cost", plain),
    ("days_to_target", "days to the target", plain),
    ("attackers_quarantined", "attackers shut out", count_text),
    ("honest_quarantined", "honest shut out", count_text),
)
"""(figure, words, how it is told)."""
Values = Callable[[Curve], Sequence[float]]


def rows_of(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """A row a figure: its value in each line, with what differs from the first line."""
    rows = []
    for name, words, told in SHOWN:
        values = [line.figure(name) for line in lines]
        if all(value is None for value in values):
            continue
        cells = []
        for line, value in zip(lines, values, strict=True):
            text = told(value)
            noise = line.spread(name)
            if noise:
                text += f" ± {told(noise)}"
            base = values[0]
            if line is not lines[0] and value is not None and base:
                text += f" ({100 * (value / base - 1):+.0f} %)"
            cells.append(text)
        rows.append((words, *cells))
    return rows


def to_json(lines: Sequence[Line]) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "lines": [
            {
                "name": line.name,
                "kind": line.kind,
                "seeds": [curve.seed for curve in line.curves],
                "figures": {name: line.figure(name) for name, _, _ in SHOWN},
                "spread": {name: line.spread(name) for name, _, _ in SHOWN},
            }
            for line in lines
        ]
    }


def print_comparison(lines: Sequence[Line], console: Any) -> None:
    """The table on a terminal."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    grid.add_column("")
    for line in lines:
        grid.add_column(f"{clean(line.name, cap=40)}\n{_seeds(line)}", justify="right")
    for row in rows_of(lines):
        grid.add_row(*row)
    console.print(grid)


def write_comparison(lines: Sequence[Line], out: Path) -> Path:
    """Write index.html and the pictures into ``out``; the page's path.

    Raises:
        ConfigError: matplotlib is not installed.
        StateError, CapacityError: ``out`` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        parts = []
        for name, title, how in _pictures(lines):
            light = draw(how, [], LIGHT)
            write_atomic(out / f"{name}.png", light)
            parts.append(f"<h2>{escape(title)}</h2>{picture(title, light, draw(how, [], DARK))}")
        names = " and ".join(clean(line.name, cap=60) for line in lines)
        heads = ("", *(f"{clean(line.name, cap=60)}, {_seeds(line)}" for line in lines))
        body = (
            f"<h1>{escape(names)}</h1>",
            '<p class="faint">A line is the mean over the seeds, its band their range; in brackets '
            "what differs from the first.</p>",
            table(heads, rows_of(lines)),
            *parts,
        )
        index = out / "index.html"
        write_atomic(index, document(f"talkoot: {names}", body).encode(errors="replace"))
    except OSError as err:
        raise explain_os_error(err, "writing the comparison", out) from err
    return index


def _seeds(line: Line) -> str:
    count = len(line.curves)
    return f"seed {line.curves[0].seed}" if count == 1 else f"{count} seeds"


def _pictures(lines: Sequence[Line]) -> list[tuple[str, str, Any]]:
    wanted: list[tuple[str, str, Values, Values, str, str, Callable[[float], str] | None]] = [
        ("tokens", "Tokens against time", _days, _tokens, "days", "tokens", count_text),
        ("contributions", "Contributions", _days, _parts, "days", "a round", None),
    ]
    if any(math.isfinite(v) for line in lines for curve in line.curves for v in curve.loss):
        wanted += [
            ("loss-tokens", "Loss against tokens", _tokens, _losses, "tokens", "loss", None),
            ("loss-time", "Loss against time", _days, _losses, "days", "loss", None),
            ("loss-bytes", "Loss against bytes pushed", _bytes, _losses, "bytes", "loss", None),
        ]
    return [
        (name, title, _overlay(lines, x, y, x_words, y_words, told))
        for name, title, x, y, x_words, y_words, told in wanted
    ]


def _days(curve: Curve) -> Sequence[float]:
    return curve.days


def _tokens(curve: Curve) -> Sequence[float]:
    return curve.tokens


def _bytes(curve: Curve) -> Sequence[float]:
    return curve.bytes_up


def _losses(curve: Curve) -> Sequence[float]:
    return curve.loss


def _parts(curve: Curve) -> Sequence[float]:
    return curve.contributions


def _overlay(
    lines: Sequence[Line],
    x: Values,
    y: Values,
    x_words: str,
    y_words: str,
    told: Callable[[float], str] | None,
) -> Any:
    def paint(figure: Any, palette: Palette, _results: Any) -> None:
        axes = figure.add_subplot()
        shades = colours(palette)
        for place, line in enumerate(lines):
            shade = shades[place % len(shades)]
            grid, middle, low, high = band(line, x, y)
            if not len(grid):
                continue
            axes.plot(grid, middle, color=shade, linewidth=2, label=clean(line.name, cap=40))
            if len(line.curves) > 1:
                axes.fill_between(grid, low, high, color=shade, alpha=0.2, linewidth=0)
        frame(axes, palette, x_words, y_words)
        if told is not None:
            ticks(axes, told)
        if x_words in ("tokens", "bytes"):
            ticks(axes, count_text if x_words == "tokens" else bytes_text, "x")
        if axes.get_legend_handles_labels()[0]:
            legend(axes, palette, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return paint


def band(line: Line, x: Values, y: Values) -> tuple[Any, Any, Any, Any]:
    """Where all seeds have values: grid, mean, least and most, each (points,)."""
    pairs = []
    for curve in line.curves:
        xs, ys = np.array(x(curve)), np.array(y(curve))
        known = np.isfinite(xs) & np.isfinite(ys)
        if known.any():
            pairs.append((xs[known], ys[known]))
    if not pairs:
        empty = np.zeros(0)
        return empty, empty, empty, empty
    first = max(float(xs[0]) for xs, _ in pairs)
    last = min(float(xs[-1]) for xs, _ in pairs)
    grid = pairs[0][0] if len(pairs) == 1 else np.linspace(first, max(first, last), GRID)
    values = np.stack([np.interp(grid, xs, ys) for xs, ys in pairs])
    return grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)
