"""What a backup is: a signed list of files with their digests, and a sealed bundle of secrets."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from talkoot.protocol.limits import MIB
from talkoot.protocol.messages import Digest, Message, RunId

FORMAT: Final = 1
MAX_RECORD: Final = 256 * MIB
"""Bytes of one backup's record: some 200 for each file."""
MAX_SECRETS: Final = 4 * MIB
"""Bytes of the bundle of keys, certificates and configuration."""

FOLDERS: Final = ("corpus", "tokenizer", "versions")
"""Below the state directory: what is copied as it is."""
SECRETS: Final = ("ca", "keys")
"""Below the state directory: what goes into the sealed bundle, with ``config.toml``."""

Size = Annotated[int, Field(ge=0, lt=2**63)]


def _plain(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\x00" in part for part in parts):
        raise ValueError(f"{path!r} is not the plain name of a file below the state directory")
    return path


def _copied(path: str) -> str:
    if path.partition("/")[0] not in FOLDERS or "/" not in path:
        raise ValueError(f"{path!r} is not below {', '.join(FOLDERS)}")
    return path


def _secret(path: str) -> str:
    if path != "config.toml" and (path.partition("/")[0] not in SECRETS or "/" not in path):
        raise ValueError(f"{path!r} is not below {', '.join(SECRETS)}")
    return path


CopiedPath = Annotated[str, Field(max_length=1024), AfterValidator(_plain), AfterValidator(_copied)]
SecretPath = Annotated[str, Field(max_length=1024), AfterValidator(_plain), AfterValidator(_secret)]


class Piece(Message):
    """A file in the vault, by the digest of its bytes."""

    digest: Digest
    size_bytes: Size


class StateFile(Message):
    """A file of the state directory, and where its bytes are in the vault."""

    path: CopiedPath
    digest: Digest
    size_bytes: Size
    inode: int
    mtime_ns: int
    """Inode and time as they were: a file that has both still is not read again next time."""


class BackupRecord(Message):
    """One backup. It is signed with the coordinator's key, which is among the secrets."""

    format: Literal[1]
    run_id: RunId
    created_unix: float
    schema_revision: Annotated[str, Field(pattern=r"^[0-9a-z]{1,32}$")]
    """Of the ledger, which is an SQLite file here whatever it was."""
    version: Size
    """The newest that was published."""
    ledger: Piece
    flower: Piece | None
    """The SuperLink's database: which keys it lets in."""
    artifacts: tuple[Piece, ...]
    """All that the ledger's newest versions and pending contributions need."""
    files: tuple[StateFile, ...]
    secrets: Piece
    encrypted: bool


class SecretFile(Message):
    """One small file, hexadecimal."""

    path: SecretPath
    hex: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=2 * MIB)]


class SecretBundle(Message):
    """Keys, CAs and configuration."""

    files: Annotated[tuple[SecretFile, ...], Field(max_length=1000)]
