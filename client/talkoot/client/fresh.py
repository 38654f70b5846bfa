"""What a node has seen of its run, and so what it refuses to be told (ADR 21).

The attacks are those of The Update Framework's list (theupdateframework.io, specification, section
1.5.2): *rollback* (an older version or round than one seen), *freeze* (old statements shown for
ever), *mix-and-match* (parts of different states), *replay* and *wrong run*. Endless data and
arbitrary software are other modules' concern: sizes are capped where they are read, and no code is
ever taken from the network.

Pure: what was seen, a statement and the time go in; what is seen from now on comes out, or an
:class:`IntegrityError` whose code names the attack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from talkoot.protocol.errors import IntegrityError
from talkoot.protocol.identity import CLOCK_SKEW_SECONDS
from talkoot.protocol.messages import Head, RoundTask, VersionStatement

STALE: Final = "stale"
FUTURE: Final = "from-the-future"
ROLLED_BACK: Final = "rolled-back"
FORKED: Final = "forked"
REPLAYED: Final = "replayed-task"
WRONG_RUN: Final = "wrong-run"
PASSING: Final = frozenset({STALE, FUTURE, ROLLED_BACK, FORKED, REPLAYED})
"""Refusals that a later statement may put right; a node waits for it."""


@dataclass(frozen=True)
class Seen:
    """The newest that a node has been shown, with a valid signature.

    Attributes:
        generation: of the coordinator's state; -1 before anything was seen.
        version: the newest published version.
        weights_digest: of that version.
        round: the newest round that a task was for.
        attempt: of that round.
    """

    generation: int = -1
    version: int = -1
    weights_digest: str | None = None
    round: int = -1
    attempt: int = -1


def see_head(seen: Seen, head: Head, run_id: str, now: float) -> Seen:
    """Take a Head."""
    _check_run(head.run_id, run_id)
    _check_times(head.issued_unix, head.expires_unix, now)
    seen = _see_generation(seen, head.generation)
    return _see_version(seen, head.version, head.weights_digest)


def see_version(seen: Seen, statement: VersionStatement, run_id: str, now: float) -> Seen:
    """Take a VersionStatement."""
    _check_run(statement.run_id, run_id)
    _check_times(statement.issued_unix, statement.expires_unix, now)
    seen = _see_generation(seen, statement.generation)
    return _see_version(seen, statement.ref.version, statement.ref.weights_digest)


def see_task(seen: Seen, task: RoundTask, run_id: str, now: float) -> Seen:
    """Take a RoundTask. That it is for this node is the caller's to check."""
    _check_run(task.run_id, run_id)
    _check_times(task.issued_unix, task.expires_unix, now)
    seen = _see_generation(seen, task.generation)
    attempt = (task.round, task.lease.attempt)
    if attempt < (seen.round, seen.attempt) or task.base.version < seen.version:
        raise IntegrityError(
            f"The task is for round {task.round}, which this node has left behind.", code=REPLAYED
        )
    if task.base.version >= task.round:
        raise IntegrityError(
            f"The task for round {task.round} begins at version {task.base.version}, which is of "
            "that round or later.",
            code=FORKED,
        )
    seen = _see_version(seen, task.base.version, task.base.weights_digest)
    return replace(seen, round=task.round, attempt=task.lease.attempt)


def _check_run(found: str, expected: str) -> None:
    if found != expected:
        raise IntegrityError(
            f"The coordinator speaks of run {found}, and this node has joined {expected}.",
            code=WRONG_RUN,
        )


def _check_times(issued: float, expires: float, now: float) -> None:
    if issued > now + CLOCK_SKEW_SECONDS:
        raise IntegrityError(
            f"What the coordinator shows was signed {issued - now:.0f} s from now: this machine's "
            "clock is slow, or the coordinator's is fast.",
            code=FUTURE,
        )
    if expires < now - CLOCK_SKEW_SECONDS:
        raise IntegrityError(
            f"What the coordinator shows has expired {now - expires:.0f} s ago: either this "
            "machine's clock is fast, or somebody shows it old news.",
            code=STALE,
        )


def _see_generation(seen: Seen, generation: int) -> Seen:
    if generation < seen.generation:
        raise IntegrityError(
            "The coordinator shows a state from before it was restored: it is not believed.",
            code=ROLLED_BACK,
        )
    # A restored coordinator may go back: what was seen of the generation before counts no more.
    return seen if generation == seen.generation else Seen(generation=generation)


def _see_version(seen: Seen, version: int, weights_digest: str) -> Seen:
    if version < seen.version:
        raise IntegrityError(
            f"The coordinator shows version {version}, and this node has seen {seen.version}: a "
            "run does not go back unless its operator restores a backup.",
            code=ROLLED_BACK,
        )
    if version == seen.version and weights_digest != seen.weights_digest:
        raise IntegrityError(
            f"The coordinator shows another version {version} than before.", code=FORKED
        )
    return replace(seen, version=version, weights_digest=weights_digest)
