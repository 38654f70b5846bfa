"""One CA follows another: who is accepted when, and that a crash loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from talkoot.protocol.errors import ConfigError, StateError
from talkoot.protocol.identity import (
    NodeKey,
    issued_by,
    load_bundle,
    load_certificate,
    make_csr,
    verify,
)
from talkoot.protocol.messages import TrustBundle
from talkoot.server.ca import CertificateAuthority
from talkoot.server.trust import TRUST_FILE, load_trust, rotate, settle, stamp

NOW = 1_800_000_000.0


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    CertificateAuthority.create(tmp_path / "ca")
    return tmp_path / "ca"


def test_both_chains_are_accepted_until_the_next_ca_takes_over_and_then_one(ca: Path) -> None:
    key = NodeKey.generate()
    csr = make_csr(key, key.node_id)
    before = load_trust(ca)
    old = load_certificate(before.issuing.issue_node(csr, 30))

    during = rotate(ca, 100, now=NOW)
    new = load_certificate(during.issuing.issue_node(csr, 30))
    assert during.serial > before.serial
    assert during.serving.fingerprint == before.serving.fingerprint
    for certificate in (old, new):
        assert issued_by(certificate, load_bundle(during.bundle_pem))
    with pytest.raises(ConfigError, match="under way"):
        rotate(ca, 100, now=NOW)

    assert not settle(ca, now=NOW + 99)
    assert settle(ca, now=NOW + 100)
    assert not settle(ca, now=NOW + 101)
    after = load_trust(ca)
    assert after.serial > during.serial
    assert issued_by(new, load_bundle(after.bundle_pem))
    assert not issued_by(old, load_bundle(after.bundle_pem))
    assert len(list(ca.rglob("ca-key.pem"))) == 1  # the old one can sign nothing any more
    assert rotate(ca, 100, now=NOW + 200).serial == after.serial + 1


def test_what_nodes_are_told_is_signed_by_the_coordinator_and_lists_all_that_are_accepted(
    ca: Path,
) -> None:
    key = NodeKey.generate()
    trust = rotate(ca, 100, now=NOW)
    bundle = verify(trust.statement(key, "a-run"), "TrustBundle", key.public_key, TrustBundle)
    assert "".join(bundle.authorities).encode() == trust.bundle_pem
    assert (bundle.run_id, bundle.serial) == ("a-run", trust.serial)


def test_a_switch_that_died_before_the_old_key_was_deleted_deletes_it_next_time(ca: Path) -> None:
    old_key = (ca / "ca-key.pem").read_bytes()
    rotate(ca, 100, now=NOW)
    settle(ca, now=NOW + 100)
    (ca / "ca-key.pem").write_bytes(old_key)
    assert not settle(ca, now=NOW + 101)
    assert not (ca / "ca-key.pem").exists()


def test_a_change_is_noticed_and_a_damaged_record_is_refused(ca: Path) -> None:
    before = stamp(ca)
    rotate(ca, 100, now=NOW)
    assert stamp(ca) != before
    assert (ca / TRUST_FILE).stat().st_mode & 0o077 == 0
    (ca / TRUST_FILE).write_bytes(b"{}")
    with pytest.raises(StateError) as refused:
        load_trust(ca)
    assert refused.value.code == "ca-damaged"
