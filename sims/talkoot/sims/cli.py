"""``talkoot-sim``: the researcher's command line. Heavy imports wait for their command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from talkoot.protocol.console import run

app = typer.Typer(
    name="talkoot-sim",
    help="Run whole talkoot networks on one machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Run whole talkoot networks on one machine."""


@app.command()
def demo(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Volunteers.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 12,
    model: Annotated[
        str, typer.Option(help="nano, tiny, small, or smollm2 (a real pretrained model).")
    ] = "small",
    tokens_per_node: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a lease; the model's own if not given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where network and report go; made anew.")] = Path(
        "runs/demo"
    ),
    kills: Annotated[
        bool, typer.Option(help="Kill a volunteer and the coordinator on the way.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report's figures as JSON at the end.")
    ] = False,
) -> None:
    """A real network of processes on this machine, from invite to exported model, with a report."""
    from rich.console import Console

    from talkoot.sims.demo import DemoOptions, check, run_demo

    options = DemoOptions(out.absolute(), nodes, rounds, model, tokens_per_node, kills)
    # With --json standard output is for the figures alone.
    data = run_demo(options, Console(stderr=True) if as_json else None)
    if as_json:
        typer.echo(json.dumps(data.to_json(), indent=2))
    else:
        from talkoot.sims.summary import print_summary

        print_summary(data, options.out / "report")
    check(data)


@app.command()
def chaos(
    kills: Annotated[
        int | None, typer.Option(min=1, help="Deaths of the soak; 200 if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides who dies when.")] = 0,
    nodes: Annotated[int | None, typer.Option(min=1, max=16, help="Volunteers.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About two minutes.")] = False,
    ledger_url: Annotated[
        str, typer.Option(help="An empty PostgreSQL database for the soak; SQLite if not given.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Where networks and figures go.")] = Path("runs/chaos"),
) -> None:
    """Kill every process of a real network, again and again, and audit it after each death."""
    from talkoot.sims.chaos.run import QUICK, ChaosOptions, run_chaos

    chosen = {"kills": kills, "nodes": nodes}
    given = {key: value for key, value in chosen.items() if value is not None}
    options = ChaosOptions(
        out.absolute(), seed=seed, ledger_url=ledger_url, **{**(QUICK if quick else {}), **given}
    )
    document = run_chaos(options, typer.echo)
    typer.echo(
        f"{document['soak']['kills']} kills survived, nothing lost; figures in "
        f"{options.out / 'chaos.json'}"
    )


def main() -> None:
    """Entry point."""
    run(app)
