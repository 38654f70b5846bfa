"""When memory runs out: what that looks like, and the recipe to go on with. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from talkoot.protocol.errors import CapacityError
from talkoot.protocol.recipes import Recipe, fastest_first, get, needs_less

MAX_FALLS: Final = 4
"""In a row; then the node leaves, as something else than the recipe must be wrong."""
OUT_OF_MEMORY: Final = "out-of-memory"
_PHRASES: Final = ("out of memory", "can't allocate memory", "not enough memory", "bad allocation")


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    torch = sys.modules.get("torch")
    if isinstance(err, MemoryError):
        return True
    if torch is not None and isinstance(err, torch.OutOfMemoryError):
        return True
    return isinstance(err, RuntimeError) and any(phrase in str(err) for phrase in _PHRASES)


def ladder(names: Sequence[str], device: str, *, adapters: bool) -> list[Recipe]:
    """The recipes that a node may come to, the one that it begins with first.

    Args:
        names: of the recipes that fit, the best first, or of one alone: whatever needs less than
            that one then follows, the fastest first.
        device: its kind.
        adapters: the kind of run.

    Raises:
        ConfigError: a name is not that of a recipe for this kind of run.
    """
    chosen = [get(name, adapters) for name in names]
    if len(chosen) == 1:
        chosen += [r for r in fastest_first(device, adapters) if needs_less(r, chosen[0], device)]
    return chosen


def next_after(recipes: Sequence[Recipe], now: Recipe, fallen: int, device: str) -> Recipe:
    """What to go on with when memory ran out under ``now``, after ``fallen`` falls before.

    Each is smaller than the one before it, so this ends.

    Raises:
        CapacityError: code ``"out-of-memory"``: there is nothing to fall to.
    """
    smaller = [r for r in recipes if needs_less(r, now, device)]
    if not smaller or fallen >= MAX_FALLS:
        tried = "" if not fallen else f" after {fallen} smaller recipes"
        raise CapacityError(
            f"Memory ran out under {now.name}{tried}, and there is no smaller recipe to go on "
            "with: close other programs, or raise this node's memory cap if it has one.",
            code=OUT_OF_MEMORY,
        )
    return smaller[0]
