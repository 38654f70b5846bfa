"""``make demo``: a real network on this machine, killed twice on the way, reported at the end."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from talkoot.protocol.errors import ConfigError, TalkootError
from talkoot.sims.evaluate import Evaluation, evaluate_in_child
from talkoot.sims.local import LocalNetwork
from talkoot.sims.pretrained import smollm2_directory
from talkoot.sims.report import write_report
from talkoot.sims.report_data import Kill, NodeRow, ReportData, RoundRow
from talkoot.sims.view import LiveView

READY_SECONDS = 300.0
ROUND_SECONDS = 1800.0
DOWN_SECONDS = 2.0
"""How long the killed stay dead before they are started again."""


@dataclass(frozen=True)
class DemoPreset:
    """A model and the round that suits it on two cores."""

    toml: str
    """The ``[model]``, ``[tokenizer]``, ``[corpus]`` and ``[inner]`` tables."""
    tokens_per_node: int
    sequence_length: int
    prompt: str = "def "


def _from_scratch(name: str, learning_rate: float, tokens_per_node: int) -> DemoPreset:
    return DemoPreset(
        toml=f"""
[model]
preset = "{name}"
sequence_length = 128
micro_batch = 8

[corpus]
sources = ["stdlib"]
block_tokens = 1024
heldout_fraction = 0.02

[inner]
learning_rate = {learning_rate}
""",
        tokens_per_node=tokens_per_node,
        sequence_length=128,
    )


def _smollm2(out: Path) -> DemoPreset:
    directory = smollm2_directory(out.parent / "models")
    return DemoPreset(
        toml=f"""
[model]
pretrained = "{directory}"
sequence_length = 128
micro_batch = 1

[tokenizer]
kind = "hf"
path = "{directory}"

[corpus]
sources = ["stdlib"]
block_tokens = 1024
heldout_fraction = 0.005

[inner]
learning_rate = 5e-5
""",
        tokens_per_node=1024,
        sequence_length=128,
    )


MODELS: dict[str, Callable[[Path], DemoPreset]] = {
    "nano": lambda _out: _from_scratch("nano", 4e-3, 16_384),
    "tiny": lambda _out: _from_scratch("tiny", 3e-3, 16_384),
    "small": lambda _out: _from_scratch("small", 2e-3, 12_288),
    "smollm2": _smollm2,
}


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does."""

    out: Path
    nodes: int = 3
    rounds: int = 12
    model: str = "small"
    tokens_per_node: int | None = None
    kills: bool = True

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(
                f"There is no demo model {self.model!r}: choose one of {', '.join(MODELS)}."
            )
        if self.nodes < 1 or self.rounds < 1:
            raise ConfigError("The demo needs at least one node and one round.")


@dataclass
class _Run:
    """What the demo learns on its way."""

    started_unix: float = field(default_factory=time.time)
    kills: list[Kill] = field(default_factory=list)

    def clock(self) -> float:
        return time.time() - self.started_unix


def config_toml(options: DemoOptions, preset: DemoPreset) -> str:
    """The operator's configuration for the demo."""
    tokens = options.tokens_per_node or preset.tokens_per_node
    total = tokens * options.nodes * options.rounds
    return f"""[run]
name = "demo"
rounds = {options.rounds}
{preset.toml}final_learning_rate_ratio = 0.1
warmup_tokens = {total // 20}
total_tokens = {total}

[round]
tokens_per_node = {tokens}
deadline_seconds = 600
min_nodes = {max(1, options.nodes - 1)}
quorum = 1
lost_after_seconds = 60
checkpoint_every = 5

[network]
bind = "127.0.0.1"
gateway_port = 0
transfer_port = 0
"""


def run_demo(options: DemoOptions, console: Console | None = None) -> ReportData:
    """Run the demo from end to end and leave its report in ``options.out / "report"``.

    Args:
        console: where the progress goes; standard output if None.
    """
    preset = MODELS[options.model](options.out)
    run = _Run()
    names = [f"volunteer-{i + 1}" for i in range(options.nodes)]
    with LocalNetwork(options.out / "network") as network:
        config = network.root / "config.toml"
        config.write_text(config_toml(options, preset), encoding="utf-8")
        with LiveView(model=options.model, started_unix=run.started_unix, console=console) as view:
            view.say("The operator makes keys, ledger, corpus and the first version …")
            network.init(config)
            network.serve()
            network.wait_for("the coordinator", lambda s: True, READY_SECONDS, view.update)
            url = network.invite(options.nodes)
            view.say(f"{options.nodes} volunteers join over TLS and prove their memory …")
            for name in names:
                network.join(name, url, "--threads", "1", "--checkpoint-seconds", "2")
            _wait_admitted(network, options.nodes, view)
            view.say("Training.")
            if options.kills:
                _kill_a_volunteer(network, run, options, names[-1], view)
                _kill_the_coordinator(network, run, options, view)
            network.wait_for("the end of the run", _finished, ROUND_SECONDS, view.update)
            view.say("The run is finished; replicas catch up …")
            final = network.wait_for("agreement of replicas", _agree, READY_SECONDS, view.update)
            agree = _agree(final)
            network.stop()
            view.say("Exporting, and measuring on held-out text in a fresh process …")
            after_dir, before, after = _measure(network, options, preset)
        document = network.ledger_status()
    data = _report(options, run, document, before, after, after_dir, agree)
    write_report(data, options.out / "report")
    return data


def _wait_admitted(network: LocalNetwork, count: int, view: LiveView) -> None:
    def admitted(status: Mapping[str, Any]) -> bool:
        return bool(sum(node["status"] == "admitted" for node in status["nodes"]) >= count)

    network.wait_for("the volunteers' admission", admitted, READY_SECONDS, view.update)


def _finished(status: Mapping[str, Any]) -> bool:
    return bool(status["phase"] == "finished")


def _agree(status: Mapping[str, Any]) -> bool:
    """Every node online holds the ledger's version with the ledger's digest."""
    online = [node for node in status["nodes"] if node["online"]]
    return bool(online) and all(
        node["version"] == status["version"] and node["weights_digest"] == status["weights_digest"]
        for node in online
    )


def _kill_a_volunteer(
    network: LocalNetwork, run: _Run, options: DemoOptions, name: str, view: LiveView
) -> None:
    """SIGKILL in the middle of a lease; it comes back and goes on with it."""
    due = max(1, options.rounds // 3)

    def in_the_middle(status: Mapping[str, Any]) -> bool:
        if _finished(status):
            return True
        node = _node(status, name)
        return bool(status["version"] >= due and node["state"] == "training" and node["step"] > 2)

    status = network.wait_for(f"round {due}", in_the_middle, ROUND_SECONDS, view.update)
    if _finished(status):
        return
    restarts = _node(status, name)["restarts"]
    when = run.clock()
    network.kill_node(name)
    view.say(f"{name} was killed with SIGKILL, trainer and all; it is started again in a moment.")
    _wait(DOWN_SECONDS, network, view)
    killed = time.monotonic() - (run.clock() - when)
    network.rejoin(name)

    def back(status: Mapping[str, Any]) -> bool:
        node = _node(status, name)
        at_work = node["restarts"] > restarts and node["state"] in ("training", "pushing")
        return bool(at_work) or _finished(status)

    if _finished(network.wait_for(f"{name} to be back", back, READY_SECONDS, view.update)):
        view.say(f"The others finished before {name} was back at work.")
        return
    seconds = time.monotonic() - killed
    run.kills.append(Kill(name, when, seconds))
    view.say(f"{name} is back at work {seconds:.1f} s after it was killed.")


def _kill_the_coordinator(
    network: LocalNetwork, run: _Run, options: DemoOptions, view: LiveView
) -> None:
    """SIGKILL the whole tree: supervisor, SuperLink, ServerApp, gateway, transfer service."""
    due = max(1, 2 * options.rounds // 3)

    def in_the_middle(status: Mapping[str, Any]) -> bool:
        training = any(node["state"] == "training" for node in status["nodes"])
        return _finished(status) or (status["version"] >= due and training)

    status = network.wait_for(f"round {due}", in_the_middle, ROUND_SECONDS, view.update)
    if _finished(status):
        return
    at_kill = status["version"]
    when, killed, killed_unix = run.clock(), time.monotonic(), time.time()
    network.kill_coordinator()
    view.say("The coordinator's whole process tree was killed with SIGKILL.")
    _wait(DOWN_SECONDS, network, view)
    network.serve()

    def back(status: Mapping[str, Any]) -> bool:
        heard = [n for n in status["nodes"] if (n["last_seen_unix"] or 0) > killed_unix]
        return len(heard) == len(status["nodes"]) or _finished(status)

    network.wait_for("the coordinator to be back", back, READY_SECONDS, view.update)
    seconds = time.monotonic() - killed
    run.kills.append(Kill("coordinator", when, seconds))
    view.say(f"The coordinator is back, with every volunteer, {seconds:.1f} s after the kill.")
    network.wait_for(
        "the next version",
        lambda s: bool(s["version"] > at_kill),
        ROUND_SECONDS,
        view.update,
    )
    view.say("The run goes on where it was.")


def _wait(seconds: float, network: LocalNetwork, view: LiveView) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        view.update(network.status())
        time.sleep(0.1)


def _node(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(node for node in status["nodes"] if node["name"] == name)
    return found


def _measure(
    network: LocalNetwork, options: DemoOptions, preset: DemoPreset
) -> tuple[Path, Evaluation, Evaluation]:
    """Export the first and the last version, and evaluate both in a fresh process."""
    first, last = options.out / "export-before", options.out / "export"

    def export(out: Path, *flags: str) -> None:
        _remove(out)
        state = str(network.state)
        network.run("talkoot-coordinator", "export", "--state", state, "--out", str(out), *flags)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(export, first, "--version", "0"), pool.submit(export, last)]
        for job in jobs:
            job.result()
    before, after = evaluate_in_child(
        [first, last],
        network.state / "corpus",
        sequence_length=preset.sequence_length,
        prompt=preset.prompt,
    )
    return last, before, after


def _remove(path: Path) -> None:
    import shutil

    if path.exists():
        shutil.rmtree(path)


def nontraining_seconds(history: Sequence[Mapping[str, Any]]) -> float:
    """Median over rounds of what is not training: from one publication to the next, less the
    longest training of the round."""
    gaps = [
        now["published_unix"] - before["published_unix"] - now["training_seconds"]
        for before, now in itertools.pairwise(history)
    ]
    return statistics.median(gaps) if gaps else 0.0


def _report(
    options: DemoOptions,
    run: _Run,
    document: Mapping[str, Any],
    before: Evaluation,
    after: Evaluation,
    export_dir: Path,
    agree: bool,
) -> ReportData:
    history = document["history"]
    parameters = document["parameters"]
    contributions = sum(row["contributions"] for row in history)
    bits_up = 8 * sum(row["bytes_up"] for row in history) / contributions / parameters
    bits_down = 8 * sum(row["update_bytes"] for row in history) / len(history) / parameters
    return ReportData(
        run_id=document["run_id"],
        model=options.model,
        parameters=parameters,
        rounds=len(history),
        nodes=options.nodes,
        heldout_loss_before=before.loss,
        heldout_loss_after=after.loss,
        bits_per_parameter_up=bits_up,
        bits_per_parameter_down=bits_down,
        nontraining_seconds_per_round=nontraining_seconds(history),
        replicas_agree=agree,
        wall_seconds=run.clock(),
        export_dir=str(export_dir),
        history=tuple(RoundRow.from_status(row) for row in history),
        node_rows=tuple(NodeRow.from_status(row) for row in document["nodes"]),
        kills=tuple(run.kills),
        first_round_seconds=history[0]["opened_unix"] - run.started_unix,
        sample_prompt=after.sample_prompt,
        sample_text=after.sample_text,
        software={name: version(name) for name in ("talkoot", "flwr", "torch", "transformers")},
    )


def check(data: ReportData) -> None:
    """Raise when the demo did not show what it promises."""
    if not data.replicas_agree:
        raise TalkootError("The replicas do not agree with the ledger.")
    if not data.heldout_loss_after < data.heldout_loss_before:
        raise TalkootError("The held-out loss did not fall.")
