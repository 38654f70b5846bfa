"""A disk that is full, on either side, costs patience and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from talkoot.sims import probe
from talkoot.sims.local import LocalNetwork

pytestmark = pytest.mark.e2e

MIB = 2**20
JOIN_FLAGS = ("--threads", "1", "--checkpoint-seconds", "0.2")


@contextlib.contextmanager
def _small_disk(path: Path, size_bytes: int) -> Iterator[None]:
    """A file system of its own at ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        # Lazily: what a failed test left running may still have files open there.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _fill(path: Path) -> Path:
    """Take all the space that is left; removing the file gives it back."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65_536)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0")
    assert os.statvfs(path).f_bavail == 0
    return filler


def test_a_volunteers_full_disk_is_told_and_its_lease_goes_on_when_there_is_room_again(
    empty_network: LocalNetwork, copy_state: Callable[..., None]
) -> None:
    network = empty_network
    with _small_disk(network.home("ada"), 24 * MIB):
        copy_state(network, tokens_per_node=65_536)
        network.serve()
        network.wait_for("the coordinator", lambda _: True, 90)
        network.join("ada", network.invite(1), *JOIN_FLAGS)
        ada = network.nodes["ada"]
        probe.until("a lease", lambda: probe.mid_lease(network, "ada"), network, 120)
        filler = _fill(network.home("ada"))
        probe.until("ada to tell", lambda: "is full" in ada.said(), network)
        held = probe.checkpoint(network, "ada")
        assert held is not None
        assert ada.running

        filler.unlink()
        done = probe.finished_lease(network, "ada", held)
        assert (done["state"], done["attempt"]) == ("committed", 0)
        assert ada.running
        assert "Traceback" not in ada.said()
        network.stop()


def test_the_operators_full_disk_is_told_and_the_run_goes_on_when_there_is_room_again(
    empty_network: LocalNetwork, copy_state: Callable[..., None]
) -> None:
    network = empty_network
    with _small_disk(network.state, 64 * MIB):
        copy_state(network)
        network.serve()
        network.wait_for("the coordinator", lambda _: True, 90)
        network.join("ada", network.invite(1), *JOIN_FLAGS)
        network.wait_for("a version", lambda s: s["version"] >= 1, 120)
        coordinator = network.coordinator
        assert coordinator is not None
        filler = _fill(network.state)
        probe.until("the operator to be told", lambda: "is full" in coordinator.said(), network)
        before = probe.versions(network)
        assert coordinator.running
        assert network.nodes["ada"].running

        filler.unlink()
        wanted = before[-1][0] + 2
        network.wait_for("new versions", lambda s: s["version"] >= wanted, 120)
        after = probe.versions(network)
        assert after[: len(before)] == before
        assert [version for version, _ in after] == list(range(len(after)))
        assert "Traceback" not in coordinator.said()
        network.stop()


def test_nothing_begins_on_a_full_disk_and_each_command_says_why(
    empty_network: LocalNetwork,
    copy_state: Callable[..., None],
    config_text: Callable[..., str],
    sentence_of: Callable[[subprocess.CompletedProcess[str]], str],
) -> None:
    network = empty_network
    config = network.root / "config.toml"
    config.write_text(config_text())
    disk = network.root
    with _small_disk(disk / "operator", 32 * MIB), _small_disk(disk / "volunteers", MIB):
        copy_state(network)
        before = probe.versions(network)
        other = network.state / "other"
        filler = _fill(network.state)
        _fill(disk / "volunteers")
        state = ("--state", str(network.state))
        for command in ("serve", "invite"):
            said = sentence_of(network.attempt("talkoot-coordinator", command, *state))
            assert "is full" in said
        init = ("init", "--config", str(config), "--state", str(other))
        assert "is full" in sentence_of(network.attempt("talkoot-coordinator", *init))
        assert not other.exists()
        join = ("join", "--home", str(network.home("ada")), "--threads", "1")
        assert "is full" in sentence_of(network.attempt("talkoot", *join))

        filler.unlink()
        assert probe.versions(network) == before
        assert network.run("talkoot-coordinator", "status", *state)
