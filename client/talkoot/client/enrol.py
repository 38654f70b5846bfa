"""Joining a network: from an invite link to a certificate, trusting nobody on the way.

1. Fetch the CA's certificate without verification. Its fingerprint must be the invite's.
2. From here on, TLS verified by that CA alone, for the name ``talkoot-coordinator``.
3. Ask which protocol the coordinator speaks; stop here if it is another one.
4. Only now send the invite's token, with a certificate request that proves we hold our key.
5. Check what comes back as if a stranger had sent it.
"""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from talkoot.protocol import limits
from talkoot.protocol.errors import (
    ConfigError,
    IntegrityError,
    ProtocolError,
    RefusedError,
    StateError,
    UnavailableError,
    VersionError,
)
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.identity import (
    COORDINATOR_NAME,
    MAX_PEM,
    NodeKey,
    fingerprint,
    issued_by,
    load_bundle,
    load_certificate,
    load_public_key,
    make_csr,
    read_small,
    verify,
)
from talkoot.protocol.invite import Invite
from talkoot.protocol.messages import (
    Capability,
    CoordinatorInfo,
    EnrolReply,
    EnrolRequest,
    Message,
    Name,
    NodeId,
    Refusal,
    RunId,
    TrustBundle,
    canonical_bytes,
    parse,
)
from talkoot.protocol.refusals import printable_lines

TIMEOUT: Final = httpx.Timeout(30.0, connect=10.0)  # seconds
TOTAL_SECONDS: Final = 60.0
"""For one whole answer, however slowly it drips."""

Port = Annotated[int, Field(ge=1, le=65535)]
Pem = Annotated[str, Field(min_length=1, max_length=MAX_PEM)]
Bundle = Annotated[str, Field(min_length=1, max_length=limits.MAX_AUTHORITIES * MAX_PEM)]


class Enrolment(Message):
    """What a node keeps of having joined: where the coordinator is and how both prove themselves.

    PEMs are ASCII text. The node's private key is not in here (``NodeKey.save``).
    """

    schema_version: Literal[1] = 1
    run_id: RunId
    node_id: NodeId
    name: Name
    host: Annotated[str, Field(min_length=1, max_length=253)]
    gateway_port: Port
    transfer_port: Port
    trust_serial: Annotated[int, Field(ge=1)]
    """Of the TrustBundle that ``ca_pem`` is from: an older one is refused."""
    ca_pem: Bundle
    """The CAs of the network, one PEM after the other."""
    certificate_pem: Pem
    coordinator_key_pem: Pem
    """Public key that signs runs, tasks, versions and trust."""

    def door(self) -> Invite:
        """Where the coordinator's gateway is."""
        known = load_bundle(self.ca_pem.encode("ascii"))[0].fingerprint(hashes.SHA256()).hex()
        return Invite(self.host, self.gateway_port, known, None)

    def save(self, path: Path) -> None:
        """Write ``enrolment.json`` atomically, readable by its owner only."""
        try:
            write_atomic(path, canonical_bytes(self), mode=0o600)
        except OSError as err:
            raise explain_os_error(err, "saving the enrolment", path) from err

    @classmethod
    def load(cls, path: Path) -> Enrolment:
        """Read what :meth:`save` wrote.

        Raises:
            StateError: missing, unreadable or damaged.
        """
        data = read_small(path, "reading the enrolment", cap=limits.MAX_CONTROL_MESSAGE)
        try:
            return parse(cls, data)
        except ProtocolError as err:
            raise StateError(
                f"{path} is damaged or from another version of talkoot ({err.sentence}) "
                "Restore it from a backup, or join again with a new invite.",
                code="bad-enrolment",
            ) from err


class _AnyInfo(BaseModel):
    """What ``/api/v1/info`` says in every protocol version."""

    model_config = ConfigDict(extra="ignore", strict=True)
    protocol: int


def fetch_info(invite: Invite) -> CoordinatorInfo:
    """Ask a coordinator who it is, over TLS pinned to the invite's fingerprint.

    Raises:
        UnavailableError: nobody answers there.
        IntegrityError: whoever answers isn't the coordinator of this invite.
        VersionError: it speaks another protocol version.
        ProtocolError: it doesn't speak talkoot at all.
    """
    with pinned_client(invite, _pinned_ca(invite)) as client:
        return _info(invite, client)


def enrol(invite: Invite, key: NodeKey, name: str, capability: Capability) -> Enrolment:
    """Use an invite. The caller saves the result; enrolling is not repeated after that.

    Raises:
        RefusedError: the coordinator said no (``code``: why).
        UnavailableError: nobody answers, or it is busy; the invite may be tried again.
        IntegrityError, VersionError, ProtocolError: as of :func:`fetch_info`.
        ConfigError: ``name`` isn't 1 to 64 printable characters.
    """
    request = _request(invite, key, name, capability)
    ca_pem = _pinned_ca(invite)
    with pinned_client(invite, ca_pem) as client:
        _info(invite, client)
        answer = call(invite, client, "POST", "/api/v1/enrol", canonical_bytes(request))
    reply = parse(EnrolReply, answer)
    trust = _check_reply(reply, key, ca_pem)
    return Enrolment(
        run_id=reply.run_id,
        node_id=reply.node_id,
        name=name,
        host=invite.host,
        gateway_port=invite.port,
        transfer_port=reply.transfer_port,
        trust_serial=trust.serial,
        ca_pem="".join(trust.authorities),
        certificate_pem=reply.certificate_pem,
        coordinator_key_pem=reply.coordinator_key_pem,
    )


def _request(invite: Invite, key: NodeKey, name: str, capability: Capability) -> EnrolRequest:
    try:
        return EnrolRequest(
            protocol=limits.PROTOCOL_VERSION,
            token=invite.token,
            csr_pem=make_csr(key, key.node_id).decode("ascii"),
            name=name,
            capability=capability,
        )
    except ValidationError as err:
        raise ConfigError(
            f"{name!r} cannot be a node's name: choose 1 to {limits.MAX_NAME_CHARS} printable "
            "characters.",
            code="bad-name",
        ) from err


def _pinned_ca(invite: Invite) -> bytes:
    """The CA's certificate, re-encoded, once its fingerprint is the invite's."""
    # Nothing is believed yet: the fingerprint below decides, and no secret is sent before it has.
    with unverified_client(invite) as client:
        pem = call(invite, client, "GET", "/api/v1/ca")
    certificate = load_certificate(pem)
    # Re-encoded, so that nothing beside the one certificate that was checked is trusted.
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    found = fingerprint(pem)
    if found != invite.ca_fingerprint:
        raise IntegrityError(
            f"Wrong CA fingerprint: {invite.host}:{invite.port} shows {found[:16]}… and the invite "
            f"says {invite.ca_fingerprint[:16]}…, so either the invite is of another coordinator "
            "or somebody stands in between; nothing was sent to it. Ask the operator for a new "
            "invite.",
            code="wrong-ca",
        )
    return pem


def unverified_client(invite: Invite) -> httpx.Client:
    """For what is believed by its own fingerprint or signature, and by nothing else."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    return _client(invite, anybody)


def pinned_client(invite: Invite, ca_pem: bytes) -> httpx.Client:
    """Trusts these CAs and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_pem.decode("ascii"))
    return _client(invite, context)


def _client(invite: Invite, context: ssl.SSLContext) -> httpx.Client:
    return httpx.Client(
        base_url=invite.base_url,
        verify=context,
        timeout=TIMEOUT,
        follow_redirects=False,
        trust_env=False,
        headers={"accept-encoding": "identity"},
    )


def _info(invite: Invite, client: httpx.Client) -> CoordinatorInfo:
    body = call(invite, client, "GET", "/api/v1/info")
    try:
        theirs = _AnyInfo.model_validate_json(body).protocol
    except ValidationError as err:
        raise _not_talkoot(invite) from err
    ours = limits.PROTOCOL_VERSION
    if theirs != ours:
        which = "this talkoot" if theirs > ours else "the coordinator"
        raise VersionError(
            f"The coordinator speaks protocol {theirs} and this node speaks {ours}: {which} has to "
            "be upgraded."
        )
    return parse(CoordinatorInfo, body)


def call(
    invite: Invite, client: httpx.Client, method: str, path: str, body: bytes | None = None
) -> bytes:
    """One capped exchange with ``invite``'s host; every failure becomes a sentence."""
    where = f"{invite.host}:{invite.port}"
    # The name is checked against the pinned CA's certificate: the address is only how to get there.
    extensions: dict[str, Any] = {"sni_hostname": COORDINATOR_NAME}
    headers = {"content-type": "application/json"} if body is not None else {}
    deadline = time.monotonic() + TOTAL_SECONDS
    answer = bytearray()
    try:
        with client.stream(
            method, path, content=body, headers=headers, extensions=extensions
        ) as response:
            for chunk in response.iter_raw():
                if len(answer) + len(chunk) > limits.MAX_CONTROL_MESSAGE:
                    raise _not_talkoot(invite)
                answer += chunk
                if time.monotonic() > deadline:
                    raise UnavailableError(f"{where} answers too slowly: try again later.")
    except httpx.TransportError as err:
        if _is_certificate_error(err):
            raise IntegrityError(
                f"The server at {where} has no valid certificate of the invite's coordinator: "
                "somebody may stand in between, or this machine's clock is wrong.",
                code="wrong-certificate",
            ) from err
        raise UnavailableError(
            f"No coordinator answers at {where} ({err or type(err).__name__}): check the address "
            "and your connection, then try again."
        ) from err
    if response.status_code == 200:
        return bytes(answer)
    raise _refusal(invite, response.status_code, bytes(answer))


def _refusal(invite: Invite, status: int, body: bytes) -> Exception:
    try:
        refusal = parse(Refusal, body)
    except ProtocolError:
        if status in {429, 502, 503, 504}:
            return UnavailableError(
                f"The coordinator at {invite.host}:{invite.port} is busy or starting (HTTP "
                f"{status}): try again later."
            )
        return _not_talkoot(invite)
    # A stranger's words, on somebody's terminal: no escape sequences.
    sentence = printable_lines(refusal.sentence)
    if status == 426:
        return VersionError(sentence, code=refusal.code)
    if status == 429 or status >= 500:
        return UnavailableError(sentence, code=refusal.code)
    return RefusedError(sentence, code=refusal.code)


def _not_talkoot(invite: Invite) -> ProtocolError:
    return ProtocolError(
        f"What answers at {invite.host}:{invite.port} is not a talkoot coordinator: check the "
        "invite's address and port.",
        code="not-talkoot",
    )


def _check_reply(reply: EnrolReply, key: NodeKey, ca_pem: bytes) -> TrustBundle:
    """The CAs must be signed and hold the pinned one; the certificate must be ours, from them."""
    signer = load_public_key(reply.coordinator_key_pem.encode("utf-8"))
    trust = verify(reply.trust, "TrustBundle", signer, TrustBundle)
    for pem in trust.authorities:
        load_certificate(pem.encode("utf-8"))
    if (
        trust.run_id != reply.run_id
        or ca_pem.decode("ascii") not in trust.authorities
        or reply.node_id != key.node_id
    ):
        raise _wrong_certificate()
    check_certificate(reply.certificate_pem, key, "".join(trust.authorities))
    return trust


def check_certificate(certificate_pem: str, key: NodeKey, ca_pem: str) -> None:
    """A certificate must be for our key and the id that it implies, and from one of these CAs.

    Raises:
        IntegrityError: it is not.
    """
    certificate = load_certificate(certificate_pem.encode("utf-8"))
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if (
        not issued_by(certificate, load_bundle(ca_pem.encode("utf-8")))
        or certificate.public_key() != key.public_key
        or [name.value for name in names] != [key.node_id]
    ):
        raise _wrong_certificate()


def _wrong_certificate() -> IntegrityError:
    return IntegrityError(
        "The coordinator answered with a certificate that is not for this node's key or not "
        "from its own CA: tell the operator.",
        code="wrong-certificate",
    )


def _is_certificate_error(err: BaseException | None) -> bool:
    while err is not None:
        if isinstance(err, ssl.SSLCertVerificationError):
            return True
        err = err.__cause__ or err.__context__
    return False
