from __future__ import annotations

import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from talkoot.protocol.errors import ConfigError, ProtocolError, StateError
from talkoot.protocol.identity import NodeKey, fingerprint, make_csr
from talkoot.server.ca import CertificateAuthority

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def ca(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", now=NOW)


def policy(ca: CertificateAuthority, at: datetime = NOW) -> PolicyBuilder:
    store = Store([x509.load_pem_x509_certificate(ca.certificate_pem)])
    return PolicyBuilder().store(store).time(at)


def common_name(certificate: x509.Certificate) -> str | bytes:
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return name.value


def test_a_certificate_authority_comes_back_from_its_directory(tmp_path: Path) -> None:
    made = CertificateAuthority.create(tmp_path / "deep" / "ca")
    loaded = CertificateAuthority.load(tmp_path / "deep" / "ca")
    assert loaded.certificate_pem == made.certificate_pem
    assert loaded.fingerprint == made.fingerprint == fingerprint(made.certificate_pem)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep/ca").iterdir()
    }
    assert modes == {"ca.pem": 0o600, "ca-key.pem": 0o600}
    assert stat.S_IMODE((tmp_path / "deep" / "ca").stat().st_mode) == 0o700


def test_an_existing_authority_is_never_replaced(tmp_path: Path) -> None:
    made = CertificateAuthority.create(tmp_path)
    with pytest.raises(StateError, match="already"):
        CertificateAuthority.create(tmp_path)
    assert CertificateAuthority.load(tmp_path).fingerprint == made.fingerprint


def test_an_authority_that_a_crash_left_half_made_can_be_made_again(tmp_path: Path) -> None:
    NodeKey.generate().save(tmp_path / "ca-key.pem")
    with pytest.raises(StateError, match="does not exist"):
        CertificateAuthority.load(tmp_path)
    CertificateAuthority.create(tmp_path)
    CertificateAuthority.load(tmp_path)


def test_a_key_and_a_certificate_of_two_authorities_are_refused(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path)
    NodeKey.generate().save(tmp_path / "ca-key.pem")
    with pytest.raises(StateError, match="damaged"):
        CertificateAuthority.load(tmp_path)


def test_a_node_certificate_verifies_for_a_client_and_for_nothing_else(
    ca: CertificateAuthority,
) -> None:
    key = NodeKey.generate()
    certificate = x509.load_pem_x509_certificate(
        ca.issue_node(make_csr(key, key.node_id), 30, now=NOW)
    )
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.certificate_pem))
    assert certificate.public_key() == key.public_key
    assert common_name(certificate) == key.node_id
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.not_valid_after_utc == NOW + timedelta(days=30)
    with pytest.raises(VerificationError):
        policy(ca).build_server_verifier(x509.DNSName("localhost")).verify(certificate, [])


def test_of_a_request_nothing_but_the_key_is_taken(ca: CertificateAuthority) -> None:
    key, victim = NodeKey.generate(), NodeKey.generate()
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.COMMON_NAME, victim.node_id),
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "operators"),
                ]
            )
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("talkoot-coordinator")]), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key.private_key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate = x509.load_pem_x509_certificate(ca.issue_node(greedy, 1, now=NOW))
    assert len(list(certificate.subject)) == 1
    assert common_name(certificate) == key.node_id
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_a_request_that_does_not_prove_possession_of_its_key_is_refused(
    ca: CertificateAuthority,
) -> None:
    key = NodeKey.generate()
    request = x509.load_pem_x509_csr(make_csr(key, key.node_id))
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1  # in the signature
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(ProtocolError, match="not signed by its own key"):
        ca.issue_node(forged, 1)


def test_a_request_with_another_curve_rubbish_or_bulk_is_refused(ca: CertificateAuthority) -> None:
    weak = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    for request, says in ((weak, "P-384"), (b"rubbish", "Not a PEM"), (b"x" * 9000, "longer than")):
        with pytest.raises(ProtocolError, match=says):
            ca.issue_node(request, 1)


def test_a_server_certificate_verifies_for_each_of_its_names(ca: CertificateAuthority) -> None:
    key = NodeKey.generate()
    certificate = x509.load_pem_x509_certificate(
        ca.issue_server(
            ["train.example.org", "münchen.example", "localhost"], ["192.0.2.7"], key, now=NOW
        )
    )
    names: list[x509.GeneralName] = [
        x509.DNSName(name)
        for name in (
            "talkoot-coordinator",
            "localhost",
            "train.example.org",
            "xn--mnchen-3ya.example",
        )
    ]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ("127.0.0.1", "::1", "192.0.2.7")]
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sorted(map(repr, san)) == sorted(map(repr, names))
    for name in names:
        assert isinstance(name, x509.DNSName | x509.IPAddress)
        policy(ca).build_server_verifier(name).verify(certificate, [])
    with pytest.raises(VerificationError):
        policy(ca).build_server_verifier(x509.DNSName("evil.example")).verify(certificate, [])
    with pytest.raises(VerificationError):
        policy(ca).build_client_verifier().verify(certificate, [])


def test_no_certificate_outlives_the_authority(ca: CertificateAuthority) -> None:
    key = NodeKey.generate()
    pem = ca.issue_node(make_csr(key, key.node_id), 100_000, now=NOW)
    end = x509.load_pem_x509_certificate(ca.certificate_pem).not_valid_after_utc
    assert x509.load_pem_x509_certificate(pem).not_valid_after_utc == end


def test_two_authorities_do_not_verify_each_others_certificates(tmp_path: Path) -> None:
    one = CertificateAuthority.create(tmp_path / "1", now=NOW)
    two = CertificateAuthority.create(tmp_path / "2", now=NOW)
    certificate = x509.load_pem_x509_certificate(
        one.issue_server([], [], NodeKey.generate(), now=NOW)
    )
    verifier = policy(two).build_server_verifier(x509.DNSName("localhost"))
    with pytest.raises(VerificationError):
        verifier.verify(certificate, [])


@pytest.mark.parametrize("name", ["", "https://a.example", "a.example:80", "a b", "x" * 70])
def test_what_is_no_host_name_does_not_enter_a_certificate(
    ca: CertificateAuthority, name: str
) -> None:
    with pytest.raises(ConfigError, match="DNS name"):
        ca.issue_server([name], [], NodeKey.generate())


def test_what_is_no_address_does_not_enter_a_certificate(ca: CertificateAuthority) -> None:
    with pytest.raises(ConfigError, match="IP address"):
        ca.issue_server([], ["10.0.0.256"], NodeKey.generate())
