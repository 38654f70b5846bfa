"""What a run would take, before it starts: measured on a few real steps of the model."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from talkoot.sims.scenario import Scenario

STEPS: Final = 4
"""Timed, after one that warms up."""
SMALL_MODEL: Final = "tiny"
"""Preset that stands for a model that is too large to be timed."""
START_SECONDS: Final = 25.0
"""Ray, imports and the operator's state."""
LEASE_SECONDS: Final = 0.06
"""Of a worker, a lease, beside its steps: messages, files, signatures, encoding (docs/LOG.md)."""
COORDINATOR_SECONDS: Final = 0.03
"""Of the round loop, a contribution: admission of leases, verification, ledger (docs/LOG.md)."""
RAY_BYTES: Final = 350 * 2**20
"""Of Ray's own processes."""
REPLICA_BYTES: Final = 20
"""On disk a parameter and node: published weights, moments, feedback, and the lease's own."""


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of this machine."""

    nodes: int
    rounds: int
    parameters: int
    workers: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int
    tokens_per_second: float
    """Of one worker."""
    measured: bool = True
    """False: derived from a smaller model, as this one's replica does not fit here."""

    def to_json(self) -> dict[str, float]:
        """For ``--json``."""
        return dict(vars(self))


def estimate(scenario: Scenario, workers: int | None, work: Path) -> Estimate:
    """Time a few steps and reckon. The truth depends on what else this machine does.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    from talkoot.sims.planning.sizes import model_config, parameters_of

    count = workers if workers is not None else os.cpu_count() or 1
    config = model_config(scenario)
    parameters = parameters_of(config)
    process_bytes = replica_bytes(scenario, config)
    free = psutil.virtual_memory().available
    fits = process_bytes < free / 2
    speed = _measure(scenario, config) if fits else _derive(scenario, parameters)
    rounds = scenario.rounds or _rounds_in(scenario)
    leases = rounds * scenario.nodes
    tokens = max(scenario.rules.round.tokens_per_node, scenario.corpus.block_tokens)
    at_once = min(count, os.cpu_count() or 1, scenario.nodes)
    busy = leases * (tokens / speed + LEASE_SECONDS) / at_once
    place = next(p for p in (work, *work.parents) if p.exists())
    return Estimate(
        nodes=scenario.nodes,
        rounds=rounds,
        parameters=parameters,
        workers=count,
        seconds=START_SECONDS + busy + leases * COORDINATOR_SECONDS,
        memory_bytes=RAY_BYTES + (count + 1) * process_bytes,
        disk_bytes=scenario.nodes * parameters * REPLICA_BYTES,
        memory_free_bytes=free,
        disk_free_bytes=shutil.disk_usage(place).free,
        tokens_per_second=speed,
        measured=fits,
    )


def replica_bytes(scenario: Scenario, config: dict[str, object]) -> int:
    """Of a process that trains the scenario's model on a CPU, as is predicted."""
    from talkoot.protocol.memory import predict

    section = scenario.model
    plan = predict(
        dict(config),
        section.sequence_length,
        section.micro_batch,
        accumulated=scenario.rules.inner.max_steps > 0,
    )
    return plan.device_bytes + plan.host_bytes


def require_room(scenario: Scenario) -> None:
    """Raise :class:`ConfigError` when not even one replica can be trained here."""
    from talkoot.protocol.errors import ConfigError
    from talkoot.protocol.memory import format_size
    from talkoot.sims.planning.sizes import model_config

    needed, there = replica_bytes(scenario, model_config(scenario)), psutil.virtual_memory().total
    if needed > there:
        raise ConfigError(
            f"One replica of this model takes {format_size(needed)} in training, and this machine "
            f"has {format_size(there)}: choose a smaller model.preset, or use talkoot-sim plan, "
            "which trains nothing.",
            code="too-large",
        )


def _rounds_in(scenario: Scenario) -> int:
    """Rounds of a scenario that only has days, if each takes half its deadline."""
    return max(1, round((scenario.days or 1) * 86_400 / scenario.rules.round.deadline_seconds * 2))


def _derive(scenario: Scenario, parameters: int) -> float:
    """Tokens a second of one worker, if they fall as parameters grow: a rough upper bound."""
    from talkoot.protocol.model import preset
    from talkoot.sims.planning.sizes import parameters_of

    small = dict(preset(SMALL_MODEL))
    section = scenario.model.model_copy(update={"sequence_length": 64, "micro_batch": 4})
    speed = _measure(scenario.model_copy(update={"model": section}), small)
    return speed * parameters_of(small) / parameters


def _measure(scenario: Scenario, config: dict[str, object]) -> float:
    """Tokens a second of one worker."""
    import torch

    from talkoot.protocol.recipes import REFERENCE, get
    from talkoot.protocol.replica import new_replica

    torch.set_num_threads(1)
    section = scenario.model
    replica = new_replica(dict(config), get(REFERENCE), scenario.rules.inner, seed=0, device="cpu")
    shape = (section.micro_batch, section.sequence_length)
    vocabulary = int(str(config.get("vocab_size", 256)))
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    replica.step(ids, 1e-4)
    began = time.monotonic()
    for _ in range(STEPS):
        replica.step(ids, 1e-4)
    seconds = max(time.monotonic() - began, 1e-9)
    return STEPS * ids.numel() / seconds
