"""A lease with fresh state, done again by somebody else: the same bytes on the same kind of device.

A torch module. A lease whose task says ``fresh_state`` is a function of the task, the base and the
blocks alone, so whoever has these can repeat it. Any other lease also depends on the optimizer
moments and the error feedback of its node, which nobody else has (ADR 24).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from talkoot.protocol.adapters import open_base
from talkoot.protocol.codec import EncodedTensor, encode_with_feedback
from talkoot.protocol.corpus import CorpusManifest
from talkoot.protocol.errors import UnavailableError
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.messages import RoundTask, RunSpec
from talkoot.protocol.payload import write_payload
from talkoot.protocol.recipes import Recipe
from talkoot.protocol.replica import new_replica, rounding_seed
from talkoot.protocol.schedule import lease_position, step_rate
from talkoot.protocol.sequences import Sequences
from talkoot.protocol.weights import WeightsReader


@dataclass(frozen=True)
class ReplayJob:
    """What a lease with fresh state is made of."""

    config: dict[str, Any]
    """The model's, parsed."""
    spec: RunSpec
    manifest: Manifest
    corpus: CorpusManifest
    task: RoundTask
    base: Path
    """Published weights of the task's base version."""
    blocks: Sequence[Path]
    """Files of the lease's blocks, in its order."""
    recipe: Recipe
    """What it is repeated with; it accumulates."""
    steps: int
    """That the contribution claims: they tell whether, and from where on, its node's recipe made
    a step of each batch (``steps.py``)."""
    frozen: Path | None = None
    """The frozen weights of an adapter run."""


def replay_lease(
    job: ReplayJob,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
) -> float:
    """Train the lease again, write its payload to ``out`` and return its mean loss.

    Raises:
        ValueError: the task does not ask for fresh state.
        UnavailableError: code ``"stopped"``.
        TalkootError: the blocks are not the lease's, or the loss is not finite.
    """
    task, spec = job.task, job.spec
    if not task.fresh_state:
        raise ValueError("only a lease with fresh state can be replayed")
    sequences = Sequences(spec, job.corpus, task.lease, job.blocks)
    base = WeightsReader(job.base, job.manifest)
    adapter = spec.adapter
    replica = new_replica(
        job.config,
        job.recipe,
        spec.inner,
        seed=None,
        device=device,
        adapter=adapter,
        base=open_base(job.config, adapter, job.frozen) if adapter is not None else None,
    )
    replica.load_weights(base.get)
    replica.seed = rounding_seed(task.lease.lease_id)
    losses = []
    batch, step = 0, 0
    while batch < sequences.steps.batches:
        if should_stop():
            raise UnavailableError("The replay was stopped.", code="stopped")
        accumulates = step + sequences.steps.left(batch, False) > job.steps
        end = sequences.steps.end(batch, accumulates)
        ids = [sequences.batch(number).to(device) for number in range(batch, end)]
        position = lease_position(
            task.tokens_before,
            task.tokens_round,
            sequences.tokens_after(end),
            sequences.tokens,
        )
        loss = replica.step(ids, step_rate(spec.inner, position, len(ids)))
        losses.append(loss * sum(map(len, ids)))
        batch, step = end, step + 1

    def encoded() -> Iterator[tuple[str, EncodedTensor]]:
        for name, weight in replica.weights():
            loaded = replica.as_loaded(base.get(name).to(weight.device))
            delta = loaded.float() - weight.float()
            yield name, encode_with_feedback(delta, None, spec.uplink, spec.feedback_decay)[0]

    write_payload(out, job.manifest, spec.uplink, encoded(), {"lease": task.lease.lease_id})
    return math.fsum(losses) / sequences.count
