"""The page of a run: loss against tokens, time and bytes; who took part; what the liars did."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.memory import format_size
from talkoot.sims.figures import clean, count_text, seconds_text
from talkoot.sims.page import document, picture, table, tiles
from talkoot.sims.report_plot import DARK, LIGHT, Palette
from talkoot.sims.scenario import METRICS

SIZE: Final = (9.6, 7.2)  # inches
DAY: Final = 86_400.0
HONEST: Final = "accepted"
LIARS: Final = "accepted of liars"
NOT: Final = "not accepted"
MOST_ROWS: Final = 200
"""Rounds in the page's table; ``rounds.csv`` has all."""


def write_report(data: Mapping[str, Any], leases: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Write ``report.html`` and ``report.png``; the path of the page.

    Args:
        data: ``run.json``.
        leases: rows of ``leases.csv``.

    Raises:
        ConfigError: matplotlib is missing (the tables are written by then).
    """
    parts = participation(data["rounds"], leases)
    try:
        light = draw(data, parts, LIGHT)
        write_atomic(out / "report.png", light)
        text = page(data, parts, light, draw(data, parts, DARK))
        write_atomic(out / "report.html", text.encode())
    except OSError as err:
        raise explain_os_error(err, "writing the report", out) from err
    return out / "report.html"


def participation(
    rounds: Sequence[Mapping[str, Any]], leases: Sequence[Mapping[str, Any]]
) -> list[dict[str, int]]:
    """Of each round: leases by what became of them, and the bytes that were moved for it."""
    places = {row["round"]: place for place, row in enumerate(rounds)}
    found = [{HONEST: 0, LIARS: 0, NOT: 0, "bytes": 0} for _ in rounds]
    for lease in leases:
        place = places.get(lease["round"])
        if place is None:
            continue
        accepted = lease["answer"] == "accepted"
        found[place][(LIARS if lease["attack"] else HONEST) if accepted else NOT] += 1
        found[place]["bytes"] += lease["bytes_up"] + lease["bytes_down"]
    return found


# The figure ---------------------------------------------------------------------------------------


def draw(data: Mapping[str, Any], parts: Sequence[Mapping[str, int]], palette: Palette) -> bytes:
    """Held-out loss above, in three measures; participation below. A PNG."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError(
            "The report's figure needs matplotlib: install it with `pip install 'talkoot[sims]'` "
            "and run the same command again; nothing is trained twice.",
            code="missing-extra",
        ) from err
    style = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": palette.ink}
    with rc_context({**style, "text.parse_math": False}):
        figure = Figure(figsize=SIZE, dpi=150, facecolor=palette.paper)
        FigureCanvasAgg(figure)
        _losses(figure, data, parts, palette)
        _bars(figure, data, parts, palette)
        name = clean(data["scenario"]["name"], cap=60)
        figure.text(0.075, 0.955, f"Simulation {name}", fontsize=14, fontweight="bold")
        png = io.BytesIO()
        figure.savefig(png, format="png", facecolor=palette.paper, metadata={"Software": None})
    return png.getvalue()


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
        axes.set_xlabel(label, color=palette.faint)
        if column == 0:
            axes.set_ylabel("loss (nats per token)", color=palette.faint)
            axes.legend(frameon=False, labelcolor=palette.ink)
        _frame(axes, palette)


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
    axes.set_xlabel("round", color=palette.faint)
    axes.set_ylabel("leases", color=palette.faint)
    axes.legend(frameon=False, labelcolor=palette.ink, loc="upper right", ncols=3)
    axes.set_ylim(0, max([*floor, 1]) * 1.2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _frame(axes, palette)


def _frame(axes: Any, palette: Palette) -> None:
    axes.tick_params(colors=palette.faint, length=0, pad=5)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# The page -----------------------------------------------------------------------------------------


def page(
    data: Mapping[str, Any], parts: Sequence[Mapping[str, int]], light: bytes, dark: bytes
) -> str:
    """The whole page."""
    scenario, found = data["scenario"], data["figures"]
    name = clean(scenario["name"], cap=60)
    body = [
        f"<h1>Simulation {escape(name)}</h1>",
        f'<p class="faint">{escape(clean(scenario["sentence"], cap=400))}</p>',
        tiles(_tiles(data)),
        picture("Held-out loss against tokens, time and bytes; leases by round.", light, dark),
        *_expected(data),
        *_liars(data),
        "<h2>By class of nodes</h2>",
        table(CLASS_HEADS, _classes(data["nodes"])),
        "<h2>Rounds</h2>",
        table(ROUND_HEADS, [_row(r, p) for r, p in _last(data["rounds"], parts)]),
        *_refused(data),
        "<h2>All figures</h2>",
        table(("figure", "is", "what it is"), _figures(found), words=3),
        '<p class="faint">Training was real; the clock and the lines were simulated. Seed '
        f"{int(scenario['seed'])}, weights {escape(data['weights_digest'][:16])}…</p>",
    ]
    return document(f"Simulation {name}", body)


def _tiles(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = data["figures"]
    first, last = data["first_loss"], found["loss"]
    loss = "—" if last is None else f"{last:.3f}"
    before = "" if first is None else f", from {first:.3f}"
    share = found["utilization"]
    return [
        (loss, f"held-out loss{before}", ""),
        (f"{found['rounds']:,}", f"rounds of {found['nodes']:,} nodes", ""),
        (seconds_text(found["virtual_days"] * DAY), "on the virtual clock", ""),
        (count_text(found["tokens"]), "tokens", ""),
        ("—" if share is None else f"{share:.0%}", "of their time online nodes train", ""),
        (format_size(found["bytes_up"] + found["bytes_down"]), "moved in all", ""),
    ]


def _expected(data: Mapping[str, Any]) -> list[str]:
    wanted = data["scenario"].get("expect") or {}
    if not wanted:
        return []
    if not data["broken"]:
        return [f'<p class="good">All {len(wanted)} expectations hold.</p>']
    return [f'<p class="bad">{escape(sentence)}</p>' for sentence in data["broken"]]


def _liars(data: Mapping[str, Any]) -> list[str]:
    rows = [
        (node["name"], node["attack"], node["status"], f"{node['contributions']:,}")
        for node in data["nodes"]
        if node["attack"]
    ]
    if not rows:
        return []
    heads = ("node", "lie", "status at the end", "accepted contributions")
    return ["<h2>Liars</h2>", table(heads, rows[:MOST_ROWS], words=3)]


CLASS_HEADS: Final = (
    "class",
    "nodes",
    "contributions",
    "tokens",
    "trains of its time online",
    "up",
    "down",
)


def _classes(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(node["population"] for node in nodes):
        mine = [node for node in nodes if node["population"] == name]
        online = sum(node["online_seconds"] for node in mine)
        trained = sum(node["train_seconds"] for node in mine)
        rows.append(
            (
                name,
                f"{len(mine):,}",
                f"{sum(node['contributions'] for node in mine):,}",
                count_text(sum(node["tokens"] for node in mine)),
                f"{trained / online:.0%}" if online else "—",
                format_size(sum(node["bytes_up"] for node in mine)),
                format_size(sum(node["bytes_down"] for node in mine)),
            )
        )
    return rows


ROUND_HEADS: Final = (
    "round",
    "took",
    "attempts",
    "leases",
    "accepted",
    "of liars",
    "tokens",
    "training loss",
    "held-out loss",
)


def _last(
    rounds: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, int]]
) -> list[tuple[Mapping[str, Any], Mapping[str, int]]]:
    return list(zip(rounds, parts, strict=True))[-MOST_ROWS:]


def _row(row: Mapping[str, Any], part: Mapping[str, int]) -> tuple[str, ...]:
    heldout = row["heldout"]
    return (
        str(row["round"]),
        seconds_text(row["published"] - row["opened"]),
        str(row["attempts"]),
        str(row["leases"]),
        str(row["contributions"]),
        str(part[LIARS]),
        f"{row['tokens']:,}",
        f"{row['loss']:.4f}",
        "—" if heldout is None else f"{heldout:.4f}",
    )


def _refused(data: Mapping[str, Any]) -> list[str]:
    if not data["refused"]:
        return []
    rows = [(sentence, f"{count:,}") for sentence, count in data["refused"]]
    return ["<h2>Nodes that could not take part</h2>", table(("why", "nodes"), rows)]


def _figures(found: Mapping[str, float | None]) -> list[tuple[str, str, str]]:
    return [
        (name, "—" if found[name] is None else f"{found[name]:,.6g}", words)
        for name, words in METRICS.items()
        if name in found
    ]
