"""``talkoot-sim run``: a scenario with real training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talkoot.sims.cli_scenario import complete_scenario

if TYPE_CHECKING:
    from rich.console import Console

    from talkoot.sims.scenario import Scenario
    from talkoot.sims.virtual.command import RunResult
    from talkoot.sims.virtual.estimate import Estimate


def run_scenario(
    scenario: Annotated[
        str,
        typer.Argument(
            help="A scenario file, or a name of the library (talkoot-sim scenarios).",
            autocompletion=complete_scenario,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Report, figures and tables; runs/NAME-sSEED if not given."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="The nodes' files; /dev/shm/… saves the disk's time. In --out if not."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Processes that train; one for each CPU if not given."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, all of whose machines see --work."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Instead of the scenario's.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of the scenario's.")] = None,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Write the tables as Parquet, too (pyarrow).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take in time and memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Simulate a scenario with real training: the real apps in Flower's simulation engine on Ray.

    Only the clock and the lines are virtual. The same command goes on where it
    was interrupted. The exit status is 1 when something that the scenario expects
    does not hold.
    """
    from rich.console import Console

    from talkoot.sims.scenario import load_scenario
    from talkoot.sims.tables import require_parquet
    from talkoot.sims.virtual.command import require_extra, run

    given = {"seed": seed, "rounds": rounds}
    loaded = load_scenario(scenario, {k: v for k, v in given.items() if v is not None})
    console = Console(stderr=True)
    require_extra()
    if parquet:
        require_parquet()
    if dry_run:
        from talkoot.sims.virtual.estimate import estimate

        place = (work or out or Path("runs")).absolute()
        found = estimate(loaded, workers, place)
        typer.echo(json.dumps(found.to_json(), indent=1) if as_json else estimate_text(found))
        return
    with _Progress(console, loaded) as progress:
        result = run(
            loaded,
            out=out,
            work=work,
            workers=workers,
            address=address,
            progress=progress.hear,
            parquet=parquet,
        )
    if as_json:
        typer.echo(json.dumps(result.document, indent=1))
    else:
        _print(result, Console())
    for sentence in result.broken:
        console.print(f"expected otherwise: {sentence}", style="red", highlight=False, markup=False)
    if not result.holds:
        raise typer.Exit(1)


def estimate_text(found: Estimate) -> str:
    """An estimate in words."""
    from talkoot.protocol.memory import format_size
    from talkoot.sims.figures import seconds_text

    speed = found.tokens_per_second
    told = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
    how = "measured just now" if found.measured else "derived from a smaller model"
    lines = [
        f"{found.rounds} rounds of {found.nodes} nodes with {found.parameters:,} parameters, on "
        f"{found.workers} workers.",
        f"time    about {seconds_text(found.seconds)} ({told} tokens a second and worker, {how})",
        f"memory  about {format_size(found.memory_bytes)}; {format_size(found.memory_free_bytes)} "
        "free",
        f"disk    about {format_size(found.disk_bytes)}; {format_size(found.disk_free_bytes)} free",
    ]
    if found.memory_bytes > found.memory_free_bytes:
        lines.append(
            "That is more memory than is free: give fewer --workers."
            if found.measured
            else "That is more memory than is free: use talkoot-sim plan, or a smaller model."
        )
    if found.disk_bytes > found.disk_free_bytes:
        lines.append(
            "That is more disk than is free: give another --work, or simulate fewer nodes."
        )
    return "\n".join(lines)


class _Progress:
    """A bar of rounds and a line about what goes on."""

    def __init__(self, console: Console, scenario: Scenario) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("{task.fields[doing]}", style="dim"),
            console=console,
            transient=True,
        )
        total = scenario.rounds
        self._task = self._bar.add_task(scenario.name, total=total, doing="starting Ray")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def hear(self, told: dict[str, Any]) -> None:
        """Show what the engine tells."""
        from talkoot.sims.figures import seconds_text

        what = told["what"]
        if what == "training":
            doing = f"round {told['round']}: {told['done']} of {told['total']} leases trained"
        elif what in ("leased", "published"):
            doing = f"round {told['round']} {what}, {seconds_text(told['now'])} on the clock"
        elif what == "admitting":
            doing = f"admitting {told['total']} nodes"
        else:
            doing = what
        self._bar.update(self._task, doing=doing)
        if what == "published":
            self._bar.update(self._task, completed=told["round"])


def _print(result: RunResult, console: Console) -> None:
    from rich.table import Table

    from talkoot.sims.figures import number_text
    from talkoot.sims.scenario import METRICS

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    for name, words in METRICS.items():
        value = result.figures.get(name)
        if value is not None:
            table.add_row(number_text(value), words.replace(" (run)", ""))
    console.print(table)
    console.print(f"\n{result.out / 'report.html'}", highlight=False, soft_wrap=True)
