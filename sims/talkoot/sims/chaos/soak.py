"""Strike after strike: kill, audit at once, wait for the work to go on, audit again."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from talkoot.protocol import faults
from talkoot.protocol.errors import TalkootError
from talkoot.server.audit import Audit, Auditor
from talkoot.server.audit.reading import view
from talkoot.sims.chaos.arena import Arena
from talkoot.sims.chaos.plan import Kill, Strike

RECOVER_SECONDS = 300.0
"""Longer, and the network counts as lost."""
PLACE_SECONDS = 20.0
"""How long to wait for somebody to come by at an armed place."""
CONVERGE_SECONDS = 300.0

Say = Callable[[str], None]


class BrokenPromise(TalkootError):
    """The auditor found something."""

    default_code = "broken-promise"


@dataclass
class Record:
    """What a soak saw."""

    kills: Counter[str] = field(default_factory=Counter)
    """Deaths by component."""
    places: Counter[str] = field(default_factory=Counter)
    """Deaths by named place."""
    missed: Counter[str] = field(default_factory=Counter)
    """Kills that found nobody to kill, or armed places that nobody came by at."""
    back: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds until the component served again, of strikes that killed one alone."""
    work: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds until the next contribution was accepted or version published, likewise; for a
    volunteer's components, until the next contribution of that volunteer."""
    several: list[float] = field(default_factory=list)
    """Seconds until work went on after strikes that killed several at once."""
    audits: int = 0
    strikes: int = 0

    def to_json(self) -> dict[str, Any]:
        """For ``chaos.json``."""
        return {
            "strikes": self.strikes,
            "kills": sum(self.kills.values()),
            "kills_by_component": dict(sorted(self.kills.items())),
            "kills_by_place": dict(sorted(self.places.items())),
            "missed": dict(sorted(self.missed.items())),
            "audits": self.audits,
            "seconds_until_back": {c: _summary(s) for c, s in sorted(self.back.items())},
            "seconds_until_work_goes_on": {c: _summary(s) for c, s in sorted(self.work.items())},
            "seconds_until_work_goes_on_after_several": _summary(self.several),
        }


def _summary(seconds: list[float]) -> dict[str, float | int] | None:
    if not seconds:
        return None
    return {
        "count": len(seconds),
        "median": round(statistics.median(seconds), 2),
        "worst": round(max(seconds), 2),
    }


class Soak:
    """Strikes at one arena. Args: the arena, started; ``say`` tells one line."""

    def __init__(self, arena: Arena, say: Say) -> None:
        self._arena = arena
        self._say = say
        self._auditor = Auditor(arena.network.state)
        self.record = Record()
        self.archive = arena.network.root / "archive"

    def run(self, strikes: Iterable[Strike], kills: int) -> None:
        """Strike until so many deaths were died.

        Raises:
            BrokenPromise: an audit found something.
            UnavailableError: the network did not come back.
        """
        self._arena.until("the first version", lambda: self._arena.progress().version > 0, 300)
        for strike in strikes:
            if sum(self.record.kills.values()) >= kills:
                return
            self._strike(strike)
            self.keep_artifacts()

    def _strike(self, strike: Strike) -> None:
        arena, record = self._arena, self.record
        self._pass(strike.delay_seconds)
        done: list[tuple[Kill, int]] = []
        for kill in strike.kills:
            pid = self._at_place(kill) if kill.place else arena.kill(kill)
            if pid is None:
                record.missed[kill.place or kill.component] += 1
                continue
            record.kills[kill.component] += 1
            if kill.place:
                record.places[kill.place] += 1
            done.append((kill, pid))
        if not done:
            return
        began = time.monotonic()
        before = arena.progress()
        self.audit(f"strike {strike.number}")
        told = ", ".join(str(kill) for kill, _ in done)
        back: dict[Kill, float] = {}

        def recovered() -> bool:
            for kill, pid in done:
                if kill not in back and arena.serves(kill, pid):
                    back[kill] = time.monotonic() - began
            if len(back) < len(done):
                return False
            now = arena.progress()
            nodes = [arena.names[k.node] if k.node is not None else None for k, _ in done]
            return all(now.beyond(before, node) for node in nodes)

        arena.until(f"recovery from {told}", recovered, RECOVER_SECONDS)
        took = time.monotonic() - began
        self.audit(f"recovery from strike {strike.number}")
        record.strikes += 1
        if len(done) == 1:
            (kill, _), *_ = done
            record.back[kill.component].append(back[kill])
            record.work[kill.component].append(took)
        else:
            record.several.append(took)
        self._say(
            f"{sum(record.kills.values()):4d}  {told}: work went on after {took:.1f} s, "
            f"version {arena.progress().version}"
        )

    def _pass(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._arena.keep()
            time.sleep(0.05)

    def _at_place(self, kill: Kill) -> int | None:
        assert kill.place is not None
        directory = self._arena.faults
        faults.arm(directory, kill.place)
        deadline = time.monotonic() + PLACE_SECONDS
        while time.monotonic() < deadline:
            pid = faults.hit(directory, kill.place)
            if pid is not None:
                return pid
            self._arena.keep()
            time.sleep(0.02)
        if faults.disarm(directory, kill.place):
            return None
        return faults.hit(directory, kill.place)  # in the last moment

    # Holding it to its promises -------------------------------------------------------------------

    def audit(self, when: str) -> Audit:
        """Audit now.

        Raises:
            BrokenPromise: something was found.
        """
        found = self._auditor.audit()
        self.record.audits += 1
        if not found.whole:
            raise BrokenPromise(f"After {when}:\n" + "\n".join(found.lines()))
        return found

    def keep_artifacts(self) -> None:
        """Link all artifacts away, so that what the coordinator collects can still be replayed."""
        store = self._arena.network.state / "store"
        for path in store.glob("[0-9a-f][0-9a-f]/*"):
            twin = self.archive / path.parent.name / path.name
            if not twin.exists():
                twin.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, twin)
                except FileNotFoundError:
                    continue

    def converge(self) -> dict[str, Any]:
        """End the run at a version not far off, and have every replica come to it.

        Raises:
            BrokenPromise: a replica's bytes are not what was published.
            UnavailableError: they did not come to it in time.
        """
        arena = self._arena
        last = finish_soon(arena)

        def together() -> bool:
            status = arena.network.status()
            if status is None or status["phase"] != "finished":
                return False
            newest = (status["version"], status["weights_digest"])
            return all((n["version"], n["weights_digest"]) == newest for n in status["nodes"])

        seconds = arena.until("all replicas at the last version", together, CONVERGE_SECONDS)
        self.keep_artifacts()
        found = self.audit("the end")
        arena.network.stop()
        with view(arena.ledger_url) as ledger:
            (row,) = ledger.all(
                "SELECT version, weights_digest FROM versions WHERE version = :v", v=last
            )
        wanted = (row["version"], row["weights_digest"])
        for name, held in arena.replica_digests().items():
            if held != wanted:
                raise BrokenPromise(f"{name} holds {held}, and {wanted} was published last.")
        return {
            "version": last,
            "weights_digest": row["weights_digest"],
            "replicas": len(arena.names),
            "seconds": round(seconds, 2),
            "audit": found.to_json(),
        }


def finish_soon(arena: Arena, version: int | None = None) -> int:
    """Move the run's end to this version, or to the second from now; returns it."""
    from sqlalchemy import text

    from talkoot.server.ledger import Ledger

    ledger = Ledger(Ledger.url_at(arena.network.state, arena.shape.ledger_url))
    with ledger.write() as session:
        newest = session.execute(text("SELECT MAX(version) FROM versions")).scalar_one()
        last = int(newest) + 2 if version is None else version
        session.execute(text("UPDATE runs SET rounds_total = :n"), {"n": last})
    ledger.close()
    # The parts have read the end when they started.
    pid = arena.pid(Kill("round loop"))
    if pid is not None:
        arena.kill(Kill("round loop"))
    return last
