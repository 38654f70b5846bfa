"""One lease: inner steps from the published weights, checkpoints on the way, then the payload.

A torch module. Everything that decides a float is in the checkpoint or in the task, so a lease that
was broken off (at any step, by any signal) ends with the same bits as one that was not, on a device
whose kernels are deterministic (the CPU with a fixed number of threads).
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from talkoot.client.trainer.falls import is_out_of_memory
from talkoot.client.trainer.mend import believable
from talkoot.client.trainer.tensors import bytes_of, load_tensors, open_tensors, save_tensors
from talkoot.client.trainer.workdir import Checkpoint, LeaseResult, Moments, Published, WorkDir
from talkoot.protocol import faults
from talkoot.protocol.artifacts import sha256_file
from talkoot.protocol.codec import EncodedTensor, encode_with_feedback
from talkoot.protocol.errors import ProtocolError, StateError, UnavailableError
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.messages import RoundTask, RunSpec
from talkoot.protocol.payload import write_payload
from talkoot.protocol.recipes import Recipe
from talkoot.protocol.replica import Replica, rounding_seed
from talkoot.protocol.schedule import feedback_share, lease_position, step_rate
from talkoot.protocol.sequences import Sequences
from talkoot.protocol.weights import WeightsReader, WeightsWriter

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]
ShouldStop = Callable[[], bool]

PROGRESS_SECONDS = 0.25
"""Reports come at most this often; the first and the last step always report."""


@dataclass(frozen=True)
class LeaseJob:
    """All that a lease needs beside the two callbacks."""

    spec: RunSpec
    manifest: Manifest
    work: WorkDir
    replica: Replica
    base: Published
    task: RoundTask
    sequences: Sequences
    checkpoint_seconds: float


def run_lease(job: LeaseJob, on_progress: Progress, should_stop: ShouldStop) -> LeaseResult:
    """Train to the end (from the checkpoint, if there is one) and commit the result.

    Raises:
        UnavailableError: code ``"stopped"``: ``should_stop`` said so; the work is checkpointed.
        TalkootError: code ``"non-finite-loss"``; what was trained is dropped.
    """
    checkpoint = _train(job, on_progress, should_stop)
    return _encode(job, checkpoint)


class _Stop(Exception):
    """``should_stop`` said so before a forward pass; the weights are those of the last step."""


class _Progressor:
    """Progress reports at a bearable rate."""

    def __init__(self, job: LeaseJob, report: Progress, batch: int) -> None:
        self._job = job
        self._report = report
        self._start_tokens = job.sequences.tokens_after(batch)
        self._started = time.monotonic()
        self._reported: float | None = None

    def after(self, step: int, steps: int, batch: int, loss: float) -> None:
        """Step ``step`` of ``steps`` is done, and all before batch ``batch``."""
        now = time.monotonic()
        if self._reported is not None and step < steps and now - self._reported < PROGRESS_SECONDS:
            return
        self._reported = now
        tokens = self._job.sequences.tokens_after(batch) - self._start_tokens
        self._report(
            {
                "step": step,
                "steps": steps,
                "loss": loss,
                "tokens_per_second": tokens / max(now - self._started, 1e-9),
            }
        )


class _Start:
    """The weights that a lease starts from, tensor by tensor: the published ones, less a share of
    the node's error feedback (ADR 26). A lease with fresh state starts from what all have."""

    def __init__(self, job: LeaseJob) -> None:
        work, feedback = job.work, job.work.state.feedback
        self._published = WeightsReader(work.path(job.base.file), job.manifest)
        self._feedback: WeightsReader | None = None
        if feedback is not None:
            self._feedback = WeightsReader(work.path(feedback), job.manifest.as_float32())
        self._share = 0.0
        if not job.task.fresh_state:
            self._share = feedback_share(job.spec.feedback_start, job.task.round)

    def feedback(self, name: str) -> Tensor | None:
        """fp32, in the manifest's shape; None before the first lease is done."""
        return None if self._feedback is None else self._feedback.get(name)

    def get(self, name: str) -> Tensor:
        """In the manifest's shape, on the CPU; fp32 where feedback was taken off."""
        published = self._published.get(name)
        if self._feedback is None or self._share == 0.0:
            return published
        return published.float().sub_(self._feedback.get(name), alpha=self._share)


def _train(job: LeaseJob, on_progress: Progress, should_stop: ShouldStop) -> Checkpoint:
    """All inner steps; returns the checkpoint of the last one, which is on disk."""
    task, sequences, replica = job.task, job.sequences, job.replica
    checkpoint = job.work.checkpoint
    cut, accumulates = sequences.steps, replica.recipe.accumulates
    wanted = (task.lease.lease_id, job.base.digest, cut.batches)
    if checkpoint is not None and wanted != (
        checkpoint.lease_id,
        checkpoint.base_digest,
        checkpoint.all_batches,
    ):
        # Of a lease that was given up, or of another base.
        job.work.drop_checkpoint()
        checkpoint = None
    if checkpoint is None:
        replica.load_weights(_Start(job).get)
    else:
        local = job.work.path(checkpoint.local)
        # Whatever recipe has written it: all have the same tensors, in fp32 or bf16.
        replica.load_weights(open_tensors(local, replica.weights(), cast=True))
    kept = None if task.fresh_state else job.work.state.moments
    moments = kept if checkpoint is None else checkpoint.moments
    _load_moments(job, moments)
    replica.seed = rounding_seed(task.lease.lease_id)
    step, batch, loss_sum, seconds = 0, 0, 0.0, 0.0
    if checkpoint is not None:
        step, batch = checkpoint.step, checkpoint.batches_done
        loss_sum, seconds = checkpoint.loss_sum, checkpoint.training_seconds
    # Another recipe may have made the steps so far.
    steps = step + cut.left(batch, accumulates)

    def save() -> Checkpoint:
        job.work.require_room(bytes_of(replica.weights()) + bytes_of(replica.state()))
        saved = Checkpoint(
            lease_id=task.lease.lease_id,
            base_digest=job.base.digest,
            step=step,
            steps=steps,
            batch=batch,
            batches=cut.batches,
            loss_sum=loss_sum,
            training_seconds=seconds,
            local=job.work.fresh("local"),
            moments=Moments(
                file=job.work.fresh("moments"), steps=replica.steps, recipe=replica.recipe.name
            ),
        )
        save_tensors(job.work.path(saved.local), replica.weights())
        faults.place("trainer.mid-checkpoint")
        save_tensors(job.work.path(saved.moments.file), replica.state())
        job.work.save_checkpoint(saved)
        return saved

    phase = ["forward"]

    def begin(name: str) -> None:
        phase[0] = name
        if name == "forward" and should_stop():  # a step of many batches is not waited for
            raise _Stop

    replica.on_phase = begin
    progress = _Progressor(job, on_progress, batch)
    device = replica.device
    saved_at = time.monotonic()
    while batch < cut.batches:
        end = cut.end(batch, accumulates)
        ids = [sequences.batch(number).to(device) for number in range(batch, end)]
        tokens = sequences.tokens_after(end)
        position = lease_position(task.tokens_before, task.tokens_round, tokens, sequences.tokens)
        began = time.monotonic()
        try:
            loss = replica.step(ids, step_rate(job.spec.inner, position, len(ids)))
        except _Stop:
            if step > (checkpoint.step if checkpoint is not None else 0):
                save()
            raise UnavailableError(
                f"Training was stopped after step {step} of {steps}; it is checkpointed and "
                "carries on from there.",
                code="stopped",
            ) from None
        except Exception as err:
            if is_out_of_memory(err) and weights_are_whole(replica.recipe, phase[0]):
                # What holds activations goes first: saving takes some memory, too.
                traceback.clear_frames(err.__traceback__)
                save_if_there_is_room(save)
            raise
        now = time.monotonic()
        seconds += now - began
        loss_sum += loss * sum(map(len, ids))
        step, batch = step + 1, end
        if batch == cut.batches or now - saved_at >= job.checkpoint_seconds:
            checkpoint = save()
            saved_at = time.monotonic()
        progress.after(step, steps, batch, loss)
    assert checkpoint is not None
    return checkpoint


def weights_are_whole(recipe: Recipe, phase: str) -> bool:
    """Whether a step that broke off in ``phase`` has not touched the weights yet."""
    return phase == "forward" or (phase == "backward" and recipe.gradients != "in-backward")


def save_if_there_is_room(save: Callable[[], Checkpoint]) -> None:
    """Keep the steps since the last checkpoint, if memory allows it."""
    try:
        save()
    except Exception as err:
        if not is_out_of_memory(err):
            raise


def _load_moments(job: LeaseJob, moments: Moments | None) -> None:
    """The state from before; zeros when there is none, or when it is that of a recipe which holds
    other tensors (in few bits, factored) and not the same ones in another float."""
    replica = job.replica
    if moments is not None:
        mine = moments.recipe == replica.recipe.name
        try:
            load_tensors(job.work.path(moments.file), replica.state(), cast=not mine)
        except (ProtocolError, StateError):
            if mine:
                raise
        else:
            if believable(replica.state()):
                replica.steps = moments.steps
                return
            log.warning("damaged, and begun anew: moments")
    for _, tensor in replica.state():
        tensor.zero_()
    replica.steps = 0


def _encode(job: LeaseJob, checkpoint: Checkpoint) -> LeaseResult:
    """Pseudo-gradient, payload, new feedback; all become current in one swap.

    Whatever was written by an attempt that died is written again, from the same inputs, to the
    same bytes.
    """
    work, lease_id = job.work, job.task.lease.lease_id
    start = _Start(job)
    work.require_room(4 * job.manifest.parameters)
    feedback = work.fresh("feedback")
    payload = work.payload_path(lease_id)

    with WeightsWriter(work.path(feedback), job.manifest.as_float32()) as writer:

        def encoded() -> Iterator[tuple[str, EncodedTensor]]:
            for name, weight in job.replica.weights():
                device = weight.device
                loaded = job.replica.as_loaded(start.get(name).to(device))
                delta = loaded.float() - weight.float()
                held = start.feedback(name)
                held = None if held is None else held.to(device)
                fresh = job.task.fresh_state
                carried = None if fresh else held
                sent, kept = encode_with_feedback(
                    delta, carried, job.spec.uplink, job.spec.feedback_decay
                )
                if fresh and held is not None:  # it waits for the next lease, whole
                    kept += held
                writer.add(name, kept, digest=False)
                faults.place("trainer.mid-encode")
                yield name, sent

        write_payload(payload, job.manifest, job.spec.uplink, encoded(), {"lease": lease_id})
    digest, size = sha256_file(payload)
    faults.place("trainer.before-done")
    result = LeaseResult(
        lease_id=lease_id,
        digest=digest,
        size=size,
        tokens=job.sequences.tokens,
        steps=checkpoint.steps,
        loss=checkpoint.loss_sum / job.sequences.count,
        training_seconds=checkpoint.training_seconds,
    )
    work.commit(
        work.state.model_copy(
            update={"feedback": feedback, "moments": checkpoint.moments, "done": result}
        )
    )
    return result
