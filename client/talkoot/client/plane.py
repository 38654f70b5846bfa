"""What a worker needs of the world: a data plane and a trainer. Production's and the simulator's.

``TransferClient`` (gRPC to the coordinator) and ``TrainerHost`` (a child process with torch) are
what a volunteer's machine runs. The simulator gives the same worker a plane over files and a
trainer in its own process (``talkoot.sims.virtual``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from talkoot.protocol.messages import (
    ArtifactRef,
    NodeReport,
    NodeReportReply,
    RenewReply,
    Signed,
    Verdict,
)

if TYPE_CHECKING:
    from talkoot.client.mirrors import MirrorFetcher
    from talkoot.protocol.artifacts import ArtifactStore


class DataPlane(Protocol):
    """A node's way to the coordinator; every method raises as ``TransferClient``'s do."""

    @property
    def mirrors(self) -> MirrorFetcher:
        """Where artifacts are asked for before the coordinator is."""
        ...

    def use_certificate(self, ca_pem: bytes, cert_pem: bytes) -> None:
        """Go on with a renewed certificate."""
        ...

    def close(self) -> None:
        """Drop the connections."""
        ...

    def fetch(
        self,
        ref: ArtifactRef,
        store: ArtifactStore,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> Path:
        """Bring an artifact here; where it is."""
        ...

    def push(
        self,
        lease_id: str,
        ref: ArtifactRef,
        path: Path,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Send the file at ``path`` as ``ref`` under a lease."""
        ...

    def submit(self, signed: Signed) -> Verdict:
        """Have a pushed contribution judged."""
        ...

    def challenge(self) -> bytes:
        """A fresh proof challenge."""
        ...

    def prove(self, signed: Signed) -> Verdict:
        """Have a proof judged."""
        ...

    def report(self, report: NodeReport) -> NodeReportReply:
        """Say what goes on, and hear what is new."""
        ...

    def run_spec(self) -> Signed:
        """What is trained."""
        ...

    def mirror_list(self) -> Signed:
        """Who else has artifacts."""
        ...

    def task(self) -> Signed | None:
        """The open task, if any."""
        ...

    def renew(self, signed: Signed) -> RenewReply:
        """A new certificate."""
        ...


class Trains(Protocol):
    """The trainer's operations (``trainer/core.py``), by name."""

    def call(
        self,
        op: str,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Run one operation and return its result."""
        ...
