"""Who a node is: an EC P-384 key, made on the node, that never leaves it.

The same key signs messages (:meth:`NodeKey.sign`), asks for the node's certificate
(:func:`make_csr`) and authenticates to Flower, which takes NIST EC keys as PEM.

A signature covers ``b"talkoot-v1\\0" + kind + b"\\0" + body``: a message signed as one kind can't
be shown as another, and nothing that Flower or TLS signs with this key can pass for a message.
ECDSA signatures are malleable, so a signature is never an identifier; the body's digest is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from talkoot.protocol import limits
from talkoot.protocol.errors import IntegrityError, ProtocolError, StateError
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.messages import Message, Signed, canonical_bytes, parse

DOMAIN: Final = b"talkoot-v1\x00"
MAX_PEM: Final = 16 * limits.KIB
"""Bytes of any one PEM file or field; a P-384 certificate needs about 1 KiB."""
COORDINATOR_NAME: Final = "talkoot-coordinator"
"""The name in every server certificate. Clients check it, for trust comes from the pinned CA and
not from the address that happened to lead here."""

CERTIFICATE_BACKDATE_SECONDS: Final = 900.0
"""Certificates are valid from so long before their issue, for those whose clocks are slow."""
CLOCK_SKEW_SECONDS: Final = 300.0
"""How far two honest clocks may differ. Flower bears no more either: it signs the time."""

_KIND = re.compile(r"[A-Za-z]{1,32}")
M = TypeVar("M", bound=Message)


class NodeKey:
    """An EC P-384 private key and what is derived from it. Its ``repr`` shows the node id only."""

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        if not isinstance(private_key.curve, ec.SECP384R1):
            raise IntegrityError(
                f"The key is on the curve {private_key.curve.name}, and talkoot uses P-384 only: "
                "make a new key.",
                code="wrong-curve",
            )
        self._private = private_key
        self.public_pem: bytes = public_pem(private_key.public_key())
        """SubjectPublicKeyInfo as PEM: the bytes that Flower registers and compares."""
        self.node_id: str = node_id_of(private_key.public_key())

    def __repr__(self) -> str:
        return f"NodeKey(node_id={self.node_id!r})"

    @classmethod
    def generate(cls) -> NodeKey:
        """A fresh key from the operating system's randomness."""
        return cls(ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def from_pem(cls, pem: bytes) -> NodeKey:
        """Read an unencrypted PEM key. Raises :class:`IntegrityError` on anything else."""
        try:
            private_key = serialization.load_pem_private_key(pem[:MAX_PEM], password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as err:
            raise IntegrityError("Not an unencrypted PEM private key.", code="bad-key") from err
        if not isinstance(private_key, ec.EllipticCurvePrivateKey):
            raise IntegrityError(
                "The private key is not an elliptic-curve key, and talkoot uses EC P-384 only.",
                code="wrong-curve",
            )
        return cls(private_key)

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Read the key at ``path``.

        Raises:
            StateError: the file is missing, unreadable, or not a P-384 key.
        """
        pem = read_small(path, "reading the node's key")
        try:
            return cls.from_pem(pem)
        except IntegrityError as err:
            raise StateError(
                f"{path} is not a usable key ({err.sentence}) Restore it from a backup, or remove "
                "it and enrol again as a new node.",
                code="bad-key",
            ) from err

    def save(self, path: Path) -> None:
        """Write the key to ``path``, readable by its owner only, atomically."""
        try:
            write_atomic(path, self.private_pem(), mode=0o600)
        except OSError as err:
            raise explain_os_error(err, "saving the node's key", path) from err

    def private_pem(self) -> bytes:
        """PKCS 8, unencrypted: for TLS libraries in this process, and for :meth:`save`."""
        return self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @property
    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """For Flower's fleet client, which wants the object."""
        return self._private

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        return self._private.public_key()

    def sign(self, kind: str, body: bytes) -> Signed:
        """Sign the canonical bytes of a message of type ``kind`` (ECDSA over SHA-384).

        Args:
            kind: what the body is, by convention the class's name: 1 to 32 ASCII letters.
            body: :func:`~talkoot.protocol.messages.canonical_bytes` of the message.
        """
        signature = self._private.sign(_signing_bytes(kind, body), ec.ECDSA(hashes.SHA384()))
        return Signed(kind=kind, body=body.decode("ascii"), signature=signature.hex())


def verify(
    signed: Signed,
    kind: str,
    public_key: ec.EllipticCurvePublicKey,
    message_type: type[M],
    *,
    cap: int = limits.MAX_CONTROL_MESSAGE,
) -> M:
    """Check a signed message of at most ``cap`` bytes and return it.

    Raises:
        IntegrityError: another kind, another signer, changed bytes, or bytes that are not the
            canonical encoding of the message that they parse to.
    """
    if signed.kind != kind:
        raise IntegrityError(
            f"A signed {kind} was expected and a signed {signed.kind} came.", code="wrong-kind"
        )
    try:
        body = signed.body.encode("ascii")
        signature = bytes.fromhex(signed.signature)
        public_key.verify(signature, _signing_bytes(kind, body), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError) as err:
        raise IntegrityError(
            f"The signature of this {kind} does not match: it was changed on the way, or somebody "
            "else signed it.",
            code="bad-signature",
        ) from err
    try:
        message = parse(message_type, body, cap=cap)
    except ProtocolError as err:
        raise IntegrityError(
            f"The signature of this {kind} holds, but its content is not valid: {err.sentence}",
            code="malformed",
        ) from err
    # One message, one encoding: else two parties could hold different bytes for the same claim.
    if canonical_bytes(message) != body:
        raise IntegrityError(
            f"This {kind} is not in canonical form: its sender runs other software.",
            code="not-canonical",
        )
    return message


def make_csr(key: NodeKey, node_id: str) -> bytes:
    """A PEM certificate request for ``key``; its self-signature proves possession of the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return request.sign(key.private_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def fingerprint(cert_pem: bytes) -> str:
    """SHA-256 (hexadecimal) of the DER of the one certificate in ``cert_pem``."""
    return load_certificate(cert_pem).fingerprint(hashes.SHA256()).hex()


def load_certificate(cert_pem: bytes) -> x509.Certificate:
    """Read exactly one PEM certificate.

    A second certificate behind the first is refused: whoever checks the fingerprint of the first
    and then trusts the whole file would trust it as well.
    """
    try:
        if len(cert_pem) > MAX_PEM:
            raise ValueError("too long")
        (certificate,) = x509.load_pem_x509_certificates(cert_pem)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise IntegrityError("Not exactly one PEM certificate.", code="bad-certificate") from err
    return certificate


def load_bundle(pem: bytes) -> list[x509.Certificate]:
    """Read 1 to ``limits.MAX_AUTHORITIES`` PEM certificates: the CAs that a node trusts."""
    try:
        if len(pem) > limits.MAX_AUTHORITIES * MAX_PEM:
            raise ValueError("too long")
        certificates = x509.load_pem_x509_certificates(pem)
        if len(certificates) > limits.MAX_AUTHORITIES:
            raise ValueError("too many")
    except (ValueError, UnsupportedAlgorithm) as err:
        raise IntegrityError("Not a few PEM certificates.", code="bad-certificate") from err
    return certificates


def issued_by(certificate: x509.Certificate, authorities: Iterable[x509.Certificate]) -> bool:
    """Whether one of these CAs signed the certificate."""
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def load_public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Read an EC P-384 public key in the one PEM form that :func:`public_pem` writes.

    Raises :class:`IntegrityError` on any other key or spelling, so that equal keys are equal bytes.
    """
    try:
        if len(pem) > MAX_PEM:
            raise ValueError("too long")
        public_key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise IntegrityError("Not a PEM public key.", code="bad-key") from err
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(
        public_key.curve, ec.SECP384R1
    ):
        raise IntegrityError("The public key is not EC P-384.", code="wrong-curve")
    if public_pem(public_key) != pem:
        raise IntegrityError("The public key is not in its canonical PEM form.", code="bad-key")
    return public_key


def public_pem(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo as PEM."""
    return public_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def node_id_of(public_key: ec.EllipticCurvePublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the key's DER SubjectPublicKeyInfo."""
    der = public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()[:16]


def read_small(path: Path, doing: str, *, cap: int = MAX_PEM) -> bytes:
    """Read a file that must not exceed ``cap`` bytes; errors are sentences that say ``doing``."""
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
    except FileNotFoundError as err:
        raise StateError(f"{path} does not exist (while {doing}).", code="missing") from err
    except PermissionError as err:
        raise StateError(
            f"{path} cannot be read by this user (while {doing}): change its owner or mode.",
            code="unreadable",
        ) from err
    except OSError as err:
        raise explain_os_error(err, doing, path) from err
    if len(data) > cap:
        raise StateError(
            f"{path} is longer than {cap} bytes, so it is not what it should be (while {doing}).",
            code="too-large",
        )
    return data


def _signing_bytes(kind: str, body: bytes) -> bytes:
    # A kind holds no NUL, so the boundary between kind and body is unambiguous.
    if _KIND.fullmatch(kind) is None:
        raise ValueError(f"a kind is 1 to 32 ASCII letters, not {kind!r}")
    return DOMAIN + kind.encode("ascii") + b"\x00" + body
