"""``talkoot-coordinator``: the operator's command line. Heavy imports wait for their command."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from talkoot.protocol.console import is_loopback, parse_duration, run

if TYPE_CHECKING:
    from talkoot.server.coordinator import Coordinator
    from talkoot.server.registry import Registry

app = typer.Typer(
    name="talkoot-coordinator",
    help="Run the coordinator of a talkoot network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
nodes_app = typer.Typer(help="See, approve and ban nodes.", no_args_is_help=True)
app.add_typer(nodes_app, name="nodes")

store_app = typer.Typer(help="The object store that artifacts are copied to.", no_args_is_help=True)
app.add_typer(store_app, name="store")

State = Annotated[
    Path, typer.Option("--state", help="The state directory.", envvar="TALKOOT_STATE_DIR")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DEFAULT_STATE = Path("talkoot-state")


class Role(StrEnum):
    """What a node is to the operator."""

    volunteer = "volunteer"
    validator = "validator"


def _open(state: Path) -> Coordinator:
    from talkoot.server.coordinator import Coordinator

    return Coordinator.open(state)


def _registry(coordinator: Coordinator) -> Registry:
    from talkoot.server.flower import ControlApi
    from talkoot.server.registry import Registry

    port = coordinator.config.network.superlink_port
    return Registry(coordinator, ControlApi(port, coordinator.ca_pem))


@app.command()
def init(
    state: State = DEFAULT_STATE,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A TOML file; see 'sample-config'.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A model preset, instead of a --config.")
    ] = None,
) -> None:
    """Make the state of a new run: keys, ledger, corpus, first version."""
    from talkoot.protocol.errors import ConfigError
    from talkoot.server.config import Config, ModelSection, load_config
    from talkoot.server.setup import init as make

    if (config is None) == (preset is None):
        raise ConfigError("Give either --config FILE or --preset NAME.")
    chosen = load_config(config) if config else Config(model=ModelSection(preset=preset))
    make(state, chosen, say=typer.echo)
    typer.echo(f"Next: talkoot-coordinator serve --state {state}")


@app.command("sample-config")
def sample_config(
    preset: Annotated[str, typer.Option(help="The model preset to write into it.")] = "small",
) -> None:
    """Print a whole configuration with its defaults, to edit."""
    from talkoot.server.config import Config, ModelSection, dump_config

    typer.echo(dump_config(Config(model=ModelSection(preset=preset))), nl=False)


@app.command()
def serve(state: State = DEFAULT_STATE) -> None:
    """Run the coordinator until Ctrl-C (twice: at once)."""
    from talkoot.server.serve import serve_forever

    serve_forever(state, typer.echo)


@app.command()
def invite(
    state: State = DEFAULT_STATE,
    uses: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many nodes.")] = 1,
    expires: Annotated[str, typer.Option(help="How long it is good: 12h, 7d, 2w.")] = "7d",
    role: Annotated[
        Role, typer.Option(help="volunteer, or validator: whose word on others' work is trusted.")
    ] = Role.volunteer,
) -> None:
    """Print an invite: one URL that carries address, CA fingerprint and token."""
    coordinator = _open(state)
    made = _registry(coordinator).invite(
        uses=uses, expires_seconds=parse_duration(expires), role=role.value
    )
    typer.echo(made.url())
    network = coordinator.config.network
    if is_loopback(network.public_host) and not is_loopback(network.bind):
        typer.echo(
            f"warning: this invite names {network.public_host}, which only this machine reaches: "
            f"set network.public_host in {coordinator.state.config} for volunteers elsewhere.",
            err=True,
        )


@app.command()
def status(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Where the run stands."""
    from talkoot.server.status import status as read_status

    document = read_status(_open(state), history_rounds=5)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    from talkoot.server.tables import print_status

    print_status(document)


@app.command()
def rounds(
    state: State = DEFAULT_STATE,
    as_json: Json = False,
    last: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 20,
) -> None:
    """The newest rounds: loss, tokens, contributions, bytes, seconds, why they closed."""
    from talkoot.server.status import status as read_status

    history = read_status(_open(state), history_rounds=last)["history"]
    if as_json:
        typer.echo(json.dumps(history, indent=2))
        return
    from talkoot.server.tables import print_rounds

    print_rounds(history)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="A directory that does not exist yet.")],
    state: State = DEFAULT_STATE,
    version: Annotated[
        int | None, typer.Option(help="Which version; the newest if not given.")
    ] = None,
) -> None:
    """Write a version as a model that AutoModelForCausalLM.from_pretrained loads."""
    from talkoot.server.export import export_version

    made = export_version(_open(state), out, version)
    typer.echo(f"Version {made.version} ({made.weights_digest[:12]}) is in {out}")


@app.command()
def verify(
    state: State = DEFAULT_STATE,
    as_json: Json = False,
    shallow: Annotated[
        bool, typer.Option(help="The ledger alone: no file is hashed, no version computed anew.")
    ] = False,
) -> None:
    """Audit ledger and files, while serving or not; exit status 1 with any finding."""
    from talkoot.server.audit import Auditor

    found = Auditor(state.absolute()).audit(shallow=shallow)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.lines()))
    if not found.whole:
        raise typer.Exit(1)


@nodes_app.command("list")
def nodes_list(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """All nodes and what they do."""
    from talkoot.server.status import status as read_status

    nodes = read_status(_open(state), history_rounds=0)["nodes"]
    if as_json:
        typer.echo(json.dumps(nodes, indent=2))
        return
    from talkoot.server.tables import print_nodes

    print_nodes(nodes)


@nodes_app.command("approve")
def nodes_approve(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    state: State = DEFAULT_STATE,
) -> None:
    """Admit a node that waits for approval, or lift a ban."""
    from talkoot.server.registry import find_node

    registry = _registry(_open(state))
    found = find_node(registry.nodes(), node)
    registry.approve(found.node_id)
    typer.echo(f"{found.name} ({found.node_id}) is admitted.")


@nodes_app.command("ban")
def nodes_ban(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    reason: Annotated[str, typer.Option(help="The node is told.")] = "Banned by the operator.",
    state: State = DEFAULT_STATE,
) -> None:
    """Shut a node out of every plane."""
    from talkoot.server.registry import find_node

    registry = _registry(_open(state))
    found = find_node(registry.nodes(), node)
    registry.ban(found.node_id, reason)
    typer.echo(f"{found.name} ({found.node_id}) is banned.")


@nodes_app.command("show")
def nodes_show(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    state: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """A node's standing and the reasons for it."""
    from talkoot.server.belief import Belief
    from talkoot.server.registry import find_node

    coordinator = _open(state)
    found = find_node(_registry(coordinator).nodes(), node)
    document = {
        "node_id": found.node_id,
        "name": found.name,
        "status": found.status,
        "status_sentence": found.sentence,
        **Belief(coordinator).record_of(found.node_id),
    }
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    from talkoot.server.tables import print_record

    print_record(document)


@nodes_app.command("quarantine")
def nodes_quarantine(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    why: Annotated[str, typer.Option("--why", help="The node is told.")],
    state: State = DEFAULT_STATE,
) -> None:
    """Keep a node out of rounds; it stays connected, and may be pardoned."""
    import time

    from talkoot.server.belief import Belief
    from talkoot.server.registry import find_node

    coordinator = _open(state)
    found = find_node(_registry(coordinator).nodes(), node)
    Belief(coordinator).quarantine(found.node_id, why, now=time.time())
    typer.echo(f"{found.name} ({found.node_id}) is quarantined.")


@nodes_app.command("pardon")
def nodes_pardon(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    state: State = DEFAULT_STATE,
) -> None:
    """End a node's quarantine: it begins anew, on probation."""
    import time

    from talkoot.server.belief import Belief
    from talkoot.server.registry import find_node

    coordinator = _open(state)
    found = find_node(_registry(coordinator).nodes(), node)
    Belief(coordinator).pardon(found.node_id, now=time.time())
    typer.echo(f"{found.name} ({found.node_id}) is pardoned, and on probation.")


@store_app.command("copy")
def store_copy(state: State = DEFAULT_STATE) -> None:
    """Copy to it what it lacks, now; 'serve' does so by itself."""
    from talkoot.server.copier import Copier, open_store

    coordinator = _open(state)
    done = Copier(coordinator, open_store(coordinator)).turn()
    typer.echo(f"{done.objects} objects copied ({done.bytes} bytes), {done.present} were there.")


@store_app.command("verify")
def store_verify(
    state: State = DEFAULT_STATE,
    url: Annotated[
        str | None, typer.Option(help="A store or mirror to read instead of store.url.")
    ] = None,
) -> None:
    """Read back what nodes may ask for (blocks aside) and compare it with its digests."""
    from talkoot.protocol.errors import IntegrityError
    from talkoot.server.copier import open_store, verify_store
    from talkoot.server.objects import ObjectStore

    coordinator = _open(state)
    store = open_store(coordinator) if url is None else ObjectStore(url)
    right, missing, wrong = verify_store(coordinator, store, typer.echo)
    typer.echo(f"{right} right, {missing} missing, {wrong} wrong.")
    if missing or wrong:
        raise IntegrityError(
            f"{store.url} does not hold all that it should: run 'store copy', or serve, and look "
            "again.",
            code="store-differs",
        )


def main() -> None:
    """Entry point."""
    run(app)
