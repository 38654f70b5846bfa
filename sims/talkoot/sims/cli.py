"""``talkoot-sim``: the researcher's command line. Heavy imports wait for their command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from talkoot.protocol.console import run
from talkoot.sims.cli_calibrate import calibrate
from talkoot.sims.cli_compare import compare, published
from talkoot.sims.cli_plan import plan
from talkoot.sims.cli_run import run_scenario
from talkoot.sims.cli_scenario import scenarios

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
    postgres: Annotated[
        bool, typer.Option("--postgres", help="The soak's ledger on a private PostgreSQL.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where networks and figures go.")] = Path("runs/chaos"),
    as_json: Annotated[bool, typer.Option("--json", help="Print chaos.json at the end.")] = False,
) -> None:
    """Kill every process of a real network, again and again, and audit it after each death."""
    from talkoot.sims.chaos.run import QUICK, ChaosOptions, run_chaos

    chosen = {"kills": kills, "nodes": nodes}
    given = {key: value for key, value in chosen.items() if value is not None}
    options = ChaosOptions(
        out.absolute(), seed=seed, postgres=postgres, **{**(QUICK if quick else {}), **given}
    )
    document = run_chaos(options, lambda line: typer.echo(line, err=as_json))
    if as_json:
        typer.echo(json.dumps(document, indent=1))
        return
    typer.echo(
        f"{document['soak']['kills']} kills survived, nothing lost; figures in "
        f"{options.out / 'chaos.json'}"
    )


@app.command()
def parity(
    model: Annotated[
        str, typer.Option(help="nano, tiny, small, smollm2, or a transformers model's directory.")
    ] = "nano",
    config: Annotated[
        Path | None,
        typer.Option(help="An operator's config.toml instead of the options about the model."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="key=value,… of the configuration, of nodes.speeds, nodes.dropout, nodes.recipes, "
            "nodes.own_text, and name; again for more. The first is held against the bars."
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Again for more; 0, 1, 2.")] = None,
    nodes: Annotated[int, typer.Option(min=2, max=256, help="Volunteers.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Outer rounds.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Inner steps in a round (H).")] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a node's batch.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="Inner peak; the model's own if not given.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Text, as in corpus.sources; again for more.")
    ] = None,
    heldout_tokens: Annotated[int, typer.Option(min=1, help="To measure losses on.")] = 32_768,
    out: Annotated[Path, typer.Option(help="Results and corpora; finished work is kept.")] = Path(
        "runs/parity"
    ),
    work: Annotated[
        Path | None,
        typer.Option(
            help="The nodes' files; /dev/shm/… saves the disk's time. In --out if not given."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print parity.json at the end.")] = False,
) -> None:
    """Measure how much of a data centre's learning the network captures, on the real code.

    Trains one node alone, all nodes as one data-parallel job, and the network,
    for each seed, and writes table, curves and parity.json. The same command again
    does only what is missing.
    """
    from rich.console import Console

    from talkoot.sims.parity.command import parity_options
    from talkoot.sims.parity.report import print_parity, write_parity
    from talkoot.sims.parity.result import summarise
    from talkoot.sims.parity.run import run_parity

    options = parity_options(
        model=model,
        config=config,
        arms=arm or [],
        seeds=seed or [0, 1, 2],
        nodes=nodes,
        rounds=rounds,
        steps=steps,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        sources=source or [],
        heldout_tokens=heldout_tokens,
        out=out.absolute(),
        work=work,
    )
    console = Console(stderr=as_json)
    measured = run_parity(
        options, lambda line: console.print(line, style="dim", highlight=False, soft_wrap=True)
    )
    data = summarise(options, measured)
    page = write_parity(data, options.out)
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        print_parity(data, console)
        console.print(f"\n{page}")


@app.command()
def attacks(
    quick: Annotated[bool, typer.Option("--quick", help="Small arms, in about a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Results; finished arms are kept.")] = Path(
        "runs/attacks"
    ),
    work: Annotated[
        Path | None, typer.Option(help="The networks' files; /dev/shm/… saves the disk's time.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Again for more; 0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print attacks.json at the end.")] = False,
) -> None:
    """Set liars of many kinds on the real coordinator, with its defences and without.

    Writes attacks.json and a plot. The same command again does only what is
    missing; several at the same time share the work.
    """
    import torch

    from talkoot.sims.attacks.figures import plot, table
    from talkoot.sims.attacks.suite import FULL, QUICK, run_suite

    torch.set_num_threads(1)
    out = out.absolute()
    data = run_suite(
        out,
        (work or out / "work").absolute(),
        QUICK if quick else FULL,
        lambda line: typer.echo(line, err=True),
        seeds=seed or [0],
    )
    plot(data, out / "attacks.png")
    typer.echo(json.dumps(data, indent=1) if as_json else table(data))


app.command()(scenarios)
app.command(name="run")(run_scenario)
app.command()(plan)
app.command()(calibrate)
app.command()(compare)
app.command()(published)


def main() -> None:
    """Entry point."""
    run(app)
