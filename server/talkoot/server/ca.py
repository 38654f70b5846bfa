"""The operator's own certificate authority: the root of all trust in one network.

Two kinds of certificate leave it. A node's says "the holder of this key is node <id>" (client
authentication only). A server's says "this is the coordinator" (server authentication only).
Profile after RFC 5280, section 4.2.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from talkoot.protocol import limits
from talkoot.protocol.errors import ConfigError, IntegrityError, ProtocolError, StateError
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.identity import (
    CERTIFICATE_BACKDATE_SECONDS,
    COORDINATOR_NAME,
    NodeKey,
    fingerprint,
    load_certificate,
    node_id_of,
    read_small,
)

CA_DAYS: Final = 3650
SERVER_DAYS: Final = 825
"""Days that a server's certificate lasts; what Apple's TLS accepts at most."""
CLOCK_SKEW: Final = timedelta(seconds=CERTIFICATE_BACKDATE_SECONDS)
KEY_FILE: Final = "ca-key.pem"
CERTIFICATE_FILE: Final = "ca.pem"

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class CertificateAuthority:
    """A CA key and its self-signed certificate, both in one directory of the operator's."""

    def __init__(self, key: NodeKey, certificate: x509.Certificate) -> None:
        if certificate.public_key() != key.public_key:
            raise IntegrityError("The CA's certificate belongs to another key.", code="ca-mismatch")
        self._key = key
        self._certificate = certificate

    @classmethod
    def create(cls, directory: Path, *, now: datetime | None = None) -> CertificateAuthority:
        """Make a new CA in ``directory`` (mode 0700; its files 0600).

        The certificate is written last: a directory without one holds no CA, whatever a crash left.

        Raises:
            StateError: there is a CA already, or the directory can't be written.
        """
        certificate_path = directory / CERTIFICATE_FILE
        key = NodeKey.generate()
        certificate = _self_signed(key, now or datetime.now(UTC))
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if certificate_path.exists():
                raise StateError(
                    f"{directory} holds a certificate authority already; a new one would lock out "
                    "every node that trusts it.",
                    code="ca-exists",
                )
            directory.chmod(0o700)
            key.save(directory / KEY_FILE)
            write_atomic(certificate_path, _pem(certificate), mode=0o600)
        except OSError as err:
            raise explain_os_error(err, "making the certificate authority", directory) from err
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> CertificateAuthority:
        """Read the CA in ``directory``.

        Raises:
            StateError: it is missing, unreadable, or its two files do not belong together.
        """
        doing = "opening the certificate authority"
        pem = read_small(directory / CERTIFICATE_FILE, doing)
        try:
            certificate = load_certificate(pem)
            return cls(NodeKey.load(directory / KEY_FILE), certificate)
        except IntegrityError as err:
            raise StateError(
                f"The certificate authority in {directory} is damaged ({err.sentence}) "
                "Restore both of its files from one backup.",
                code="ca-damaged",
            ) from err

    @property
    def certificate_pem(self) -> bytes:
        """The CA's certificate: public, what nodes pin."""
        return _pem(self._certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER, hexadecimal: the ``ca=`` of an invite."""
        return fingerprint(self.certificate_pem)

    @property
    def expires(self) -> datetime:
        """When the CA's own certificate ends."""
        return self._certificate.not_valid_after_utc

    def issue_node(self, csr_pem: bytes, days: float, *, now: datetime | None = None) -> bytes:
        """Certify the key of a request; returns PEM. Of the request only the key is taken.

        Args:
            csr_pem: at most ``limits.MAX_CSR`` bytes.
            days: how long the certificate lasts, though never longer than the CA's own.

        Raises:
            ProtocolError: not a request, its self-signature fails, or its key is not EC P-384.
        """
        if len(csr_pem) > limits.MAX_CSR:
            raise ProtocolError(
                f"The certificate request is longer than {limits.MAX_CSR} bytes.", code="too-large"
            )
        public_key = key_of_csr(csr_pem)
        return self._issue(
            node_id_of(public_key),
            public_key,
            ExtendedKeyUsageOID.CLIENT_AUTH,
            names=None,
            lifetime=timedelta(days=days),
            now=now or datetime.now(UTC),
        )

    def issue_server(
        self,
        names: Iterable[str],
        ips: Iterable[str],
        key: NodeKey,
        *,
        days: float = SERVER_DAYS,
        now: datetime | None = None,
    ) -> bytes:
        """Certify a server's key for its hosts; returns PEM.

        Every server certificate also holds ``talkoot-coordinator``, which clients check, and the
        loopback names.

        Args:
            names: DNS names; an international one is converted to its ASCII form.
            ips: IPv4 or IPv6 addresses.

        Raises:
            ConfigError: a name or an address can't stand in a certificate.
        """
        dns = dict.fromkeys([COORDINATOR_NAME, "localhost", *(_ascii_name(name) for name in names)])
        addresses = dict.fromkeys(_address(ip) for ip in ["127.0.0.1", "::1", *ips])
        general: list[x509.GeneralName] = [x509.DNSName(name) for name in dns]
        general += [x509.IPAddress(address) for address in addresses]
        return self._issue(
            COORDINATOR_NAME,
            key.public_key,
            ExtendedKeyUsageOID.SERVER_AUTH,
            names=x509.SubjectAlternativeName(general),
            lifetime=timedelta(days=days),
            now=now or datetime.now(UTC),
        )

    def _issue(
        self,
        common_name: str,
        public_key: ec.EllipticCurvePublicKey,
        usage: x509.ObjectIdentifier,
        *,
        names: x509.SubjectAlternativeName | None,
        lifetime: timedelta,
        now: datetime,
    ) -> bytes:
        issuer = self._certificate
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(issuer.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - CLOCK_SKEW, issuer.not_valid_before_utc))
            # Nothing outlives the CA: it could not be verified anyway.
            .not_valid_after(min(now + lifetime, issuer.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
                critical=False,
            )
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return _pem(builder.sign(self._key.private_key, hashes.SHA384()))


def _self_signed(key: NodeKey, now: datetime) -> x509.Certificate:
    # The key's id in the name tells two networks' CAs apart wherever certificates are listed.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"talkoot network {key.node_id}")])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key), critical=False)
        .sign(key.private_key, hashes.SHA384())
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def key_of_csr(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The EC P-384 key of a PEM request that is signed by it; else :class:`ProtocolError`.

    The size is the caller's to check (``EnrolRequest`` caps it at ``limits.MAX_CSR``).
    """
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public_key = request.public_key()
        if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(
            public_key.curve, ec.SECP384R1
        ):
            raise ProtocolError(
                "The certificate request is not for an EC P-384 key: make the node's key with "
                "talkoot.",
                code="wrong-curve",
            )
        # RFC 2986, section 3: the self-signature is what proves possession of the key.
        proven = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise ProtocolError("Not a PEM certificate request.", code="bad-csr") from err
    if not proven:
        raise ProtocolError("The certificate request is not signed by its own key.", code="bad-csr")
    return public_key


def _ascii_name(name: str) -> str:
    try:
        ascii_name = name.encode("idna").decode("ascii")
        x509.DNSName(ascii_name)
    except (UnicodeError, ValueError) as err:
        raise ConfigError(f"{name!r} is not a DNS name.", code="bad-name") from err
    if not ascii_name or any(char.isspace() or char in "/:@" for char in ascii_name):
        raise ConfigError(
            f"{name!r} is not a DNS name: give the bare host, without scheme or port.",
            code="bad-name",
        )
    return ascii_name


def _address(ip: str) -> IPAddress:
    try:
        return ipaddress.ip_address(ip)
    except ValueError as err:
        raise ConfigError(f"{ip!r} is not an IP address.", code="bad-address") from err


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
