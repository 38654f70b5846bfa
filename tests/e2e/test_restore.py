"""A coordinator is backed up while it runs, destroyed, and restored somewhere else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from talkoot.server.audit import Auditor
from talkoot.sims import probe
from talkoot.sims.local import LocalNetwork

pytestmark = pytest.mark.e2e


def test_volunteers_follow_a_coordinator_that_was_restored_elsewhere_back_and_go_on(
    run_network: Callable[..., LocalNetwork], tmp_path: Path
) -> None:
    network = run_network("ada", "ben", tokens_per_node=2048)
    network.wait_for(
        "both at work", lambda s: sum(n["contributions"] > 0 for n in s["nodes"]) == 2, 150
    )
    vault, passphrase = tmp_path / "vault", tmp_path / "passphrase"
    passphrase.write_text("a passphrase of some length\n")
    sealed = ("--passphrase-file", str(passphrase))
    said = network.run(
        "talkoot-coordinator", "backup", str(vault), "--state", str(network.state), *sealed
    )
    backed_up = int(said.partition(" of version ")[2].split()[0])
    # The volunteers see versions that the backup does not know.
    lost = network.wait_for("versions after that", lambda s: s["version"] >= backed_up + 3, 90)

    network.kill_coordinator()
    shutil.rmtree(network.state)
    elsewhere = LocalNetwork(tmp_path / "another-machine", nodes=network.nodes)
    elsewhere.root.mkdir()
    (elsewhere.root / "volunteers").symlink_to(network.root / "volunteers")
    restored = ("restore", str(vault), "--state", str(elsewhere.state), *sealed)
    network.run("talkoot-coordinator", *restored)
    assert Auditor(elsewhere.state).audit().findings == []
    elsewhere.serve()
    try:
        elsewhere.wait_for(
            "both at work again, further than they were",
            lambda s: s["version"] > lost["version"] and s["history"][-1]["contributions"] == 2,
            120,
        )
        elsewhere.wait_for("agreement of replicas", lambda s: probe.agree(s, "ada", "ben"), 60)
        elsewhere.stop()
        audit = Auditor(elsewhere.state).audit()
        assert audit.findings == []
        for name in ("ada", "ben"):
            said = network.nodes[name].said()
            assert "Traceback" not in said
            assert "The coordinator was restored from a backup; going back with it." in said
            # What is on their disks is of the new history, which went another way than the old.
            held = (probe.held_version(elsewhere, name), probe.replica_digest(elsewhere, name))
            assert held in probe.versions(elsewhere)
    finally:
        elsewhere.__exit__(None, None, None)
        print(elsewhere.tails(40))
