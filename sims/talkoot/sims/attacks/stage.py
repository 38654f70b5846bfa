"""One network in this process over the real ledger, desk, book and round loop, and real trainers.

Left out are sockets and Flower: a payload is handed to the desk as the transfer service hands it
over, signed with its node's key. The nodes work one after the other and share one model's memory.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from talkoot.client.home import Home
from talkoot.client.trainer.core import Trainer
from talkoot.protocol.artifacts import sha256_file
from talkoot.protocol.corpus import (
    INDEX,
    CorpusManifest,
    block_digest,
    load_block,
    load_heldout,
    read_manifest,
)
from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.messages import (
    ArtifactRef,
    Contribution,
    RoundTask,
    Signed,
    Verdict,
    canonical_bytes,
)
from talkoot.protocol.steps import steps_of
from talkoot.protocol.weights import WeightsReader
from talkoot.server.aggregate import VersionDir
from talkoot.server.book import Book
from talkoot.server.config import BeliefSection, dump_config, load_config
from talkoot.server.coordinator import Coordinator
from talkoot.server.desk import Desk
from talkoot.server.heldout import heldout_loss, heldout_rows
from talkoot.server.ledger.schema import EvidenceRecord, JudgementRecord, Node, StandingRecord
from talkoot.server.registry import Registry
from talkoot.server.robust import AggregationSpec
from talkoot.server.sketch import Examination
from talkoot.sims.attacks.kinds import Actor
from talkoot.sims.in_process import InProcessCoordinator, task_of
from talkoot.sims.lab.behaviour import Situation
from talkoot.sims.lab.tamper import tampered

SPEED = 1000.0
"""Tokens a second that a node claims: figures must not depend on this machine's load."""
TURNS = 50


def key_of(seed: int, name: str) -> NodeKey:
    """The key of a node of this name: arms of one seed have nodes in common, and so their leases.

    Drawn at random instead, chance between two honest runs was larger than what most liars do
    (``docs/LOG.md``, 2026-11-25).
    """
    drawn = hashlib.sha384(f"stage {seed} {name}".encode()).digest()
    return NodeKey(ec.derive_private_key(int.from_bytes(drawn) >> 1 | 1, ec.SECP384R1()))


class _CredulousBook(Book):
    """Takes what is well-formed, whatever it is."""

    def accept(self, claim: Any, signed: Any, **known: Any) -> Verdict:
        return super().accept(claim, signed, l2_norm=known["l2_norm"], now=known["now"])


class CredulousDesk(Desk):
    """A coordinator without defences: no acceptance, no judgement, no clipping. For comparison."""

    def __init__(self, coordinator: Coordinator, registry: Registry) -> None:
        super().__init__(coordinator, registry)
        self._book = _CredulousBook(coordinator)

    def _keep_payload(self, claim: Contribution) -> Examination:
        from dataclasses import replace

        return replace(super()._keep_payload(claim), l2_norm=1.0)  # all alike: nothing is clipped


@dataclass
class Hand:
    """A node of the stage: its key, its home and its trainer."""

    actor: Actor
    node_id: str
    key: NodeKey
    trainer: Trainer
    home: Home


@dataclass
class Tale:
    """What became of a run."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """(round, held-out loss)."""
    verdicts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By node name: how often the desk answered with each code."""


class Stage:
    """A network over a copy of ``state``; a context manager.

    Args:
        state: of ``init``.
        root: everything goes here; a RAM-backed file system saves time.
        actors: one a node.
        defended: without it, a :class:`CredulousDesk` and a plain mean.
        belief: changes to the operator's ``[belief]``.
        rule: of aggregation.
    """

    def __init__(
        self,
        state: Path,
        root: Path,
        actors: Sequence[Actor],
        *,
        defended: bool = True,
        belief: dict[str, Any] | None = None,
        rule: AggregationSpec | None = None,
    ) -> None:
        self._root = root
        copy = root / "made"
        shutil.copytree(state, copy)
        config = load_config(copy / "config.toml")
        # Looks by the validator are measured apart (validator.py): they need a process.
        changed: dict[str, Any] = {"gain_share": 0.0, "gain_share_probation": 0.0}
        changed |= {"replay_share": 0.0}
        if not defended:
            changed |= {"set_aside_below": 0.0, "quarantine": False}
        section = BeliefSection.model_validate(
            config.belief.model_dump() | changed | (belief or {})
        )
        config = config.model_copy(
            update={"belief": section, "aggregation": rule or config.aggregation}
        )
        (copy / "config.toml").write_text(dump_config(config), encoding="utf-8")
        desk = Desk if defended else CredulousDesk
        self.site = InProcessCoordinator(copy, root / "operator", desk)
        shutil.rmtree(copy)
        self.site.conductor._clock = lambda: self.now
        self.now = 1_800_000_000.0
        self.corpus: CorpusManifest = read_manifest(self.coordinator.state.corpus)
        self._index = (self.coordinator.state.corpus / INDEX).read_bytes()
        self.hands: list[Hand] = []
        self.tale = Tale()
        for actor in actors:
            self.add(actor)
        self._heldout = heldout_rows(
            load_heldout(self.coordinator.state.corpus, self.corpus),
            self.coordinator.spec.sequence_length,
            32_768,
        )

    @property
    def coordinator(self) -> Coordinator:
        """The open state."""
        return self.site.coordinator

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.coordinator.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def add(self, actor: Actor) -> Hand:
        """A node joins."""
        home = Home(self._root / f"home-{len(self.hands):03d}")
        key = key_of(self.coordinator.spec.seed, actor.name)
        enrolment = self.site.enrol(home, actor.name, key=key)
        with self.coordinator.ledger.write() as session:
            node = session.get_one(Node, enrolment.node_id)
            node.tokens_per_second = SPEED * actor.speed
        trainer = Trainer(home.work, "cpu", checkpoint_seconds=math.inf)
        store, spec = self.coordinator.store, self.coordinator.spec
        trainer.open(
            spec,
            store.path(spec.model.digest),
            store.path(spec.manifest.digest),
            store.path(spec.corpus.digest),
        )
        if self.hands:
            trainer.share_memory(self.hands[0].trainer)
        hand = Hand(actor, enrolment.node_id, NodeKey.load(home.key), trainer, home)
        self.hands.append(hand)
        return hand

    # A round --------------------------------------------------------------------------------------

    def run_round(self) -> int:
        """One round from opening to published version; returns its number."""
        self.work_round()
        before = self.site.version
        for _ in range(TURNS):
            if self.site.version > before:
                break
            self.site.conductor.step()
            self.now += 60.0  # who promised and did not come is not waited for
        else:
            raise UnavailableError("The stage published nothing.")
        for hand in self.hands:
            self._settle(hand)
        return self.site.version

    def work_round(self) -> None:
        """Every node does its lease and delivers; the round stays open."""
        tasks = {hand.node_id: task for hand, task in self._tasks()}
        honest: list[Path] = []
        for hand in sorted(self.hands, key=lambda h: not h.actor.honest):
            if hand.node_id not in tasks:
                continue
            task = tasks[hand.node_id]
            path = self._work(hand, task, tuple(honest))
            if path is not None and hand.actor.honest:
                honest.append(path)

    def _tasks(self) -> list[tuple[Hand, RoundTask]]:
        for _ in range(TURNS):
            found = [
                (hand, task_of(signed))
                for hand in self.hands
                if (signed := self.site.desk.task(hand.node_id)) is not None
            ]
            if found:
                return found
            self.site.conductor.step()
        raise UnavailableError("The stage gave out no lease.")

    def _work(self, hand: Hand, task: RoundTask, honest: tuple[Path, ...]) -> Path | None:
        """One lease on one node; the payload, when the desk took it."""
        actor = hand.actor
        situation = Situation(task.round, len(self.hands), self.coordinator.spec.seed, honest)
        acting = not actor.honest and task.round >= actor.begins
        behaviour = actor.behaviour if acting or actor.odd else None
        path = hand.home.root / "payload"
        loss = 0.0
        made = False
        if acting:
            made = actor.forge(self.coordinator, situation, path)
        if not made:
            self._sync(hand, task)
            blocks = self._blocks(hand, task, situation)
            if behaviour is None:
                done = hand.trainer.train(task, blocks)
            else:
                with tampered(self.coordinator.manifest, behaviour, situation):
                    done = hand.trainer.train(task, blocks)
            shutil.copyfile(done["payload_path"], path)
            loss = done["loss"]
        else:
            loss = 3.0  # what one says who looked at the status page
        verdict = self._deliver(hand, task, path, loss)
        counts = self.tale.verdicts.setdefault(actor.name, {})
        counts[verdict.code] = counts.get(verdict.code, 0) + 1
        if not verdict.accepted:
            self.site.book.decline(hand.node_id, task.lease.lease_id, verdict.sentence)
        if not made:
            hand.trainer.settle(task.lease.lease_id, verdict.accepted)
        kept = hand.home.root / "kept"
        path.replace(kept)
        return kept if verdict.accepted else None

    def _deliver(self, hand: Hand, task: RoundTask, path: Path, loss: float) -> Verdict:
        digest, size = sha256_file(path)
        lease, spec = task.lease, self.coordinator.spec
        claim = Contribution(
            run_id=task.run_id,
            round=task.round,
            lease_id=lease.lease_id,
            node_id=hand.node_id,
            base_weights_digest=task.base.weights_digest,
            payload=ArtifactRef(digest=digest, size_bytes=size),
            tokens=lease.tokens,
            steps=steps_of(spec, lease.tokens).fewest,
            loss=loss,
            training_seconds=lease.tokens / (SPEED * hand.actor.speed),
        )
        signed = hand.key.sign("Contribution", canonical_bytes(claim))
        return self._send(hand, task, path, claim.payload, signed)

    def _send(
        self, hand: Hand, task: RoundTask, path: Path, ref: ArtifactRef, signed: Signed
    ) -> Verdict:
        """Hand a payload and its claim to the desk, as the transfer service does."""
        desk, lease_id = self.site.desk, task.lease.lease_id
        refused = desk.may_push(hand.node_id, lease_id, ref.digest, ref.size_bytes)
        if not refused.accepted:
            return refused
        upload = self.coordinator.state.incoming / f"stage-{hand.node_id}"
        shutil.copyfile(path, upload)
        desk.pushed(hand.node_id, lease_id, ref.digest, upload)
        return desk.submit(hand.node_id, signed)

    def _settle(self, hand: Hand) -> None:
        lease = hand.trainer.state()["lease"]
        if lease is not None:
            hand.trainer.settle(lease["lease_id"], accepted=False)

    def _blocks(self, hand: Hand, task: RoundTask, situation: Situation) -> list[Path]:
        directory = hand.home.root / "leased"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        actor, paths = hand.actor, []
        changes = actor.odd or (not actor.honest and task.round >= actor.begins)
        for ref in task.lease.blocks:
            found = self.coordinator.source.lookup(block_digest(self._index, ref.block))
            assert found is not None
            with found.path.open("rb") as file:
                file.seek(found.offset)
                data = file.read(found.length)
            if changes:
                ids = actor.behaviour.tokens(situation, load_block(data, self.corpus).copy())
                data = ids.astype(f"<u{self.corpus.item_bytes}").tobytes()
            paths.append(directory / f"{ref.epoch}-{ref.block}")
            paths[-1].write_bytes(data)
        return paths

    def _sync(self, hand: Hand, task: RoundTask) -> None:
        base, trainer = task.base, hand.trainer
        held = trainer.state()["version"]
        store = self.coordinator.store
        checkpoint = None
        start = held
        if held is None or not base.updates_from <= held <= base.version:
            start = base.checkpoint_version
            checkpoint = (start, store.path(base.checkpoint.digest))
        assert start is not None
        updates = base.updates[start - base.updates_from :]
        trainer.sync(
            base.version,
            base.weights_digest,
            checkpoint,
            [store.path(ref.digest) for ref in updates],
        )

    # Figures --------------------------------------------------------------------------------------

    def model(self) -> torch.nn.Module:
        """The newest published version."""
        with self.coordinator.ledger.read() as session:
            directory = self.site.book.latest_version(session).directory
        published = VersionDir(self.coordinator.state.versions / directory).published
        reader = WeightsReader(published, self.coordinator.manifest)
        model = self.hands[0].trainer._built().model
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(reader.get(name))
        return model

    def measure(self) -> float:
        """Held-out loss of the newest version, kept in the tale."""
        loss = heldout_loss(self.model(), self._heldout)
        self.tale.losses.append((self.site.version, loss))
        return loss

    def standings(self) -> dict[str, dict[str, Any]]:
        """By node name: standing, the round of its quarantine, and what the rounds made of it."""
        with self.coordinator.ledger.read() as session:
            out: dict[str, dict[str, Any]] = {}
            for hand in self.hands:
                row = session.get(StandingRecord, hand.node_id)
                judged = session.scalars(
                    select(JudgementRecord).where(JudgementRecord.node_id == hand.node_id)
                ).all()
                evidence = session.scalars(
                    select(EvidenceRecord).where(EvidenceRecord.node_id == hand.node_id)
                ).all()
                codes: dict[str, int] = {}
                for one in judged:
                    codes[one.code] = codes.get(one.code, 0) + 1
                agreements = [j.agreement for j in judged if j.agreement is not None]
                out[hand.actor.name] = {
                    "honest": hand.actor.honest,
                    "standing": row.state if row is not None else "probation",
                    "suspicion": row.suspicion if row is not None else 0.0,
                    "quarantined_in_round": (
                        max((e.round or 0 for e in evidence if e.points > 0), default=None)
                        if row is not None and row.state == "quarantined"
                        else None
                    ),
                    "judged": codes,
                    "agreements": [round(a, 3) for a in agreements],
                }
            return out
