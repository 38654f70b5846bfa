"""``[warm_up]``: version 0 is trained by the coordinator before there is a network. A torch module.

While a model is new, every step moves all of it, and all nodes agree on where to. An update of a
few values a chunk cannot tell that: measured, a network is behind one node alone for its first
rounds (docs/learning.md). Whoever joins fetches a dense version first, so a better one costs no
byte more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from talkoot.protocol.corpus import CorpusManifest, read_block
from talkoot.protocol.errors import CapacityError, ConfigError
from talkoot.protocol.leases import CommittedBlocks, Member, plan_leases
from talkoot.protocol.messages import InnerSpec, RunSpec
from talkoot.protocol.recipes import get as get_recipe
from talkoot.protocol.replica import Replica, new_replica
from talkoot.protocol.schedule import step_rate
from talkoot.protocol.sequences import Sequences
from talkoot.server.config import Config

COORDINATOR = "0" * 16
"""Who leases of a warm-up are made out to: the order of their sequences follows from it."""
SAY_SECONDS = 5.0
Get = Callable[[str], torch.Tensor]


def warm_up(
    model_config: dict[str, Any],
    weights: Get,
    config: Config,
    spec: RunSpec,
    corpus: tuple[Path, CorpusManifest],
    *,
    say: Callable[[str], None],
    after: Callable[[Replica], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """Train ``weights`` on ``warm_up.tokens`` tokens of the corpus; the new ones, fp32 on the CPU.

    Args:
        model_config: the model's.
        weights: what it starts from, by name.
        config: the operator's.
        spec: the run's, which says how the text is cut into batches.
        corpus: its directory and manifest. The blocks are those of the network's first rounds, and
            come again there.
        say: hears how far it is.
        after: is called whenever as many tokens are done as a lease of the network has.

    Raises:
        ConfigError: no such recipe, or a device that is not there.
        CapacityError: the model does not fit.
        TalkootError: the loss is not finite.
    """
    section, (directory, manifest) = config.warm_up, corpus
    replica = new_replica(
        model_config,
        get_recipe(section.recipe),
        config.inner,
        seed=None,
        device=_device(section.device),
    )
    replica.load_weights(weights)
    committed = CommittedBlocks(manifest.block_count)
    done, number, said = 0, 0, time.monotonic()
    while done < section.tokens:
        number += 1
        (lease,) = plan_leases(
            seed=spec.seed,
            run_id=spec.run_id,
            round=number,
            attempt=0,
            block_tokens=manifest.block_tokens,
            committed=committed,
            members=[Member(COORDINATOR, min(config.round.tokens_per_node, section.tokens - done))],
        )
        blocks = [read_block(directory, manifest, ref.block).tobytes() for ref in lease.blocks]
        sequences = Sequences(spec, manifest, lease, blocks)
        batch = 0
        while batch < sequences.steps.batches:
            end = sequences.steps.end(batch, replica.recipe.accumulates)
            share = min(1.0, (done + sequences.tokens_after(end)) / section.tokens)
            ids = [sequences.batch(n).to(replica.device) for n in range(batch, end)]
            try:
                loss = replica.step(ids, _rate(config.inner, share, len(ids)))
            except torch.OutOfMemoryError as err:
                raise CapacityError(
                    f"The warm-up does not fit into the memory of {section.device}: choose another "
                    "warm_up.recipe, a smaller model.micro_batch, or no warm-up."
                ) from err
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                say(f"  warm-up: {share:.0%} of {section.tokens:,} tokens, loss {loss:.3f}")
            batch = end
        committed.add(lease.blocks)
        done += lease.tokens
        after(replica)
    say(f"  warm-up: {done:,} tokens, {replica.steps:,} steps, loss {loss:.3f}")
    return {name: tensor.float().cpu().clone() for name, tensor in replica.weights()}


def _rate(inner: InnerSpec, share: float, batches: int) -> float:
    """The inner rate after a share of the warm-up: as if the network's tokens passed by."""
    span = max(0, inner.warmup_tokens - inner.start_tokens)
    return step_rate(inner, span * share, batches)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(
            f"warm_up.device: {name!r} is no device of this machine: say cpu, cuda or cuda:1."
        ) from err
    return device
