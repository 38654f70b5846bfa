"""The exception tree. Errors from outside are wrapped: ``raise TransferError(...) from err``.

TalkootError                 one clear sentence; ``code`` for machines
├── ConfigError              a setting is unknown, impossible or missing
├── StateError               a state directory is in use, half made, newer, read-only or full
├── ProtocolError            a peer sent what the protocol does not allow
│   ├── VersionError         the peer speaks another protocol version
│   └── IntegrityError       a digest, signature or certificate does not match
├── RefusedError             a peer answered, and said no (invite used, banned, lease closed)
├── UnavailableError         nobody answered; trying again may help
├── CapacityError            this machine cannot do what is asked (memory, disk, device)
└── CorpusError              a corpus is empty, unreadable or not text
"""

from __future__ import annotations


class TalkootError(Exception):
    """Root of every error that a person may see.

    Args:
        sentence: one sentence that names the cause and the way out.
        code: stable machine-readable reason, e.g. ``"invite-used"``.
    """

    default_code = "error"

    def __init__(self, sentence: str, *, code: str | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code or self.default_code


class ConfigError(TalkootError):
    """A setting is unknown, impossible or missing."""

    default_code = "config"


class StateError(TalkootError):
    """A state directory is in use, half made, of a newer schema, read-only or full."""

    default_code = "state"


class ProtocolError(TalkootError):
    """A peer sent what the protocol does not allow."""

    default_code = "protocol"


class VersionError(ProtocolError):
    """The peer speaks another protocol version."""

    default_code = "protocol-version"


class IntegrityError(ProtocolError):
    """A digest, signature or certificate does not match."""

    default_code = "integrity"


class RefusedError(TalkootError):
    """A peer answered, and said no. ``code`` carries its reason."""

    default_code = "refused"


class UnavailableError(TalkootError):
    """Nobody answered, or the answer broke off; trying again may help."""

    default_code = "unavailable"


class CapacityError(TalkootError):
    """This machine cannot do what is asked: memory, disk or device."""

    default_code = "capacity"


class CorpusError(TalkootError):
    """A corpus is empty, unreadable or not text."""

    default_code = "corpus"
