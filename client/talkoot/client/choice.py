"""Which recipe this node holds its replica by, and when that has to be shown anew. Pure; no torch.

The planner says what fits (known plans or the closed form, never a simulation: a node that joins
waits for nothing), the fastest of these is opened, and the trainer falls along the rest when memory
runs out. A choice lasts while what it rests on does: what other programs happen to hold when a
daemon starts does not change it, and with it the optimizer's moments (ADR 10).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final

from talkoot.client.caps import Caps
from talkoot.protocol.errors import CapacityError
from talkoot.protocol.memory import MemoryPlan, format_size
from talkoot.protocol.messages import Capability
from talkoot.protocol.planner.choose import (
    NOBODY,
    Fit,
    Holders,
    fastest,
    hold,
    refusal,
    table,
)
from talkoot.protocol.recipes import Recipe, get

MARGIN: Final = 1.05
"""What operators ask for if they change nothing (``admission.memory_margin``). One who asks for
more refuses a proof that lacks room; the node then steps down by itself."""
LACKS_ROOM: Final = frozenset(
    {"too-little-memory", "too-little-host-memory", "too-little-disk", "over-the-cap"}
)
"""Verdicts on a proof that a smaller recipe may be the answer to."""
_PHYSICAL: Final = (
    *("device", "device_name", "device_physical_bytes", "host_physical_bytes"),
    *("compute_capability", "bf16", "driver", "torch_version"),
)


@dataclass(frozen=True)
class Choice:
    """Recipes that this node may come to, the one that it begins with first."""

    recipes: tuple[str, ...]
    basis: str
    """Digest of what the choice and the proof of it rest on."""
    sentence: str
    """For people."""


def basis(has: Capability, caps: Caps, run_spec_sha256: str, pinned: str | None) -> str:
    """Digest of hardware, driver, torch, caps, model and wish: with another one a node is another
    machine, chooses anew and proves itself again. What is free at the moment is not in it."""
    machine = {name: getattr(has, name) for name in _PHYSICAL}
    rests_on = [machine, [caps.vram, caps.ram, caps.disk], run_spec_sha256, pinned]
    return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()


def installed(recipe: Recipe) -> str | None:
    """Why a recipe's package keeps it from running here; None when nothing does."""
    if recipe.package is None or find_spec(recipe.package) is not None:
        return None
    return f"needs {recipe.package} (install 'talkoot[{recipe.extra}]')"


def held_against(
    plans: Sequence[MemoryPlan],
    has: Capability,
    why_not: Callable[[Recipe], str | None] = installed,
) -> list[Fit]:
    """Every recipe against this machine, the fastest here first."""
    fits = hold(plans, has, margin=MARGIN)
    return [replace(fit, why_not=fit.why_not or why_not(get(fit.recipe))) for fit in fits]


def choose(
    fits: Sequence[Fit],
    has: Capability,
    on: str,
    *,
    pinned: str | None,
    kept: str | None,
    others: Callable[[str], Holders] | None = None,
) -> Choice:
    """The fastest recipe that fits, then the others that do.

    Args:
        fits: of :func:`held_against`.
        has: this machine.
        on: the basis of this choice.
        pinned: the recipe that the volunteer wants to begin with, if any.
        kept: what was chosen, and proved, on the same basis before: it stays.
        others: says who else holds the memory of a kind of device, if the volunteer may be told.

    Raises:
        CapacityError: nothing fits, or not the one that is wanted; the sentence has the table.
    """
    fitting = [fit.recipe for fit in fits if fit.fits]
    first = next((fit for fit in fits if fit.recipe == kept), None)
    if first is None and pinned is not None:
        first = next((fit for fit in fits if fit.recipe == pinned), None)
        if first is None or not first.fits:
            raise _not_the_wanted(pinned, first, fits, has)
    first = first or fastest(fits)
    if first is None:
        held = NOBODY if others is None else others(has.device)
        code, sentence = refusal(fits, has, MARGIN, held)
        raise CapacityError(sentence, code=code)
    rest = [name for name in fitting if name != first.recipe]
    return Choice(
        (first.recipe, *rest),
        on,
        f"Holding the replica by {first.recipe}: {format_size(first.need.device)} of "
        f"{format_size(has.device_total_bytes)}.",
    )


def _not_the_wanted(
    pinned: str, fit: Fit | None, fits: Sequence[Fit], has: Capability
) -> CapacityError:
    if fit is None:
        known = ", ".join(other.recipe for other in fits)
        return CapacityError(
            f"This run has no recipe {pinned!r}: give --recipe one of {known}, or fastest.",
            code="unknown-recipe",
        )
    head = (
        f"--recipe {pinned} does not fit this machine: give another one of those that lack "
        "nothing, or fastest, or make room."
    )
    return CapacityError("\n".join([head, *table(fits, has.device)]), code="recipe-does-not-fit")
