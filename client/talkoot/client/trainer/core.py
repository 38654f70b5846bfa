"""The trainer's operations. A torch module; ``__main__`` serves it to the daemon, tests call it.

Between operations the replica is on disk; what memory holds is loaded anew for each lease.
"""

from __future__ import annotations

import hashlib
import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from talkoot.client.trainer.falls import is_out_of_memory, ladder, next_after
from talkoot.client.trainer.lease import LeaseJob, Progress, ShouldStop, run_lease
from talkoot.client.trainer.mend import drop_damaged
from talkoot.client.trainer.peak import PeakMeter, return_free_memory
from talkoot.client.trainer.workdir import Fall, LeaseResult, Published, State, WorkDir
from talkoot.protocol import faults, limits
from talkoot.protocol.adapters import GetBase, adapted_outline, open_base
from talkoot.protocol.artifacts import sha256_file
from talkoot.protocol.corpus import CorpusManifest, parse_manifest
from talkoot.protocol.errors import (
    CapacityError,
    IntegrityError,
    ProtocolError,
    StateError,
    TalkootError,
    UnavailableError,
)
from talkoot.protocol.files import explain_os_error
from talkoot.protocol.manifest import Manifest, manifest_of
from talkoot.protocol.messages import RoundTask, RunSpec
from talkoot.protocol.model import build_model, named_trainable, parse_config
from talkoot.protocol.payload import PayloadReader
from talkoot.protocol.planner import plans
from talkoot.protocol.proof import proof_batches, proof_steps
from talkoot.protocol.recipes import REFERENCE, Recipe, get, reference
from talkoot.protocol.replica import Replica, new_replica
from talkoot.protocol.sequences import Sequences
from talkoot.protocol.weights import WeightsReader, WeightsWriter, apply_update, save_weights

DIFFERS: Final = "replica-differs"
PROOF_STEPS: Final = 2


def never_stop() -> bool:
    """The ``should_stop`` of whoever does not stop."""
    return False


def no_progress(report: dict[str, Any]) -> None:
    """The ``on_progress`` of whoever does not listen."""


@dataclass(frozen=True)
class _Run:
    """What ``open`` established."""

    spec: RunSpec
    config: dict[str, Any]
    manifest: Manifest
    corpus: CorpusManifest | None
    work: WorkDir
    base: GetBase | None
    """The frozen weights of an adapter run."""


class Trainer:
    """A node's replica in one directory.

    Args:
        root: the work directory; one process at a time (``__main__`` holds its lock).
        device: a torch device name; ``None`` takes the accelerator if one works, else the CPU.
        recipe: how the replica is held; a name that is one for the kind of run
            (``recipes.py``). ``None`` takes that kind's reference.
        checkpoint_seconds: time between checkpoints of a lease; 0 is one a step.
        max_disk: bytes that all files in the directory above ``root`` may take.

    All operations return JSON-ready dictionaries and raise :class:`TalkootError`.
    """

    def __init__(
        self,
        root: Path,
        device: str | None = None,
        *,
        recipe: str | None = None,
        checkpoint_seconds: float = 10.0,
        max_disk: int | None = None,
    ) -> None:
        self._root = root
        self._max_disk = max_disk
        self._device = _choose_device(device)
        self._checkpoint_seconds = checkpoint_seconds
        self._chosen = recipe
        self._recipe: Recipe = get(recipe) if recipe is not None else get(REFERENCE)
        self._recipes: Sequence[Recipe] = (self._recipe,)
        self._run: _Run | None = None
        self._replica: Replica | None = None

    def open(
        self,
        spec: RunSpec,
        model_config_path: Path,
        manifest_path: Path,
        corpus_path: Path | None = None,
        base_path: Path | None = None,
        recipes: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Take up a run: ``{"parameters", "recipe", "falls"}``.

        Args:
            spec: what is trained.
            model_config_path: the model's config.
            manifest_path: of what is trained.
            corpus_path: the corpus manifest; for training only.
            base_path: the frozen weights of an adapter run; for training only.
            recipes: that fit this machine, the best first. When memory runs out, the next one that
                needs less takes over; a node that fell stays there until it is given another first
                one.

        Raises:
            ConfigError: the recipe is none for this kind of run.
            IntegrityError: a file is not the one that the run names.
            ProtocolError: a file is malformed, or the manifest is not the model's.
            StateError: the directory holds another run's replica.
        """
        config = parse_config(_artifact(model_config_path, spec.model.digest))
        manifest = Manifest.from_bytes(_artifact(manifest_path, spec.manifest.digest))
        corpus = None
        if corpus_path is not None:
            corpus = parse_manifest(_artifact(corpus_path, spec.corpus.digest))
        adapter = spec.adapter
        names = recipes or (self._chosen or reference(adapter is not None).name,)
        choice = ladder(names, self._device.type, adapters=adapter is not None)
        if adapter is None:
            outline = build_model(config, seed=None, device="cpu", meta=True)
        else:
            outline = adapted_outline(config, adapter)
        if manifest_of(named_trainable(outline)) != manifest:
            raise ProtocolError(
                "The run's manifest does not list the parameters of the run's model: the operator "
                "must publish both from one model.",
                code="manifest-mismatch",
            )
        if manifest.parameters != spec.parameters:
            raise ProtocolError(
                f"The run says {spec.parameters} parameters and its manifest "
                f"{manifest.parameters}: the operator must publish both from one model.",
                code="manifest-mismatch",
            )
        work = WorkDir(self._root, spec.run_id, spec.manifest.digest, max_disk=self._max_disk)
        falls = work.state.falls
        if falls and falls[0].before != choice[0].name:
            falls = ()
            work.commit(work.state.model_copy(update={"falls": ()}))
        self._drop_replica()
        self._recipes = choice
        self._recipe = choice[0]
        if falls:
            self._recipe = get(falls[-1].after, adapters=adapter is not None)
        base = None
        if adapter is not None and base_path is not None:
            _check_file(base_path, adapter.base.digest)
            base = open_base(config, adapter, base_path)
        self._run = _Run(spec, config, manifest, corpus, work, base)
        said = {"recipe": self._recipe.name, "falls": len(falls)}
        return {"parameters": manifest.parameters, **said}

    def move(self, root: Path) -> None:
        """Take up another node's directory of the same run, with the replica that is in memory.

        What memory holds is loaded anew for each lease, so one trainer can serve many nodes, one
        after the other. Raises :class:`StateError` as :meth:`open` does.
        """
        run = self._opened
        self._root = root
        work = WorkDir(root, run.spec.run_id, run.spec.manifest.digest, max_disk=self._max_disk)
        self._run = replace(run, work=work)

    @property
    def _opened(self) -> _Run:
        if self._run is None:
            raise StateError("The trainer has no run yet: open one first.", code="not-open")
        return self._run

    def state(self) -> dict[str, Any]:
        """``{"version", "weights_digest", "lease", "recipe", "falls"}`` as recorded (``verify``
        looks at the bytes). ``falls`` is how often memory ran out.

        ``lease`` is null or ``{"lease_id", "step", "steps", "done"}``.
        """
        work = self._opened.work
        published, done, checkpoint = work.state.published, work.state.done, work.checkpoint
        lease: dict[str, Any] | None = None
        if done is not None:
            lease = {
                "lease_id": done.lease_id,
                "step": done.steps,
                "steps": done.steps,
                "done": True,
            }
        elif checkpoint is not None:
            lease = {
                "lease_id": checkpoint.lease_id,
                "step": checkpoint.step,
                "steps": checkpoint.steps,
                "done": False,
            }
        said = {"recipe": self._recipe.name, "falls": len(work.state.falls)}
        return {**_replica(published), "lease": lease, **said}

    def prove(
        self,
        nonce: str,
        steps: int = PROOF_STEPS,
        *,
        on_progress: Progress = no_progress,
        should_stop: ShouldStop = never_stop,
    ) -> dict[str, Any]:
        """Train on the challenge (``proof.py``) and measure it; the replica on disk is not touched.

        When memory runs out it begins again with the next smaller recipe, and ``on_progress`` gets
        ``{"fell": {"before", "after"}}``.

        ``{"loss", "losses", "sketch", "steps", "peak_bytes", "predicted_bytes",
        "tokens_per_second", "recipe"}``. Speed is that of the steps after the first, which pays
        for warming up.

        Raises:
            CapacityError: code ``"out-of-memory"``: it does not fit under any.
        """
        while True:
            try:
                return self._prove(nonce, steps, should_stop)
            except Exception as err:
                if not is_out_of_memory(err):
                    raise
                self._fall(err, None, on_progress)

    def _prove(self, nonce: str, steps: int, should_stop: ShouldStop) -> dict[str, Any]:
        run = self._opened
        spec = run.spec
        self._drop_replica()  # the proof's model takes its place in memory
        losses: list[float] = []
        mark: list[float] = []
        times = [time.monotonic()]
        with PeakMeter(self._device) as meter:
            for loss in proof_steps(
                run.config,
                nonce,
                sequence_length=spec.sequence_length,
                micro_batch=spec.micro_batch,
                inner=spec.inner,
                steps=steps,
                recipe=self._recipe,
                adapter=spec.adapter,
                device=self._device,
                mark=mark,
            ):
                losses.append(loss)
                times.append(time.monotonic())
                if should_stop():
                    raise UnavailableError("The proof was stopped; start it again.", code="stopped")
        timed = max(steps - 1, 1)
        batches = timed * proof_batches(spec.inner, self._recipe)
        tokens = batches * spec.micro_batch * spec.sequence_length
        plan = plans.of_run(spec, run.config, self._recipe)
        on_cpu = self._device.type == "cpu"
        return {
            "loss": math.fsum(losses) / steps,
            "losses": losses,
            "sketch": mark,
            "steps": steps,
            "peak_bytes": meter.peak_bytes,
            "predicted_bytes": plan.allocated_bytes if on_cpu else plan.device_bytes,
            "tokens_per_second": tokens / max(times[-1] - times[-1 - timed], 1e-9),
            "recipe": self._recipe.name,
        }

    def sync(
        self,
        version: int,
        weights_digest: str,
        checkpoint: tuple[int, Path] | None,
        updates: Sequence[Path],
    ) -> dict[str, Any]:
        """Bring the replica to a version: ``{"version", "weights_digest"}``.

        Args:
            version: of the target.
            weights_digest: of the target.
            checkpoint: ``(version, file)`` of dense published weights to start from, or ``None``
                to start from the replica as it is.
            updates: for start + 1 … ``version``, in order.

        Raises:
            IntegrityError: code ``"replica-differs"``: the result is not the target. The replica
                stays as it was; sync again from a checkpoint.
            ProtocolError: the updates do not lead from the start to the target.
        """
        run = self._opened
        work, published = run.work, run.work.state.published
        if published is not None and checkpoint is None:
            self._reader(published)  # damage to the file itself is healed like a wrong digest
            if published.version == version and not updates:
                # Nothing to apply, so nothing else would look at the bytes.
                self._require(self.verify()["weights_digest"], version, weights_digest)
                return _replica(published)
        if checkpoint is not None:
            start, source = checkpoint
        elif published is not None:
            start, source = published.version, work.path(published.file)
        else:
            raise ProtocolError(
                "There is no replica yet to apply updates to: sync from a checkpoint.",
                code="no-replica",
            )
        if start + len(updates) != version:
            raise ProtocolError(
                f"{len(updates)} updates do not lead from version {start} to {version}.",
                code="updates-mismatch",
            )
        name, digest = self._advance(source, updates, copy=checkpoint is not None)
        faults.place("trainer.mid-sync")
        try:
            self._require(digest, version, weights_digest)
        except IntegrityError:
            work.path(name).unlink()
            raise
        work.commit(
            work.state.model_copy(
                update={"published": Published(version=version, digest=digest, file=name)}
            )
        )
        return _replica(work.state.published)

    def adopt(self, version: int, weights_digest: str, path: Path) -> bool:
        """Take a version's file from another directory of this run, as a second name for it.

        For many nodes on one machine: who trusts the other directory as its own (its file had this
        digest when it was made, and is never written to again) need not make the same bytes once
        more. False, and nothing has changed: the file is gone, or on another disk.
        """
        work = self._opened.work
        name = work.fresh("published")
        try:
            work.path(name).hardlink_to(path)
        except OSError:
            return False
        published = Published(version=version, digest=weights_digest, file=name)
        work.commit(work.state.model_copy(update={"published": published}))
        return True

    @property
    def published(self) -> tuple[int, str, Path] | None:
        """Version, weights digest and file of the replica on disk, as recorded."""
        work = self._opened.work
        held = work.state.published
        return None if held is None else (held.version, held.digest, work.path(held.file))

    def _require(self, digest: str, version: int, target: str) -> None:
        if digest != target:
            raise IntegrityError(
                f"This replica is not version {version} as published ({digest[:12]}… instead of "
                f"{target[:12]}…): fetch a full checkpoint.",
                code=DIFFERS,
            )

    def _advance(self, source: Path, updates: Sequence[Path], *, copy: bool) -> tuple[str, str]:
        """Apply ``updates`` to ``source``: name and digest of the new file."""
        run = self._opened
        reached: str | None = None
        digest = ""
        if copy:
            # A copy and not a link: the replica must not change when its source does.
            reader = WeightsReader(source, run.manifest)
            run.work.require_room(source.stat().st_size)
            reached = run.work.fresh("published")
            digest = save_weights(run.work.path(reached), run.manifest, reader.get)
        for update in updates:
            before = source if reached is None else run.work.path(reached)
            run.work.require_room(before.stat().st_size)
            name = run.work.fresh("published")
            digest = apply_update(
                run.manifest, before, update, run.spec.downlink, run.work.path(name)
            )
            if reached is not None:
                before.unlink()
            reached = name
        assert reached is not None
        return reached, digest

    def verify(self) -> dict[str, Any]:
        """Hash the weights that are on disk now: ``{"version", "weights_digest"}``.

        Raises:
            IntegrityError: code ``"replica-differs"``: the file is gone or not even well-formed.
        """
        run = self._opened
        published = run.work.state.published
        if published is None:
            return _replica(None)
        digest = self._reader(published).weights_digest()
        return {"version": published.version, "weights_digest": digest}

    def _reader(self, published: Published) -> WeightsReader:
        run = self._opened
        try:
            return WeightsReader(run.work.path(published.file), run.manifest)
        except (ProtocolError, StateError) as err:
            raise IntegrityError(
                f"The replica on disk is damaged ({err.sentence}): fetch a full checkpoint.",
                code=DIFFERS,
            ) from err

    def train(
        self,
        task: RoundTask,
        blocks: Sequence[Path],
        *,
        on_progress: Progress = no_progress,
        should_stop: ShouldStop = never_stop,
    ) -> dict[str, Any]:
        """Train a lease and encode its payload; a lease that is done is not trained again.

        ``{"payload_path", "digest", "size", "tokens", "steps", "loss", "training_seconds"}``.

        Args:
            task: the lease, and the version to start from, at which the replica must be.
            blocks: files of the lease's blocks, in its order.
            on_progress: gets ``{"step", "steps", "loss", "tokens_per_second"}``, and ``{"fell":
                {"before", "after"}}`` when memory ran out and a smaller recipe took over: what was
                trained goes on.
            should_stop: asked before each batch; a step that is broken off is made again.

        Raises:
            UnavailableError: code ``"stopped"``; the same call again carries on.
            StateError: code ``"lease-unsettled"``: settle the lease before this one first.
            ProtocolError: the task is not for this run, version or corpus.
            CapacityError: code ``"out-of-memory"``: there is no smaller recipe to fall to. The
                work is kept.
        """
        run = self._opened
        done = run.work.state.done
        if done is not None:
            if done.lease_id == task.lease.lease_id:
                return self._result(done)
            raise StateError(
                f"Lease {done.lease_id} is finished and not settled: settle it before another.",
                code="lease-unsettled",
            )
        base = run.work.state.published
        if task.run_id != run.spec.run_id:
            raise ProtocolError(
                f"The task is of run {task.run_id}, not of {run.spec.run_id}.", code="other-run"
            )
        if base is None or (base.version, base.digest) != (
            task.base.version,
            task.base.weights_digest,
        ):
            raise ProtocolError(
                f"The task starts from version {task.base.version}, where this replica is not: "
                "sync first.",
                code="wrong-base",
            )
        if run.corpus is None:
            raise StateError(
                "The run was opened without its corpus manifest: open it with one to train.",
                code="no-corpus",
            )
        self._reader(base)  # a damaged replica is found before anything is loaded
        sequences = Sequences(run.spec, run.corpus, task.lease, blocks)
        while True:
            try:
                drop_damaged(run.work, run.manifest, self._built())
                job = LeaseJob(
                    spec=run.spec,
                    manifest=run.manifest,
                    work=run.work,
                    replica=self._built(),
                    base=base,
                    task=task,
                    sequences=sequences,
                    checkpoint_seconds=self._checkpoint_seconds,
                )
                return self._result(run_lease(job, on_progress, should_stop))
            except TalkootError as err:
                if err.code in {"non-finite-loss", "not-finite"}:
                    run.work.drop_checkpoint()
                    run.work.sweep()
                raise
            except Exception as err:
                if not is_out_of_memory(err):
                    raise
                self._fall(err, task.lease.lease_id, on_progress)

    def _fall(self, err: Exception, lease_id: str | None, on_progress: Progress) -> None:
        """Give up all memory and take the next smaller recipe, for good.

        Raises :class:`CapacityError` when there is none.
        """
        traceback.clear_frames(err.__traceback__)
        self.release()
        kind = self._device.type
        work, before = self._opened.work, self._recipe
        try:
            after = next_after(self._recipes, before, len(work.state.falls), kind)
        except CapacityError as last:
            raise last from err
        checkpoint = work.checkpoint if lease_id is not None else None
        fall = Fall(
            before=before.name,
            after=after.name,
            lease_id=lease_id,
            step=checkpoint.step if checkpoint is not None else 0,
        )
        work.commit(work.state.model_copy(update={"falls": (*work.state.falls, fall)}))
        self._recipe = after
        on_progress({"fell": {"before": before.name, "after": after.name}})

    def share_memory(self, other: Trainer) -> None:
        """Use the replica that ``other`` (same run, recipe and device) has in memory.

        What it holds is loaded anew for each lease, so many trainers in one process need the memory
        of one. Only one of them may work at a time, and none may prove.
        """
        self._replica = other._built()

    def _built(self) -> Replica:
        """The replica; its weights and state are to be loaded."""
        if self._replica is None:
            run = self._opened
            if run.spec.adapter is not None and run.base is None:
                raise StateError(
                    "The run was opened without its base weights: open it with them to train.",
                    code="no-base",
                )
            self._replica = new_replica(
                run.config,
                self._recipe,
                run.spec.inner,
                seed=None,
                device=self._device,
                adapter=run.spec.adapter,
                base=run.base,
            )
        return self._replica

    def release(self) -> None:
        """Give up all memory that can be built or loaded again."""
        self._drop_replica()
        return_free_memory()
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()

    def _drop_replica(self) -> None:
        if self._replica is not None:
            self._replica.release()
            self._replica = None

    def _result(self, done: LeaseResult) -> dict[str, Any]:
        path = self._opened.work.payload_path(done.lease_id)
        return {
            "payload_path": str(path),
            "digest": done.digest,
            "size": done.size,
            "tokens": done.tokens,
            "steps": done.steps,
            "loss": done.loss,
            "training_seconds": done.training_seconds,
        }

    def settle(self, lease_id: str, accepted: bool) -> dict[str, Any]:
        """Close a lease: ``{"settled"}``, false when there is nothing (left) to settle.

        An accepted payload is dropped. A refused one goes back into the error feedback first, so
        that the next contribution carries it. A lease in progress is given up.
        """
        run = self._opened
        work, state = run.work, run.work.state
        if state.done is None or state.done.lease_id != lease_id:
            if work.checkpoint is not None and work.checkpoint.lease_id == lease_id:
                work.drop_checkpoint()
                work.sweep()
                return {"settled": True}
            return {"settled": False}
        feedback = state.feedback
        if not accepted:
            feedback = self._give_back(state)
        faults.place("trainer.before-settled")
        work.commit(state.model_copy(update={"feedback": feedback, "done": None}))
        return {"settled": True}

    def _give_back(self, state: State) -> str:
        """Feedback plus what was sent, as a new file; its name."""
        run = self._opened
        assert state.done is not None
        assert state.feedback is not None
        manifest = run.manifest.as_float32()
        kept = WeightsReader(run.work.path(state.feedback), manifest)
        path = run.work.payload_path(state.done.lease_id)
        run.work.require_room(4 * manifest.parameters)
        name = run.work.fresh("feedback")
        payload = PayloadReader(path, run.manifest, run.spec.uplink)
        with WeightsWriter(run.work.path(name), manifest) as writer:
            for spec in manifest.tensors:
                whole = kept.get(spec.name).reshape(-1)
                payload.decode(spec.name).add_to_(whole)
                writer.add(spec.name, whole.reshape(spec.shape), digest=False)
        return name


def _choose_device(name: str | None) -> torch.device:
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as err:
        raise CapacityError(
            f"torch knows no device named {name!r}: use cpu, cuda, mps or xpu.", code="no-device"
        ) from err


def _replica(published: Published | None) -> dict[str, Any]:
    if published is None:
        return {"version": None, "weights_digest": None}
    return {"version": published.version, "weights_digest": published.digest}


def _check_file(path: Path, digest: str) -> None:
    """Raise :class:`IntegrityError` unless a large file has its digest."""
    try:
        found, _ = sha256_file(path)
    except OSError as err:
        raise explain_os_error(err, "reading the base weights", path) from err
    if found != digest:
        raise IntegrityError(
            f"{path} is not the file that the run names: delete it and fetch it anew."
        )


def _artifact(path: Path, digest: str) -> bytes:
    """A JSON artifact, whole, if it has its digest."""
    try:
        with path.open("rb") as file:
            data = file.read(limits.MAX_JSON_ARTIFACT + 1)
    except OSError as err:
        raise explain_os_error(err, "reading an artifact", path) from err
    if hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(
            f"{path} is not the file that the run names: delete it and fetch it anew."
        )
    return data
