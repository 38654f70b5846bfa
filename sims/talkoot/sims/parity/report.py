"""The figure, the page and the table of ``parity.json``'s content. Draws with matplotlib's Agg."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.sims.figures import clean, count_text, loss_text
from talkoot.sims.page import document, picture, table
from talkoot.sims.report_plot import DARK, LIGHT, Palette

SIZE = (9.6, 8.2)  # inches
COLOURS = ("#2563c9", "#2a9d55", "#8a3ffc", "#c2185b", "#00838f", "#9e6b00", "#5d6675")
"""Of the arms, the first first; told apart by the colour-blind in this order."""


def write_parity(data: Mapping[str, Any], out: Path) -> Path:
    """Write ``parity.json``, ``parity.png`` and ``index.html``; the path of the page.

    Raises :class:`ConfigError` when matplotlib is missing (``parity.json`` is written by then).
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "parity.json", text.encode())
        light = draw(data, LIGHT)
        write_atomic(out / "parity.png", light)
        write_atomic(out / "index.html", page(data, light, draw(data, DARK)).encode())
    except OSError as err:
        raise explain_os_error(err, "writing the parity report", out) from err
    return out / "index.html"


# The figure ----------------------------------------------------------------------


def draw(data: Mapping[str, Any], palette: Palette) -> bytes:
    """Losses above, captured share below, over rounds; bands reach from seed to seed. A PNG."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError(
            "The figure needs matplotlib: install it with `pip install 'talkoot[report]'` and run "
            "the same command again; nothing is trained twice.",
            code="missing-extra",
        ) from err
    style = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": palette.ink}
    with rc_context({**style, "text.parse_math": False}):
        drawn = Figure(figsize=SIZE, dpi=150, facecolor=palette.paper)
        FigureCanvasAgg(drawn)
        above = drawn.add_axes((0.08, 0.44, 0.89, 0.47), facecolor=palette.paper)
        below = drawn.add_axes((0.08, 0.08, 0.89, 0.28), facecolor=palette.paper)
        for axes, label in ((above, "held-out loss (nats per token)"), (below, "captured share")):
            axes.set_ylabel(label, color=palette.faint)
            axes.tick_params(colors=palette.faint, length=0, pad=6)
            axes.grid(axis="y", color=palette.grid, linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.spines["bottom"].set_color(palette.grid)
            axes.set_xlim(0, data["rounds"] * 1.02)
        below.set_xlabel("outer rounds", color=palette.faint)
        first = data["arms"][0]["horizons"]
        _band(above, first, "loss_one", palette.faint, "one node alone", "--")
        _band(above, first, "loss_ddp", palette.heldout, "data-parallel, all nodes", "--")
        for arm, colour in zip(data["arms"], _colours(len(data["arms"])), strict=True):
            name = clean(arm["name"], cap=60)
            _band(above, arm["horizons"], "loss_net", colour, name, "-")
            _band(below, arm["horizons"], "share", colour, name, "-")
        below.axhline(1, color=palette.heldout, linestyle="--", linewidth=1.2)
        below.axhline(0, color=palette.faint, linestyle="--", linewidth=1.2)
        below.set_ylim(-0.5, 1.1)
        ends = [point["loss_ddp"]["low"] for point in first]
        starts = [point["loss_one"]["high"] for point in first if point["round"] >= 5]
        above.set_ylim(min(ends) - 0.05, max(starts or [max(ends)]) + 0.15)
        above.legend(loc="upper right", frameon=False, labelcolor=palette.ink)
        drawn.text(0.08, 0.945, _title(data), fontsize=13, fontweight="bold")
        png = io.BytesIO()
        drawn.savefig(png, format="png", facecolor=palette.paper, metadata={"Software": None})
    return png.getvalue()


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _band(
    axes: Any, points: Sequence[Mapping[str, Any]], key: str, colour: str, name: str, line: str
) -> None:
    known = [(p["round"], p[key]) for p in points if p[key]["mean"] is not None]
    rounds = [at for at, _ in known]
    axes.plot(
        rounds,
        [v["mean"] for _, v in known],
        color=colour,
        linestyle=line,
        linewidth=2,
        label=name,
        zorder=3,
    )
    low, high = [v["low"] for _, v in known], [v["high"] for _, v in known]
    axes.fill_between(rounds, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)


# Words ----------------------------------------------------------------------


def _title(data: Mapping[str, Any]) -> str:
    start = "" if data["from_scratch"] else ", pretrained"
    return (
        f"{count_text(data['parameters'])} parameters{start}, {data['nodes']} nodes, "
        f"{data['rounds']} rounds"
    )


HEADS = (
    "arm",
    "round",
    "one node",
    "data-parallel",
    "network",
    "captured share",
    "seeds",
    "bits up",
    "bits down",
)


def rows(data: Mapping[str, Any], *, every_horizon: bool) -> list[tuple[str, ...]]:
    """The table: each arm at its last horizon, or at all."""
    made = []
    for arm in data["arms"]:
        for point in arm["horizons"] if every_horizon else arm["horizons"][-1:]:
            share = point["share"]
            made.append(
                (
                    clean(arm["name"], cap=60),
                    str(point["round"]),
                    *(loss_text(point[f"loss_{kind}"]["mean"]) for kind in ("one", "ddp", "net")),
                    _share_text(share),
                    str(len(arm["seeds"])),
                    f"{arm['bits_up']:.3f}",
                    f"{arm['bits_down']:.3f}",
                )
            )
    return made


def _share_text(share: Mapping[str, Any]) -> str:
    if share["mean"] is None:
        return "–"
    if len(share["by_seed"]) == 1:
        return f"{share['mean']:.2f}"
    return f"{share['mean']:.2f} ({share['low']:.2f} … {share['high']:.2f})"


def page(data: Mapping[str, Any], light: bytes, dark: bytes) -> str:
    """The whole page."""
    bars = [
        (
            clean(bar["arm"], cap=60),
            bar["name"],
            "–" if bar["value"] is None else f"{bar['value']:.3f}",
            f"{bar['bar']:.2f}",
            "holds" if bar["holds"] else "missed",
        )
        for bar in data["bars"]
    ]
    sources = ", ".join(clean(source, cap=80) for source in data["sources"])
    words = (
        f"{_title(data)}; {count_text(data['tokens'])} tokens of {sources}. Captured share is "
        "(one − network) / (one − data-parallel): 1 is a data centre, 0 is training alone. "
        "Losses are nats per token on held-out text; bands reach from the lowest to the highest "
        "seed; bits are per parameter and round."
    )
    return document(
        "talkoot: parity",
        (
            "<h1>How much of a data centre the network is</h1>",
            f'<p class="faint">{escape(words)}</p>',
            picture("Losses and captured share over rounds", light, dark),
            "<h2>At the end</h2>" + table(HEADS, rows(data, every_horizon=False)),
            "<h2>Bars</h2>" + table(("arm", "bar", "seen", "asked", ""), bars),
            "<h2>All horizons</h2>" + table(HEADS, rows(data, every_horizon=True)),
        ),
    )


def print_parity(data: Mapping[str, Any], console: Console) -> None:
    """The table for a terminal."""
    shown = Table(title=_title(data), title_justify="left", header_style="bold")
    for i, head in enumerate(HEADS):
        shown.add_column(head, justify="left" if i == 0 else "right")
    for row in rows(data, every_horizon=False):
        shown.add_row(*(escape_markup(cell) for cell in row))
    console.print(shown)
    for bar in data["bars"]:
        mark = "[green]holds[/green]" if bar["holds"] else "[red]missed[/red]"
        value = "–" if bar["value"] is None else f"{bar['value']:.3f}"
        name = escape_markup(clean(bar["arm"], cap=60))
        console.print(f"  {bar['name']:<28} {value:>8}  (asked {bar['bar']:g})  {mark}  {name}")
