"""What happens to machines that nobody planned for: each has an end that is stated and held.

``docs/durability.md`` states them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from talkoot.server.audit import Auditor
from talkoot.sims import probe
from talkoot.sims.local import LocalNetwork

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # a whole story in one set-up

CLOCK = Path(__file__).parent / "odd_clock"
HOUR = 3600
JOIN_FLAGS = ("--threads", "1", "--checkpoint-seconds", "0.2")


class Clock:
    """The time that processes are shown, which may jump while they run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """So far from the real time."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._path)

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(CLOCK), "TALKOOT_TEST_CLOCK": str(self._path)}


@pytest.fixture(scope="module")
def clocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clock]:
    root = tmp_path_factory.mktemp("clocks")
    return {who: Clock(root / who) for who in ("operator", "ada")}


@pytest.fixture(scope="module")
def network(
    tmp_path_factory: pytest.TempPathFactory,
    copy_state: Callable[..., None],
    clocks: dict[str, Clock],
) -> Iterator[LocalNetwork]:
    """Ada, whose life is odd, and ben, who is there all the while; both clocks can jump."""
    with LocalNetwork(tmp_path_factory.mktemp("odd") / "network") as network:
        copy_state(network, tokens_per_node=2048, deadline_seconds=8.0)
        network.extra_environment = clocks["operator"].environment
        network.serve()
        operator = network.coordinator
        assert operator is not None
        probe.until("the SuperLink", lambda: "Serving run" in operator.said(), network)
        url = network.invite(2)
        network.extra_environment = {}
        network.join("ben", url, *JOIN_FLAGS)
        network.extra_environment = clocks["ada"].environment
        network.join("ada", url, *JOIN_FLAGS)
        try:
            network.wait_for("both at work", _both_at_work, 200)
            yield network
        finally:
            print(network.tails(40))


def _both_at_work(status: Mapping[str, Any]) -> bool:
    return sum(bool(node["contributions"]) for node in status["nodes"]) == 2


def _given(status: Mapping[str, Any], name: str) -> int:
    return int(probe.node_of(status, name)["contributions"])


def _goes_on(network: LocalNetwork, *names: str) -> None:
    """Each of them contributes twice more, and all is well with the operator's books."""
    now = network.wait_for("the status", lambda _: True, 60)
    before = {name: _given(now, name) for name in names}
    network.wait_for(
        f"more of {names}", lambda s: all(_given(s, n) >= before[n] + 2 for n in names), 150
    )
    for command in network.nodes.values():
        assert "Traceback" not in command.said()
    assert Auditor(network.state).audit(shallow=True).findings == []


def test_a_laptop_that_was_suspended_past_a_deadline_is_not_waited_for_and_then_goes_on(
    network: LocalNetwork,
) -> None:
    daemon = network.nodes["ada"].process
    assert daemon is not None
    tree = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
    asleep = network.wait_for("the status", lambda _: True, 60)
    for process in tree:
        process.suspend()
    try:
        network.wait_for(
            "versions without ada", lambda s: s["version"] >= asleep["version"] + 3, 120
        )
    finally:
        for process in tree:
            process.resume()
    _goes_on(network, "ada", "ben")
    assert network.nodes["ada"].process is daemon


def test_a_node_from_an_old_disk_image_catches_up_and_counts_nothing_twice(
    network: LocalNetwork, tmp_path: Path
) -> None:
    network.nodes["ada"].stop()
    image = tmp_path / "image"
    shutil.copytree(network.home("ada"), image)
    network.rejoin("ada")
    _goes_on(network, "ada")
    network.kill_node("ada")
    shutil.rmtree(network.home("ada"))
    shutil.copytree(image, network.home("ada"))
    network.rejoin("ada")
    _goes_on(network, "ada", "ben")
    blocks = probe.rows(network, "SELECT epoch, block FROM committed_blocks")
    assert len({(row["epoch"], row["block"]) for row in blocks}) == len(blocks)


@pytest.mark.parametrize("seconds", [2 * HOUR, -2 * HOUR], ids=["forward", "back"])
def test_a_node_whose_clock_jumps_says_so_holds_up_nobody_and_goes_on_when_it_is_right(
    seconds: int, network: LocalNetwork, clocks: dict[str, Clock]
) -> None:
    ada = network.nodes["ada"]
    heard = len(ada.said())
    clocks["ada"].jump(seconds)
    try:
        probe.until("ada to tell", lambda: "clock" in ada.said()[heard:], network, 60)
        now = network.wait_for("the status", lambda _: True, 60)
        network.wait_for("rounds meanwhile", lambda s: s["version"] >= now["version"] + 2, 90)
    finally:
        clocks["ada"].jump(0)
    _goes_on(network, "ada", "ben")


@pytest.mark.parametrize("seconds", [2 * HOUR, -2 * HOUR], ids=["forward", "back"])
def test_a_coordinator_whose_clock_jumps_is_not_followed_and_goes_on_when_it_is_right(
    seconds: int, network: LocalNetwork, clocks: dict[str, Clock]
) -> None:
    ben = network.nodes["ben"]
    heard = len(ben.said())
    clocks["operator"].jump(seconds)
    try:
        probe.until("ben to tell", lambda: "clock" in ben.said()[heard:], network, 60)
    finally:
        clocks["operator"].jump(0)
    _goes_on(network, "ada", "ben")
