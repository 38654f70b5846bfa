"""Tokens per second that each recipe costs beside the reference, on the CPU of this machine.

The real step of the real recipe (``replica.py``: forward, backward, clipping, update) on one core,
all recipes in turn, in processor seconds: others on the machine then cost them alike. It is where
``cpu_speed`` in ``recipes.py`` comes from; nothing here says anything of a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

import torch

from bench.registry import Row, Run, benchmark, compare
from talkoot.protocol.messages import AdapterSpec, ArtifactRef, InnerSpec
from talkoot.protocol.model import preset
from talkoot.protocol.recipes import Recipe, recipes_of, reference
from talkoot.protocol.replica import Replica, new_replica

SHAPE: Final = (2, 256)
"""Sequences of a step, and their tokens."""
TARGETS: Final = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def _replica(config: dict[str, Any], recipe: Recipe) -> Replica:
    adapter = None
    if recipe.adapter is not None:
        adapter = AdapterSpec(
            rank=8,
            alpha=16.0,
            targets=TARGETS,
            base=ArtifactRef(digest="0" * 64, size_bytes=4),
            base_dtype="float32",
        )
    return new_replica(config, recipe, InnerSpec(), seed=1, device="cpu", adapter=adapter)


def _step_seconds(replica: Replica, ids: torch.Tensor) -> float:
    began = time.process_time()
    replica.step(ids, 1e-5)
    return time.process_time() - began


@benchmark("recipes", quick=False)
def recipes(run: Run) -> Iterator[Row]:
    """Each recipe's tokens a second of one core beside the reference's, models of 1 and 4 M."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for adapters in (False, True):
        for name in ("tiny",) if run.quick else ("tiny", "small"):
            config = preset(name)
            ids = torch.randint(0, config["vocab_size"], SHAPE, generator=generator)
            held = {r.name: _replica(config, r) for r in recipes_of(adapters).values()}
            for replica in held.values():
                _step_seconds(replica, ids)  # makes the states, and warms up
            taken: dict[str, list[float]] = {recipe: [] for recipe in held}
            for _ in range(run.repeats):
                for recipe, replica in held.items():
                    taken[recipe].append(ids.numel() / _step_seconds(replica, ids))
            base = taken[reference(adapters).name]
            for recipe, rates in taken.items():
                yield compare(
                    f"recipe_{recipe}_{name}",
                    "tokens/s",
                    rates,
                    base,
                    note=f"{name}, {SHAPE[0]} x {SHAPE[1]} tokens, one core; baseline: "
                    f"{reference(adapters).name}",
                )
