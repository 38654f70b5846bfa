"""``talkoot-coordinator recipes``: what a model needs under every recipe, before a run exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.limits import GIB
from talkoot.protocol.memory import MemoryPlan, format_size, need, parse_size
from talkoot.protocol.model import named_config
from talkoot.protocol.planner import plans
from talkoot.protocol.planner.choose import CARD_RESERVE
from talkoot.protocol.recipes import RECIPES

MAX_CARDS = 16


def card_sizes(text: str) -> list[int]:
    """``"8,12,24"`` (GiB, or sizes with a unit) as bytes, ascending.

    Raises:
        ConfigError: not a list of sizes.
    """
    sizes = [
        parse_size(f"{part}GiB" if part.strip().replace(".", "").isdigit() else part)
        for part in text.split(",")
    ]
    if len(sizes) > MAX_CARDS or min(sizes) <= 0:
        raise ConfigError(f"--vram takes 1 to {MAX_CARDS} sizes, such as 8,12,24.", code="bad-size")
    return sorted(set(sizes))


def examine(
    model: str,
    *,
    sequence_length: int,
    micro_batch: int,
    cards: Sequence[int],
    margin: float,
    quick: bool,
    accumulate: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Plans of every recipe and what holds them, as plain JSON.

    Args:
        quick: take the closed form for what has not been simulated yet.
        accumulate: steps may be of several batches (``inner.max_steps``).
        say: told before a simulation, which takes minutes.
    """
    config = named_config(model)
    found: dict[str, MemoryPlan] = {}
    missing = []
    for recipe in RECIPES.values():
        ask = plans.quick if quick else plans.known
        plan = ask(
            config,
            recipe,
            sequence_length=sequence_length,
            micro_batch=micro_batch,
            accumulated=accumulate,
        )
        if plan is None:
            missing.append(recipe)
        else:
            found[recipe.name] = plan
    if missing:
        say(
            f"Simulating {len(missing)} recipes of {model}, once (seconds for a small model, "
            "minutes for 7B; --quick estimates instead) …"
        )
        found |= plans.simulated(
            config,
            missing,
            sequence_length=sequence_length,
            micro_batch=micro_batch,
            accumulated=accumulate,
        )
    return {
        "model": model,
        "config_sha256": plans.config_digest(config),
        "sequence_length": sequence_length,
        "micro_batch": micro_batch,
        "accumulate": accumulate,
        "margin": margin,
        "cards": list(cards),
        "recipes": [_row(found[name], cards, margin) for name in RECIPES],
    }


def _row(plan: MemoryPlan, cards: Sequence[int], margin: float) -> dict[str, Any]:
    on_card, on_cpu = need(plan, "cuda", margin=margin), need(plan, "cpu", margin=margin)
    recipe = RECIPES[plan.recipe]
    fitting = [card for card in cards if on_card.device <= card - CARD_RESERVE]
    return {
        **plan.as_dict(),
        "needs": {"device": on_card.device, "host": on_card.host, "disk": on_card.disk},
        "needs_on_cpu": None if recipe.accelerator_only else on_cpu.device,
        "smallest_card": fitting[0] if fitting else None,
        "accelerator_speed": recipe.accelerator_speed,
        "cpu_speed": recipe.cpu_speed,
    }


def lines(findings: dict[str, Any]) -> list[str]:
    """The findings as a table of at most 80 columns (with seven cards)."""
    cards: list[int] = findings["cards"]
    heads = [f"{card / GIB:g}" for card in cards]
    rows = findings["recipes"]
    width = max(len(row["recipe"]) for row in rows)
    out = [
        f"{findings['model']}, sequences of {findings['sequence_length']}, "
        f"{findings['micro_batch']} a {'batch' if findings['accumulate'] else 'step'}; GiB, "
        f"margin {findings['margin']:g} included",
        f"{'':{width}}  speed  device   host   disk   cards of",
        f"{'recipe':{width}}                              " + " ".join(heads),
    ]
    for row in rows:
        needs = row["needs"]
        marks = " ".join(
            f"{'✓' if needs['device'] <= card - CARD_RESERVE else '·':>{len(head)}}"
            for card, head in zip(cards, heads, strict=True)
        )
        star = "*" if row["source"] == "formula" else " "
        out.append(
            f"{row['recipe']:{width}} {row['accelerator_speed']:6.2f} "
            f"{needs['device'] / GIB:7.1f}{star}{needs['host'] / GIB:6.1f} "
            f"{needs['disk'] / GIB:6.1f}   {marks}"
        )
    best = [row for row in rows if row["smallest_card"] is not None]
    if best:
        least = min(best, key=lambda row: row["needs"]["device"])
        out.append(
            f"The least: {least['recipe']} on a card of {format_size(least['smallest_card'])}, "
            f"with {format_size(least['needs']['host'])} of host memory."
        )
    else:
        out.append("No recipe fits on any of these cards.")
    out.append("Speeds are relative, and estimates.")
    if any(row["source"] == "formula" for row in rows):
        out.append("* estimated; without --quick it is simulated.")
    return out
