"""A calibration as a table on a terminal, a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.sims.calibration.compare import BAR, Row
from talkoot.sims.calibration.real import Seen
from talkoot.sims.calibration.run import Calibration
from talkoot.sims.figures import bytes_text, clean, many
from talkoot.sims.page import document, picture, table, tiles
from talkoot.sims.planning.plots import DARK, LIGHT, colours, draw, frame, legend
from talkoot.sims.report_plot import Palette

HEADS: Final = ("", "real", "simulated", "difference", "bar", "planned")
PARTS: Final = {
    "opening": "from a version to the next round's leases",
    "around": "the last node, beside training: hears, fetches, encodes, pushes, is verified",
    "training": "the last node's training",
    "closing": "from the last verdict to the next version",
}


def _told(row: Row, value: float | None) -> str:
    if value is None:
        return "–"
    return bytes_text(value) if row.unit == "B" else f"{value:.2f} s"


def rows_of(found: Calibration) -> list[tuple[str, ...]]:
    """The table: figures, and the losses below them."""
    rows: list[tuple[str, ...]] = [
        (
            clean(row.what, cap=60),
            _told(row, row.real),
            _told(row, row.simulated),
            f"{row.difference:+.1%}",
            f"{BAR:.0%}" if row.holds else f"{BAR:.0%}, missed",
            _told(row, row.planned),
        )
        for row in found.comparison.rows
    ]
    losses = found.comparison.losses
    told = f"{losses.bar:.3f} nats" + ("" if losses.holds else ", missed")
    mean = sum(losses.means) / len(losses.means)
    means = (f"{losses.real_mean:.3f}", f"{mean:.3f}")
    rows.append((f"{losses.kind} loss, mean", *means, f"{losses.apart:.3f} nats", told, "–"))
    return rows


def print_calibration(found: Calibration, console: Any) -> None:
    """The table, what was missed and what a reader should know."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, head in enumerate(HEADS):
        grid.add_column(head, justify="right" if place else "left")
    for row in rows_of(found):
        grid.add_row(*row)
    console.print(grid)
    for note in found.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    for sentence in found.comparison.broken:
        console.print(f"missed: {sentence}", style="red", highlight=False, markup=False)


def write_report(found: Calibration, out: Path) -> Path:
    """Write ``report.html`` and ``report.png`` into ``out``; the page's path.

    Raises:
        ConfigError: matplotlib is not installed.
        StateError, CapacityError: ``out`` cannot be written.
    """

    def paint(figure: Any, palette: Palette, _results: Any) -> None:
        _paint(figure, palette, found)

    light = draw(paint, [], LIGHT, 3.8)
    try:
        write_atomic(out / "report.png", light)
        page = _page(found, picture("Losses and rounds", light, draw(paint, [], DARK, 3.8)))
        write_atomic(out / "report.html", page.encode(errors="replace"))
    except OSError as err:
        raise explain_os_error(err, "writing the report", out) from err
    return out / "report.html"


def _page(found: Calibration, image: str) -> str:
    comparison, name = found.comparison, clean(found.scenario.name, cap=63)
    time, worst = comparison.rows[0], max(comparison.rows[1:], key=lambda r: abs(r.difference))
    losses = comparison.losses
    where = "on the scenario's lines" if found.shaped else "on plain loopback"
    nodes = many(len(found.real.nodes), "process")
    return document(
        f"talkoot calibration: {name}",
        (
            f"<h1>{escape(name)}: real beside simulated</h1>",
            f'<p class="faint">{nodes} {where}, {many(len(found.simulated), "simulation")} of what '
            "was measured of them.</p>",
            tiles(
                [
                    (f"{time.difference:+.1%}", "a round's time", _style(time.holds)),
                    (f"{worst.difference:+.1%}", worst.what, _style(worst.holds)),
                    (
                        f"{losses.apart:.3f} nats",
                        f"between mean {losses.kind} losses; one more seed would be within "
                        f"{losses.bar:.3f} in 95 of 100 cases",
                        _style(losses.holds),
                    ),
                ]
            ),
            *(f"<p>{escape(sentence)}</p>" for sentence in comparison.broken),
            *(f'<p class="faint">{escape(note)}</p>' for note in found.notes),
            image,
            "<h2>Figures</h2>",
            '<p class="faint">After the first round, which is warm-up. Bytes are all that goes '
            "over the data plane: artifacts, reports, claims.</p>",
            table(HEADS, rows_of(found)),
            "<h2>A round's parts</h2>",
            table(("", "real", "simulated"), _parts(found.real, found.simulated)),
            "<h2>What was measured of the nodes, and simulated</h2>",
            table(("node", "tokens/s", "uneven by", "up", "down", "there and back"), _nodes(found)),
        ),
    )


def _style(holds: bool) -> str:
    return "good" if holds else "bad"


def _parts(real: Seen, simulated: Sequence[Seen]) -> list[tuple[str, str, str]]:
    rows = []
    for name, words in PARTS.items():
        mean = sum(one.parts[name] for one in simulated) / len(simulated)
        rows.append((words, f"{real.parts[name]:.2f} s", f"{mean:.2f} s"))
    return rows


def _nodes(found: Calibration) -> list[tuple[str, ...]]:
    return [
        (
            clean(node.name, cap=63),
            f"{node.tokens_per_second:,.0f}",
            f"{node.noise:.1%}",
            f"{line.up_mbit:,.3g} Mbit/s",
            f"{line.down_mbit:,.3g} Mbit/s",
            f"{line.rtt_ms:.3g} ms",
        )
        for node, line in zip(found.real.nodes, found.lines, strict=True)
    ]


def _paint(figure: Any, palette: Palette, found: Calibration) -> None:
    left, right = figure.subplots(1, 2)
    real, sims = colours(palette)[:2]
    losses = found.comparison.losses
    for place, curve in enumerate(losses.simulated):
        label = "simulated, by seed" if place == 0 else None
        left.plot(losses.rounds, curve, color=sims, linewidth=1.2, alpha=0.8, label=label)
    left.plot(losses.rounds, losses.real, color=real, linewidth=2.2, label="real")
    frame(left, palette, "round", f"{losses.kind} loss (nats per token)")
    legend(left, palette)
    for place, one in enumerate((*found.simulated, found.real)):
        mine = place == len(found.simulated)
        right.plot(
            [row.round for row in one.rounds],
            [row.published - one.rounds[0].published for row in one.rounds],
            color=real if mine else sims,
            linewidth=2.2 if mine else 1.2,
        )
    frame(right, palette, "round", "published, seconds after the first")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
