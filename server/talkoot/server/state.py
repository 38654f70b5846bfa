"""The operator's state directory: what is where, and whether it can be used.

config.toml   the whole configuration          ledger.db    the ledger (unless by URL)
state.json    written last: the rest is whole  flower.db    the SuperLink's database
ca/ keys/     secrets, 0700                    store/       artifacts by SHA-256
tls/          the servers' certificates        versions/    published weights, feedback
corpus/       token blocks, held-out tokens    incoming/    uploads on their way
tokenizer/    as given                         logs/ run/   of the running parts
pieces/       digests of artifacts' pieces
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from talkoot.protocol.errors import StateError
from talkoot.protocol.files import explain_os_error, write_atomic

STATE_FORMAT = 1


@dataclass(frozen=True)
class StateDir:
    """Paths below one operator's state directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.root / "config.toml"

    @property
    def marker(self) -> Path:
        """Written last by ``init``."""
        return self.root / "state.json"

    @property
    def ca(self) -> Path:
        """The certificate authority."""
        return self.root / "ca"

    @property
    def coordinator_key(self) -> Path:
        """The key that signs runs and tasks."""
        return self.root / "keys" / "coordinator.pem"

    @property
    def tls(self) -> Path:
        """Server certificates and keys, issued anew at every start."""
        return self.root / "tls"

    @property
    def loopback_ca(self) -> Path:
        """Certificate of the CA that the SuperLink's certificate comes from; its own, so that the
        network's CA can be rotated while the SuperLink runs."""
        return self.tls / "loopback" / "ca.pem"

    @property
    def store(self) -> Path:
        """Artifacts by digest."""
        return self.root / "store"

    @property
    def incoming(self) -> Path:
        """Uploads on their way, a folder a node."""
        return self.root / "incoming"

    @property
    def pieces(self) -> Path:
        """Piece lists of artifacts, made when a node asks for one."""
        return self.root / "pieces"

    @property
    def corpus(self) -> Path:
        """Token blocks."""
        return self.root / "corpus"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's files, when it is not bytes."""
        return self.root / "tokenizer"

    @property
    def versions(self) -> Path:
        """Master and published weights, a folder a version."""
        return self.root / "versions"

    @property
    def logs(self) -> Path:
        """A log a part."""
        return self.root / "logs"

    @property
    def run(self) -> Path:
        """Process ids and readiness of the running parts."""
        return self.root / "run"

    @property
    def round_loop_pid(self) -> Path:
        """Process id of the newest round loop, which Flower starts and we watch."""
        return self.run / "rounds.pid"

    @property
    def flower(self) -> Path:
        """Flower's own files."""
        return self.root / "flower"

    def create(self) -> None:
        """Make the directory, or raise :class:`StateError` when something is there."""
        if self.marker.exists():
            raise StateError(
                f"{self.root} is an operator's state directory already: start it with "
                f"'talkoot-coordinator serve --state {self.root}', or choose another directory.",
                code="exists",
            )
        if self.root.exists() and not self.root.is_dir():
            raise StateError(
                f"{self.root} is not a directory: choose another --state.", code="not-a-directory"
            )
        if self.root.exists() and any(self.root.iterdir()):
            raise StateError(
                f"{self.root} is not empty, and not a finished state directory (an earlier init "
                "or restore may have been interrupted): delete it or choose another directory.",
                code="half-made",
            )
        try:
            for path in (
                self.root,
                self.ca,
                self.coordinator_key.parent,
                self.tls,
                self.store,
                self.incoming,
                self.versions,
                self.logs,
                self.run,
                self.flower,
            ):
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(0o700)
        except OSError as err:
            raise explain_os_error(err, "making the state directory", self.root) from err

    def finish(self, run_id: str) -> None:
        """Mark the directory as whole."""
        body = {"format": STATE_FORMAT, "run_id": run_id}
        write_atomic(self.marker, json.dumps(body).encode() + b"\n", mode=0o600)

    def check(self) -> str:
        """Make sure that the directory can be used; returns the run id it holds."""
        if not self.root.is_dir():
            raise StateError(
                f"There is no state directory at {self.root}: make one with "
                f"'talkoot-coordinator init --state {self.root}'.",
                code="missing",
            )
        try:
            body = json.loads(self.marker.read_bytes())
            if not isinstance(body, dict):
                raise ValueError("it is not a JSON object")
        except FileNotFoundError as err:
            raise StateError(
                f"{self.root} is half made (an earlier init or restore was interrupted): delete it "
                "and do that again.",
                code="half-made",
            ) from err
        except (OSError, ValueError) as err:
            raise StateError(f"{self.marker} cannot be read: {err}.", code="unreadable") from err
        if body.get("format") != STATE_FORMAT:
            raise StateError(
                f"{self.root} has format {body.get('format')}, and this talkoot understands "
                f"{STATE_FORMAT}: use the talkoot that wrote it.",
                code="newer-schema",
            )
        if not os.access(self.root, os.W_OK):
            raise StateError(
                f"{self.root} is read-only for this user: change its permissions or run as its "
                "owner.",
                code="read-only",
            )
        run_id = body.get("run_id")
        if not isinstance(run_id, str):
            raise StateError(
                f"{self.marker} names no run: restore it from a backup.", code="unreadable"
            )
        return run_id
