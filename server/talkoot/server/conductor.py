"""The round loop: a thin shell around ``rounds.py``, ``book.py`` and ``aggregate.py``.

It holds no state of its own: whatever it is doing when it dies, the next one reads in the ledger
where things stand and goes on from there. A round that was closing is aggregated again, from the
same contributions to the same version.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from talkoot.protocol import faults
from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.errors import TalkootError
from talkoot.protocol.messages import ArtifactRef, Verdict
from talkoot.server.belief import Belief
from talkoot.server.book import Book, OpenTask, tasks_by_flower_id
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger import LedgerError
from talkoot.server.ledger.database import PASSING
from talkoot.server.registry import Registry

if TYPE_CHECKING:
    from talkoot.server.aggregate import AggregateResult, VersionDir
    from talkoot.server.ledger.schema import ContributionRecord

log = logging.getLogger(__name__)

LOOP_SECONDS = 0.1
"""How often the loop looks at the ledger."""
ONLINE_SECONDS = 1.0
"""How often the loop asks Flower who is there: a full listing costs the SuperLink a query."""
REPLY_SECONDS = 1.0
"""How often the loop asks Flower for replies: only refusals are news in them."""
AWAY_SECONDS = 1.0
"""How often the loop tries a ledger that is away or busy."""
MAX_REOPEN_SECONDS = 60.0
"""Longest pause between two attempts at a round whose leases all came back."""
KEEP_VERSION_DIRS = 2
RUBBISH_SECONDS = 3600.0
"""An artifact that nothing refers to is kept so long: somebody may be fetching it, or a payload may
be on its way into the ledger."""


class ControlPlane(Protocol):
    """The way to the nodes; ``WaryGridControl`` over Flower in production."""

    def online(self) -> frozenset[int]:
        """Flower ids of the nodes that are there."""
        ...

    def send(self, tasks: Mapping[int, str], *, round_number: int, ttl_seconds: float) -> None:
        """Send each node its signed task."""
        ...

    def replies(self) -> Iterable[tuple[int, str | None]]:
        """News since the last call."""
        ...

    def forget(self) -> None:
        """Stop waiting for earlier replies."""
        ...


class Conductor:
    """Runs rounds until the run is finished.

    Args:
        coordinator: open state.
        registry: the nodes.
        control: the way to the nodes.
        clock: Unix seconds.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        registry: Registry,
        control: ControlPlane,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._c = coordinator
        self._registry = registry
        self._control = control
        self._clock = clock
        self._sleep = sleep
        self._book = Book(coordinator)
        self._belief = Belief(coordinator)
        self._online: frozenset[int] = frozenset()
        self._online_until = 0.0
        self._replies_at = 0.0
        self._reopened_at = 0.0
        self._reopen_pause = 0.0
        self._sent: set[str] = set()
        self._told: set[str] = set()

    def run(self) -> None:
        """Run rounds until the run is finished."""
        while True:
            try:
                if self._book.finished():
                    return
                waiting = not self.step()
            except LedgerError as err:
                if err.code not in PASSING:
                    raise
                log.warning("%s", err.sentence)
                self._sleep(AWAY_SECONDS)
                continue
            if waiting:
                self._sleep(LOOP_SECONDS)

    def step(self) -> bool:
        """Do the next thing that can be done; False when there is only waiting to do."""
        with self._c.ledger.read() as session:
            current = self._book.current_round(session)
        if current is None:
            return self._open()
        if current.state == "closing":
            now = self._clock()
            if self._belief.waits(current.round, current.closed_unix or now, now):
                return False
            self._belief.judge_round(current.round, now=now)
            self._finish(current.round)
            return True
        now = self._clock()
        self._send_open_tasks(current.round)
        self._take_replies()
        decision = self._book.decide(self._who(), now)
        if decision is None or decision.action == "wait":
            return False
        log.info(decision.sentence)
        if decision.action == "close":
            late = self._who() if decision.code == "deadline" else frozenset()
            self._book.close_round(decision.sentence, now=now, waited_for=late)
            faults.place("close.after-commit")
            self._reopen_pause = 0.0
            return True
        if self._reopened_at <= now < self._reopened_at + self._reopen_pause:
            return False
        self._tell("no-quorum", decision.sentence)
        if not self._open():
            return False
        # Nodes that give their leases back at once (a full disk, say) get them again more slowly.
        self._reopened_at = now
        self._reopen_pause = min(MAX_REOPEN_SECONDS, max(1.0, 2 * self._reopen_pause))
        return True

    # Opening --------------------------------------------------------------------------------------

    def _open(self) -> bool:
        opened = self._book.open_round(
            self._who(), self._registry.poll_seconds(), now=self._clock()
        )
        if opened is None:
            self._tell("waiting", "Waiting for nodes: fewer are here than round.min_nodes.")
            return False
        faults.place("open.after-commit")
        log.info("round %d opened, attempt %d", opened.round, opened.attempt)
        self._told.clear()
        self._control.forget()
        self._sent.clear()
        self._send_open_tasks(opened.round)
        return True

    def _send_open_tasks(self, number: int) -> None:
        """Send what this process has not sent yet: after a restart that is every open lease."""
        fresh = [t for t in self._book.open_tasks() if t.signed not in self._sent]
        here = self._who()
        fresh = [t for t in fresh if t.flower_node_id in here]
        if not fresh:
            return
        ttl = max(60.0, fresh[0].deadline_unix - self._clock())
        self._control.send(tasks_by_flower_id(fresh), round_number=number, ttl_seconds=ttl)
        self._sent.update(t.signed for t in fresh)

    def _who(self) -> frozenset[int]:
        now = self._clock()
        if not self._online_until - 10 * ONLINE_SECONDS < now < self._online_until:
            self._online = self._control.online()
            self._online_until = now + ONLINE_SECONDS
        return self._online

    def _take_replies(self) -> None:
        now = self._clock()
        if self._replies_at - 10 * REPLY_SECONDS < now < self._replies_at:
            return
        self._replies_at = now + REPLY_SECONDS
        replies = list(self._control.replies())
        if not replies:
            return
        by_flower_id = {t.flower_node_id: t for t in self._book.open_tasks()}
        for flower_node_id, text in replies:
            task = by_flower_id.get(flower_node_id)
            if task is None:
                continue
            self._take_reply(task, text)

    def _take_reply(self, task: OpenTask, text: str | None) -> None:
        if text is None:
            self._book.decline(task.node_id, _lease_id(task), "its ClientApp failed")
            return
        try:
            verdict = Verdict.model_validate_json(text)
        except ValidationError:
            log.warning("node %s sent a malformed reply", task.node_id)
            return
        if not verdict.accepted:
            self._book.decline(task.node_id, _lease_id(task), verdict.sentence)

    # Publishing -----------------------------------------------------------------------------------

    def _finish(self, number: int) -> None:
        """Aggregate a closing round and publish its version."""
        from talkoot.server.aggregate import VersionDir

        config = self._c.config
        with self._c.ledger.read() as session:
            base = self._book.latest_version(session)
        name = f"v{number:08d}"
        out_dir = self._c.state.versions / name
        if out_dir.exists():  # a try that died before it was published
            shutil.rmtree(out_dir)
        contributions = self._book.contributions(number)
        result = aggregate_version(
            self._c,
            contributions,
            VersionDir(self._c.state.versions / base.directory),
            out_dir,
            payload=self._c.store.path,
        )
        update = self._c.store.put_file(result.update_path)
        faults.place("publish.update-stored")
        checkpoint = None
        if number % config.round.checkpoint_every == 0 or number >= self._c.rounds_total:
            checkpoint = link_checkpoint(self._c.store, VersionDir(out_dir))
        faults.place("publish.before-commit")
        self._book.publish(
            weights_digest=result.weights_digest,
            directory=name,
            update=update,
            checkpoint=checkpoint,
            now=self._clock(),
        )
        faults.place("publish.after-commit")
        log.info(
            "version %d published: %d contributions, %.3f bit/parameter, digest %s",
            number,
            len(contributions),
            result.bits_per_parameter,
            result.weights_digest[:12],
        )
        self._clean(number)

    def _clean(self, newest: int) -> None:
        """Delete what no living version needs: rubbish costs a turn of the loop, never a round."""
        self._belief.forget(newest)
        # Before the ledger is asked: what came since then may not be in its answer.
        moment = time.time() - RUBBISH_SECONDS
        try:
            self._c.store.sweep(
                self._book.kept_digests(self._c.config.round.keep_checkpoints),
                older_than_unix=moment,
            )
        except TalkootError as err:
            log.warning("rubbish stays for now: %s", err.sentence)
        for path in self._c.state.versions.glob("v*"):
            if path.name[1:].isdigit() and int(path.name[1:]) <= newest - KEEP_VERSION_DIRS:
                shutil.rmtree(path, ignore_errors=True)

    def _tell(self, kind: str, sentence: str) -> None:
        """Put something on record once until a round opens, not at every turn of the loop."""
        if kind not in self._told:
            self._told.add(kind)
            log.info(sentence)
            self._book.note(kind, sentence)


def aggregate_version(
    coordinator: Coordinator,
    contributions: Sequence[ContributionRecord],
    base: VersionDir,
    out_dir: Path,
    *,
    payload: Callable[[str], Path],
) -> AggregateResult:
    """A round's accepted contributions as the next version's files, in ``out_dir``.

    ``payload`` says where the payload of a digest is. The same contributions and base give the same
    bytes, however often somebody died over it.
    """
    # Torch takes seconds to import, and a round can open without it.
    from talkoot.server.aggregate import ContributionInput, aggregate_round

    influences = influences_of(coordinator, contributions)
    inputs = [
        ContributionInput(
            path=payload(c.payload_digest),
            tokens=c.tokens,
            l2_norm=c.l2_norm,
            key=c.node_id,
            influence=influences[c.lease_id],
        )
        for c in contributions
    ]
    return aggregate_round(
        coordinator.manifest,
        base,
        inputs,
        coordinator.spec.uplink,
        coordinator.spec.downlink,
        coordinator.config.outer,
        out_dir,
        rule=coordinator.config.aggregation,
    )


def influences_of(
    coordinator: Coordinator, contributions: Sequence[ContributionRecord]
) -> dict[str, float]:
    """By lease: how much each contribution of a judged round counts, from 0 to 1.

    That is what its judgement says, and what the operator's rule makes of it.
    """
    judged = Belief(coordinator).influences(contributions[0].round)
    said = {c.lease_id: judged.get(c.lease_id, (1.0, None))[0] for c in contributions}
    if coordinator.config.aggregation.rule != "geometric-median":
        return said
    import numpy as np

    from talkoot.server.aggregate import clip_factors, fair_norms
    from talkoot.server.robust import geometric_influences
    from talkoot.server.sketch import unpack

    counted = [c for c in contributions if said[c.lease_id] > 0]
    sketches = [judged[c.lease_id][1] for c in counted if c.lease_id in judged]
    if len(sketches) < len(counted) or any(sketch is None for sketch in sketches):
        return said  # accepted before there were sketches
    directions = np.stack([unpack(sketch or b"") for sketch in sketches]).astype(np.float64)
    given = [said[c.lease_id] for c in counted]
    norms = [c.l2_norm for c in counted]
    factors = clip_factors(fair_norms(norms, [c.tokens for c in counted]), given)
    clipped = np.array(norms) * factors
    weights = np.array([c.tokens * said[c.lease_id] for c in counted])
    found = geometric_influences(directions @ directions.T, clipped, weights)
    return said | {
        c.lease_id: said[c.lease_id] * float(share) for c, share in zip(counted, found, strict=True)
    }


def link_checkpoint(store: ArtifactStore, version: VersionDir) -> ArtifactRef:
    """Put a version's published weights into the store without copying them."""
    twin = version.published.with_suffix(".checkpoint")
    twin.unlink(missing_ok=True)
    twin.hardlink_to(version.published)
    return store.put_file(twin, move=True)


def _lease_id(task: OpenTask) -> str:
    from talkoot.protocol.messages import RoundTask, Signed, parse

    signed = parse(Signed, task.signed.encode("ascii"))
    return parse(RoundTask, signed.body.encode("ascii")).lease.lease_id
