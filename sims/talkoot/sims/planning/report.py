"""The report of a plan: a self-contained page, and its pictures as files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.sims.figures import bytes_text, clean, count_text, many, seconds_text
from talkoot.sims.page import document, picture, table, tiles
from talkoot.sims.planning.plots import DARK, LIGHT, PICTURES, draw, sweep_picture
from talkoot.sims.planning.result import PHASE_WORDS, PHASES, PlanResult
from talkoot.sims.planning.words import middle, money, share

if TYPE_CHECKING:
    from talkoot.sims.planning.sweep import Point

MAX_ROWS = 200
"""Rounds in the page's table; all of them are in plan.json."""


def write_report(results: Sequence[PlanResult], out: Path) -> Path:
    """Write index.html and the PNGs into ``out``, which exists; the page's path.

    Raises:
        ConfigError: matplotlib is not installed.
        StateError, CapacityError: ``out`` cannot be written.
    """
    pictures = []
    try:
        for name, title, words, how, height in PICTURES:
            inches = height(results[0])
            light = draw(how, results, LIGHT, inches)
            write_atomic(out / f"{name}.png", light)
            image = picture(title, light, draw(how, results, DARK, inches))
            pictures.append(f'<h2>{escape(title)}</h2><p class="faint">{escape(words)}</p>{image}')
        index = out / "index.html"
        write_atomic(index, _page(results, pictures).encode(errors="replace"))
    except OSError as err:
        raise explain_os_error(err, "writing the report", out) from err
    return index


def _page(results: Sequence[PlanResult], pictures: Sequence[str]) -> str:
    first = results[0]
    scenario = first.scenario
    return document(
        f"talkoot plan: {clean(scenario.name, cap=63)}",
        (
            f"<h1>{escape(_title(results))}</h1>",
            f'<p class="faint">{escape(clean(scenario.sentence, cap=400))}</p>',
            tiles(_tiles(results)),
            f"<p>{escape(first.bottleneck)}</p>",
            *(f'<p class="faint">{escape(note)}</p>' for note in first.notes),
            *pictures,
            "<h2>Where the time goes</h2>",
            _phases(first),
            "<h2>Classes of nodes</h2>",
            _classes(first),
            "<h2>Rounds</h2>",
            _rounds(first),
            "<h2>What was assumed</h2>",
            _assumed(first),
        ),
    )


def _title(results: Sequence[PlanResult]) -> str:
    pace = middle(results, "tokens_per_day")
    name = clean(results[0].scenario.name, cap=63)
    if pace is None:
        return f"{name}: no round was published"
    return f"{name}: {count_text(pace)} tokens a day"


def _tiles(results: Sequence[PlanResult]) -> list[tuple[str, str, str]]:
    scenario = results[0].scenario

    def figure(name: str) -> float:
        return middle(results, name) or 0.0

    egress = bytes_text(1e9 * figure("coordinator_egress_gb_per_day"))
    fit, nodes = figure("nodes_that_fit"), figure("nodes")
    found = [
        (count_text(middle(results, "tokens_per_day")), "tokens a day"),
        (
            share(middle(results, "utilization")),
            "utilization: of their time online, nodes train on what counts",
        ),
        (f"{fit:,.0f} of {nodes:,.0f}", "nodes can hold a replica"),
        (egress, "a day out of the coordinator's line"),
        (seconds_text(middle(results, "round_seconds")), f"a round, of {figure('rounds'):.0f}"),
        (money(middle(results, "cost"), scenario.currency), f"for {figure('kwh'):,.0f} kWh"),
    ]
    if scenario.target_tokens is not None:
        needed = middle(results, "days_to_target")
        words = "never" if needed is None else f"{needed:,.1f} days"
        found[4] = (words, f"to {count_text(scenario.target_tokens)} tokens")
    return [(how, what, "") for how, what in found]


def _phases(result: PlanResult) -> str:
    heads = ("", *(row.name for row in result.classes if row.recipe), "all")
    rows = []
    for phase in PHASES:
        cells = [share(row.phases[phase]) for row in result.classes if row.recipe]
        rows.append((PHASE_WORDS[phase], *cells, share(result.phases[phase])))
    return table(heads, rows)


def _classes(result: PlanResult) -> str:
    heads = ("class", "device", "recipe", "nodes", "tokens/s", "trains", "tokens", "kWh")
    rows = [
        (
            clean(row.name, cap=63),
            row.device,
            row.recipe or "does not fit",
            f"{row.nodes:,}",
            count_text(row.tokens_per_second),
            share(row.utilization),
            count_text(row.tokens),
            f"{row.kwh:,.0f}",
        )
        for row in result.classes
    ]
    refused = "".join(
        f'<p class="faint">{escape(row.name)}: {escape(row.why)}</p>'
        for row in result.classes
        if row.recipe is None
    )
    return table(heads, rows, words=3) + refused


def _rounds(result: PlanResult) -> str:
    heads = ("round", "closed", "leased", "contributed", "tokens", "length", "up", "down")
    rows = [
        (
            str(row.round),
            row.code,
            f"{row.members:,}",
            f"{row.contributions:,}",
            count_text(row.tokens),
            seconds_text(row.published - row.opened),
            bytes_text(row.bytes_up),
            bytes_text(row.bytes_down),
        )
        for row in result.rounds[:MAX_ROWS]
    ]
    more = len(result.rounds) - MAX_ROWS
    rest = f'<p class="faint">{many(more, "more round")} in plan.json.</p>' if more > 0 else ""
    return table(heads, rows, words=2) + rest


def _assumed(result: PlanResult) -> str:
    payload = result.payload
    rows = [
        ("parameters", count_text(payload["parameters"])),
        ("a payload", bytes_text(payload["uplink_bytes"])),
        ("a published update", bytes_text(payload["update_bytes"])),
        ("a checkpoint", bytes_text(payload["checkpoint_bytes"])),
    ]
    return table(("", "size"), rows) + (
        '<p class="faint">Tokens a second follow from the devices\' sheets and a stated '
        "efficiency; docs/simulation.md says what else is assumed, and how published runs compare."
        "</p>"
    )


def write_sweep(points: Sequence[Point], out: Path) -> Path:
    """Write index.html with a row for each combination of values; the page's path."""
    first = points[0]
    heads = (
        *(key.split(".")[-1] for key in first.values),
        *("tokens a day", "utilization", "round", "egress a day", "wait for others", "closing"),
    )
    rows = []
    for point in points:
        phases = point.results[0].phases
        egress = middle(point.results, "coordinator_egress_gb_per_day")
        rows.append(
            (
                *(clean(value, cap=40) for value in point.values.values()),
                count_text(middle(point.results, "tokens_per_day")),
                share(middle(point.results, "utilization")),
                seconds_text(middle(point.results, "round_seconds")),
                bytes_text(None if egress is None else 1e9 * egress),
                share(phases["others"]),
                share(phases["closing"]),
            )
        )
    labels = [point.label for point in points]
    drawn = sweep_picture(labels, [point.results for point in points])
    height = 2.4 + 0.34 * len(points)
    index = out / "index.html"
    try:
        light = draw(drawn, [], LIGHT, height)
        write_atomic(out / "sweep.png", light)
        body = (
            f"<h1>{escape(first.scenario.name)}: {many(len(points), 'plan')}</h1>",
            f'<p class="faint">{escape(clean(first.scenario.sentence, cap=400))}</p>',
            table(heads, rows, words=0),
            '<h2>Where the time goes</h2><p class="faint">Of the nodes\' time online; beside it '
            "tokens a day.</p>",
            picture("Where the time goes", light, draw(drawn, [], DARK, height)),
        )
        write_atomic(index, document(f"talkoot sweep: {first.scenario.name}", body).encode())
    except OSError as err:
        raise explain_os_error(err, "writing the sweep", out) from err
    return index
