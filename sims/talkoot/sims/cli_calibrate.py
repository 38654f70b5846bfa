"""``talkoot-sim calibrate``: is the simulation right?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from talkoot.sims.cli_scenario import complete_scenario


def calibrate(
    scenario: Annotated[
        str,
        typer.Argument(
            help="A small scenario's file, or a name of the library.",
            autocompletion=complete_scenario,
        ),
    ] = "loopback-2",
    out: Annotated[
        Path | None,
        typer.Option(help="Networks, report and figures, made anew; runs/calibrate-NAME if not."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=2, max=20, help="Simulations, for what chance does to a loss.")
    ] = 6,
    shape: Annotated[
        bool,
        typer.Option(
            help="Put the scenario's lines between the real nodes (network namespaces: needs root)."
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print calibration.json.")] = False,
) -> None:
    """Let a small real network live through a scenario, and hold the simulation against it.

    Real processes over TLS, then simulations with the speeds and lines that they
    had. Round time and bytes must agree within 10 %, and losses as one more seed
    would in 95 of 100 cases; the exit status is 1 if they do not.
    """
    from rich.console import Console

    from talkoot.sims.calibration.report import print_calibration, write_report
    from talkoot.sims.calibration.run import calibrate as run
    from talkoot.sims.scenario import load_scenario
    from talkoot.sims.wan import impossible

    loaded = load_scenario(scenario)
    target = (out or Path(f"runs/calibrate-{loaded.name}")).absolute()
    console = Console(stderr=True)
    why = impossible() if shape else None
    if why is not None:
        console.print(f"Without the scenario's lines: {why}.", style="dim", highlight=False)
    with console.status("") as status:
        found = run(
            loaded,
            out=target,
            seeds=seeds,
            shaped=shape and why is None,
            say=lambda text: status.update(f"{loaded.name}: {text}"),
        )
    page = write_report(found, target)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        told = Console()
        print_calibration(found, told)
        told.print(f"\n{page}", highlight=False, soft_wrap=True)
    if not found.comparison.holds:
        raise typer.Exit(1)
