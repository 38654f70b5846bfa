"""``talkoot``: the volunteer's command line. Heavy imports wait for their command."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talkoot.protocol.console import format_count, run

if TYPE_CHECKING:
    from talkoot.client.home import Home

app = typer.Typer(
    name="talkoot",
    help="Give your machine to a model that a community trains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

HomePath = Annotated[
    Path, typer.Option("--home", help="This node's directory.", envvar="TALKOOT_HOME")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
MaxVram = Annotated[
    str | None, typer.Option(help="The most of an accelerator's memory that it may take: 20GiB.")
]
MaxRam = Annotated[
    str | None, typer.Option(help="The most of the host's memory that its trainer may take: 12GiB.")
]
MaxDisk = Annotated[
    str | None, typer.Option(help="The most that all of its files may take: 100GiB.")
]
FASTEST = "fastest"
DEFAULT_HOME = Path("~/.local/share/talkoot")
FRESH_SECONDS = 10.0


def _home(path: Path) -> Home:
    from talkoot.client.home import Home

    return Home(path.expanduser().absolute())


def _quiet_flower() -> None:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


@app.command()
def join(
    invite: Annotated[
        str | None,
        typer.Argument(help="The invite URL, or - to read it from standard input; once is enough."),
    ] = None,
    home: HomePath = DEFAULT_HOME,
    name: Annotated[str | None, typer.Option(help="How the operator sees this node.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, xpu …; the best there is if not given.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the trainer.")] = None,
    max_vram: MaxVram = None,
    max_ram: MaxRam = None,
    max_disk: MaxDisk = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="How to hold the replica; 'fastest' chooses anew from those that fit."),
    ] = None,
    max_upload: Annotated[
        str | None, typer.Option(help="Upload rate per second, e.g. 2MB.")
    ] = None,
    max_download: Annotated[
        str | None, typer.Option(help="Download rate per second, e.g. 10MB.")
    ] = None,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="The most work that a crash can cost, seconds.")
    ] = None,
    enrol_only: Annotated[
        bool,
        typer.Option(help="Only enrol and prove; prints how to start a stock flower-supernode."),
    ] = False,
) -> None:
    """Join a network and train until Ctrl-C (twice: at once)."""
    _quiet_flower()
    from talkoot.client.argv import hide
    from talkoot.client.join import join as do_join
    from talkoot.protocol.memory import parse_size

    if invite == "-":
        invite = sys.stdin.readline().strip()
    elif invite is not None:
        hide(invite)  # from those who list this machine's processes
    node = _home(home)
    chosen: dict[str, Any] = {
        "device": device,
        "threads": threads,
        **_sizes(max_vram, max_ram, max_disk),
        "recipe": recipe,
        "max_rate_up": float(parse_size(max_upload)) if max_upload else None,
        "max_rate_down": float(parse_size(max_download)) if max_download else None,
        "checkpoint_seconds": checkpoint_seconds,
    }
    given = {key: value for key, value in chosen.items() if value is not None}
    if recipe is not None:
        given["recipe"] = _recipe(recipe)
    settings = node.settings().model_copy(update=given) if given else None
    do_join(
        *(node, invite, name, settings, _say),
        enrol_only=enrol_only,
        choose_anew=recipe is not None,
    )


def _sizes(vram: str | None, ram: str | None, disk: str | None) -> dict[str, int | None]:
    """Caps as settings have them."""
    from talkoot.protocol.errors import ConfigError
    from talkoot.protocol.memory import parse_size

    sizes = {}
    for name, text in (("vram", vram), ("ram", ram), ("disk", disk)):
        size = parse_size(text) if text else None
        if size == 0:
            raise ConfigError(f"--max-{name} must be more than nothing: write 12GiB, say.")
        sizes[f"max_{name}_bytes"] = size
    return sizes


def _recipe(name: str) -> str | None:
    """The recipe that is wanted; None for whatever is fastest."""
    from talkoot.protocol.recipes import get

    return None if name == FASTEST else get(name).name


def _say(sentence: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')}  {sentence}")


@app.command()
def status(home: HomePath = DEFAULT_HOME, as_json: Json = False) -> None:
    """What the node is doing."""
    node = _home(home)
    node.require()
    try:
        document: dict[str, Any] = json.loads(node.status_path.read_bytes())
    except (OSError, ValueError):
        document = {"state": "never started"}
    # A clock that was set back must not make a dead daemon look alive.
    fresh = abs(time.time() - float(document.get("unix", 0))) < FRESH_SECONDS
    if not fresh and document["state"] not in ("stopped", "never started"):
        document["state"] = "not running"
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"{document.get('name', '?')} ({document.get('node_id', '?')}): {document['state']}")
    if "coordinator" in document:
        reach = "reachable" if document["reachable"] and fresh else "not reached"
        typer.echo(f"  coordinator {document['coordinator']}: {reach}, {document['status']}")
        typer.echo(f"  {_progress(document)}")
        typer.echo(
            f"  {document['contributions']} contributions, up "
            f"{format_count(document['bytes_up'])}B, down {format_count(document['bytes_down'])}B"
        )
        typer.echo(f"  {document['last']}")


def _progress(document: dict[str, Any]) -> str:
    version, loss = document["version"], document["loss"]
    if version is None:
        return "no work yet since it started"
    step = f"step {document['step']}/{document['steps']}, " if document["steps"] else ""
    told = "—" if loss is None else f"{loss:.4f}"
    speed = format_count(document["tokens_per_second"])
    return f"version {version}, {step}loss {told}, {speed} tokens/s"


@app.command()
def pause(home: HomePath = DEFAULT_HOME) -> None:
    """Stop training at the next step, until 'talkoot resume'."""
    node = _home(home)
    node.require()
    node.pause.touch()
    typer.echo("Paused: the device is free within a step. 'talkoot resume' goes on.")


@app.command()
def resume(home: HomePath = DEFAULT_HOME) -> None:
    """Go on after 'talkoot pause'."""
    node = _home(home)
    node.require()
    node.pause.unlink(missing_ok=True)
    typer.echo("Goes on.")


@app.command()
def leave(home: HomePath = DEFAULT_HOME) -> None:
    """Leave the network and delete the replica, the cache and the key."""
    from talkoot.client.join import leave as do_leave

    do_leave(_home(home), typer.echo)


@app.command()
def doctor(
    home: HomePath = DEFAULT_HOME,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, xpu …")] = None,
    max_vram: MaxVram = None,
    max_ram: MaxRam = None,
    max_disk: MaxDisk = None,
    model: Annotated[
        str | None, typer.Option(help="A model preset or config.json to hold it against.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 2048,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure this machine, and say whether it can hold a replica of a model."""
    from talkoot.client.doctor import examine, print_findings

    given = {key: size for key, size in _sizes(max_vram, max_ram, max_disk).items() if size}
    node = _home(home)
    settings = node.settings().model_copy(update=given)
    if device is not None:
        settings = settings.model_copy(update={"device": device})
    findings = examine(
        node,
        settings,
        model,
        sequence_length,
        micro_batch,
    )
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings)
    if findings["fits"] is False:
        raise typer.Exit(1)


def main() -> None:
    """Entry point."""
    run(app)
