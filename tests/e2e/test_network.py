"""A network that trains, from invite to exported model; and one in which somebody is not well."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from talkoot.client.app import app
from talkoot.client.enrol import Enrolment
from talkoot.client.flower import FleetHost
from talkoot.client.pace import Meter
from talkoot.client.transfer import TransferClient
from talkoot.protocol.errors import RefusedError
from talkoot.protocol.identity import NodeKey
from talkoot.sims import probe
from talkoot.sims.evaluate import evaluate_in_child
from talkoot.sims.local import Command, LocalNetwork

pytestmark = pytest.mark.e2e

ROUNDS = 8
RECIPES = {"ada": None, "ben": "fp32-adamw-ckpt", "cyd": "bf16-backward-adafactor"}
"""Whom which is told; ada takes the fastest that fits."""
JOIN_FLAGS = ("--threads", "1", "--checkpoint-seconds", "0.2")


def test_three_volunteers_train_to_the_end_and_hold_the_ledgers_weights_bit_for_bit(
    empty_network: LocalNetwork, config_text: Callable[..., str]
) -> None:
    network = empty_network
    config = network.root / "config.toml"
    config.write_text(config_text(rounds=ROUNDS))
    network.init(config)
    network.serve()
    network.wait_for("the coordinator", lambda _: True, 90)
    url = network.invite(3)
    names = tuple(RECIPES)
    for name, recipe in RECIPES.items():
        network.join(name, url, *JOIN_FLAGS, *([] if recipe is None else ["--recipe", recipe]))
    network.wait_for(
        "everybody's first contribution",
        lambda s: len(s["nodes"]) == 3 and all(n["contributions"] for n in s["nodes"]),
        150,
    )

    _ada_pauses_and_comes_back(network)

    network.wait_for("the end of the run", lambda s: s["phase"] == "finished", 150)
    network.wait_for("agreement of replicas", lambda s: probe.agree(s, *names), 60)
    _operator_sees_it_all(network)
    _each_block_was_committed_once(network)
    # What the nodes say of themselves is also what is on their disks.
    network.stop()
    newest = probe.versions(network)[-1]
    assert newest[0] == ROUNDS
    assert {probe.replica_digest(network, name) for name in names} == {newest[1]}

    _cyd_leaves(network)
    _the_export_loads_and_has_learned(network)


def _ada_pauses_and_comes_back(network: LocalNetwork) -> None:
    home = ("--home", str(network.home("ada")))
    network.run("talkoot", "pause", *home)
    paused = network.wait_for(
        "the pause", lambda s: probe.node_of(s, "ada")["state"] == "paused", 30
    )
    told = json.loads(network.run("talkoot", "status", "--json", *home))
    assert told["state"] == "paused"
    # The round that was open at the pause may hold a lease of hers; the one after must not.
    opened = network.wait_for(
        "a round that opened after the pause", lambda s: s["round"] >= paused["round"] + 1, 60
    )
    ada = probe.node_of(paused, "ada")
    query = "SELECT * FROM leases WHERE node_id = ? AND round = ?"
    assert probe.rows(network, query, ada["node_id"], opened["round"]) == []

    network.run("talkoot", "resume", *home)
    network.wait_for(
        "ada's next contribution",
        lambda s: probe.node_of(s, "ada")["contributions"] > ada["contributions"],
        60,
    )


def _operator_sees_it_all(network: LocalNetwork) -> None:
    state = ("--state", str(network.state))
    status = json.loads(network.run("talkoot-coordinator", "status", "--json", *state))
    assert (status["phase"], status["version"]) == ("finished", ROUNDS)
    rounds = json.loads(network.run("talkoot-coordinator", "rounds", "--json", *state))
    assert [row["round"] for row in rounds] == list(range(1, ROUNDS + 1))
    assert [(row["version"], row["weights_digest"]) for row in rounds] == probe.versions(network)[
        1:
    ]
    nodes = json.loads(network.run("talkoot-coordinator", "nodes", "list", "--json", *state))
    assert {node["name"]: node["status"] for node in nodes} == dict.fromkeys(
        ("ada", "ben", "cyd"), "admitted"
    )
    # A contribution is counted by the node when its answer arrives, by the operator at commit.
    for node in nodes:
        told = json.loads(
            network.run("talkoot", "status", "--json", "--home", str(network.home(node["name"])))
        )
        assert told["contributions"] == node["contributions"]
        assert told["version"] == ROUNDS
        assert told["recipe"] == (RECIPES[node["name"]] or "fp32-adamw")
    shown = network.run("talkoot-coordinator", "nodes", "show", "cyd", *state)
    assert f"recipe {RECIPES['cyd']}" in shown


def _each_block_was_committed_once(network: LocalNetwork) -> None:
    blocks = probe.rows(network, "SELECT epoch, block FROM committed_blocks")
    unique = {(row["epoch"], row["block"]) for row in blocks}
    assert len(unique) == len(blocks)
    tokens = probe.rows(network, "SELECT SUM(tokens) AS n FROM contributions")[0]["n"]
    assert tokens == 512 * len(blocks)


def _cyd_leaves(network: LocalNetwork) -> None:
    home = network.home("cyd")
    said = network.run("talkoot", "leave", "--home", str(home))
    assert "thank you" in said
    assert not any((home / name).exists() for name in ("identity.pem", "enrolment.json", "work"))


def _the_export_loads_and_has_learned(network: LocalNetwork) -> None:
    exports: list[Path] = []
    for version in (0, ROUNDS):
        exports.append(network.root / f"export-{version}")
        network.run(
            *("talkoot-coordinator", "export", "--state", str(network.state)),
            *("--out", str(exports[-1]), "--version", str(version)),
        )
    # A fresh process, AutoModelForCausalLM and AutoTokenizer, nothing of ours in the way.
    before, after = evaluate_in_child(
        exports, network.state / "corpus", sequence_length=64, prompt="def "
    )
    assert after.loss < before.loss - 1.0
    assert after.sample_text


def test_a_replica_that_differs_is_found_and_healed_from_a_checkpoint(
    run_network: Callable[..., LocalNetwork],
) -> None:
    network = run_network("ada")
    network.wait_for("a contribution", lambda s: any(n["contributions"] for n in s["nodes"]), 120)
    network.nodes["ada"].stop()
    weights = probe.replica(network, "ada")
    assert weights is not None
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1  # one bit of one weight
    weights.write_bytes(damaged)

    network.rejoin("ada")
    healed = network.wait_for("healing", lambda s: probe.node_of(s, "ada")["healed"] == 1, 90)
    assert "fetching a checkpoint anew" in network.nodes["ada"].said()
    network.wait_for(
        "a new version with her contribution",
        lambda s: s["version"] > healed["version"] and s["history"][-1]["contributions"] == 1,
        60,
    )
    network.stop()
    version, digest = probe.versions(network)[-1]
    # She may not have followed to the newest version before she stopped; what she has is right.
    held = probe.held_version(network, "ada")
    assert held in (version, version - 1)
    assert (held, probe.replica_digest(network, "ada")) in probe.versions(network)
    assert digest


def test_a_banned_node_is_shut_out_of_both_planes_until_it_is_approved_again(
    run_network: Callable[..., LocalNetwork],
) -> None:
    network = run_network("ada", "ben")
    network.wait_for(
        "both at work", lambda s: sum(n["contributions"] > 0 for n in s["nodes"]) == 2, 150
    )
    ben = network.nodes.pop("ben")
    state = ("--state", str(network.state))
    reason = "Sends noise."
    network.run("talkoot-coordinator", "nodes", "ban", "ben", "--reason", reason, *state)
    assert ben.process is not None
    assert ben.process.wait(60) == 1
    assert f"error: This node is banned: {reason}" in ben.said()
    assert "Traceback" not in ben.said()

    home = network.home("ben")
    enrolment, key = Enrolment.load(home / "enrolment.json"), NodeKey.load(home / "identity.pem")
    ca = enrolment.ca_pem.encode()
    with TransferClient(
        f"127.0.0.1:{enrolment.transfer_port}",
        ca,
        enrolment.certificate_pem.encode(),
        key.private_pem(),
        meter=Meter(),
    ) as data_plane:
        with pytest.raises(RefusedError, match=reason) as refused:
            data_plane.run_spec()
        assert refused.value.code == "banned"
    host = FleetHost(f"127.0.0.1:{enrolment.gateway_port}", ca, key, app, {})
    with pytest.raises(RefusedError, match=reason) as refused:
        host.connect(1.0)
    assert refused.value.code == "banned"

    banned = network.wait_for(
        "the ban on the status page", lambda s: probe.node_of(s, "ben")["status"] == "banned", 60
    )
    network.wait_for("rounds without ben", lambda s: s["version"] >= banned["version"] + 2, 60)

    network.run("talkoot-coordinator", "nodes", "approve", "ben", *state)
    network.rejoin("ben")
    given = probe.node_of(banned, "ben")["contributions"]
    network.wait_for("ben's return", lambda s: probe.node_of(s, "ben")["contributions"] > given, 90)


def test_a_pause_and_a_ctrl_c_keep_the_lease_and_a_second_ctrl_c_ends_the_daemon_at_once(
    run_network: Callable[..., LocalNetwork],
) -> None:
    network = run_network("ada", tokens_per_node=65_536)
    _pause_in_the_middle_of_adas_lease(network)

    held = _middle_of_adas_lease(network)
    _interrupt(network.nodes["ada"])
    kept = probe.checkpoint(network, "ada")
    assert kept is not None
    assert kept["lease_id"] == held["lease_id"]
    assert kept["step"] >= held["step"]
    network.rejoin("ada")
    assert probe.finished_lease(network, "ada", kept)["state"] == "committed"

    held = _middle_of_adas_lease(network)
    ada, coordinator = network.nodes["ada"], network.coordinator
    assert coordinator is not None
    _interrupt(coordinator)
    assert "Nothing is lost" in coordinator.said()
    probe.until("ada to say that she waits", lambda: "does not answer" in ada.said(), network)
    network.serve()
    assert probe.finished_lease(network, "ada", held)["state"] == "committed"

    _middle_of_adas_lease(network)
    trainer = probe.trainer_process(network, "ada")
    trainer.suspend()  # a step that takes for ever
    assert ada.process is not None
    earlier = len(ada.said())
    ada.process.send_signal(signal.SIGINT)
    probe.until("an answer", lambda: "once more ends it now" in ada.said()[earlier:], network)
    assert ada.process.poll() is None
    ada.process.send_signal(signal.SIGINT)
    assert ada.process.wait(30) == 130
    trainer.wait(30)
    assert "Traceback" not in ada.said()


def _middle_of_adas_lease(network: LocalNetwork) -> dict[str, Any]:
    return probe.until(
        "the middle of a lease", lambda: probe.mid_lease(network, "ada"), network, 120
    )


def _pause_in_the_middle_of_adas_lease(network: LocalNetwork) -> None:
    held = _middle_of_adas_lease(network)
    home = ("--home", str(network.home("ada")))
    network.run("talkoot", "pause", *home)
    paused = network.wait_for(
        "the pause", lambda s: probe.node_of(s, "ada")["state"] == "paused", 30
    )
    seen = probe.node_of(paused, "ada")["last_seen_unix"]
    network.wait_for(
        "more reports", lambda s: probe.node_of(s, "ada")["last_seen_unix"] > seen + 3, 30
    )
    network.run("talkoot", "resume", *home)
    assert probe.finished_lease(network, "ada", held)["state"] == "committed"


def _interrupt(command: Command) -> None:
    """Ctrl-C, once; it must end well by itself."""
    assert command.process is not None
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(60) == 0
    assert "Traceback" not in command.said()
