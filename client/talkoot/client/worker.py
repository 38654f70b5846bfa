"""From a signed task to an accepted contribution: everything a node does in a round.

The worker has no opinion on where tasks come from (``daemon.py`` over Flower, a stock SuperNode, a
resumed lease) and no torch: weights are the trainer child's business. Every step can be done again:
after a crash the same task leads to the same contribution.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from talkoot.client.caps import require_room
from talkoot.client.choice import LACKS_ROOM, Choice, basis, choose, held_against
from talkoot.client.enrol import Enrolment
from talkoot.client.fresh import Seen, see_head, see_task, see_version
from talkoot.client.home import Counters, Home
from talkoot.client.membership import Membership
from talkoot.client.neighbours import holders
from talkoot.client.pace import Meter, TransferOptions
from talkoot.client.plane import DataPlane, Trains
from talkoot.client.transfer import FETCH_OWNER, TransferClient
from talkoot.protocol import faults
from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.corpus import CorpusManifest, block_digest
from talkoot.protocol.errors import (
    CapacityError,
    IntegrityError,
    ProtocolError,
    RefusedError,
    TalkootError,
    UnavailableError,
    VersionError,
)
from talkoot.protocol.identity import NodeKey, load_public_key, verify
from talkoot.protocol.ingest import received_bytes
from talkoot.protocol.limits import MAX_JSON_ARTIFACT, MIB, PROTOCOL_VERSION
from talkoot.protocol.messages import (
    ArtifactRef,
    Capability,
    Contribution,
    Head,
    MirrorList,
    NodeReport,
    NodeReportReply,
    Proof,
    ProofChallenge,
    RoundTask,
    RunSpec,
    Signed,
    Verdict,
    VersionRef,
    VersionStatement,
    canonical_bytes,
    parse,
)
from talkoot.protocol.model import parse_config
from talkoot.protocol.planner import plans
from talkoot.protocol.refusals import AWAITS_APPROVAL, printable

log = logging.getLogger(__name__)

State = Literal["idle", "syncing", "proving", "training", "pushing", "paused"]

MAX_RETRY_SECONDS = 5.0
MIN_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.02, 600.0
REREAD_BYTES = 64 * MIB
"""Up to this size an artifact that is here already is hashed again before it is used."""
MAX_TRAINER_DEATHS = 3
"""In one lease; a node that cannot hold on gives the lease back."""
REPLICA_DIFFERS = "replica-differs"
TRAINING_BEGINS = "version %d: training begins; %d bytes up, %d down until now"
"""In the daemon's log; a calibration reads it there."""
LINK_BYTES = MIB
"""Less than that says more of round trips than of a line."""
MIRROR_LIST_SECONDS = 600.0
"""For so long a list of mirrors is good."""


class Worker:
    """One enrolled node at work.

    Args:
        home: its directory.
        trainer: the child that owns the device; the caller closes it.
        say: tells the volunteer one line; without it nobody is there to read one.
        plane: makes the way to the coordinator, over gRPC if not given.
        clock: Unix seconds.
    """

    def __init__(
        self,
        home: Home,
        trainer: Trains,
        say: Callable[[str], None] | None = None,
        *,
        plane: Callable[[Enrolment, NodeKey, Meter], DataPlane] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        def tell(sentence: str) -> None:
            (say or log.info)(printable(sentence))  # it may be the coordinator's

        self._say = tell
        self._has_reader = say is not None
        self.home = home
        self.trainer = trainer
        enrolment = Enrolment.load(home.enrolment)
        self.key = NodeKey.load(home.key)
        self._settings = home.settings()
        self.counters: Counters = home.counters()
        self.meter = Meter(self.counters.bytes_up, self.counters.bytes_down)
        self._clock = clock
        self.transfer: DataPlane = (plane or self._over_grpc)(enrolment, self.key, self.meter)
        self._coordinator_key = load_public_key(enrolment.coordinator_key_pem.encode("ascii"))
        self._store = ArtifactStore(home.store)
        self._spec: RunSpec | None = None
        self._run_paths: dict[str, Any] = {}
        self._choice: Choice | None = None
        self._corpus: CorpusManifest | None = None
        self._index = b""
        self._started_unix = clock()
        self._mirrors_until = 0.0  # monotonic seconds
        self._stop = threading.Event()
        self._closed_leases: set[str] = set()
        self._saving = threading.Lock()
        self._seeing = threading.Lock()
        self.membership = Membership(home, self.key, enrolment, self.transfer)
        # What the reporter tells; single assignments, read by another thread.
        self.state: State = "idle"
        self.lease_id: str | None = None
        self.version: int | None = None
        self.weights_digest: str | None = None
        self.step = 0
        self.steps = 0
        self.loss: float | None = None
        self.tokens_per_second = 0.0
        self.recipe: str | None = None
        self.falls = 0
        self.reply: NodeReportReply | None = None

    def _over_grpc(self, enrolment: Enrolment, key: NodeKey, meter: Meter) -> DataPlane:
        host = f"[{enrolment.host}]" if ":" in enrolment.host else enrolment.host
        return TransferClient(
            f"{host}:{enrolment.transfer_port}",
            enrolment.ca_pem.encode("ascii"),
            enrolment.certificate_pem.encode("ascii"),
            key.private_pem(),
            meter=meter,
            options=TransferOptions(
                max_rate_up=self._settings.max_rate_up, max_rate_down=self._settings.max_rate_down
            ),
        )

    @property
    def enrolment(self) -> Enrolment:
        """Whom this node trains for, with its newest certificate."""
        return self.membership.enrolment

    # Stopping -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End what is going on at the next step, checkpointed."""
        self._stop.set()

    def should_stop(self) -> bool:
        """Whether work should end now: asked to stop, paused, or the lease was closed."""
        if self._stop.is_set() or self.home.pause.exists():
            return True
        return self.lease_id is not None and self.lease_id in self._closed_leases

    def close(self) -> None:
        """Close the connection and save what lasts."""
        self._stop.set()
        self.transfer.close()
        self.save_counters()

    def save_counters(self, **changes: Any) -> None:
        """Save what lasts beyond this process. Thread-safe."""
        meter = {"bytes_up": self.meter.bytes_up, "bytes_down": self.meter.bytes_down}
        with self._saving:
            self.counters = self.counters.model_copy(update={**meter, **changes})
            self.home.save(self.home.counters_path, self.counters)

    # Freshness ------------------------------------------------------------------------------------

    def _see(self, look: Callable[[Seen], Seen]) -> None:
        """Hold a statement against what was seen before, and remember it. Thread-safe.

        Raises:
            IntegrityError: it is stale, rolled back, forked or replayed.
        """
        with self._seeing:
            known = self.counters
            before = Seen(
                known.generation,
                known.newest_version,
                known.newest_digest,
                known.newest_round,
                known.newest_attempt,
            )
            after = look(before)
            if after == before:
                return
            changes: dict[str, Any] = {
                "generation": after.generation,
                "newest_version": after.version,
                "newest_digest": after.weights_digest,
                "newest_round": after.round,
                "newest_attempt": after.attempt,
            }
            if after.generation != before.generation:
                # A restored coordinator may give out a lease of the same name once more.
                changes["settled_lease"] = None
                if before.generation >= 0:
                    self._say("The coordinator was restored from a backup; going back with it.")
            self.save_counters(**changes)

    # Getting ready --------------------------------------------------------------------------------

    @property
    def spec(self) -> RunSpec:
        """What is trained. Raises before :meth:`prepare`."""
        if self._spec is None:
            raise RuntimeError("the worker is not prepared")
        return self._spec

    def prepare(self) -> None:
        """Learn what is trained, and let the trainer build the model; harmless to do again."""
        if self._spec is not None:
            return
        signed = self.transfer.run_spec()
        spec = verify(signed, "RunSpec", self._coordinator_key, RunSpec)
        if spec.protocol != PROTOCOL_VERSION:
            raise VersionError(
                f"The run speaks protocol {spec.protocol} and this node {PROTOCOL_VERSION}: "
                "upgrade the older of the two."
            )
        digest = hashlib.sha256(signed.body.encode("ascii")).hexdigest()
        if self.counters.run_spec_sha256 not in (None, digest):
            raise IntegrityError(
                "The coordinator offers another run than the one that this node joined: leave with "
                "'talkoot leave' and join the new one with its own invite.",
                code="other-run",
            )
        self.save_counters(run_spec_sha256=digest)
        model_config = self._fetch_json(spec.model)
        manifest = self._fetch_json(spec.manifest)
        corpus_path = self._fetch_json(spec.corpus)
        corpus = parse(CorpusManifest, corpus_path.read_bytes(), cap=MAX_JSON_ARTIFACT)
        self._index = self._fetch(corpus.blocks_index).read_bytes()
        base = str(self._fetch(spec.adapter.base)) if spec.adapter is not None else None
        self._run_paths = {
            "spec": spec.model_dump(mode="json"),
            "model_config_path": str(model_config),
            "manifest_path": str(manifest),
            "corpus_path": str(corpus_path),
            "base_path": base,
        }
        try:
            choice = self._choose(spec, digest, model_config)
        except CapacityError:
            # A run whose documents contradict each other is refused as such, and not as too large.
            self.trainer.call("open", **self._run_paths)
            raise
        self._open(choice)
        self._say(choice.sentence)
        self._corpus = corpus
        self._spec = spec

    def _choose(self, spec: RunSpec, digest: str, model_config: Path) -> Choice:
        """The recipes that fit this machine, by plans that are known or in closed form.

        Raises:
            CapacityError: none fits, or not the one that the volunteer wants.
            ConfigError: the model's config lacks a number that a plan needs.
        """
        has = self._measure()
        wanted = self._settings.recipe
        on = basis(has, self._settings.caps, digest, wanted)
        fits = held_against(plans.all_of_run(spec, parse_config(model_config.read_bytes())), has)
        kept = self.counters.chosen_recipe if self.counters.proved_basis == on else None
        # The names of the volunteer's programs are for the volunteer: under a stock SuperNode the
        # sentence goes to the coordinator.
        others = holders if self._has_reader else None
        return choose(fits, has, on, pinned=wanted, kept=kept, others=others)

    def _open(self, choice: Choice) -> None:
        opened = self.trainer.call("open", **self._run_paths, recipes=list(choice.recipes))
        self.recipe = opened["recipe"]
        self.falls = int(opened["falls"])
        self._choice = choice

    def _measure(self) -> Capability:
        # By the trainer, which has torch already: importing it again takes seconds.
        measured = self.trainer.call("measure")
        return parse(Capability, json.dumps(measured).encode())  # lists, as tuples

    @property
    def is_proved(self) -> bool:
        """Whether the coordinator has seen a proof by this recipe, on this machine as it is."""
        known = self.counters
        assert self._choice is not None
        return (known.proved_recipe, known.proved_basis) == (self.recipe, self._choice.basis)

    def _learn_mirrors(self) -> None:
        """Ask who else has artifacts; without an answer those that are known stay."""
        if time.monotonic() < self._mirrors_until:
            return
        try:
            told = verify(
                self.transfer.mirror_list(), "MirrorList", self._coordinator_key, MirrorList
            )
        except (UnavailableError, ProtocolError) as err:
            log.info("mirrors: %s", err.sentence)
            return
        self._mirrors_until = time.monotonic() + MIRROR_LIST_SECONDS
        if self._spec is None or told.run_id == self._spec.run_id:
            self.transfer.mirrors.mirrors.replace(told.urls)

    def _fetch(self, ref: ArtifactRef) -> Path:
        self._learn_mirrors()
        self._drop_damaged(ref)
        if not self._store.has(ref.digest):
            incoming = self._store.incoming
            here = received_bytes(incoming, FETCH_OWNER, ref.digest, ref.size_bytes)
            require_room(self.home.root, ref.size_bytes - here, self._settings.max_disk_bytes)
        with self._timed("link_down"):
            return self.transfer.fetch(ref, self._store, should_stop=self.should_stop)

    @contextmanager
    def _timed(self, direction: Literal["link_down", "link_up"]) -> Iterator[None]:
        """Note how fast the line was, when enough went over it."""
        meter = self.meter
        before, began = meter.bytes_down + meter.bytes_up, time.monotonic()
        yield
        moved = meter.bytes_down + meter.bytes_up - before
        if moved >= LINK_BYTES:
            self.save_counters(**{direction: moved / max(time.monotonic() - began, 1e-3)})

    def _drop_damaged(self, ref: ArtifactRef) -> None:
        """Forget a copy that has another size by now or, if it is small, other bytes.

        Large ones are weights and updates: what is made of them is held against a digest.
        """
        found = self._store.lookup(ref.digest)
        if found is not None and (
            found.length != ref.size_bytes
            or (ref.size_bytes <= REREAD_BYTES and not self._store.verify(ref.digest))
        ):
            log.warning("artifact %s is damaged here; fetching it anew", ref.digest)
            self._store.delete(ref.digest)

    def _fetch_json(self, ref: ArtifactRef) -> Path:
        if ref.size_bytes > MAX_JSON_ARTIFACT:
            raise ProtocolError(f"A document of {ref.size_bytes} bytes is over its cap.")
        return self._fetch(ref)

    def prove(self) -> Verdict:
        """Take real training steps on a fresh challenge, and let the coordinator judge them.

        Where it says that the recipe lacks room there (it knows what others of this kind measured,
        and its operator may want more of a margin), the next one that fits takes its place.
        """
        while True:
            verdict = self._prove_once()
            if verdict.code not in LACKS_ROOM or not self._step_down():
                return verdict
            self._say(f"{verdict.sentence} Trying {self.recipe} instead.")

    def _step_down(self) -> bool:
        """Take the next recipe to begin with; False: there is none, or the volunteer wants this."""
        choice = self._choice
        assert choice is not None
        if self._settings.recipe is not None or len(choice.recipes) < 2:
            return False
        self._open(replace(choice, recipes=choice.recipes[1:]))
        return True

    def _prove_once(self) -> Verdict:
        assert self._choice is not None
        self.state = "proving"
        try:
            challenge = parse(ProofChallenge, self.transfer.challenge())
            done = self.trainer.call(
                "prove",
                on_progress=self._progress,
                should_stop=self.should_stop,
                nonce=challenge.nonce,
                steps=challenge.steps,
            )
            proof = Proof(
                run_id=self.spec.run_id,
                node_id=self.enrolment.node_id,
                nonce=challenge.nonce,
                recipe=done["recipe"],
                steps=challenge.steps,
                loss=done["loss"],
                sketch=tuple(done["sketch"]),
                peak_bytes=done["peak_bytes"],
                predicted_bytes=done["predicted_bytes"],
                tokens_per_second=done["tokens_per_second"],
                capability=self._measure(),
            )
            verdict = self.transfer.prove(self.key.sign("Proof", canonical_bytes(proof)))
            if verdict.accepted or verdict.code == AWAITS_APPROVAL:
                self.save_counters(
                    proved_recipe=proof.recipe,
                    proved_basis=self._choice.basis,
                    chosen_recipe=self._choice.recipes[0],
                )
            return verdict
        finally:
            self.state = "idle"

    # A lease --------------------------------------------------------------------------------------

    def tell(self, sentence: str) -> None:
        """Say something to the machine's owner."""
        self._say(sentence)

    def execute(self, signed: Signed) -> Verdict:
        """Do one task from end to end and return what the coordinator said of it.

        Raises:
            ProtocolError, IntegrityError: the task is not one that this node should do.
            UnavailableError: stopped, or paused; the lease is kept and can be resumed.
        """
        self.prepare()
        task = verify(signed, "RoundTask", self._coordinator_key, RoundTask)
        self._check(task)
        lease = task.lease
        if lease.lease_id in self._closed_leases:
            return Verdict(accepted=False, code="late", sentence="That lease was closed.")
        known = self.counters
        if (lease.lease_id, task.generation) == (known.settled_lease, known.generation):
            # Resumed over the data plane, and now Flower's own message for it comes, too.
            return Verdict(
                accepted=known.settled_accepted,
                code="settled",
                sentence="That lease was answered before.",
            )
        self._see(lambda seen: see_task(seen, task, self.spec.run_id, self._clock()))
        self._settle_earlier(lease.lease_id)
        self.lease_id = lease.lease_id
        try:
            self.state = "syncing"
            self._sync(task.base)
            self.state = "training"
            blocks = [self._fetch(self._block(ref.block)) for ref in lease.blocks]
            log.info(TRAINING_BEGINS, self.version, self.meter.bytes_up, self.meter.bytes_down)
            result = self._train(task, blocks)
            self.state = "pushing"
            verdict = self._deliver(task, result)
        except UnavailableError as err:
            if err.code != "stopped" or lease.lease_id not in self._closed_leases:
                raise
            verdict = self._final_word(lease.lease_id)
        finally:
            self.lease_id = None
            self.state = "idle"
        faults.place("node.after-verdict")
        # First what keeps the lease from being done again: if we die here, the next lease settles
        # this one with the trainer (_settle_earlier).
        self.save_counters(
            contributions=self.counters.contributions + int(verdict.accepted),
            settled_lease=lease.lease_id,
            settled_accepted=verdict.accepted,
        )
        faults.place("node.before-settle")
        self._settle(lease.lease_id, verdict.accepted)
        if verdict.accepted:
            self._say(f"Round {task.round}: accepted, loss {self.loss or 0.0:.4f}.")
        else:
            self._say(f"Round {task.round}: {verdict.sentence}")
        self._sweep(task)
        self._prove_what_changed()
        return verdict

    def _prove_what_changed(self) -> None:
        """Prove again when this node holds its replica by another recipe than it has shown.

        The coordinator's verdict comes with the next report, too: a node that it does not admit any
        more gets no leases.
        """
        if self.counters.proved_recipe is None or self.is_proved:
            return
        self._say(self.prove().sentence)

    def _train(self, task: RoundTask, blocks: list[Path]) -> dict[str, Any]:
        """Train a lease; a trainer that dies on the way goes on from its last checkpoint."""
        deaths = 0
        while True:
            try:
                return self.trainer.call(
                    "train",
                    on_progress=self._progress,
                    should_stop=self.should_stop,
                    task=task.model_dump(mode="json"),
                    blocks=[str(path) for path in blocks],
                )
            except UnavailableError as err:
                deaths += 1
                if err.code != "trainer-died" or deaths >= MAX_TRAINER_DEATHS:
                    raise
                self._say(err.sentence)

    def _check(self, task: RoundTask) -> None:
        lease = task.lease
        mine = lease.node_id == self.enrolment.node_id
        if task.run_id != self.spec.run_id or lease.run_id != task.run_id or not mine:
            raise IntegrityError("The task is for another node or run.", code="wrong-task")
        if lease.round != task.round:
            raise IntegrityError("The task's lease is for another round.", code="wrong-task")
        assert self._corpus is not None
        if any(ref.block >= self._corpus.block_count for ref in lease.blocks):
            raise ProtocolError("The task names blocks that do not exist.", code="malformed")
        if lease.tokens != len(lease.blocks) * self._corpus.block_tokens:
            raise ProtocolError("The task's tokens are not those of its blocks.", code="malformed")

    def _block(self, number: int) -> ArtifactRef:
        assert self._corpus is not None
        return ArtifactRef(
            digest=block_digest(self._index, number), size_bytes=self._corpus.block_bytes
        )

    def _progress(self, report: dict[str, Any]) -> None:
        fell = report.get("fell")
        if fell is not None:
            self.recipe, self.falls = str(fell["after"]), self.falls + 1
            self._say(
                f"Memory ran out under {fell['before']}; going on with {fell['after']}. The work "
                "is kept."
            )
        self.step = int(report.get("step", self.step))
        self.steps = int(report.get("steps", self.steps))
        loss = report.get("loss")
        self.loss = float(loss) if loss is not None else self.loss
        self.tokens_per_second = float(report.get("tokens_per_second", 0.0))

    # Sync -----------------------------------------------------------------------------------------

    def follow(self, signed: Signed) -> None:
        """Catch up with what is published, outside a lease."""
        key = self._coordinator_key
        statement = verify(signed, "VersionStatement", key, VersionStatement)
        ref = statement.ref
        if (ref.version, ref.weights_digest) == (self.version, self.weights_digest):
            return
        known = self.counters
        if statement.generation == known.generation and ref.version < known.newest_version:
            return  # an old statement that somebody sends again; a replica never goes back
        self._see(lambda seen: see_version(seen, statement, self.spec.run_id, self._clock()))
        self.state = "syncing"
        try:
            self._sync(ref)
        finally:
            self.state = "idle"

    def _sync(self, base: VersionRef) -> None:
        """Bring the replica to the published version; a wrong one is healed from a checkpoint."""
        held = self.trainer.call("state")
        local = held["version"]
        usable = local is not None and base.updates_from <= local <= base.version
        try:
            self._sync_from(base, local if usable else None)
        except TalkootError as err:
            if err.code != REPLICA_DIFFERS or not usable:
                raise
            self._say("The replica differs from what is published; fetching a checkpoint anew.")
            for ref in (base.checkpoint, *base.updates):  # it may be one of these that is damaged
                self._store.delete(ref.digest)
            self._sync_from(base, None)
            self.save_counters(healed=self.counters.healed + 1)

    def _sync_from(self, base: VersionRef, local: int | None) -> None:
        checkpoint = None
        start = local
        if local is None:
            start = base.checkpoint_version
            checkpoint = {"version": start, "path": str(self._fetch(base.checkpoint))}
        assert start is not None
        updates = base.updates[start - base.updates_from :]
        done = self.trainer.call(
            "sync",
            target={"version": base.version, "weights_digest": base.weights_digest},
            checkpoint=checkpoint,
            updates=[str(self._fetch(ref)) for ref in updates],
        )
        self.version = int(done["version"])
        self.weights_digest = str(done["weights_digest"])

    # Delivery -------------------------------------------------------------------------------------

    def _deliver(self, task: RoundTask, result: dict[str, Any]) -> Verdict:
        payload = ArtifactRef(digest=result["digest"], size_bytes=result["size"])
        contribution = Contribution(
            run_id=task.run_id,
            round=task.round,
            lease_id=task.lease.lease_id,
            node_id=self.enrolment.node_id,
            base_weights_digest=task.base.weights_digest,
            payload=payload,
            tokens=result["tokens"],
            steps=result["steps"],
            loss=result["loss"],
            training_seconds=result["training_seconds"],
        )
        signed = self.key.sign("Contribution", canonical_bytes(contribution))
        self.loss = float(result["loss"])
        self.home.save(self.home.pending, signed)
        return self._persist(
            lambda: self._push_and_submit(task.lease.lease_id, payload, result, signed)
        )

    def _push_and_submit(
        self, lease_id: str, payload: ArtifactRef, result: dict[str, Any], signed: Signed
    ) -> Verdict:
        try:
            faults.place("node.before-push")
            with self._timed("link_up"):
                self.transfer.push(
                    lease_id, payload, Path(result["payload_path"]), should_stop=self.should_stop
                )
            faults.place("node.before-submit")
            return self.transfer.submit(signed)
        except RefusedError as err:
            if err.code == "not-pushed":
                raise UnavailableError("The upload was lost; pushing again.") from err
            return Verdict(accepted=False, code=err.code, sentence=err.sentence)

    def _settle(self, lease_id: str, accepted: bool) -> None:
        """Let the trainer drop a lease; a refused payload goes back into the feedback buffer."""
        self.trainer.call("settle", lease_id=lease_id, accepted=accepted)
        self.home.pending.unlink(missing_ok=True)

    def _final_word(self, lease_id: str) -> Verdict:
        """What became of a lease that is closed: its acceptance may only not have reached us."""
        late = Verdict(accepted=False, code="late", sentence="The round was closed without it.")
        try:
            signed = parse(Signed, self.home.pending.read_bytes())
            claim = parse(Contribution, signed.body.encode("ascii", "replace"))
            if claim.lease_id != lease_id:
                return late
            return self.transfer.submit(signed)
        except (FileNotFoundError, ProtocolError, RefusedError):
            return late

    def _settle_earlier(self, lease_id: str) -> None:
        """Settle a lease that an earlier process left open; another one is due now."""
        held = self.trainer.call("state")["lease"]
        if held is not None and held["lease_id"] != lease_id:
            self._settle(held["lease_id"], self._final_word(held["lease_id"]).accepted)

    def _persist(self, action: Callable[[], Verdict]) -> Verdict:
        """Try until it is done, or the work should stop: an outage costs patience, not work."""
        pause = 0.25
        while True:
            try:
                return action()
            except UnavailableError as err:
                if self.should_stop():
                    raise UnavailableError(
                        "Stopped before the contribution was delivered.", code="stopped"
                    ) from err
                self._say(f"{err.sentence} Trying again in {pause:.1f} s; the work is kept.")
                self._stop.wait(pause)
                pause = min(MAX_RETRY_SECONDS, 2 * pause)

    def _sweep(self, task: RoundTask) -> None:
        """Drop what this node does not need any more; it can be fetched again."""
        spec = self.spec
        assert self._corpus is not None
        keep = {
            spec.model.digest,
            spec.manifest.digest,
            spec.corpus.digest,
            self._corpus.blocks_index.digest,
            *(ref.digest for ref in task.base.updates[-1:]),
            *((spec.adapter.base.digest,) if spec.adapter is not None else ()),
        }
        self._store.sweep(keep)

    # Reports --------------------------------------------------------------------------------------

    def report(self, *, leaving: bool = False) -> NodeReportReply:
        """Tell the coordinator what goes on, and hear what it says.

        Args:
            leaving: no reports follow, and their absence means nothing: Flower's heartbeat alone
                says whether the node is there.
        """
        lease_id = self.lease_id
        state = "paused" if self.home.pause.exists() else self.state
        self.membership.asks()
        reply = self.transfer.report(
            NodeReport(
                state="leaving" if leaving else state,
                version=self.version,
                weights_digest=self.weights_digest,
                lease_id=lease_id,
                step=self.step,
                steps=self.steps,
                loss=self.loss,
                tokens_per_second=self.tokens_per_second,
                bytes_up=self.meter.bytes_up,
                bytes_down=self.meter.bytes_down,
                healed=self.counters.healed,
                started_unix=self._started_unix,
                recipe=self.recipe,
                falls=self.falls,
                link_down=self.counters.link_down,
                link_up=self.counters.link_up,
            )
        )
        self.membership.hears()
        head = verify(reply.head, "Head", self._coordinator_key, Head)
        self._see(lambda seen: see_head(seen, head, self.enrolment.run_id, self._clock()))
        self.membership.newest_serial = head.trust_serial
        if lease_id is not None and not reply.lease_open:
            self._closed_leases.add(lease_id)
        # Whatever it asks for, a node neither falls silent for hours nor knocks without a pause.
        reply = reply.model_copy(
            update={
                "report_seconds": min(
                    max(reply.report_seconds, MIN_WAIT_SECONDS), MAX_WAIT_SECONDS
                ),
                "poll_seconds": min(max(reply.poll_seconds, MIN_WAIT_SECONDS), MAX_WAIT_SECONDS),
            }
        )
        self.reply = reply
        return reply
