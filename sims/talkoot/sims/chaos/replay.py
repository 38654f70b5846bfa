"""The whole run again, from what the ledger says was accepted: no process, no death, no network.

Version 0 and the accepted payloads go through the production aggregator in one go. Every version
that comes out must be the published one, bit for bit: whatever died while it was made.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from talkoot.server.aggregate import VersionDir
from talkoot.server.book import Book
from talkoot.server.conductor import aggregate_version
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import Version


def replay(state: Path, archive: Path, first: Path, scratch: Path) -> dict[str, Any]:
    """Compute every version anew.

    Args:
        state: the operator's state, stopped.
        archive: artifacts by digest (``ab/cdef…``), among them every accepted payload.
        first: version 0's directory, as ``init`` made it.
        scratch: for the versions' files; emptied.

    Returns:
        ``{"versions", "equal", "first_difference"}``: how many were computed, how many of them are
        the ledger's bit for bit (weights and update), and the first that is not.
    """
    coordinator = Coordinator.open(state)
    book = Book(coordinator)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    base = VersionDir(Path(shutil.copytree(first, scratch / "v0")))
    equal, first_difference, number = 0, None, 0
    try:
        with coordinator.ledger.read() as session:
            newest = book.latest_version(session).version
        for number in range(1, newest + 1):
            result = aggregate_version(
                coordinator,
                book.contributions(number),
                base,
                scratch / f"v{number}",
                payload=lambda digest: archive / digest[:2] / digest[2:],
            )
            with coordinator.ledger.read() as session:
                version = session.get_one(Version, (coordinator.run_id, number))
            made = (result.weights_digest, result.update_digest)
            if made == (version.weights_digest, version.update_digest):
                equal += 1
            elif first_difference is None:
                first_difference = number
            shutil.rmtree(base.path)
            base = result.state
    finally:
        coordinator.close()
    return {"versions": number, "equal": equal, "first_difference": first_difference}
