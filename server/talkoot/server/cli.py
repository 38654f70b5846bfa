"""``talkoot-coordinator``: the operator's command line. Heavy imports wait for their command."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from talkoot.protocol.console import is_loopback, parse_duration, run
from talkoot.server import cli_backup

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
nodes_app = typer.Typer(help="See, approve, refuse and ban nodes.", no_args_is_help=True)
app.add_typer(nodes_app, name="nodes")
invites_app = typer.Typer(help="See and revoke invites.", no_args_is_help=True)
app.add_typer(invites_app, name="invites")
ca_app = typer.Typer(help="See and rotate the certificate authority.", no_args_is_help=True)
app.add_typer(ca_app, name="ca")

app.command()(cli_backup.backup)
app.command()(cli_backup.restore)
app.command()(cli_backup.repair)
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
    return Registry(coordinator, ControlApi(port, coordinator.loopback_ca_pem))


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
    from talkoot.protocol.model import preset as known
    from talkoot.server.config import Config, ModelSection, dump_config

    known(preset)  # a typing error is told now, and not by 'init'
    typer.echo(dump_config(Config(model=ModelSection(preset=preset))), nl=False)


@app.command()
def recipes(
    model: Annotated[str, typer.Option(help="A model preset, a model directory or a config.json.")],
    sequence_length: Annotated[
        int,
        typer.Option("--sequence-length", "--seq", min=2, max=2**20, help="Tokens in a sequence."),
    ] = 2048,
    micro_batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences in a batch.")] = 1,
    vram: Annotated[
        str, typer.Option(help="Cards to hold it against, in GiB.")
    ] = "8,12,16,24,32,48,80",
    margin: Annotated[
        float, typer.Option(min=1.0, max=4.0, help="As admission.memory_margin.")
    ] = 1.05,
    quick: Annotated[
        bool, typer.Option("--quick", help="Estimate what has not been simulated yet.")
    ] = False,
    accumulate: Annotated[
        bool,
        typer.Option("--accumulate", help="For a run with inner.max_steps: steps of many batches."),
    ] = False,
    as_json: Json = False,
) -> None:
    """What a replica of a model needs under each recipe, and on which cards it fits."""
    from talkoot.server.recipes import card_sizes, examine, lines

    findings = examine(
        model,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        cards=card_sizes(vram),
        margin=margin,
        quick=quick,
        accumulate=accumulate,
        say=lambda sentence: typer.echo(sentence, err=True),
    )
    typer.echo(json.dumps(findings, indent=2) if as_json else "\n".join(lines(findings)))


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
    everybody: Annotated[
        bool, typer.Option("--everybody", help="Without a token: who comes waits for approval.")
    ] = False,
) -> None:
    """Print an invite: one URL that carries address, CA fingerprint and token."""
    from talkoot.server.invites import public_link

    coordinator = _open(state)
    if everybody:
        made = public_link(coordinator)
    else:
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


@invites_app.command("list")
def invites_list(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """All invites: for whom, until when, how many nodes came with each. Tokens are not kept."""
    from talkoot.server.invites import list_invites
    from talkoot.server.tables_gate import invite_rows, print_invites

    rows = invite_rows(list_invites(_open(state)), time.time())
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    print_invites(rows)


@invites_app.command("revoke")
def invites_revoke(
    number: Annotated[int, typer.Argument(help="As 'invites list' shows it.")],
    state: State = DEFAULT_STATE,
    ban: Annotated[
        bool, typer.Option("--ban", help="Ban the nodes that came with it, too.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Told to nodes that are banned.")] = (
        "The invite that this node came with was revoked."
    ),
) -> None:
    """Make an invite useless from now on."""
    from talkoot.server.invites import revoke

    banned = revoke(_registry(_open(state)), number, ban=ban, reason=reason)
    told = f", and {len(banned)} nodes that came with it are banned" if ban else ""
    typer.echo(f"Invite {number} is revoked{told}.")


@ca_app.command("status")
def ca_status(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Which CA signs what, and until when."""
    from talkoot.server.tables_gate import ca_document, print_ca

    document = ca_document(_open(state), time.time())
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    print_ca(document)


@ca_app.command("rotate")
def ca_rotate(
    state: State = DEFAULT_STATE,
    overlap: Annotated[
        str, typer.Option(help="How long both CAs are accepted: 12h, 7d, 2w.")
    ] = "30d",
) -> None:
    """Make the next CA. Both are accepted for a while, then the old one is not any more."""
    from talkoot.server.coordinator import note
    from talkoot.server.invites import open_invites
    from talkoot.server.trust import rotate

    coordinator = _open(state)
    seconds = parse_duration(overlap)
    made = rotate(coordinator.state.ca, seconds)
    with coordinator.ledger.write() as session:
        note(session, "ca", "A rotation of the CA has begun.")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(made.switch_unix))
    typer.echo(
        f"The next CA is {made.issuing.fingerprint[:16]}…; it takes over on {when}. Nodes that "
        "report until then learn of it, and those that were off find it when they come back."
    )
    waiting = open_invites(coordinator, made.switch_unix or 0.0)
    if waiting:
        typer.echo(
            f"warning: {waiting} open invites end with the old CA on {when}: give out new ones "
            "after that.",
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
    from talkoot.protocol.files import DirectoryLock
    from talkoot.server.tables import print_status

    print_status(document)
    if not DirectoryLock.is_held(state):
        typer.echo(f"It is not being served: 'talkoot-coordinator serve --state {state}' goes on.")


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
    merge: Annotated[
        bool, typer.Option("--merge", help="Of an adapter run: one model, not the adapters.")
    ] = False,
) -> None:
    """Write a version as a model that AutoModelForCausalLM.from_pretrained loads.

    Of an adapter run, adapters that PEFT reads; with --merge a model, too.
    """
    from talkoot.server.export import export_version

    made = export_version(_open(state), out, version, merge=merge)
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


@nodes_app.command("queue")
def nodes_queue(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Who asks to be let in without an invite (with admission.enrolment = "open")."""
    from talkoot.server.applicants import waiting
    from talkoot.server.tables_gate import applicant_rows, print_applicants

    rows = applicant_rows(waiting(_open(state)), time.time())
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    print_applicants(rows)


@nodes_app.command("approve")
def nodes_approve(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    state: State = DEFAULT_STATE,
    role: Annotated[
        Role, typer.Option(help="Of a node from the queue: volunteer, or validator.")
    ] = Role.volunteer,
) -> None:
    """Let a node in that waits in the queue, or admit one that waits for approval."""
    from talkoot.server import applicants
    from talkoot.server.registry import find_node

    coordinator = _open(state)
    registry = _registry(coordinator)
    queue = applicants.waiting(coordinator)
    if any(node == a.name or a.node_id.startswith(node) for a in queue):
        asked = find_node(queue, node)
        applicants.decide(coordinator, asked.node_id, approve=True, role=role.value)
        typer.echo(f"{asked.name} ({asked.node_id}) may come in; it hears of it in a minute.")
        return
    found = find_node(registry.nodes(), node)
    registry.approve(found.node_id)
    typer.echo(f"{found.name} ({found.node_id}) is admitted.")


@nodes_app.command("refuse")
def nodes_refuse(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    state: State = DEFAULT_STATE,
    reason: Annotated[str, typer.Option(help="The node is told.")] = "Refused by the operator.",
) -> None:
    """Refuse a node that waits in the queue."""
    from talkoot.server import applicants
    from talkoot.server.registry import find_node

    coordinator = _open(state)
    found = find_node(applicants.waiting(coordinator), node)
    applicants.decide(coordinator, found.node_id, approve=False, reason=reason)
    typer.echo(f"{found.name} ({found.node_id}) is refused.")


@nodes_app.command("lift")
def nodes_lift(
    node: Annotated[str, typer.Argument(help="Id, beginning of an id, or name.")],
    state: State = DEFAULT_STATE,
) -> None:
    """Lift a ban."""
    from talkoot.server.registry import find_node

    registry = _registry(_open(state))
    found = find_node(registry.nodes(), node)
    status = registry.lift(found.node_id)
    typer.echo(f"{found.name} ({found.node_id}) is not banned any more: it is {status}.")


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
    """A node's standing and the reasons for it, its recipe and its proofs."""
    from talkoot.server.belief import Belief
    from talkoot.server.proofs import memory_of
    from talkoot.server.registry import find_node

    coordinator = _open(state)
    found = find_node(_registry(coordinator).nodes(), node)
    document = {
        "node_id": found.node_id,
        "name": found.name,
        "status": found.status,
        "status_sentence": found.sentence,
        **Belief(coordinator).record_of(found.node_id),
        **memory_of(coordinator, found.node_id),
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
