"""SIGKILL, of everything that can be killed, in the middle of its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import psutil
import pytest

from talkoot.sims import probe
from talkoot.sims.local import LocalNetwork

pytestmark = pytest.mark.e2e

PARTS = ("superlink", "superexec", "gateway", "transfer", "evaluator")


def _middle(network: LocalNetwork) -> dict[str, Any]:
    return probe.until(
        "the middle of a lease", lambda: probe.mid_lease(network, "ada"), network, 120
    )


def _checkpoint(network: LocalNetwork) -> dict[str, Any]:
    saved = probe.checkpoint(network, "ada")
    assert saved is not None
    return saved


def _is_new(network: LocalNetwork, part: str, old_pid: int) -> bool:
    return probe.part_pids(network).get(part, old_pid) != old_pid


def _has_come_to(version: int, status: Mapping[str, Any]) -> bool:
    return bool(status["version"] >= version)


def test_a_killed_trainer_and_then_a_killed_volunteer_go_on_in_the_middle_of_their_leases(
    run_network: Callable[..., LocalNetwork],
) -> None:
    network = run_network("ada", tokens_per_node=65_536)
    _middle(network)
    daemon = network.nodes["ada"].process
    trainer = probe.trainer_process(network, "ada")
    trainer.kill()
    trainer.wait(30)
    held = _checkpoint(network)
    done = probe.finished_lease(network, "ada", held)
    assert (done["state"], done["attempt"]) == ("committed", 0)
    assert "signal 9" in network.nodes["ada"].said()
    assert network.nodes["ada"].running
    assert network.nodes["ada"].process is daemon

    _middle(network)
    network.kill_node("ada")
    held = _checkpoint(network)
    network.rejoin("ada")  # without its invite
    done = probe.finished_lease(network, "ada", held)
    assert (done["state"], done["attempt"]) == ("committed", 0)
    assert "Going on with an open lease." in network.nodes["ada"].said()
    status = network.wait_for("the round's version", lambda s: s["version"] >= done["round"], 60)
    assert probe.node_of(status, "ada")["restarts"] == 1


def test_a_coordinator_killed_in_the_middle_of_a_round_goes_on_with_that_round(
    run_network: Callable[..., LocalNetwork],
) -> None:
    network = run_network("ada", tokens_per_node=65_536, checkpoint_every=1)
    first = network.wait_for("a version", lambda s: s["version"] >= 1, 150)
    held = _middle(network)
    network.kill_coordinator()
    before = probe.versions(network)
    assert len(before) > first["version"]
    ada = network.nodes["ada"]
    probe.until("ada to say that she waits", lambda: "does not answer" in ada.said(), network)

    network.serve()
    done = probe.finished_lease(network, "ada", held)
    assert (done["state"], done["attempt"]) == ("committed", 0)
    network.wait_for("the round's version", lambda s: s["version"] >= done["round"], 60)
    assert probe.versions(network)[: len(before)] == before
    assert ada.running
    assert "The coordinator answers." in ada.said()


def test_each_part_of_the_coordinator_may_die_and_the_run_goes_on(
    run_network: Callable[..., LocalNetwork],
) -> None:
    network = run_network("ada")
    network.wait_for("a version", lambda s: s["version"] >= 1, 150)
    assert network.coordinator is not None
    for part in PARTS:
        pid = probe.part_pids(network)[part]
        psutil.Process(pid).kill()
        probe.until(f"a new {part}", partial(_is_new, network, part, pid), network)
        assert f"{part} ended (SIGKILL); starting it again" in network.coordinator.said()
        # One round may have been on its way already; the next one was not.
        wanted = probe.versions(network)[-1][0] + 2
        network.wait_for(f"rounds after the {part}'s death", partial(_has_come_to, wanted), 90)

    loop = probe.round_loop_pid(network)
    assert loop is not None
    psutil.Process(loop).kill()
    wanted = probe.versions(network)[-1][0] + 2
    network.wait_for("rounds after the round loop's death", lambda s: s["version"] >= wanted, 120)
    numbers = [version for version, _ in probe.versions(network)]
    assert numbers == list(range(len(numbers)))
    assert network.nodes["ada"].running
