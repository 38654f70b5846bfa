"""Which recipe a machine can hold, and what would make one fit. Pure; no torch.

The node chooses with this and the coordinator admits with it, so both give the same answer for the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from talkoot.protocol.limits import GIB, MAX_SENTENCE_CHARS
from talkoot.protocol.memory import MemoryPlan, Need, format_size, need
from talkoot.protocol.messages import Capability
from talkoot.protocol.recipes import ADAPTER_RECIPES, RECIPES, get

CARDS: Final = tuple(size * GIB for size in (8, 12, 16, 24, 32, 48, 80))
"""Nominal memory of usual accelerators."""
CARD_RESERVE: Final = GIB // 2
"""Of a card's nominal memory, what driver and display keep."""


@dataclass(frozen=True)
class Fit:
    """One recipe held against one machine."""

    plan: MemoryPlan
    need: Need
    lacks_device: int
    """Bytes; 0: enough. So the other two."""
    lacks_host: int
    lacks_disk: int
    why_not: str | None
    """A reason beside sizes, or None."""

    @property
    def recipe(self) -> str:
        """Its name."""
        return self.plan.recipe

    @property
    def fits(self) -> bool:
        """Whether nothing is lacking."""
        return self.why_not is None and not (
            self.lacks_device or self.lacks_host or self.lacks_disk
        )


@dataclass(frozen=True)
class Holder:
    """Another program that holds memory."""

    name: str
    pid: int
    """One of its processes."""
    bytes: int | None
    """None where the driver does not tell."""


@dataclass(frozen=True)
class Holders:
    """Who else holds a machine's memory, by tier, most first; empty where nobody can say."""

    device: Sequence[Holder] = ()
    host: Sequence[Holder] = ()


NOBODY: Final = Holders()
MOST_CLOSED: Final = 3
"""Programs that a person is asked to close by name."""

Ratio = Callable[[str], float]
"""Measured over predicted memory of a recipe, on machines of the kind in question."""


def as_predicted(recipe: str) -> float:
    """The ratio where nothing has been measured."""
    return 1.0


def hold(
    plans: Iterable[MemoryPlan],
    has: Capability,
    *,
    margin: float,
    ratio: Ratio = as_predicted,
) -> list[Fit]:
    """Every plan against a machine, from the recipe that is fastest there to the slowest."""
    found = []
    for plan in plans:
        recipe = get(plan.recipe)
        wants = need(plan, has.device, margin=margin, ratio=ratio(plan.recipe))
        why = None
        if recipe.accelerator_only and has.device == "cpu":
            why = "runs on accelerators only"
        found.append(
            Fit(
                plan,
                wants,
                lacks_device=max(wants.device - has.device_free_bytes, 0),
                lacks_host=max(wants.host - has.host_free_bytes, 0),
                lacks_disk=max(wants.disk - has.disk_free_bytes, 0),
                why_not=why,
            )
        )
    order = [*RECIPES, *ADAPTER_RECIPES]
    found.sort(key=lambda fit: (-speed(fit.recipe, has), order.index(fit.recipe)))
    return found


def speed(recipe: str, has: Capability) -> float:
    """Relative speed of a recipe on a machine; bf16 without units for it is as slow as on a CPU."""
    known = get(recipe)
    if has.device != "cpu" and not has.bf16 and known.compute == "bfloat16":
        return known.cpu_speed
    return known.speed(has.device)


def fastest(fits: Sequence[Fit]) -> Fit | None:
    """The fastest that fits; None when none does."""
    return next((fit for fit in fits if fit.fits), None)


def refusal(
    fits: Sequence[Fit], has: Capability, margin: float, holders: Holders = NOBODY
) -> tuple[str, str]:
    """Code and sentence for a machine that no recipe fits: three ways, then all as a table."""
    least = min(fits, key=lambda fit: fit.lacks_device + fit.lacks_host + fit.lacks_disk)
    if least.lacks_device:
        code = "too-little-memory"
    elif least.lacks_host:
        code = "too-little-host-memory"
    else:
        code = "too-little-disk"
    found = ways_to_fit(fits, has, holders)
    ways = "; ".join(f"({number}) {way}" for number, way in enumerate(found, 1))
    host = "" if has.device == "cpu" else f", {format_size(has.host_free_bytes)} of host memory"
    sentence = (
        f"No recipe for a replica of this model fits: {has.device_name} has "
        f"{format_size(has.device_free_bytes)} free of {format_size(has.device_total_bytes)}"
        f"{host} and {format_size(has.disk_free_bytes)} of disk. Cheapest ways to fit: {ways}. "
        f"What each recipe needs, with a margin of {margin:.2f}:"
    )
    return code, "\n".join([sentence, *table(fits, has.device)])[:MAX_SENTENCE_CHARS]


@dataclass(frozen=True)
class _Way:
    """Something that would make a recipe fit, and how much it asks of a person."""

    cost: tuple[int, int]  # kind of effort, then bytes
    sentence: str


def ways_to_fit(fits: Sequence[Fit], has: Capability, holders: Holders = NOBODY) -> list[str]:
    """The three cheapest ways to make some recipe fit, cheapest first.

    Raising a cap costs a flag, closing a program costs its use, freeing disk costs work, another
    machine costs money.
    """
    ways: dict[str, _Way] = {}
    for fit in fits:
        if fit.why_not is not None:
            continue
        way = _way(fit, has, holders)
        old = ways.get(way.sentence)
        if old is None or way.cost < old.cost:
            ways[way.sentence] = way
    ordered = sorted(ways.values(), key=lambda way: way.cost)
    # A dearer way of the same kind (a larger cap, a bigger card) adds nothing.
    chosen: list[_Way] = []
    for way in ordered:
        if all(way.cost[0] != other.cost[0] for other in chosen):
            chosen.append(way)
    for way in ordered:
        if len(chosen) < 3 and way not in chosen:
            chosen.append(way)
    return [way.sentence for way in chosen[:3]]


def _way(fit: Fit, has: Capability, holders: Holders) -> _Way:
    """What one recipe lacks, as one sentence part."""
    parts: list[str] = []
    effort, missing = 0, fit.lacks_device + fit.lacks_host + fit.lacks_disk
    if fit.lacks_device:
        cpu = has.device == "cpu"
        kind, text = _more_memory(
            fit.need.device,
            free=has.device_free_bytes,
            capped=has.device_total_bytes,
            physical=has.device_physical_bytes or has.device_total_bytes,
            option="--max-ram" if cpu else "--max-vram",
            what="a machine with {} of memory" if cpu else "a device with {}",
            card=not cpu,
            holders=holders.device,
        )
        effort, parts = max(effort, kind), [*parts, text]
    if fit.lacks_host:
        kind, text = _more_memory(
            fit.need.host,
            free=has.host_free_bytes,
            capped=has.host_total_bytes,
            physical=has.host_physical_bytes or has.host_total_bytes,
            option="--max-ram",
            what="{} of host memory",
            card=False,
            holders=holders.host,
        )
        effort, parts = max(effort, kind), [*parts, text]
    if fit.lacks_disk and fit.need.disk <= (has.disk_physical_bytes or 0):
        parts.append(f"raise --max-disk to {_up(fit.need.disk)}")
    elif fit.lacks_disk:
        effort = max(effort, 2)
        parts.append(f"free {format_size(fit.lacks_disk)} of disk or choose another --home")
    return _Way((effort, missing), f"{' and '.join(parts)} ({fit.recipe})")


def _more_memory(
    wanted: int,
    *,
    free: int,
    capped: int,
    physical: int,
    option: str,
    what: str,
    card: bool,
    holders: Sequence[Holder],
) -> tuple[int, str]:
    if wanted <= capped:
        return 1, f"close {_programs(wanted - free, holders)}: {format_size(wanted - free)}"
    if wanted <= physical:
        return 0, f"raise {option} to {_up(wanted)}"
    sizes = [size for size in CARDS if size - CARD_RESERVE >= wanted] if card else []
    return 3, what.format(format_size(sizes[0] if sizes else wanted))


def _programs(size: int, holders: Sequence[Holder]) -> str:
    """The few largest programs that hold so much together; unnamed where no few do."""
    held, names = 0, list[str]()
    for holder in [one for one in holders if one.bytes][:MOST_CLOSED]:
        held += holder.bytes or 0
        names.append(holder.name)
        if held >= size:
            return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return "programs"


def _up(size: int) -> str:
    """In whole GiB that are enough (MiB for less than four)."""
    unit, name = (GIB, "GiB") if size >= 4 * GIB else (2**20, "MiB")
    return f"{-(-size // unit)}{name}"


def table(fits: Sequence[Fit], device: str) -> list[str]:
    """What each recipe needs and lacks, one line each, for people; the first line is a heading."""
    cpu = device == "cpu"
    width = max(len(fit.recipe) for fit in fits)
    head = f"{'recipe':{width}}  {'memory' if cpu else 'device':>8}"
    head += "" if cpu else f"  {'host':>8}"
    head += f"  {'disk':>8}  lacks"
    lines = [head]
    for fit in fits:
        cells = [f"{fit.recipe:{width}}", f"{format_size(fit.need.device):>8}"]
        if not cpu:
            cells.append(f"{format_size(fit.need.host):>8}")
        cells.append(f"{format_size(fit.need.disk):>8}")
        cells.append(_lacks(fit))
        lines.append("  ".join(cells))
    return lines


def _lacks(fit: Fit) -> str:
    if fit.why_not is not None:
        return fit.why_not
    lacks = (("memory", fit.lacks_device), ("host", fit.lacks_host), ("disk", fit.lacks_disk))
    return ", ".join(f"{format_size(size)} {name}" for name, size in lacks if size) or "nothing"
