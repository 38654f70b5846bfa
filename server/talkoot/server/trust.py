"""The CAs of one network, and how one follows another without a node being lost.

ca/ca.pem, ca/ca-key.pem   the first CA           ca/<n>/    each later one, the same two files
ca/trust.json              which of them is what; absent as long as there is only the first

A rotation has three states. *One CA*: it signs everything. *Overlap* (``ca rotate``): the next CA
signs nodes' certificates from now on, the servers still show one of the old CA, and both chains are
accepted, so that every node that reports learns the next CA before it meets it. *Switched* (when
the overlap is over): the next CA is the only one, and the old one's private key is deleted.

What nodes are told is a :class:`TrustBundle`, signed with the coordinator's key and not with any
CA's: a node that was off for the whole overlap still believes it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from talkoot.protocol.errors import ConfigError, StateError
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.messages import Signed, TrustBundle, canonical_bytes
from talkoot.server.ca import CERTIFICATE_FILE, KEY_FILE, CertificateAuthority

TRUST_FILE: Final = "trust.json"
FIRST: Final = "."


class _Record(BaseModel):
    """``trust.json``: folders below ``ca/``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    serial: int
    serving: str
    upcoming: str | None
    switch_unix: float | None
    changed_unix: float


@dataclass(frozen=True)
class Trust:
    """The CAs as they stand now.

    Attributes:
        serial: rises with every change.
        serving: signs the servers' certificates.
        upcoming: follows it at ``switch_unix`` (Unix seconds), and signs nodes' certificates now.
        changed_unix: when the last change was.
    """

    serial: int
    serving: CertificateAuthority
    upcoming: CertificateAuthority | None
    switch_unix: float | None
    changed_unix: float

    @property
    def issuing(self) -> CertificateAuthority:
        """Signs nodes' certificates."""
        return self.upcoming or self.serving

    @property
    def authorities(self) -> tuple[CertificateAuthority, ...]:
        """All that are accepted."""
        return (self.serving,) if self.upcoming is None else (self.serving, self.upcoming)

    @property
    def bundle_pem(self) -> bytes:
        """All accepted CAs in one file."""
        return b"".join(authority.certificate_pem for authority in self.authorities)

    def statement(self, key: NodeKey, run_id: str) -> Signed:
        """What nodes are told, signed with the coordinator's key."""
        bundle = TrustBundle(
            run_id=run_id,
            serial=self.serial,
            authorities=tuple(a.certificate_pem.decode("ascii") for a in self.authorities),
            issued_unix=self.changed_unix,
        )
        return key.sign("TrustBundle", canonical_bytes(bundle))


def load_trust(directory: Path) -> Trust:
    """Read the CAs in ``directory``. Raises :class:`StateError` when they can't be used."""
    record = _read(directory)
    upcoming = record.upcoming
    return Trust(
        serial=record.serial,
        serving=CertificateAuthority.load(directory / record.serving),
        upcoming=None if upcoming is None else CertificateAuthority.load(directory / upcoming),
        switch_unix=record.switch_unix,
        changed_unix=record.changed_unix,
    )


def rotate(directory: Path, overlap_seconds: float, *, now: float | None = None) -> Trust:
    """Make the next CA and begin the overlap.

    Raises:
        ConfigError: a rotation is under way already.
        StateError: the directory can't be written.
    """
    moment = time.time() if now is None else now
    record = _read(directory)
    if record.upcoming is not None:
        raise ConfigError(
            "A rotation is under way: it ends at the time that 'talkoot-coordinator ca status' "
            "shows, and another can begin after that."
        )
    number = 2
    while (directory / str(number) / CERTIFICATE_FILE).exists():
        number += 1
    CertificateAuthority.create(directory / str(number))
    _write(
        directory,
        _Record(
            serial=record.serial + 1,
            serving=record.serving,
            upcoming=str(number),
            switch_unix=moment + overlap_seconds,
            changed_unix=moment,
        ),
    )
    return load_trust(directory)


def settle(directory: Path, *, now: float) -> bool:
    """Let the next CA take over if its time has come; returns whether anything changed.

    Harmless to repeat, and to be interrupted: the record is written first, and an old private key
    that a crash left behind is deleted by the next call.
    """
    record = _read(directory)
    if record.upcoming is None or record.switch_unix is None or now < record.switch_unix:
        _forget_old_keys(directory, record)
        return False
    switched = _Record(
        serial=record.serial + 1,
        serving=record.upcoming,
        upcoming=None,
        switch_unix=None,
        changed_unix=now,
    )
    _write(directory, switched)
    _forget_old_keys(directory, switched)
    return True


def stamp(directory: Path) -> tuple[int, int]:
    """Changes whenever the trust does: cheap to ask often."""
    try:
        found = (directory / TRUST_FILE).stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)


def _forget_old_keys(directory: Path, record: _Record) -> None:
    used = {record.serving, record.upcoming}
    folders = [FIRST, *(p.name for p in directory.iterdir() if p.name.isdigit())]
    for folder in folders:
        if folder not in used:
            (directory / folder / KEY_FILE).unlink(missing_ok=True)


def _read(directory: Path) -> _Record:
    path = directory / TRUST_FILE
    try:
        return _Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Record(serial=1, serving=FIRST, upcoming=None, switch_unix=None, changed_unix=0.0)
    except OSError as err:
        raise explain_os_error(err, "opening the certificate authority", path) from err
    except ValidationError as err:
        raise StateError(
            f"{path} is damaged: restore the folder {directory} from one backup.", code="ca-damaged"
        ) from err


def _write(directory: Path, record: _Record) -> None:
    path = directory / TRUST_FILE
    try:
        body = json.dumps(record.model_dump()).encode("ascii") + b"\n"
        write_atomic(path, body, mode=0o600)
    except OSError as err:
        raise explain_os_error(err, "writing the certificate authority", path) from err
