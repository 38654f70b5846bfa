"""Joining for a stock SuperNode, and leaving, against a real gateway and data plane."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.config import parse_config_args

from talkoot.client.app import HOME_KEY
from talkoot.client.enrol import Enrolment
from talkoot.client.home import Home, Settings
from talkoot.client.join import join, leave, supernode_command
from talkoot.protocol.errors import StateError, UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.messages import EnrolReply, EnrolRequest
from talkoot.server.desk import Desk
from talkoot.server.ledger.schema import Node, NodeState, ProofRecord
from talkoot.sims.in_process import InProcessCoordinator, nano_state


class ForgetfulDesk(Desk):
    """The real desk; the answer to an enrolment can be lost on its way."""

    lost_enrolments = 0

    def enrol(self, request: EnrolRequest, peer: str) -> EnrolReply:
        reply = super().enrol(request, peer)
        if self.lost_enrolments:
            self.lost_enrolments -= 1
            raise UnavailableError("The line broke.")
        return reply


def _node(site: InProcessCoordinator, node_id: str) -> tuple[str, int, str]:
    """(status, proofs, state of the last report)."""
    with site.coordinator.ledger.read() as session:
        proofs = session.query(ProofRecord).filter_by(node_id=node_id).count()
        state = session.get(NodeState, node_id)
        told = "" if state is None else state.report
        return session.get_one(Node, node_id).status, proofs, told


def test_enrolling_only_proves_once_and_prints_the_command_for_a_stock_supernode(
    tmp_path: Path,
) -> None:
    state = nano_state(tmp_path / "operator")
    home = Home(tmp_path / "a home")  # with a space in its name
    said: list[str] = []
    with InProcessCoordinator(state, tmp_path / "state", ForgetfulDesk) as site:
        url = site.registry.invite(uses=1, expires_seconds=3600).url()
        settings = Settings(device="cpu", threads=1)

        # The answer is lost after the invite was used up. The key that it was used for is kept, so
        # the same invite, again, is the same node's.
        assert isinstance(site.desk, ForgetfulDesk)
        site.desk.lost_enrolments = 1
        with pytest.raises(UnavailableError):
            join(home, url, "ada", settings, said.append, enrol_only=True)
        key = NodeKey.load(home.key)
        assert not home.enrolment.exists()

        join(home, url, "ada", None, said.append, enrol_only=True)
        assert NodeKey.load(home.key).public_pem == key.public_pem
        status, proofs, report = _node(site, key.node_id)
        assert (status, proofs) == ("admitted", 1)
        assert '"state":"leaving"' in report  # its silence from here on means nothing

        command = shlex.split(said[-1])
        network = site.coordinator.config.network
        options = dict(zip(command[1::2], command[2::2], strict=True))
        assert command[0] == "flower-supernode"
        assert options["--superlink"] == f"127.0.0.1:{network.gateway_port}"
        assert Path(options["--root-certificates"]).read_bytes() == site.coordinator.ca_pem
        # As Flower reads them.
        node_config = parse_config_args([options["--node-config"]])
        assert node_config == {HOME_KEY: str(home.root)}
        path = Path(options["--auth-supernode-private-key"])
        assert path.stat().st_mode & 0o777 == 0o600
        loaded = load_ssh_private_key(path.read_bytes(), None)
        assert loaded.public_key() == key.public_key

        # Again, without the invite: nothing is proved a second time.
        join(home, None, None, None, said.append, enrol_only=True)
        assert shlex.split(said[-1]) == command
        _, proofs, report = _node(site, key.node_id)
        assert proofs == 1
        assert '"state":"leaving"' in report

        # Another coordinator's invite is not for this home.
        other = url.replace(str(network.gateway_port), "1")
        with pytest.raises(StateError) as refused:
            join(home, other, None, None, said.append, enrol_only=True)
        assert refused.value.code == "other-coordinator"

        leave(home, said.append)
        left = {p.name for p in home.root.iterdir() if p.is_file()} - {"lock"}
        assert left == {"settings.json"}
        with pytest.raises(StateError):
            leave(home, said.append)


def test_a_home_that_node_config_cannot_carry_is_refused(tmp_path: Path) -> None:
    enrolment = Enrolment(
        run_id="test-run",
        trust_serial=1,
        node_id="0" * 16,
        name="ada",
        host="::1",
        gateway_port=7443,
        transfer_port=7444,
        ca_pem="x",
        certificate_pem="x",
        coordinator_key_pem="x",
    )
    assert "--superlink '[::1]:7443'" in supernode_command(Home(tmp_path), enrolment)
    for name in ('a"b', "a'b", "a\\b"):
        with pytest.raises(StateError) as refused:
            supernode_command(Home(tmp_path / name), enrolment)
        assert refused.value.code == "bad-home"


def test_leaving_asks_a_running_daemon_to_end_and_waits_for_it(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    home.enrolment.write_bytes(b"{}")
    # Stands for a daemon: holds the home's lock until it is asked to leave.
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from talkoot.client.home import Home\n"
        "from talkoot.protocol.files import DirectoryLock\n"
        "home = Home(Path(sys.argv[1]))\n"
        "with DirectoryLock(home.root, who='test'):\n"
        "    print('held', flush=True)\n"
        "    while not home.leave.exists():\n"
        "        time.sleep(0.01)\n"
        "    assert home.enrolment.exists()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home.root)], stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "held\n"
        said: list[str] = []
        leave(home, said.append)
        assert daemon.wait(30) == 0
    assert not home.enrolment.exists()
    assert not home.leave.exists()
    assert len(said) == 2


def test_leaving_gives_up_on_a_daemon_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkoot.client import join as module
    from talkoot.protocol.errors import RefusedError
    from talkoot.protocol.files import DirectoryLock

    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.0)
    home = Home(tmp_path / "home")
    home.create()
    home.enrolment.write_bytes(b"{}")
    with DirectoryLock(home.root, who="test"), pytest.raises(RefusedError) as refused:
        leave(home, lambda _: None)
    assert refused.value.code == "running"
    assert home.enrolment.exists()
