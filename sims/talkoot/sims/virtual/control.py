"""The round loop's way to the nodes: the world says when, Flower's engine does the work.

When the round loop waits, the world goes on to the next moment at which its answer could be
another. Leases whose training nothing can end any more are begun at once, and the world goes on
beside them as far as none of them could change it (``work.py``); the others are worked at when
their time has come, so that a node whose round was closed over its head has not trained.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import select

from talkoot.protocol.messages import RoundTask, Signed, Verdict, VersionRef, parse
from talkoot.server.ledger.schema import LeaseRecord, Node, Round
from talkoot.sims.planning.sizes import PROOF_SECONDS
from talkoot.sims.virtual.layout import ON_ITS_WAY, Layout, Profile
from talkoot.sims.virtual.site import EPOCH, Site
from talkoot.sims.virtual.timing import Course, Timing
from talkoot.sims.virtual.work import TTL_SECONDS, Task, Work
from talkoot.sims.virtual.world import (
    ARRIVES,
    CAUGHT_UP,
    DEADLINE,
    HAPPENS,
    NEWS,
    NOTICED,
    TRAINED,
    Held,
    NodeNow,
    Say,
    World,
)

IDLE_SECONDS: Final = 60.0
"""How far the clock goes on while there are too few nodes."""
REPORTS_IN_A_POLL: Final = 4.0
WATCHERS: Final = frozenset({"copy", "colluding", "sybil wave", "longest leases"})
"""Lies that are made from what others have pushed."""
COPYING_SECONDS: Final = 1.0


class Over(Exception):
    """The scenario's days have passed."""


class VirtualControl:
    """``conductor.ControlPlane`` over a world.

    Args:
        world: clock and nodes.
        site: the operator's side.
        timing: of lines and devices.
        profiles: of all nodes.
        layout: of the run.
        work: real work.
        say: hears how far it is.
    """

    def __init__(
        self,
        world: World,
        site: Site,
        timing: Timing,
        profiles: Sequence[Profile],
        layout: Layout,
        work: Work,
        say: Say,
        end: float,
    ) -> None:
        self.world, self.site, self.timing = world, site, timing
        self._profiles, self._layout, self._work, self._say = profiles, layout, work, say
        work.on_done = self._made
        self._begun, self._done = 0, 0
        self._end = end
        self._news: list[tuple[int, str]] = []
        self._opened = (0, -1)
        self._newest = self._version()
        self._seen: dict[int, float] = {}
        rule = world.scenario.rules.round
        self._lost_after = rule.lost_after_seconds
        self._max_behind = rule.max_behind
        self._close_at_share = rule.close_at_share
        self._open_until = math.inf
        self._events = layout.events.open("ab")
        self.real_seconds: dict[int, float] = {}
        """Of this machine, by round."""
        self._real_began = time.monotonic()

    # The ControlPlane -----------------------------------------------------------------------------

    def online(self) -> frozenset[int]:
        """Flower ids of nodes that are there, or were until a moment ago."""
        since = self.world.now - self._lost_after
        here = [index for index in self.world.nodes if self.world.last_seen(index) > since]
        return frozenset(self.site.flower_ids[index] for index in here)

    def send(self, tasks: Mapping[int, str], *, round_number: int, ttl_seconds: float) -> None:
        """Put leases into the nodes' hands. Those that are there already stay as they are."""
        by_flower = {number: index for index, number in self.site.flower_ids.items()}
        opened: dict[int, tuple[RoundTask, str]] = {}
        for flower_id, text in tasks.items():
            signed = parse(Signed, text.encode("ascii"))
            task = parse(RoundTask, signed.body.encode("ascii"))
            index = by_flower[flower_id]
            held = self.world.nodes[index].held
            if held is None or held.lease_id != task.lease.lease_id:
                opened[index] = task, text
        if not opened:
            return
        first = next(iter(opened.values()))[0]
        if (first.round, first.lease.attempt) != self._opened:
            self._open(first)
        self._lease(dict(sorted(opened.items())))

    def replies(self) -> Iterable[tuple[int, str | None]]:
        """Refusals whose time has come."""
        news: list[tuple[int, str | None]] = list(self._news)
        self._news.clear()
        return news

    def forget(self) -> None:
        """Stop waiting for earlier replies."""
        self._news.clear()

    # Leases ---------------------------------------------------------------------------------------

    def _open(self, task: RoundTask) -> None:
        number, attempt = task.round, task.lease.attempt
        self._work.finish()
        self._begun = self._done = 0
        self._opened = number, attempt
        self._events.flush()
        self.world.save(number, attempt, {"events": self._events.tell()})
        for path in (self._layout.root / "outbox").iterdir():
            if path.name.isdigit() and int(path.name) < number - 1:
                shutil.rmtree(path, ignore_errors=True)
        for place in self.world.of_round(number):
            self._happen(place)
        self.world.agenda.add(task.deadline_unix, DEADLINE)
        self._tell("leased")

    def _lease(self, opened: Mapping[int, tuple[RoundTask, str]]) -> None:
        world, now = self.world, self.world.now
        ready, down, behind, artifacts, tokens, speeds = {}, {}, {}, {}, {}, {}
        for index, (task, _) in opened.items():
            node = world.nodes[index]
            poll = task.poll_seconds
            busy = self._give_up(index)
            ready[index] = now - EPOCH + (REPORTS_IN_A_POLL * poll if busy else poll / 2)
            size, updates = lacks(node.version, task.base)
            down[index] = size + len(task.lease.blocks) * self._block_bytes()
            behind[index] = updates
            artifacts[index] = updates + len(task.lease.blocks)
            tokens[index] = task.lease.tokens
            speeds[index] = self._profiles[index].speed_in(task.round)
        courses = self.timing.courses(now - EPOCH, ready, down, behind, artifacts, tokens, speeds)
        self._open_until = EPOCH + surely_open(courses, tokens, self._close_at_share)
        for index, (task, text) in opened.items():
            course, node = courses[index], world.nodes[index]
            node.bytes_down += down[index]
            node.version = task.base.version
            self.site.report(index, version=node.version, digest=task.base.weights_digest)
            node.held = Held(
                lease_id=task.lease.lease_id,
                round=task.round,
                attempt=task.lease.attempt,
                tokens=task.lease.tokens,
                sent=now,
                fetched=EPOCH + course.fetched,
                trained=EPOCH + course.trained,
                stepped=EPOCH + course.stepped,
                deadline=task.deadline_unix,
                steady=course.steady,
                together=len(opened),
                bytes_down=down[index],
                text=text,
            )
            self._follow_absences(index, task.deadline_unix)
            if not self._certain(node.held):
                world.agenda.add(node.held.trained, TRAINED, index, node.held.lease_id)

    def _block_bytes(self) -> int:
        return self.site.coordinator.corpus.block_bytes

    def _follow_absences(self, index: int, deadline: float) -> None:
        """Moments at which a node's silence is noticed, or ends."""
        if not self.world.online([index])[0]:
            return
        for gone, back in self.world.absences(index, self.world.now, deadline):
            if gone + self._lost_after < back:
                self.world.agenda.add(gone + self._lost_after, NOTICED, index)
            self.world.agenda.add(back, NOTICED, index)

    def _certain(self, held: Held) -> bool:
        """Whether the round waits for it until it is trained, whatever the others do."""
        last = min(held.deadline, self._open_until)
        return held.steady and held.trained <= last and not self._outage_ahead()

    def _outage_ahead(self) -> bool:
        return any(end > self.world.now for _, end in self.world.outages)

    def _give_up(self, index: int) -> bool:
        """A node hears that its lease was closed; whether it was still at it."""
        held = self.world.nodes[index].held
        if held is None or held.answer:
            return False
        self._work.wait_for(index)
        if held.made:
            self._arrive(index, held)
        else:
            self._answer(index, held, "given-up")
        return True

    # Work -----------------------------------------------------------------------------------------

    def _begin(self, indices: Sequence[int]) -> None:
        """Have leases trained, beside what else happens.

        Liars may look at what honest nodes made, all of it and nothing more, whoever was faster on
        this machine. With them, time stands still until all is made.
        """
        liars = [index for index in indices if self._lies(index)]
        self._hand_over([index for index in indices if not self._lies(index)])
        if liars:
            self._work.finish()
            self._hand_over(liars)
            self._work.finish()

    def _hand_over(self, indices: Sequence[int]) -> None:
        self._begun += len(indices)
        self._work.begin(
            Task(held.trained, index, self.site.flower_ids[index], held.round, held.text)
            for index in indices
            for held in [self.world.nodes[index].held]
            if held is not None
        )

    def _lies(self, index: int) -> bool:
        profile = self._profiles[index]
        held = self.world.nodes[index].held
        return profile.attack is not None and held is not None and held.round >= profile.attack_from

    def _made(self, index: int, verdict: Verdict) -> None:
        held = self.world.nodes[index].held
        assert held is not None
        self._done += 1
        self._tell("training", done=self._done, total=self._begun)
        held.made = True
        claim = self._layout.claim(held.round, held.lease_id)
        if verdict.code != ON_ITS_WAY and not claim.exists():
            # It gives the lease back: news for the round loop, when its time comes.
            self.world.agenda.add(held.trained, NEWS, index, verdict.model_dump_json())
            held.answer = verdict.code
            return
        held.bytes_up = claimed_bytes(claim.read_bytes())
        held.arrives = EPOCH + self.timing.arrival(
            index, held.trained - EPOCH, held.bytes_up, held.together
        )
        if self._profiles[index].attack in WATCHERS and self._lies(index):
            held.arrives = max(held.arrives, self._after_the_honest(held))
        self.world.agenda.add(held.arrives, ARRIVES, index, held.lease_id)

    def _after_the_honest(self, mine: Held) -> float:
        """Nobody copies what was not there yet: a moment after the last payload that it saw."""
        seen = [
            node.held.arrives
            for index, node in self.world.nodes.items()
            if node.held is not None
            and node.held.made
            and (node.held.round, node.held.attempt) == (mine.round, mine.attempt)
            and not self._lies(index)
        ]
        return max(seen, default=0.0) + COPYING_SECONDS

    # Time -----------------------------------------------------------------------------------------

    def advance(self, _seconds: float) -> None:
        """The round loop waits: go on to the next moment that could change its mind.

        Raises:
            Over: the scenario's time is up.
        """
        nodes = self.world.nodes
        ready = [
            index
            for index, node in sorted(nodes.items())
            if node.held is not None
            and not node.held.made
            and not node.held.answer
            and index not in self._work
            and self._certain(node.held)
        ]
        self._begin(ready)
        while not self._step():
            pass
        self._hear()

    def until(self, moment: float) -> None:
        """Let everything happen that happens by ``moment``, while the coordinator is at work."""
        while self._next() <= moment:
            self._step()
        self.world.now = max(self.world.now, self.world.outage(moment))
        self._hear()

    def _step(self) -> bool:
        """One moment; whether the round loop should look."""
        world = self.world
        awaited = [n.held for n in world.nodes.values() if n.held is not None and not n.held.answer]
        moment = self._next()
        if not awaited:
            moment = min(moment, world.now + IDLE_SECONDS)
        if not math.isfinite(moment) or moment > self._end:
            raise Over
        moment = world.outage(moment)
        world.now = max(world.now, moment)
        look = not awaited
        while self._next() <= world.now:
            _, kind, index, about = world.agenda.pop()
            look = self._handle(kind, index, about) or look
        open_still = any(n.held is not None and not n.held.answer for n in world.nodes.values())
        return look or not open_still

    def _next(self) -> float:
        """When something happens next: nothing that is still worked at can come before it."""
        while self._work.earliest <= self.world.agenda.next() and self._work:
            self._work.wait()
        return self.world.agenda.next()

    def _handle(self, kind: int, index: int, about: str) -> bool:
        if kind == HAPPENS:
            self._happen(index)
            return True
        if kind in (NOTICED, DEADLINE):
            return True
        node = self.world.nodes[index]
        if kind == CAUGHT_UP:
            self._caught_up(index)
            return True
        if kind == NEWS:
            self._news.append((self.site.flower_ids[index], about))
            return True
        held = node.held
        if held is None or held.lease_id != about or held.answer:
            return False  # it was given up
        if kind == TRAINED:
            if not held.made and self._still_open(held.lease_id):
                self._begin([index])
                self._work.wait_for(index)
            return False
        return self._arrive(index, held) != "accepted" or self._close_at_share < 1

    def _still_open(self, lease_id: str) -> bool:
        with self.site.coordinator.ledger.read() as session:
            lease = session.get(LeaseRecord, lease_id)
            if lease is None or lease.state != "open":
                return False
            current = session.get(Round, (self.site.coordinator.run_id, lease.round))
            return current is not None and current.state == "open"

    def _arrive(self, index: int, held: Held) -> str:
        """A payload is at the coordinator; the code of its verdict."""
        verdict = self.site.deliver(index, held.round, held.lease_id)
        node = self.world.nodes[index]
        node.bytes_up += held.bytes_up
        if verdict.accepted:
            node.train_seconds += self.timing.between(
                index, held.fetched - EPOCH, held.stepped - EPOCH
            )
            node.contributions += 1
        self._answer(index, held, verdict.code)
        return verdict.code

    def _answer(self, index: int, held: Held, code: str) -> None:
        held.answer = code
        profile = self._profiles[index]
        row = {
            "round": held.round,
            "attempt": held.attempt,
            "node": profile.name,
            "population": profile.population,
            "attack": profile.attack or "",
            "tokens": held.tokens,
            "sent": _since(held.sent),
            "fetched": _since(held.fetched),
            "trained": _since(held.stepped),
            "encoded": _since(held.trained),
            "arrived": _since(held.arrives),
            "answered": _since(self.world.now),
            "bytes_down": held.bytes_down,
            "bytes_up": held.bytes_up,
            "answer": code,
            "lease": held.lease_id,
        }
        self._events.write(json.dumps(row).encode("ascii") + b"\n")

    # Nodes ----------------------------------------------------------------------------------------

    def _happen(self, place: int) -> None:
        """An event of the scenario."""
        self._work.finish()  # when their payloads arrive is reckoned with who is there now
        came = self.world.happen(place)
        self.welcome(came)
        for index in self.world.nodes:
            held = self.world.nodes[index].held
            if held is None or held.answer:
                continue
            self._follow_absences(index, held.deadline)
            if not held.made:
                self._again(index, held)

    def _again(self, index: int, held: Held) -> None:
        """A lease's course may be another now that its node leaves, or the coordinator is away."""
        now = self.world.now
        begin = max(now, held.sent)
        rest, steps = (max(0.0, end - begin) for end in (held.trained, held.stepped))
        held.trained = EPOCH + self.timing.after(index, begin - EPOCH, rest)
        if held.stepped > begin:
            held.stepped = EPOCH + self.timing.after(index, begin - EPOCH, steps)
        gone = self.world.absences(index, held.sent, held.trained) if held.steady else [(0.0, 0.0)]
        held.steady = not gone
        self.world.agenda.add(held.trained, TRAINED, index, held.lease_id)

    def welcome(self, indices: Sequence[int], *, holding: int | None = None) -> dict[int, Verdict]:
        """Let nodes in; by node, what admission said.

        ``holding``: the version that they have already. Without it they fetch a checkpoint first.
        """
        fits = self.world.fleet.fits
        kinds = self.world.fleet.kind
        asked = [(self._profiles[i], fits[int(kinds[i])]) for i in indices]
        found = self.site.enrol(asked)
        for index, verdict in found.items():
            if not verdict.accepted or index in self.world.nodes:
                continue
            node = NodeNow(version=holding)
            self.world.nodes[index] = node
            if holding is None:
                self._catch_up(index, PROOF_SECONDS)
            else:
                self.site.report(index, version=holding, digest=None)
        return found

    def _catch_up(self, index: int, more_seconds: float = 0.0) -> None:
        """A node without a lease fetches what it lacks."""
        node, base = self.world.nodes[index], self._ref()
        size, updates = lacks(node.version, base)
        done = self.timing.fetching(index, self.world.now - EPOCH, size, updates)
        done = self.timing.after(index, done, more_seconds)
        node.bytes_down += size
        node.version = base.version
        node.behind_until = EPOCH + done
        self.world.agenda.add(node.behind_until, CAUGHT_UP, index)

    def _caught_up(self, index: int) -> None:
        node = self.world.nodes[index]
        self.site.report(index, version=node.version, digest=None)
        self._seen[index] = self.world.now

    def _hear(self) -> None:
        """Nodes that are there report; those that came back behind fetch what they lack."""
        world = self.world
        indices = sorted(world.nodes)
        here = [i for i, on in zip(indices, world.online(indices), strict=True) if on]
        quiet = [i for i in here if world.nodes[i].behind_until <= world.now]
        self.site.heard(quiet, world.now)
        for index in sorted(set(indices) - set(here)):
            last = world.last_seen(index)
            if last > self._seen.get(index, 0.0):
                self.site.heard([index], last)
                self._seen[index] = last
        newest = self._newest
        for index in quiet:
            node = world.nodes[index]
            idle = node.held is None or bool(node.held.answer)
            if idle and newest - (node.version or 0) > self._max_behind:
                self._catch_up(index)

    def close(self) -> None:
        """Write out what is kept of events."""
        self._work.finish()
        self._events.close()

    # Publishing -----------------------------------------------------------------------------------

    def published(self, number: int) -> None:
        """A version is out."""
        self._work.finish()
        self._newest = number
        self.real_seconds[number] = time.monotonic() - self._real_began
        self._real_began = time.monotonic()
        self._events.flush()
        self.world.save(number, -1, {"events": self._events.tell()})
        self._tell("published")

    def _version(self) -> int:
        with self.site.coordinator.ledger.read() as session:
            return self.site.book.latest_version(session).version

    def _ref(self) -> VersionRef:
        with self.site.coordinator.ledger.read() as session:
            return self.site.book.version_ref(session, self.site.book.latest_version(session))

    def _tell(self, what: str, **more: int) -> None:
        self._say({"what": what, "round": self._opened[0], "now": self.world.now - EPOCH, **more})

    # Going on -------------------------------------------------------------------------------------

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Go on after a death: what the ledger knows of the saved round happens once more.

        Everything in it is harmless to do again and has the same outcome, so that the world comes
        to where the ledger is.
        """
        self._events.truncate(int(saved["events"]))
        self._events.seek(0, 2)
        number, attempt = int(saved["round"]), int(saved["attempt"])
        if attempt < 0:
            return
        while True:
            self._send_again(number, attempt)
            upto, attempt = self._ledger_is_at(number, attempt)
            if upto is None:
                return
            self._finish_making()
            self.until(upto)
            if attempt < 0:
                return

    def _send_again(self, number: int, attempt: int) -> None:
        with self.site.coordinator.ledger.read() as session:
            rows = session.execute(
                select(LeaseRecord, Node)
                .join(Node, Node.node_id == LeaseRecord.node_id)
                .where(LeaseRecord.round == number, LeaseRecord.attempt == attempt)
            ).all()
        tasks = {int(node.flower_node_id or 0): lease.task for lease, node in rows}
        if tasks:
            self.send(tasks, round_number=number, ttl_seconds=TTL_SECONDS)

    def _finish_making(self) -> None:
        ready = [
            index
            for index, node in sorted(self.world.nodes.items())
            if node.held is not None and not node.held.made and self._certain(node.held)
        ]
        self._begin(ready)

    def _ledger_is_at(self, number: int, attempt: int) -> tuple[float | None, int]:
        """Up to when an attempt went, if it is over, and the attempt after it (-1: none)."""
        with self.site.coordinator.ledger.read() as session:
            record = session.get(Round, (self.site.coordinator.run_id, number))
            if record is None:
                return None, -1
            if record.attempt > attempt:
                rule = self.world.scenario.rules.round
                return record.deadline_unix - rule.deadline_seconds, attempt + 1
            if record.state == "published":
                return record.published_unix, -1
            if record.state == "closing":
                return record.closed_unix, -1
        return None, -1


def lacks(version: int | None, base: VersionRef) -> tuple[int, int]:
    """Bytes and updates that bring a node from ``version`` (None: nothing) to ``base``."""
    size, start = 0, version
    if start is None or not base.updates_from <= start <= base.version:
        size, start = base.checkpoint.size_bytes, base.checkpoint_version
    updates = base.updates[start - base.updates_from :]
    return size + sum(ref.size_bytes for ref in updates), len(updates)


def surely_open(
    courses: Mapping[int, Course], tokens: Mapping[int, int], close_at_share: float
) -> float:
    """Up to when a round is open whatever happens: it may close when enough tokens have arrived.

    Only nodes that do not go away count towards all tokens, as the others may be out of reach then.
    """
    if close_at_share >= 1:
        return math.inf
    needed = close_at_share * sum(tokens[index] for index, one in courses.items() if one.steady)
    arrived = 0
    for trained, index in sorted((one.trained, index) for index, one in courses.items()):
        arrived += tokens[index]
        if arrived >= needed:
            return trained
    return math.inf


def claimed_bytes(data: bytes) -> int:
    """Size of the payload of a signed contribution."""
    from talkoot.protocol.messages import Contribution

    signed = parse(Signed, data)
    return parse(Contribution, signed.body.encode("ascii")).payload.size_bytes


def _since(moment: float) -> float | None:
    return round(moment - EPOCH, 6) if math.isfinite(moment) else None
