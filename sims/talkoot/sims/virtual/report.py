"""The page of a run: loss against tokens, time and bytes; who took part; what the liars did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.memory import format_size
from talkoot.sims.figures import clean, count_text, seconds_text
from talkoot.sims.page import document, picture, table, tiles
from talkoot.sims.panels import paint
from talkoot.sims.report_plot import DARK, LIGHT
from talkoot.sims.scenario import METRICS
from talkoot.sims.virtual.pictures import HONEST, LIARS, NOT, Picture, pictures

DAY: Final = 86_400.0
MOST_ROWS: Final = 200
"""Rounds in the page's table; ``rounds.csv`` has all."""


def write_report(
    data: Mapping[str, Any],
    leases: Sequence[Mapping[str, Any]],
    present: Sequence[Mapping[str, Any]],
    out: Path,
) -> Path:
    """Write ``report.html`` and ``report.png``; the path of the page.

    Args:
        data: ``run.json``.
        leases: rows of ``leases.csv``.
        present: rows of ``presence.csv``.

    Raises:
        ConfigError: matplotlib is missing (the tables are written by then).
    """
    parts = participation(data["rounds"], leases)
    shown = []
    try:
        for one in pictures(data, parts, leases, present):
            light = paint(one.paint, LIGHT, one.inches)
            write_atomic(out / f"{one.name}.png", light)
            shown.append((one, light, paint(one.paint, DARK, one.inches)))
        write_atomic(out / "report.html", page(data, parts, shown).encode())
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


# The page -----------------------------------------------------------------------------------------


Shown = tuple[Picture, bytes, bytes]
"""A picture, on light and on dark paper."""


def page(
    data: Mapping[str, Any], parts: Sequence[Mapping[str, int]], shown: Sequence[Shown]
) -> str:
    """The whole page."""
    scenario, found = data["scenario"], data["figures"]
    name = clean(scenario["name"], cap=60)
    (first, light, dark), *others = shown
    body = [
        f"<h1>Simulation {escape(name)}</h1>",
        f'<p class="faint">{escape(clean(scenario["sentence"], cap=400))}</p>',
        tiles(_tiles(data)),
        picture(first.words, light, dark),
        *_expected(data),
        *(_section(*one) for one in others),
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


def _section(one: Picture, light: bytes, dark: bytes) -> str:
    image = picture(one.title, light, dark)
    return f'<h2>{escape(one.title)}</h2><p class="faint">{escape(one.words)}</p>{image}'


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
        count = len(wanted)
        words = "What it expects holds." if count == 1 else f"All {count} expectations hold."
        return [f'<p class="good">{words}</p>']
    return [f'<p class="bad">{escape(sentence)}</p>' for sentence in data["broken"]]


def _liars(data: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            node["name"],
            node["attack"],
            node["status"],
            _moment(node.get("quarantined")),
            f"{node['contributions']:,}",
        )
        for node in data["nodes"]
        if node["attack"]
    ]
    if not rows:
        return []
    heads = ("node", "lie", "status at the end", "shut out after", "accepted contributions")
    return ["<h2>Liars</h2>", table(heads, rows[:MOST_ROWS], words=3)]


def _moment(seconds: float | None) -> str:
    return "—" if seconds is None else seconds_text(seconds)


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
