"""The volunteer's own directory: identity, replica, cache, settings. Nothing is written elsewhere.

identity.pem     the node's key, 0600          work/     replica, optimizer, feedback, leases
enrolment.json   whom it trains for            store/    artifacts that it fetched
settings.json    what its owner chose          logs/     daemon and trainer
status.json      what it is doing, for 'talkoot status'
pause            there while its owner wants the machine
ca.pem           whom it trusts, and
supernode.key    its key as OpenSSH writes it, 0600: both for a stock flower-supernode only
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from talkoot.client.caps import Caps
from talkoot.protocol.errors import ProtocolError, StateError
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.messages import Digest, LeaseId, M, Message, canonical_bytes, parse


class Settings(Message):
    """What the volunteer chose when joining; kept, so that a restart needs no flags."""

    device: Annotated[str, Field(max_length=32)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_vram_bytes: Annotated[int, Field(ge=1)] | None = None
    max_ram_bytes: Annotated[int, Field(ge=1)] | None = None
    max_disk_bytes: Annotated[int, Field(ge=1)] | None = None
    recipe: Annotated[str, Field(max_length=64)] | None = None
    """To begin with; None is the fastest that fits."""
    max_rate_up: Annotated[float, Field(gt=0)] | None = None  # bytes per second
    max_rate_down: Annotated[float, Field(gt=0)] | None = None  # bytes per second
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 10.0

    @property
    def caps(self) -> Caps:
        """What talkoot may have of the machine."""
        return Caps(self.max_vram_bytes, self.max_ram_bytes, self.max_disk_bytes)


class Counters(Message):
    """What lasts beyond one process."""

    bytes_up: int = 0
    bytes_down: int = 0
    healed: int = 0
    contributions: int = 0
    flower_node_id: int | None = None
    run_spec_sha256: Digest | None = None
    """The run that this node joined: a coordinator cannot swap it for another."""
    generation: int = -1
    """Of the coordinator's state, as last seen; with the four below: see ``fresh.py``."""
    newest_version: int = -1
    newest_digest: Digest | None = None
    newest_round: int = -1
    newest_attempt: int = -1
    proved_recipe: Annotated[str, Field(max_length=64)] | None = None
    """What the last accepted proof was made with."""
    proved_basis: Digest | None = None
    """What that proof rested on: see ``choice.py``."""
    link_down: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Bytes a second of the last transfer that was worth timing, under the volunteer's limits."""
    link_up: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    chosen_recipe: Annotated[str, Field(max_length=64)] | None = None
    """What was begun with then."""
    settled_lease: LeaseId | None = None
    """The last lease that was answered: its task may come again, over the other plane."""
    settled_accepted: bool = False
    """What became of it."""


@dataclass(frozen=True)
class Home:
    """Paths below one volunteer's directory."""

    root: Path

    @property
    def key(self) -> Path:
        """The node's private key."""
        return self.root / "identity.pem"

    @property
    def enrolment(self) -> Path:
        """Whom it trains for."""
        return self.root / "enrolment.json"

    @property
    def ca(self) -> Path:
        """The coordinator's CA, for a stock SuperNode."""
        return self.root / "ca.pem"

    @property
    def supernode_key(self) -> Path:
        """The node's private key in the format that a stock SuperNode reads."""
        return self.root / "supernode.key"

    @property
    def settings_path(self) -> Path:
        """What its owner chose."""
        return self.root / "settings.json"

    @property
    def counters_path(self) -> Path:
        """What lasts beyond one process."""
        return self.root / "counters.json"

    @property
    def status_path(self) -> Path:
        """What it is doing."""
        return self.root / "status.json"

    @property
    def pending(self) -> Path:
        """The signed contribution whose fate is not known yet."""
        return self.root / "pending.json"

    @property
    def pause(self) -> Path:
        """There while its owner wants the machine."""
        return self.root / "pause"

    @property
    def leave(self) -> Path:
        """There when its owner asked the daemon to leave for good."""
        return self.root / "leave"

    @property
    def work(self) -> Path:
        """The trainer's directory."""
        return self.root / "work"

    @property
    def store(self) -> Path:
        """Fetched artifacts."""
        return self.root / "store"

    @property
    def logs(self) -> Path:
        """Logs of daemon and trainer."""
        return self.root / "logs"

    def create(self) -> None:
        """Make the directory, for its owner only."""
        try:
            for path in (self.root, self.work, self.store, self.logs):
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(0o700)
        except OSError as err:
            raise explain_os_error(err, "making the node's home", self.root) from err
        if not os.access(self.root, os.W_OK):
            raise StateError(
                f"{self.root} is read-only for this user: choose another --home.", code="read-only"
            )

    def require(self) -> None:
        """Make sure that a node lives here."""
        if not self.enrolment.exists():
            raise StateError(
                f"No node lives at {self.root}: join with 'talkoot join <invite-url> --home "
                f"{self.root}'.",
                code="not-joined",
            )

    def settings(self) -> Settings:
        """What its owner chose."""
        return self._read(self.settings_path, Settings, _renamed)

    def counters(self) -> Counters:
        """What lasts beyond one process; a damaged file starts at nothing."""
        try:
            return self._read(self.counters_path, Counters)
        except StateError:
            return Counters()

    def _read(
        self, path: Path, kind: type[M], mend: Callable[[bytes], bytes] = lambda data: data
    ) -> M:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return kind()
        except OSError as err:
            raise explain_os_error(err, "reading", path) from err
        try:
            return parse(kind, mend(data))
        except ProtocolError as err:
            raise StateError(f"{path} is damaged ({err.sentence}) Remove it.") from err

    def save(self, path: Path, message: Message) -> None:
        """Write one of the small files."""
        try:
            write_atomic(path, canonical_bytes(message), mode=0o600)
        except OSError as err:
            raise explain_os_error(err, "saving", path) from err

    def write_status(self, document: dict[str, object]) -> None:
        """Tell 'talkoot status' what goes on; best effort, a full disk does not stop training."""
        try:
            write_atomic(self.status_path, json.dumps(document).encode(), mode=0o600)
        except OSError:
            return


def _renamed(data: bytes) -> bytes:
    """Settings of before ``--max-memory`` became ``--max-vram`` and ``--max-ram``."""
    try:
        known = json.loads(data)
    except ValueError:
        return data
    if not isinstance(known, dict) or "max_memory_bytes" not in known:
        return data
    cap = known.pop("max_memory_bytes")
    return json.dumps({"max_vram_bytes": cap, "max_ram_bytes": cap, **known}).encode()
