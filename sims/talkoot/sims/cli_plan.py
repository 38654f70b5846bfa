"""``talkoot-sim plan``: what would happen, in seconds and without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talkoot.sims.cli_scenario import complete_scenario

if TYPE_CHECKING:
    from talkoot.sims.planning.sweep import Point


def plan(
    scenario: Annotated[
        str,
        typer.Argument(
            help="A scenario's file, or a name of the library.", autocompletion=complete_scenario
        ),
    ],
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="key=a,b,c: plan once for each value, such as rules.round.deadline_seconds=3600,"
            "7200; again for every combination with another key."
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value instead of the scenario's; again for more."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Plan with so many seeds, from the scenario's on.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Write report, figures and plan.json into this directory.")
    ] = None,
    events: Annotated[
        bool, typer.Option("--events", help="With --out: every node's rounds as events.csv, too.")
    ] = False,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="With --events: events.parquet, too (pyarrow).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost in time and memory, only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json.")] = False,
) -> None:
    """Say how a network would fare: tokens a day, utilization, bytes, cost, the bottleneck.

    No training: discrete events over the real rules of rounds, admission and
    leases, with the codec's real sizes. The exit status is 1 when something that
    the scenario expects does not hold.
    """
    from rich.console import Console

    from talkoot.protocol.errors import ConfigError
    from talkoot.sims.planning.sweep import cost_of, parse_changes, points_of, run_points
    from talkoot.sims.tables import require_parquet

    if events and out is None:
        raise ConfigError("--events needs --out, the directory that events.csv goes to.")
    if parquet:
        if not events:
            raise ConfigError("--parquet needs --events: they are what is written as Parquet.")
        require_parquet()
    points = points_of(scenario, sweep or [], parse_changes(change or []), seeds)
    if dry_run:
        cost = cost_of(points)
        typer.echo(json.dumps(cost.to_json()) if as_json else cost.sentence)
        return
    console = Console(stderr=as_json)
    swept = bool(sweep)
    done = run_points(points, console, events=events)
    document = _document(done, swept)
    if out is not None:
        _write(done, document, out, swept, events, parquet)
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        _print(done, swept, console, out)
    _expect(done)


def _document(points: list[Point], swept: bool) -> dict[str, Any]:
    from talkoot.sims.planning.sweep import summary_of

    if swept:
        return {"kind": "sweep", "points": [summary_of(point) for point in points]}
    return {
        "kind": "plan",
        "name": points[0].scenario.name,
        "scenario": points[0].scenario.model_dump(mode="json"),
        "runs": [run.to_json() for run in points[0].results],
    }


def _write(
    points: list[Point],
    document: dict[str, Any],
    out: Path,
    swept: bool,
    events: bool,
    parquet: bool,
) -> None:
    from talkoot.protocol.files import write_atomic
    from talkoot.sims.planning.report import write_report, write_sweep
    from talkoot.sims.planning.table import write_events

    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "plan.json", json.dumps(document, indent=1).encode())
    if swept:
        write_sweep(points, out)
    else:
        write_report(points[0].results, out)
        if events:
            write_events(points[0].results[0], out / "events", parquet=parquet)


def _print(points: list[Point], swept: bool, console: Any, out: Path | None) -> None:
    from talkoot.sims.planning.words import print_plan, print_sweep

    if swept:
        print_sweep(points, console)
    else:
        print_plan(points[0].results, console)
    if out is not None:
        console.print(f"\n{out / 'index.html'}", highlight=False, soft_wrap=True)


def _expect(points: list[Point]) -> None:
    """Whether each plan's own expectations hold. Raises :class:`ExpectationError`."""
    from talkoot.protocol.errors import TalkootError
    from talkoot.sims.scenario import broken

    found = []
    for point in points:
        for result in point.results:
            label = f"{point.label}: " if point.label else ""
            label += f"seed {result.scenario.seed}: " if len(point.results) > 1 else ""
            found += [label + text for text in broken(point.scenario.expect, result.figures)]
    if found:
        raise TalkootError("What the scenario expects does not hold: " + " ".join(found))
