"""The directory of a simulated network, and the small files that its parts leave for each other.

state/       the operator's state directory         nodes/00012/  a volunteer's home
by-flower/   Flower's node id → home                blocks/       leased blocks, shared by all nodes
plane/       what the coordinator tells everybody   outbox/       contributions on their way
verdicts/    what became of them                    world.json    the virtual clock, round by round
steps/       real seconds of inner steps            job.json      what the engine was told
events.jsonl what happened                          engine.log    of Flower, Ray and the engine
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from talkoot.protocol.messages import Signed, Verdict, canonical_bytes, parse

ON_ITS_WAY = "on-its-way"
"""Code of the verdict that a node's host sends when the payload is made and travels."""


class Profile(BaseModel):
    """``nodes/…/profile.json``: what kind of node lives in a home."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    name: str
    population: str
    recipe: str
    tokens_per_second: Annotated[float, Field(gt=0)]
    """Of the simulated device."""
    speed_noise: float = 0.0
    """Standard deviation of the logarithm of that, from round to round."""
    attack: str | None = None
    attack_from: int = 1
    """The round from which it lies."""
    seed: int = 0

    def speed_in(self, number: int) -> float:
        """Tokens a second in one round: the node's own speed, and what disturbs it this time."""
        if not self.speed_noise:
            return self.tokens_per_second
        rng = np.random.default_rng([self.seed, 0x5EED, self.index, number])
        return self.tokens_per_second * math.exp(self.speed_noise * float(rng.standard_normal()))


@dataclass(frozen=True)
class Layout:
    """Paths below a run's working directory."""

    root: Path

    @property
    def state(self) -> Path:
        """The operator's state directory."""
        return self.root / "state"

    @property
    def world(self) -> Path:
        """The virtual clock, as of the last opening of a round."""
        return self.root / "world.json"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def blocks(self) -> Path:
        """An artifact store of blocks: every node would have the same bytes."""
        return self.root / "blocks"

    @property
    def spec(self) -> Path:
        """The signed RunSpec."""
        return self.root / "plane" / "spec.json"

    @property
    def mirrors(self) -> Path:
        """The signed list of mirrors, which is empty: the lines are simulated."""
        return self.root / "plane" / "mirrors.json"

    def home(self, index: int) -> Path:
        """Of node number ``index``."""
        return self.root / "nodes" / f"{index:05d}"

    def profile(self, home: Path) -> Path:
        """What kind of node lives there."""
        return home / "profile.json"

    def by_flower(self, flower_node_id: int) -> Path:
        """A link to the home of the node that Flower knows by this id."""
        return self.root / "by-flower" / str(flower_node_id)

    def outbox(self, number: int) -> Path:
        """Contributions to a round."""
        return self.root / "outbox" / f"{number:06d}"

    def claim(self, number: int, lease_id: str) -> Path:
        """A signed contribution on its way."""
        return self.outbox(number) / f"{lease_id}.json"

    def payload(self, number: int, lease_id: str) -> Path:
        """Its payload."""
        return self.outbox(number) / f"{lease_id}.safetensors"

    def verdict(self, lease_id: str) -> Path:
        """What the coordinator said."""
        return self.root / "verdicts" / f"{lease_id}.json"

    def note_steps(self, number: int, seconds: float) -> None:
        """Keep what a lease's inner steps took in this process."""
        with (self.root / "steps" / f"{os.getpid()}.txt").open("a", encoding="ascii") as file:
            file.write(f"{number} {seconds}\n")

    def steps(self) -> dict[int, float]:
        """Real seconds of inner steps, of all processes, by round."""
        found: dict[int, float] = {}
        for path in (self.root / "steps").glob("*.txt"):
            for line in path.read_text(encoding="ascii").splitlines():
                number, seconds = line.split()
                found[int(number)] = found.get(int(number), 0.0) + float(seconds)
        return found

    def create(self) -> None:
        """Make the directories."""
        for name in ("nodes", "by-flower", "plane", "outbox", "verdicts", "blocks", "steps"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def read_verdict(self, lease_id: str) -> Verdict | None:
        """What the coordinator said of a lease, when it has said something."""
        try:
            return parse(Verdict, self.verdict(lease_id).read_bytes())
        except FileNotFoundError:
            return None

    def write(self, path: Path, message: Signed | Verdict) -> None:
        """Leave a message; whoever reads it sees all of it or nothing."""
        # No fsync: what is lost with the machine's power is made again from the ledger.
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(canonical_bytes(message))
        part.replace(path)
