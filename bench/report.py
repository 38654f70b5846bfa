"""The table in the terminal, ``bench.json`` and the plot."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.registry import Row
from talkoot.protocol.files import write_atomic


def table_of(rows: Iterable[Row], title: str) -> Table:
    """A rich table."""
    table = Table(title=title, title_justify="left")
    for header, justify in (("figure", "left"), ("value", "right"), ("baseline", "right")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for header in ("ratio", "bar", "", "spread"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("what")
    for row in rows:
        mark = {True: "[green]holds[/]", False: "[red]missed[/]", None: ""}[row.holds]
        table.add_row(
            row.name,
            f"{number(row.value)} {row.unit}",
            "" if row.baseline is None else number(row.baseline),
            "" if row.ratio is None else f"{row.ratio:.3g}",
            row.bar,
            mark,
            f"±{50 * row.spread:.0f} %" if row.samples > 1 else "",
            row.note,
        )
    return table


def number(value: float) -> str:
    """Four significant digits, thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def save_json(path: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Write the rows, beside those of other names that an earlier run left there."""
    old: list[dict[str, Any]] = []
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
    names = {row.name for row in rows}
    merged = [row for row in old if row["name"] not in names] + [row.as_json() for row in rows]
    merged.sort(key=lambda row: row["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(merged, indent=1) + "\n").encode())
    return merged


def save_plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Every figure that has a bar, as a share of it: left of 1 is on the right side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = [(row["name"], *_share(row), row["holds"]) for row in rows if row["bar"]]
    if not shares:
        return
    figure = Figure(figsize=(9.6, 1.2 + 0.32 * len(shares)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [name for name, _, _, _ in shares]
    lengths = [max(share, 1e-3) for _, share, _, _ in shares]
    colours = ["#2563c9" if holds else "#b3261e" for *_, holds in shares]
    axes.barh(names, lengths, color=colours, height=0.62)
    for place, (_, share, text, _) in enumerate(shares):
        axes.annotate(
            f" {text}", (max(share, 1e-3), place), va="center", fontsize=8, color="#1c2330"
        )
    axes.axvline(1, color="#c2620a", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlim(min([*lengths, 0.1]) / 2, max([*lengths, 1]) * 6)
    axes.set_xlabel("share of what the bar allows (1 is the bar; shorter is better)")
    axes.invert_yaxis()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def _share(row: dict[str, Any]) -> tuple[float, str]:
    match = re.fullmatch(r"(value|ratio) (<=|>=) (\S+)", row["bar"])
    if match is None:
        raise ValueError(f"{row['name']} has the bar {row['bar']!r}")
    reached, limit = row[match[1]], float(match[3])
    share = reached / limit if match[2] == "<=" else limit / reached if reached else math.inf
    unit = row["unit"] if match[1] == "value" else "×"
    return share, f"{number(reached)} {unit} (bar {match[2]} {limit:g})"
