"""Errors across the data plane: a talkoot error becomes a gRPC status, and the same error again.

The status says which class of the exception tree it was; its detail is the canonical JSON of
:class:`~talkoot.protocol.messages.Refusal`, with the code and the sentence.
"""

from __future__ import annotations

from typing import Final

import grpc

from talkoot.protocol.errors import (
    CapacityError,
    IntegrityError,
    ProtocolError,
    RefusedError,
    TalkootError,
    UnavailableError,
    VersionError,
)
from talkoot.protocol.messages import Refusal, canonical_bytes, parse

AWAITS_APPROVAL: Final = "awaits-approval"
"""Not yet: ask again in a while."""
APPLICATION_REFUSED: Final = "application-refused"
CERTIFICATE_EXPIRED: Final = "certificate-expired"
"""Renew, and try again."""

MAX_DETAIL: Final = 4096
"""Bytes of a status detail. It is an HTTP/2 trailer, and gRPC drops those that are over 8 KiB."""

_STATUS: Final[tuple[tuple[type[TalkootError], grpc.StatusCode], ...]] = (
    (VersionError, grpc.StatusCode.FAILED_PRECONDITION),
    (IntegrityError, grpc.StatusCode.DATA_LOSS),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (RefusedError, grpc.StatusCode.PERMISSION_DENIED),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
)
"""Most derived first. What is not here is the server's own trouble: INTERNAL."""

_NEUTRAL: Final = (
    "The coordinator failed inside while answering: try again later, and tell its operator if it "
    "goes on."
)
_DISK_FULL: Final = (
    "The coordinator's disk is full: try again later; its operator has to free some space."
)
_BROKEN_OFF: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        # Without a Refusal this comes from gRPC: more calls at once than the server takes.
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def to_status(err: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and detail for an error met while answering a peer.

    An error that is not made for peers (a bug, a server's own state or disk) is told in a neutral
    sentence: a peer learns no path and no internals.
    """
    for kind, status in _STATUS:
        if isinstance(err, kind):
            if isinstance(err, CapacityError) and err.code == "disk-full":
                return status, _detail(err.code, _DISK_FULL)
            return status, _detail(err.code, err.sentence)
    return grpc.StatusCode.INTERNAL, _detail("internal", _NEUTRAL)


def _detail(code: str, sentence: str) -> str:
    limit = 2000
    while True:
        body = canonical_bytes(Refusal(code=code, sentence=sentence[:limit]))
        if len(body) <= MAX_DETAIL:
            return body.decode("ascii")
        limit //= 2


def from_status(status: grpc.StatusCode, detail: str, *, peer: str) -> TalkootError:
    """The error that a peer's status stands for; ``peer`` names it in sentences of our own.

    Whatever has no valid Refusal comes from gRPC or the network on the way.
    """
    try:
        refusal = parse(Refusal, detail.encode("utf-8", "replace"), cap=MAX_DETAIL)
    except ProtocolError:
        cause = printable(detail)[:300]
        if status in _BROKEN_OFF:
            return UnavailableError(
                f"No answer from {peer} ({status.name.lower()}: {cause}): check the network and "
                "that the coordinator is up, then try again."
            )
        return ProtocolError(
            f"{peer} answered outside the protocol ({status.name.lower()}: {cause}): "
            "update talkoot on both sides."
        )
    sentence = printable(refusal.sentence)
    for kind, known in _STATUS:
        if status is known:
            return kind(sentence, code=refusal.code)
    return UnavailableError(sentence, code=refusal.code)


def printable(text: str) -> str:
    """A peer's text as one line without control characters: it will be shown in a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def printable_lines(text: str) -> str:
    """As :func:`printable`, line by line; all lines but the first are indented, so that none can
    pass for a line of this program's own."""
    return "\n  ".join(printable(line) for line in text.split("\n"))
