"""What the coordinator says of the state of the run, signed and dated (ADR 21).

A node believes nothing about versions, rounds and CAs but what these say, and only while it is
fresh. Signing takes a millisecond, and every node asks every second or so: a head is signed once a
minute, or when something in it changes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from talkoot.protocol.messages import Head, Signed, VersionRef, VersionStatement, canonical_bytes

if TYPE_CHECKING:
    from talkoot.server.coordinator import Coordinator

SIGN_AGAIN_SECONDS: Final = 60.0
HEAD_SECONDS: Final = 600.0
"""How long a head is good: a node that is shown an older one is being kept on old news."""
TASK_GRACE_SECONDS: Final = 86400.0
"""A round whose quorum is missing may go on past its deadline; a task is not begun after this."""


class Statements:
    """Signs heads and versions. Thread-safe."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._lock = threading.Lock()
        self._head: tuple[tuple[object, ...], float, Signed] | None = None

    def head(self, version: int, weights_digest: str, now: float) -> Signed:
        """The signed Head at ``now`` (Unix seconds)."""
        serial = self._c.trust().serial
        facts = (version, weights_digest, serial, self._c.generation)
        with self._lock:
            known = self._head
            # A clock that was set back must not leave us with a head from the future.
            if known is not None and known[0] == facts and 0 <= now - known[1] < SIGN_AGAIN_SECONDS:
                return known[2]
            head = Head(
                run_id=self._c.run_id,
                generation=self._c.generation,
                version=version,
                weights_digest=weights_digest,
                trust_serial=serial,
                issued_unix=now,
                expires_unix=now + HEAD_SECONDS,
            )
            signed = self._c.key.sign("Head", canonical_bytes(head))
            self._head = (facts, now, signed)
            return signed

    def version(self, ref: VersionRef, now: float) -> Signed:
        """A signed VersionStatement."""
        statement = VersionStatement(
            run_id=self._c.run_id,
            generation=self._c.generation,
            ref=ref,
            issued_unix=now,
            expires_unix=now + HEAD_SECONDS,
        )
        return self._c.key.sign("VersionStatement", canonical_bytes(statement))
