"""A network in one process: every round goes through the code of the real one.

Real: ``plan_leases``, each node's ``Trainer`` with its work directory (weights, optimizer state,
error feedback, checkpoints, payloads), ``verify_payload``, ``aggregate_round``, ``apply_update``,
the schedule in tokens, the digests. Left out: sockets, signatures, the ledger and the clock.

The nodes work one after the other and share the memory of one model, which holds nothing between
two operations: a node's replica is on its disk. A lab that was killed goes on from its last round.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from talkoot.client.trainer.core import Trainer
from talkoot.protocol import limits
from talkoot.protocol.corpus import MANIFEST
from talkoot.protocol.errors import ConfigError
from talkoot.protocol.files import write_atomic
from talkoot.protocol.leases import CommittedBlocks, Member, plan_leases, tokens_wanted
from talkoot.protocol.messages import (
    ArtifactRef,
    Count,
    Digest,
    Lease,
    LeaseId,
    Message,
    RoundTask,
    VersionRef,
    canonical_bytes,
    parse,
)
from talkoot.protocol.model import config_bytes
from talkoot.protocol.payload import PayloadFacts, verify_payload
from talkoot.protocol.weights import WeightsReader
from talkoot.server.aggregate import (
    AggregateResult,
    ContributionInput,
    VersionDir,
    aggregate_round,
    initial_state,
)
from talkoot.server.heldout import heldout_loss
from talkoot.sims.lab.behaviour import NodeBehaviour, NodeProfile, Situation
from talkoot.sims.lab.tamper import tampered
from talkoot.sims.lab.world import World

STATE_CAP = 64 * limits.MIB
KEEP_VERSIONS = 2


class LabState(Message):
    """``lab.json``: where the lab is."""

    format: Literal[1] = 1
    round: Count = 0
    """Rounds that are published."""
    weights_digest: Digest
    tokens: Count = 0
    """That the whole network has committed."""
    committed: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]*$")], ...]
    """Committed blocks of each shard, hexadecimal."""
    accepted: tuple[LeaseId, ...] = ()
    """Leases of the last round that count; the others were refused."""


@dataclass(frozen=True)
class Submission:
    """A payload that a node delivered, and what it claims."""

    node: int
    lease: Lease
    path: Path
    facts: PayloadFacts
    steps: int
    loss: float
    """Mean training loss over the lease, as the node says."""


@dataclass(frozen=True)
class LabRound:
    """What a round was."""

    round: int
    result: AggregateResult
    accepted: tuple[Submission, ...]
    refused: tuple[Submission, ...]
    """Late, or screened out."""
    tokens: int
    """Of the accepted."""
    loss: float
    """Mean training loss of the accepted, weighted by tokens."""
    bits_up: float
    """Bits per parameter, mean of the accepted payloads."""
    bits_down: float
    """Bits per parameter of the published update."""
    seconds: dict[str, float]
    """By stage: sync, steps (the inner steps alone), node (the rest of a lease), verify,
    aggregate."""


Screen = Callable[[Sequence[Submission]], Sequence[Submission]]
"""Which of the verified submissions are accepted; the coordinator's own checks stand here."""


class Lab:
    """One network over one :class:`World`, in one directory.

    Args:
        world: model, corpora and configuration.
        nodes: one profile a node.
        root: all files; on a RAM-backed file system the files cost next to nothing.
        screen: see :data:`Screen`; everybody who is verified by default.
        clock: seconds, for the report only.

    Raises:
        StateError: ``root`` holds something else.
    """

    def __init__(
        self,
        world: World,
        nodes: Sequence[NodeProfile],
        root: Path,
        *,
        screen: Screen = tuple,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not nodes:
            raise ConfigError("A network needs at least one node.")
        if max(node.shard for node in nodes) >= len(world.shards):
            raise ConfigError("A node names a shard that the world does not have.")
        self.world = world
        self.nodes = tuple(nodes)
        self._root = root
        self._screen = screen
        self._clock = clock
        self._model = world.blank_model()
        for part in ("versions", "updates", "run", "nodes"):
            (root / part).mkdir(parents=True, exist_ok=True)
        self._state = self._open_state()
        self._committed = [
            CommittedBlocks.from_bytes(bytes.fromhex(c)) for c in self._state.committed
        ]
        self._trainers = [self._open_trainer(i) for i in range(len(self.nodes))]
        first: dict[str, Trainer] = {}
        for profile, trainer in zip(self.nodes, self._trainers, strict=True):
            if first.setdefault(profile.recipe, trainer) is not trainer:
                trainer.share_memory(first[profile.recipe])
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._settle()

    @property
    def round(self) -> int:
        """The last published round, which is the version too."""
        return self._state.round

    @property
    def tokens(self) -> int:
        """That the whole network has committed."""
        return self._state.tokens

    @property
    def version(self) -> VersionDir:
        """The newest published version."""
        return VersionDir(self._root / "versions" / f"v{self.round:08d}")

    def heldout_loss(self) -> float:
        """Of the newest published version."""
        reader = WeightsReader(self.version.published, self.world.manifest)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(reader.get(name))
        return heldout_loss(self._model, self.world.heldout)

    def replicas(self) -> list[str | None]:
        """The weights digest of each node's replica; ``None`` before its first round."""
        return [trainer.state()["weights_digest"] for trainer in self._trainers]

    # A round --------------------------------------------------------------------------------------

    def run_round(self) -> LabRound:
        """Plan, train, verify, aggregate, publish. Killed half-way, it does the same round again.

        Raises:
            TalkootError: a node's training diverged, or nobody's contribution was accepted.
        """
        self._seconds.clear()
        number = self.round + 1
        tasks = self._tasks(number)
        # Who misbehaves comes last: it may look at what the others made.
        order = sorted(tasks, key=lambda node: (not self._behaves(node), node))
        submissions: list[Submission] = []
        for node in order:
            honest = tuple(s.path for s in submissions if self._behaves(s.node))
            submissions.append(self._work(node, tasks[node], honest))
        in_time = [s for s in submissions if not self.nodes[s.node].behaviour.late]
        accepted = tuple(sorted(self._screen(in_time), key=lambda s: s.node))
        if not accepted:
            raise ConfigError(f"Round {number} has no contribution: let fewer nodes be late.")
        refused = tuple(s for s in submissions if s not in accepted)
        result = self._publish(number, accepted)
        tokens = sum(s.lease.tokens for s in accepted)
        done = LabRound(
            round=number,
            result=result,
            accepted=accepted,
            refused=refused,
            tokens=tokens,
            loss=sum(s.loss * s.lease.tokens for s in accepted) / tokens,
            bits_up=statistics.fmean(s.facts.bits_per_parameter for s in accepted),
            bits_down=result.bits_per_parameter,
            seconds=dict(self._seconds),
        )
        for submission in accepted:
            shard = self.nodes[submission.node].shard
            self._committed[shard].add(submission.lease.blocks)
        self._save(
            LabState(
                round=number,
                weights_digest=result.weights_digest,
                tokens=self.tokens + tokens,
                committed=tuple(c.to_bytes().hex() for c in self._committed),
                accepted=tuple(s.lease.lease_id for s in accepted),
            )
        )
        self._settle()
        return done

    def present(self, number: int) -> list[int]:
        """Who takes part in round ``number``: a function of the seed; never nobody."""
        seed = self.world.config.run.seed
        draws = np.random.default_rng([seed, number, 0x7A1C]).random(len(self.nodes))
        here = [i for i, node in enumerate(self.nodes) if draws[i] >= node.dropout]
        return here or [int(np.argmax(draws))]

    def _behaves(self, node: int) -> bool:
        return self.nodes[node].behaviour.honest

    def _tasks(self, number: int) -> dict[int, RoundTask]:
        """The leases of a round, as the coordinator gives them out, by node."""
        config = self.world.config
        here = self.present(number)
        median = statistics.median(self.nodes[i].speed for i in here)
        leases: dict[int, Lease] = {}
        for shard, committed in enumerate(self._committed):
            members = {
                f"{i:016x}": Member(
                    f"{i:016x}",
                    tokens_wanted(self.nodes[i].speed, median, config.round.tokens_per_node),
                )
                for i in here
                if self.nodes[i].shard == shard
            }
            planned = plan_leases(
                seed=config.run.seed,
                run_id=self.world.spec().run_id,
                round=number,
                attempt=0,
                block_tokens=self.world.shards[shard].manifest.block_tokens,
                committed=committed,
                members=list(members.values()),
            )
            leases.update({int(lease.node_id, 16): lease for lease in planned})
        size = self.version.published.stat().st_size
        return {
            node: RoundTask(
                run_id=lease.run_id,
                generation=0,
                round=number,
                lease=lease,
                base=VersionRef(
                    version=self.round,
                    weights_digest=self._state.weights_digest,
                    checkpoint_version=self.round,
                    checkpoint=ArtifactRef(digest=self._state.weights_digest, size_bytes=size),
                    updates_from=self.round,
                    updates=(),
                ),
                tokens_before=self.tokens,
                tokens_round=sum(lease.tokens for lease in leases.values()),
                issued_unix=0.0,
                deadline_unix=0.0,
                expires_unix=0.0,
                poll_seconds=0.0,
            )
            for node, lease in sorted(leases.items())
        }

    def _work(self, node: int, task: RoundTask, honest: tuple[Path, ...]) -> Submission:
        """One lease on one node: come to the version, train, encode; then the coordinator looks."""
        trainer, profile = self._trainers[node], self.nodes[node]
        with self._stage("sync"):
            self._sync(trainer)
        situation = Situation(task.round, node, self.world.config.run.seed, honest)
        blocks = self._blocks(node, task.lease, situation)
        with self._stage("node"), self._acting(profile.behaviour, situation):
            done = trainer.train(task, blocks)
        self._seconds["steps"] += done["training_seconds"]
        self._seconds["node"] -= done["training_seconds"]
        path = Path(done["payload_path"])
        if not profile.behaviour.honest:
            profile.behaviour.payload(situation, path)
        with self._stage("verify"):
            facts = verify_payload(path, self.world.manifest, self.world.spec().uplink)
        return Submission(node, task.lease, path, facts, done["steps"], done["loss"])

    def _acting(
        self, behaviour: NodeBehaviour, situation: Situation
    ) -> AbstractContextManager[None]:
        if behaviour.honest:
            return nullcontext()
        return tampered(self.world.manifest, behaviour, situation)

    def _blocks(self, node: int, lease: Lease, situation: Situation) -> list[Path]:
        """The leased blocks as files, as a node has them after fetching."""
        profile = self.nodes[node]
        directory = self._root / "nodes" / f"{node:03d}" / "blocks"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        paths = []
        for ref in lease.blocks:
            ids = self.world.shards[profile.shard].block(ref.block)
            if not profile.behaviour.honest:
                ids = profile.behaviour.tokens(situation, ids.copy())
            paths.append(directory / f"{ref.epoch}-{ref.block}")
            paths[-1].write_bytes(ids.tobytes())
        return paths

    def _sync(self, trainer: Trainer) -> None:
        """Bring a node to the newest version: by updates, or from the dense file when it is new."""
        digest, version = self._state.weights_digest, trainer.state()["version"]
        if version is None or version + limits.MAX_UPDATE_CHAIN < self.round:
            trainer.sync(self.round, digest, (self.round, self.version.published), [])
        elif version < self.round:
            updates = [self._update(n) for n in range(version + 1, self.round + 1)]
            trainer.sync(self.round, digest, None, updates)

    def _publish(self, number: int, accepted: Sequence[Submission]) -> AggregateResult:
        config, spec = self.world.config, self.world.spec()
        with self._stage("aggregate"):
            result = aggregate_round(
                self.world.manifest,
                self.version,
                [
                    ContributionInput(
                        path=s.path,
                        tokens=s.lease.tokens,
                        l2_norm=s.facts.l2_norm,
                        key=s.lease.node_id,
                    )
                    for s in accepted
                ],
                spec.uplink,
                spec.downlink,
                config.outer,
                self._root / "versions" / f"v{number:08d}",
            )
            shutil.copyfile(result.update_path, self._update(number))
        return result

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = self._clock()
        yield
        self._seconds[name] += self._clock() - began

    # Files ----------------------------------------------------------------------------------------

    def _update(self, number: int) -> Path:
        return self._root / "updates" / f"{number:08d}.safetensors"

    def _open_state(self) -> LabState:
        path = self._root / "lab.json"
        if path.is_file():
            return parse(LabState, path.read_bytes(), cap=STATE_CAP)
        first = VersionDir(self._root / "versions" / "v00000000")
        digest = initial_state(self.world.manifest, self.world.initial.__getitem__, first.path)
        counts = [shard.manifest.block_count for shard in self.world.shards]
        state = LabState(
            weights_digest=digest,
            committed=tuple(CommittedBlocks(count).to_bytes().hex() for count in counts),
        )
        write_atomic(path, canonical_bytes(state))
        return state

    def _save(self, state: LabState) -> None:
        write_atomic(self._root / "lab.json", canonical_bytes(state))
        self._state = state

    def _open_trainer(self, node: int) -> Trainer:
        run = self._root / "run"
        shard = self.nodes[node].shard
        files = {
            "model.json": config_bytes(self.world.model_config),
            "manifest.json": self.world.manifest.to_bytes(),
            f"corpus-{shard}.json": (self.world.shards[shard].directory / MANIFEST).read_bytes(),
        }
        for name, data in files.items():
            if not (run / name).is_file():
                write_atomic(run / name, data)
        # A lab's lease is short, and can be done again: no checkpoint but the last.
        trainer = Trainer(
            self._root / "nodes" / f"{node:03d}" / "work",
            "cpu",
            recipe=self.nodes[node].recipe,
            checkpoint_seconds=math.inf,
        )
        model, manifest, corpus = (run / name for name in files)
        trainer.open(self.world.spec(shard), model, manifest, corpus)
        return trainer

    def _settle(self) -> None:
        """Tell the nodes of the last round what became of their leases, and drop old versions."""
        # A lab that was killed inside a round finds its leases done: they count in that round.
        ahead = {task.lease.lease_id for task in self._tasks(self.round + 1).values()}
        for trainer in self._trainers:
            lease = trainer.state()["lease"]
            if lease is not None and lease["done"] and lease["lease_id"] not in ahead:
                trainer.settle(lease["lease_id"], lease["lease_id"] in self._state.accepted)
        for path in (self._root / "versions").glob("v*"):
            if int(path.name[1:]) <= self.round - KEEP_VERSIONS:
                shutil.rmtree(path)
        oldest = min((t.state()["version"] or 0 for t in self._trainers), default=0)
        oldest = max(oldest, self.round - limits.MAX_UPDATE_CHAIN)
        for path in (self._root / "updates").iterdir():
            if int(path.name[:8]) <= oldest:
                path.unlink()
