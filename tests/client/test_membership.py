"""A node stays a member: certificates renewed in time or late, CAs followed, bans told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from talkoot.client import membership
from talkoot.client.enrol import Enrolment
from talkoot.client.home import Home
from talkoot.client.membership import Membership
from talkoot.client.pace import Meter
from talkoot.client.transfer import TransferClient
from talkoot.protocol.errors import IntegrityError, RefusedError, TalkootError
from talkoot.protocol.identity import NodeKey, load_bundle, load_certificate, make_csr
from talkoot.protocol.messages import TrustBundle, canonical_bytes
from talkoot.server.config import Config, dump_config, load_config
from talkoot.server.desk import Desk
from talkoot.server.setup import init
from talkoot.server.trust import rotate, settle
from talkoot.sims.in_process import InProcessCoordinator


class Rig:
    """A coordinator that serves, and one enrolled node."""

    def __init__(self, site: InProcessCoordinator, home: Home) -> None:
        self.site = site
        self.home = home
        self.enrolment = site.enrol(home, "anna")
        self.key = NodeKey.load(home.key)
        self.transfer = self.connect(self.enrolment)
        self.membership = Membership(home, self.key, self.enrolment, self.transfer)

    def connect(self, enrolment: Enrolment) -> TransferClient:
        return TransferClient(
            f"127.0.0.1:{enrolment.transfer_port}",
            enrolment.ca_pem.encode(),
            enrolment.certificate_pem.encode(),
            self.key.private_pem(),
            meter=Meter(),
        )

    def certificate(self, days: float) -> str:
        """Of this node, from the CA that signs now."""
        csr = make_csr(self.key, self.key.node_id)
        return self.site.coordinator.trust().issuing.issue_node(csr, days).decode()

    def hold(self, certificate_pem: str) -> None:
        self.membership.enrolment = self.enrolment.model_copy(
            update={"certificate_pem": certificate_pem}
        )
        self.transfer.use_certificate(self.enrolment.ca_pem.encode(), certificate_pem.encode())

    def ends(self) -> float:
        pem = self.membership.enrolment.certificate_pem.encode()
        return load_certificate(pem).not_valid_after_utc.timestamp()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("membership")
    text = root / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(f"Chapter {number}. Who is told well, listens. " * 40)
    config = Config.model_validate(
        {
            "model": {"preset": "nano", "sequence_length": 64, "micro_batch": 1},
            "corpus": {
                "sources": [str(text)],
                "block_tokens": 512,
                "heldout_fraction": 0.1,
            },
            "round": {"tokens_per_node": 512},
        }
    )
    (root / "config.toml").write_text(dump_config(config))
    init(root / "state", load_config(root / "config.toml"), say=lambda _line: None)
    return root / "state"


@pytest.fixture
def rig(state: Path, tmp_path: Path) -> Iterator[Rig]:
    with InProcessCoordinator(state, tmp_path / "state", Desk) as site:
        rig = Rig(site, Home(tmp_path / "home"))
        yield rig
        rig.transfer.close()


def test_a_certificate_is_renewed_in_its_last_third_and_not_before(rig: Rig) -> None:
    now = time.time()
    rig.membership.keep(now)
    assert rig.membership.enrolment == rig.enrolment
    ends = rig.ends()
    assert membership.need(rig.enrolment, ends - 11 * 86400) == "none"
    assert membership.need(rig.enrolment, ends - 9 * 86400) == "due"
    rig.hold(rig.certificate(1e-3))  # issued now: not due
    assert membership.need(rig.membership.enrolment, now) == "none"
    due = rig.ends() - 1e-3 * 86400 / 4
    # The request is signed with a time that is a minute ahead, which honest clocks are, too.
    rig.membership.keep(due)
    assert rig.ends() > now + 29 * 86400
    assert Enrolment.load(rig.home.enrolment) == rig.membership.enrolment
    rig.transfer.run_spec()


def test_a_node_that_was_off_for_longer_than_its_certificate_lasts_comes_back(rig: Rig) -> None:
    rig.hold(rig.certificate(-1e-9))
    assert membership.need(rig.membership.enrolment, time.time()) == "late"
    with pytest.raises(TalkootError):
        rig.transfer.run_spec()
    rig.membership.keep(time.time())
    rig.transfer.run_spec()


def test_a_banned_node_gets_no_certificate_and_hears_why(rig: Rig) -> None:
    rig.site.registry.ban(rig.key.node_id, "Sends noise.")
    rig.hold(rig.certificate(-1e-9))
    with pytest.raises(RefusedError, match=r"Sends noise\.") as refused:
        rig.membership.keep(time.time())
    assert refused.value.code == "banned"


def test_only_the_registered_key_renews_and_only_now(rig: Rig) -> None:
    now = time.time()
    registry = rig.site.registry
    honest = membership.renewal_request(rig.enrolment, rig.key, now)
    other = membership.renewal_request(rig.enrolment, NodeKey.generate(), now)
    with pytest.raises(IntegrityError):
        registry.renew(other, peer_node_id=None, now=now)
    with pytest.raises(RefusedError) as refused:
        registry.renew(honest, peer_node_id=None, now=now + 301)
    assert refused.value.code == "stale-request"
    with pytest.raises(RefusedError) as refused:
        registry.renew(honest, peer_node_id="0" * 16, now=now)
    assert refused.value.code == "wrong-node"
    assert registry.renew(honest, peer_node_id=None, now=now).certificate_pem


def test_a_node_that_hears_of_a_rotation_trusts_both_cas_and_then_one(rig: Rig) -> None:
    ca = rig.site.coordinator.state.ca
    serial = rotate(ca, 1000).serial
    rig.membership.newest_serial = serial
    rig.membership.keep(time.time())
    assert rig.membership.enrolment.trust_serial == serial
    assert len(load_bundle(rig.membership.enrolment.ca_pem.encode())) == 2
    rig.transfer.run_spec()


def test_a_node_that_was_off_for_a_whole_rotation_comes_back(rig: Rig) -> None:
    rig.site.stop()
    ca = rig.site.coordinator.state.ca
    rotate(ca, 1)
    assert settle(ca, now=time.time() + 2)
    rig.site.start()
    with pytest.raises(TalkootError):
        rig.transfer.run_spec()  # neither trusts the other's CA
    for _ in range(membership.LOST_REPORTS):
        rig.membership.asks()
    rig.membership.keep(time.time())
    rig.transfer.run_spec()
    assert load_bundle(rig.membership.enrolment.ca_pem.encode()) == load_bundle(
        rig.site.coordinator.ca_pem
    )


def test_cas_that_are_unsigned_of_another_run_or_older_are_not_taken(rig: Rig) -> None:
    now = rig.membership.enrolment.model_copy(update={"trust_serial": 5})
    coordinator = rig.site.coordinator

    def bundle(serial: int, run_id: str = coordinator.run_id, key: NodeKey = coordinator.key):  # type: ignore[no-untyped-def]
        message = TrustBundle(
            run_id=run_id, serial=serial, authorities=(now.ca_pem,), issued_unix=0.0
        )
        return key.sign("TrustBundle", canonical_bytes(message))

    assert membership.take_trust(now, bundle(6)).trust_serial == 6
    for bad, code in (
        (bundle(4), "rolled-back"),
        (bundle(6, run_id="other"), "wrong-run"),
        (bundle(6, key=NodeKey.generate()), "bad-signature"),
    ):
        with pytest.raises(IntegrityError) as refused:
            membership.take_trust(now, bad)
        assert refused.value.code == code
