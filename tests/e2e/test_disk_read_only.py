"""A disk that the kernel makes read-only under whoever uses it, as it does after an error."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from talkoot.server.audit import Auditor
from talkoot.sims import probe
from talkoot.sims.local import LocalNetwork

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # a whole story in one set-up

MIB = 2**20
JOIN_FLAGS = ("--threads", "1", "--checkpoint-seconds", "0.2")


@dataclass
class Disk:
    """An ext4 file system in a file."""

    image: Path
    at: Path

    def make(self, size_bytes: int) -> None:
        self.at.mkdir(parents=True, exist_ok=True)
        with self.image.open("wb") as file:
            file.truncate(size_bytes)
        if shutil.which("mkfs.ext4") is None or self._run("mkfs.ext4", "-q", str(self.image)):
            pytest.skip("mkfs.ext4 is not here")
        if self.mount():
            pytest.skip("mounting is not allowed here")

    def mount(self) -> int:
        return self._run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.at))

    def fails(self) -> None:
        """What the kernel does when it finds the disk damaged: nobody writes any more."""
        assert self._run("mount", "-o", "remount,abort", str(self.at)) == 0

    def repaired(self, network: LocalNetwork) -> None:
        """Taken out once nobody uses it any more, looked at, and put in again."""
        free = lambda: self._run("umount", str(self.at)) == 0  # noqa: E731
        probe.until("the disk to be free", free, network)
        self._run("e2fsck", "-fy", str(self.image))
        assert self.mount() == 0

    @staticmethod
    def _run(*command: str) -> int:
        return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture
def new_disk(tmp_path: Path) -> Iterator[Callable[[Path], Disk]]:
    made: list[Disk] = []

    def make(at: Path) -> Disk:
        made.append(Disk(tmp_path / f"disk{len(made)}.img", at))
        made[-1].make(64 * MIB)
        return made[-1]

    yield make
    for disk in made:
        # Lazily: what a failed test left running may still have files open there.
        subprocess.run(["umount", "--lazy", str(disk.at)], capture_output=True, check=False)


def test_either_sides_disk_that_turns_read_only_is_told_and_the_run_goes_on_after_its_repair(
    empty_network: LocalNetwork,
    copy_state: Callable[..., None],
    new_disk: Callable[[Path], Disk],
) -> None:
    network = empty_network
    operators, adas = new_disk(network.state), new_disk(network.home("ada"))
    copy_state(network, tokens_per_node=2048)
    os.sync()  # a real state has been on its disk for long
    network.serve()
    operator = network.coordinator
    assert operator is not None
    probe.until("the SuperLink", lambda: "Serving run" in operator.said(), network)
    network.join("ada", network.invite(1), *JOIN_FLAGS)
    network.wait_for("a version", lambda s: s["version"] >= 1, 120)

    # A volunteer's: the daemon ends, since what it would do can't be kept.
    ada = network.nodes["ada"]
    adas.fails()
    assert ada.process is not None
    assert ada.process.wait(60) == 1
    network.nodes.pop("ada")
    assert "it is read-only for this user" in ada.said().splitlines()[-1]
    adas.repaired(network)
    network.rejoin("ada")
    now = network.wait_for("the status", lambda _: True, 60)
    network.wait_for("her return", lambda s: s["version"] >= now["version"] + 2, 120)

    # The operator's: told, and nothing that was acknowledged is lost.
    before = probe.versions(network)
    operators.fails()
    probe.until(
        "the operator to be told", lambda: "Read-only file system" in operator.said(), network
    )
    assert operator.running
    network.kill_coordinator()
    operators.repaired(network)
    assert probe.versions(network)[: len(before)] == before
    network.serve()
    network.wait_for("new versions", lambda s: s["version"] >= before[-1][0] + 2, 120)
    network.stop()
    assert Auditor(network.state).audit().findings == []
    assert "Traceback" not in ada.said() + network.nodes["ada"].said() + operator.said()
