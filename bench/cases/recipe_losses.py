"""What a recipe costs in loss: the same text, batches and first weights under each of them."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from bench.registry import Row, Run, benchmark, compare
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.model import preset
from talkoot.protocol.recipes import Recipe, get, reference
from talkoot.protocol.replica import new_replica

STEPS: Final = 600
BATCH: Final = (8, 64)
"""Sequences of a step, and their bytes."""
RATE: Final = 4e-3
SEEDS: Final = 2
HELD_OUT: Final = 64 * 1024
TRIED: Final = (
    *("amp-adamw", "fp32-backward-adamw", "fp32-backward-adamw8", "fp32-backward-adafactor"),
    *("bf16-adamw", "bf16-backward-adamw", "bf16-backward-adamw8", "bf16-backward-adamw4"),
    *("bf16-backward-adafactor", "bf16-offload-adamw"),
)
"""All but those that compute what another one does, in another place or twice."""
NEAREST: Final = "bf16-backward-adamw-to-nearest"


def _text() -> torch.Tensor:
    """The standard library's own source, as bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def _rate(step: int) -> float:
    """Half a cosine, to a tenth."""
    return RATE * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))


def _loss(recipe: Recipe, text: torch.Tensor, seed: int) -> float:
    """Held-out loss, in nats a byte, of weights as they would be published: in fp32."""
    replica = new_replica(preset("nano"), recipe, InnerSpec(), seed=seed, device="cpu")
    replica.seed = seed
    chance = torch.Generator().manual_seed(seed)
    held_out, rest = text[:HELD_OUT], text[HELD_OUT:]
    windows = len(rest) - BATCH[1]
    for step in range(STEPS):
        starts = torch.randint(0, windows, (BATCH[0], 1), generator=chance)
        replica.step(rest[starts + torch.arange(BATCH[1])], _rate(step))
    model = new_replica(
        preset("nano"), reference(adapters=False), InnerSpec(), seed=seed, device="cpu"
    )
    weights = dict(replica.weights())
    model.load_weights(lambda name: weights[name].float())
    with torch.no_grad():
        ids = held_out.view(-1, BATCH[1])
        return float(model.model.eval()(input_ids=ids, labels=ids).loss)


@benchmark("recipe-losses", quick=False)
def recipe_losses(run: Run) -> Iterator[Row]:
    """Held-out loss after 600 steps of each recipe beside that of fp32, on two seeds."""
    torch.set_num_threads(1)
    text = _text()
    pure = get("bf16-backward-adamw")
    first = reference(adapters=False)
    base: list[float] = []
    tried: dict[str, Recipe] = {name: get(name) for name in (first.name, *TRIED)}
    for label, recipe in (tried | {NEAREST: replace(pure, stochastic_rounding=False)}).items():
        run.say(label)
        losses = [_loss(recipe, text, seed) for seed in range(SEEDS)]
        base = base or losses
        yield compare(
            f"recipe_loss_{label}",
            "nats/byte",
            losses,
            base,
            note=f"nano, {STEPS} steps of {BATCH[0]} x {BATCH[1]} bytes; baseline: {first.name}",
        )
