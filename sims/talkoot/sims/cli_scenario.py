"""``talkoot-sim scenarios``: what ships, what a file may hold, and whether one is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from talkoot.protocol.console import format_count

if TYPE_CHECKING:
    from talkoot.sims.scenario import Scenario


def complete_scenario(incomplete: str) -> list[str]:
    """Library names for the shell."""
    from talkoot.sims.scenario import library

    return [name for name in library() if name.startswith(incomplete)]


def scenarios(
    check: Annotated[
        str | None,
        typer.Argument(
            help="Check this file (or library scenario) and say what it holds.",
            autocompletion=complete_scenario,
        ),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            help="Print this library scenario: a start for your own.",
            autocompletion=complete_scenario,
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema, for your editor.")
    ] = False,
    devices: Annotated[
        bool, typer.Option("--devices", help="List devices and lines with their sources.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the scenarios that ship, or check one of yours."""
    from talkoot.sims import scenario as lib

    if schema:
        typer.echo(json.dumps(lib.schema(), indent=2))
    elif show is not None:
        typer.echo(lib.find(show).read_text(encoding="utf-8"), nl=False)
    elif devices:
        _devices(as_json)
    else:
        names = list(lib.library()) if check is None else [check]
        loaded = [lib.load_scenario(name) for name in names]
        if as_json:
            typer.echo(json.dumps([s.model_dump(mode="json") for s in loaded], indent=1))
        else:
            _list(loaded)


def _list(loaded: Sequence[Scenario]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for one in loaded:
        model = one.model.preset or (one.model.config or one.model.pretrained or "").split("/")[-1]
        length = [f"{one.rounds} rounds"] if one.rounds else []
        length += [f"{one.days:g} day{'' if one.days == 1 else 's'}"] if one.days else []
        nodes = format_count(one.nodes)
        facts = f"{nodes} nodes, {model}, {' or '.join(length)}"
        console.print(Text.assemble((f"{one.name:14}", "bold"), (facts, "dim")))
        console.print(Padding(Text(one.sentence), (0, 0, 0, 2)))


def _devices(as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from talkoot.protocol.memory import format_size
    from talkoot.sims.scenario.devices import DEVICES, LINKS

    if as_json:
        found = {
            "devices": {name: asdict(one) for name, one in DEVICES.items()},
            "links": {name: asdict(one) for name, one in LINKS.items()},
        }
        typer.echo(json.dumps(found, indent=1))
        return
    console = Console(highlight=False)
    cards = Table(box=None, padding=(0, 2, 0, 0))
    lines = Table(box=None, padding=(0, 2, 0, 0))
    for table, first in ((cards, "device"), (lines, "line")):
        table.add_column(first, no_wrap=True)
    for title in ("memory", "TFLOP/s", "used", "watts"):
        cards.add_column(title, justify="right", no_wrap=True)
    for title in ("Mbit/s up", "down", "ms"):
        lines.add_column(title, justify="right", no_wrap=True)
    for table in (cards, lines):
        table.add_column("source")
    for name, device in DEVICES.items():
        size, used = format_size(device.memory_bytes), f"{device.efficiency:.0%}"
        cards.add_row(name, size, f"{device.teraflops:g}", used, f"{device.watts:g}", device.source)
    for link, line in LINKS.items():
        up, down = f"{line.up_mbit:g}", f"{line.down_mbit:g}"
        lines.add_row(link, up, down, f"{line.latency_ms:g}", line.source)
    console.print(cards)
    console.print()
    console.print(lines)
