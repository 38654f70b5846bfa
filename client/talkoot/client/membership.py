"""Staying a member: certificates that are renewed in time, and CAs that follow one another.

All of it starts from what the node has held since it enrolled: its own key, which the coordinator
registered, and the coordinator's public key. So a node that was off for longer than its certificate
lasts, or for a whole rotation of the CA, finds its way back without its owner.
"""

from __future__ import annotations

import logging
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from talkoot.client.enrol import (
    Enrolment,
    call,
    check_certificate,
    pinned_client,
    unverified_client,
)
from talkoot.client.home import Home
from talkoot.client.plane import DataPlane
from talkoot.protocol.errors import IntegrityError
from talkoot.protocol.files import write_atomic
from talkoot.protocol.identity import (
    CERTIFICATE_BACKDATE_SECONDS,
    NodeKey,
    issued_by,
    load_bundle,
    load_certificate,
    load_public_key,
    make_csr,
    verify,
)
from talkoot.protocol.messages import (
    RenewReply,
    RenewRequest,
    Signed,
    TrustBundle,
    canonical_bytes,
    parse,
)

Need = Literal["none", "due", "late"]
RENEW_SHARE: Final = 1 / 3
"""Of a certificate's life: how much of it is left when it is renewed."""
MAX_RETRY_SECONDS: Final = 60.0
LOST_REPORTS: Final = 3
LOST_SECONDS: Final = 20.0
"""After so many reports without an answer, how often a node asks for the network's CAs anew."""

log = logging.getLogger(__name__)


class Membership:
    """Keeps one node's certificate and its CAs current. One thread calls :meth:`keep`.

    Args:
        home: where the enrolment is saved.
        key: the node's.
        enrolment: as it is now.
        transfer: is given every new certificate.
    """

    def __init__(self, home: Home, key: NodeKey, enrolment: Enrolment, transfer: DataPlane) -> None:
        self.enrolment = enrolment
        self.newest_serial = 0
        """Of the TrustBundle that the coordinator's head speaks of."""
        self._home = home
        self._key = key
        self._transfer = transfer
        self._unanswered = 0
        self._due = 0.0

    def asks(self) -> None:
        """A report is on its way."""
        self._unanswered += 1

    def hears(self) -> None:
        """A report was answered."""
        self._unanswered = 0

    def keep(self, now: float) -> None:
        """Renew the certificate when it is time, and follow the network's CAs. Called often.

        Raises:
            RefusedError: this node is banned, or not known any more.
            UnavailableError, ProtocolError: it did not work now; it is tried again later.
        """
        wanted = need(self.enrolment, now)
        told = self.newest_serial > self.enrolment.trust_serial
        lost = self._unanswered >= LOST_REPORTS
        if wanted == "none" and not told and not lost:
            return
        # A clock that was set back must not put it off for ever.
        if 0 < self._due - now < 2 * MAX_RETRY_SECONDS:
            return
        wait = retry_seconds(self.enrolment)
        self._due = now + (wait if wanted != "none" or told else max(wait, LOST_SECONDS))
        if told or lost or wanted == "late":
            # Who can't be reached may have another CA by now, or accept another than ours.
            self._adopt(take_trust(self.enrolment, fetch_trust(self.enrolment)))
            wanted = need(self.enrolment, now)
        if wanted == "due":
            reply = self._transfer.renew(renewal_request(self.enrolment, self._key, now))
        elif wanted == "late":
            reply = renew_late(self.enrolment, self._key, now)
        else:
            return
        self._adopt(take_renewal(self.enrolment, self._key, reply))
        self._due = 0.0
        log.info("the node's certificate was renewed")

    def _adopt(self, enrolment: Enrolment) -> None:
        if enrolment == self.enrolment:
            return
        enrolment.save(self._home.enrolment)
        self.enrolment = enrolment
        self._transfer.use_certificate(
            enrolment.ca_pem.encode("ascii"), enrolment.certificate_pem.encode("ascii")
        )
        if self._home.ca.exists():  # a stock SuperNode reads it when it starts
            write_atomic(self._home.ca, enrolment.ca_pem.encode("ascii"))


def need(enrolment: Enrolment, now: float) -> Need:
    """Whether the certificate is to be renewed at ``now`` (Unix seconds).

    ``due``: soon, over the connection that it still opens. ``late``: it opens none any more.
    """
    certificate = load_certificate(enrolment.certificate_pem.encode("ascii"))
    ends = certificate.not_valid_after_utc.timestamp()
    if now >= ends or not issued_by(certificate, load_bundle(enrolment.ca_pem.encode("ascii"))):
        return "late"
    return "due" if ends - now <= lifetime(certificate) * RENEW_SHARE else "none"


def retry_seconds(enrolment: Enrolment) -> float:
    """How long to wait after a renewal that failed."""
    certificate = load_certificate(enrolment.certificate_pem.encode("ascii"))
    return min(MAX_RETRY_SECONDS, max(0.5, lifetime(certificate) / 30))


def lifetime(certificate: x509.Certificate) -> float:
    """Seconds from a certificate's issue to its end."""
    begins = certificate.not_valid_before_utc.timestamp() + CERTIFICATE_BACKDATE_SECONDS
    return max(1.0, certificate.not_valid_after_utc.timestamp() - begins)


def fetch_trust(enrolment: Enrolment) -> Signed:
    """Ask for the CAs of the network, from whoever answers: the signature decides."""
    door = enrolment.door()
    with unverified_client(door) as client:
        return parse(Signed, call(door, client, "GET", "/api/v1/trust"))


def take_trust(enrolment: Enrolment, signed: Signed) -> Enrolment:
    """The enrolment with the CAs of a signed TrustBundle.

    Raises:
        IntegrityError: not signed by this coordinator, of another run, or older than one seen.
    """
    key = load_public_key(enrolment.coordinator_key_pem.encode("ascii"))
    bundle = verify(signed, "TrustBundle", key, TrustBundle)
    if bundle.run_id != enrolment.run_id:
        raise IntegrityError("These CAs are of another run.", code="wrong-run")
    if bundle.serial < enrolment.trust_serial:
        raise IntegrityError(
            "The coordinator shows CAs that have been replaced since: they are not trusted.",
            code="rolled-back",
        )
    # Each is read alone: nothing that hides behind a certificate is trusted with it.
    authorities = [load_certificate(pem.encode("ascii", "replace")) for pem in bundle.authorities]
    pems = [a.public_bytes(Encoding.PEM).decode("ascii") for a in authorities]
    return enrolment.model_copy(update={"trust_serial": bundle.serial, "ca_pem": "".join(pems)})


def renewal_request(enrolment: Enrolment, key: NodeKey, now: float) -> Signed:
    """A signed request for a certificate of the same key."""
    request = RenewRequest(
        run_id=enrolment.run_id,
        node_id=enrolment.node_id,
        csr_pem=make_csr(key, key.node_id).decode("ascii"),
        issued_unix=now,
    )
    return key.sign("RenewRequest", canonical_bytes(request))


def renew_late(enrolment: Enrolment, key: NodeKey, now: float) -> RenewReply:
    """Renew through the gateway, with no certificate of our own.

    Raises:
        RefusedError: banned, unknown, or this machine's clock is wrong.
        UnavailableError: nobody answers.
        IntegrityError: whoever answers is not this coordinator.
    """
    door = enrolment.door()
    request = canonical_bytes(renewal_request(enrolment, key, now))
    with pinned_client(door, enrolment.ca_pem.encode("ascii")) as client:
        return parse(RenewReply, call(door, client, "POST", "/api/v1/renew", request))


def take_renewal(enrolment: Enrolment, key: NodeKey, reply: RenewReply) -> Enrolment:
    """The enrolment with a new certificate, checked as if a stranger had sent it."""
    enrolment = take_trust(enrolment, reply.trust)
    check_certificate(reply.certificate_pem, key, enrolment.ca_pem)
    return enrolment.model_copy(update={"certificate_pem": reply.certificate_pem})
