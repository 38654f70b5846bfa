"""The secrets of a backup: in clear in a file of mode 0600, or encrypted under a passphrase.

scrypt (RFC 7914) makes a key of the passphrase, AES-256-GCM encrypts and authenticates. What is
authenticated with it is the run's id, so that one network's secrets can't be shown as another's.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from talkoot.protocol.errors import ConfigError, IntegrityError
from talkoot.protocol.identity import read_small

MAGIC: Final = b"talkoot sealed 1\n"
SALT_BYTES: Final = 16
NONCE_BYTES: Final = 12
SCRYPT_N: Final = 2**16  # 64 MiB and a quarter of a second or so for each guess
SCRYPT_R: Final = 8
MIN_PASSPHRASE: Final = 12
"""Characters: who has the file may guess for years."""


def read_passphrase(path: Path) -> bytes:
    """The first line of a file. Raises :class:`ConfigError` when it is too short."""
    said = read_small(path, "reading the passphrase").split(b"\n", 1)[0].rstrip(b"\r")
    if len(said) < MIN_PASSPHRASE:
        raise ConfigError(
            f"The passphrase in {path} has under {MIN_PASSPHRASE} characters: choose a longer one "
            "(its first line counts)."
        )
    return said


def seal(data: bytes, passphrase: bytes, run_id: str) -> bytes:
    """Encrypt: magic, salt, nonce, then ciphertext with its tag."""
    salt, nonce = secrets.token_bytes(SALT_BYTES), secrets.token_bytes(NONCE_BYTES)
    return MAGIC + salt + nonce + _cipher(passphrase, salt).encrypt(nonce, data, run_id.encode())


def unseal(data: bytes, passphrase: bytes, run_id: str) -> bytes:
    """Decrypt. Raises :class:`IntegrityError` with a wrong passphrase or changed bytes."""
    head = len(MAGIC) + SALT_BYTES + NONCE_BYTES
    if not data.startswith(MAGIC) or len(data) < head:
        raise IntegrityError("The backup's secrets are damaged.", code="bad-backup")
    salt = data[len(MAGIC) : len(MAGIC) + SALT_BYTES]
    nonce = data[len(MAGIC) + SALT_BYTES : head]
    try:
        return _cipher(passphrase, salt).decrypt(nonce, data[head:], run_id.encode())
    except InvalidTag as err:
        raise IntegrityError(
            "The passphrase does not open the backup's secrets, or they were changed: give the "
            "passphrase that it was made with.",
            code="wrong-passphrase",
        ) from err


def _cipher(passphrase: bytes, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=1).derive(passphrase))
