"""A data plane on loopback: a real server over a backend in memory, with real certificates."""

from __future__ import annotations

import datetime
import hashlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from talkoot.client.mirrors import MirrorLimits
from talkoot.client.pace import Meter, TransferOptions
from talkoot.client.transfer import TransferClient
from talkoot.protocol import limits
from talkoot.protocol.artifacts import ArtifactStore, ChainSource, Slice, Source
from talkoot.protocol.errors import (
    RefusedError,
    TalkootError,
)
from talkoot.protocol.messages import (
    ArtifactRef,
    NodeReport,
    NodeReportReply,
    RenewReply,
    Signed,
    Verdict,
)
from talkoot.protocol.pieces import Pieces, PieceShelf
from talkoot.protocol.refusals import from_status
from talkoot.protocol.wire.transfer_pb2_grpc import TransferStub
from talkoot.server.transfer import TransferServer, serve

NODE, OTHER = "0123456789abcdef", "fedcba9876543210"
LEASE, OTHER_LEASE = "a" * 32, "b" * 32
FAST = TransferOptions(attempts=8, first_delay_seconds=0.05, max_delay_seconds=0.5)
SHORT = TransferOptions(attempts=2, first_delay_seconds=0.01, max_delay_seconds=0.01)
MIB = limits.MIB


# A certificate authority ----------------------------------------------------------------------


class Authority:
    """An EC P-384 CA."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA384())
        )
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    def issue(self, common_name: str, san: str | None = None) -> tuple[bytes, bytes]:
        """(key PEM, certificate PEM)."""
        key = ec.generate_private_key(ec.SECP384R1())
        return (
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            self.certify(common_name, key.public_key(), san),
        )

    def certify(
        self, common_name: str, public_key: ec.EllipticCurvePublicKey, san: str | None = None
    ) -> bytes:
        """A certificate (PEM) for a key that somebody has."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = self._builder(name, public_key)
        if san is not None:
            names = x509.SubjectAlternativeName([x509.DNSName(san)])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA384())
        return certificate.public_bytes(serialization.Encoding.PEM)


# A backend in memory ----------------------------------------------------------------------


@dataclass
class Shelf:
    """A real backend without a ledger: leases and bans in dictionaries, files in a store."""

    store: ArtifactStore
    leases: dict[str, str] = field(default_factory=lambda: {LEASE: NODE, OTHER_LEASE: OTHER})
    banned: set[str] = field(default_factory=set)
    extra: list[Source] = field(default_factory=list)
    arrived: list[tuple[str, str, str]] = field(default_factory=list)
    submitted: list[tuple[str, Signed]] = field(default_factory=list)
    reports: list[tuple[str, NodeReport]] = field(default_factory=list)
    open_task: Signed | None = None
    failure: Exception | None = None

    def authorize(self, node_id: str) -> Verdict:
        if node_id in self.banned:
            return Verdict(accepted=False, code="banned", sentence="This node was banned: ask why.")
        return Verdict(accepted=True, code="ok", sentence="")

    def banned_nodes(self) -> frozenset[str]:
        return frozenset(self.banned)

    def renew(self, signed: Signed, peer_node_id: str | None) -> RenewReply:
        raise RefusedError(f"{peer_node_id} has a certificate.", code="not-due")

    def source(self) -> Source:
        return ChainSource([self.store, *self.extra])

    def may_push(self, node_id: str, lease_id: str, digest: str, size: int) -> Verdict:
        if self.leases.get(lease_id) != node_id:
            return Verdict(accepted=False, code="not-your-lease", sentence="Not your lease.")
        return Verdict(accepted=True, code="ok", sentence="")

    def incoming_root(self) -> Path:
        return self.store.incoming

    def pushed(self, node_id: str, lease_id: str, digest: str, path: Path) -> None:
        self.store.put_file(path, verified=digest)
        self.arrived.append((node_id, lease_id, digest))

    def has_pushed(self, node_id: str, lease_id: str, digest: str) -> bool:
        return (node_id, lease_id, digest) in self.arrived

    def submit(self, node_id: str, signed: Signed) -> Verdict:
        self.submitted.append((node_id, signed))
        return Verdict(accepted=True, code="accepted", sentence="Thanks.")

    def prove(self, node_id: str, signed: Signed) -> Verdict:
        return Verdict(accepted=False, code="too-slow", sentence=f"{node_id} is too slow.")

    def challenge(self, node_id: str) -> bytes:
        return b'{"nonce":"' + node_id.encode() + b'"}'

    def report(self, node_id: str, report: NodeReport) -> NodeReportReply:
        self.reports.append((node_id, report))
        return NodeReportReply(
            status="admitted",
            sentence="",
            report_seconds=5.0,
            poll_seconds=3.0,
            latest_version=7,
            run_finished=False,
            head=signed("Head"),
            latest=None,
            lease_open=True,
        )

    def pieces(self, digest: str, found: Slice) -> Pieces:
        return PieceShelf(self.store.root / "pieces").get(digest, found)

    def mirrors(self, node_id: str) -> Signed:
        return signed("MirrorList")

    def run_spec(self, node_id: str) -> Signed:
        if self.failure is not None:
            raise self.failure
        return signed("RunSpec")

    def task(self, node_id: str) -> Signed | None:
        return self.open_task


def signed(kind: str, body: str = "{}") -> Signed:
    return Signed(kind=kind, body=body, signature="ab" * 50)


# The network ----------------------------------------------------------------------


AUTHORITY = Authority()
SERVER_KEY, SERVER_CERT = AUTHORITY.issue("talkoot-coordinator", san="talkoot-coordinator")
IDENTITIES = {node: AUTHORITY.issue(node) for node in (NODE, OTHER)}


@dataclass
class Network:
    """A server on loopback that can die and come back on the same port."""

    shelf: Shelf
    home: Path
    address: str = ""
    server: TransferServer | None = None
    closing: list[Callable[[], object]] = field(default_factory=list)

    first_word_seconds: float = 60.0

    def start(self) -> None:
        if not self.address:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.server = serve(
            self.shelf,
            self.address,
            SERVER_KEY,
            SERVER_CERT,
            AUTHORITY.pem,
            max_workers=16,
            first_word_seconds=self.first_word_seconds,
        )

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop(0).wait()
            self.server = None

    def client(
        self,
        node: str = NODE,
        *,
        identity: tuple[bytes, bytes] | None = None,
        ca: bytes = AUTHORITY.pem,
        meter: Meter | None = None,
        options: TransferOptions = FAST,
        server_name: str | None = "talkoot-coordinator",
        address: str | None = None,
        mirror_limits: MirrorLimits | None = None,
    ) -> TransferClient:
        key, certificate = identity or IDENTITIES[node]
        client = TransferClient(
            address or self.address,
            ca,
            certificate,
            key,
            server_name=server_name,
            meter=meter or Meter(),
            options=options,
            mirror_limits=mirror_limits,
        )
        self.closing.append(client.close)
        return client

    def raw(
        self, node: str = NODE, compression: grpc.Compression = grpc.Compression.NoCompression
    ) -> TransferStub:
        """What a hostile node has: the bare stub."""
        key, certificate = IDENTITIES[node]
        channel = grpc.secure_channel(
            self.address,
            grpc.ssl_channel_credentials(AUTHORITY.pem, key, certificate),
            options=[
                ("grpc.ssl_target_name_override", "talkoot-coordinator"),
                ("grpc.max_send_message_length", -1),
            ],
            compression=compression,
        )
        self.closing.append(channel.close)
        return TransferStub(channel)

    def local(self, name: str = "local") -> ArtifactStore:
        return ArtifactStore(self.home / name)

    def file(self, data: bytes) -> tuple[ArtifactRef, Path]:
        path = self.home / "payload"
        path.write_bytes(data)
        return ref_of(data), path

    def incoming(self) -> list[str]:
        root = self.shelf.store.incoming
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def ref_of(data: bytes) -> ArtifactRef:
    return ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def error_of(call: Callable[[], object]) -> TalkootError:
    """What a client would make of a raw call's failure."""
    with pytest.raises(grpc.RpcError) as info:
        call()
    assert isinstance(info.value, grpc.Call)
    return from_status(info.value.code(), info.value.details() or "", peer="the server")
