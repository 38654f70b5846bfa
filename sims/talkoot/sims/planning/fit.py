"""Which class of nodes can hold a replica, and by which recipe: the real admission decides.

What each recipe needs comes from the planner: simulated where that is known, else in closed form. A
node proves that it fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from talkoot.protocol import recipes
from talkoot.protocol.limits import GIB
from talkoot.protocol.memory import MemoryPlan
from talkoot.protocol.messages import Capability, Verdict
from talkoot.protocol.planner import plans
from talkoot.protocol.planner.choose import CARD_RESERVE
from talkoot.protocol.recipes import Recipe
from talkoot.server.admission import AdmissionPolicy, judge_capability
from talkoot.sims.scenario import NodeClass, Scenario


@dataclass(frozen=True)
class Fit:
    """A class of nodes and the fastest recipe that it can hold."""

    node_class: NodeClass
    recipe: Recipe | None
    """None: no recipe fits."""
    needs: MemoryPlan
    """Of ``recipe``, or of the smallest that was tried."""
    verdict: Verdict
    tokens_per_second: float
    """With ``recipe``; 0 if none fits."""


def capability(node: NodeClass) -> Capability:
    """What a node of this class would measure of itself."""
    entry, device = node.population, node.device
    given = entry.memory_gib
    memory = device.memory_bytes if given is None else round(given * GIB)
    host = device.host_bytes if entry.host_gib is None else round(entry.host_gib * GIB)
    free = memory if device.kind == "cpu" else max(0, memory - CARD_RESERVE)
    return Capability(
        device=device.kind,
        device_name=entry.device,
        device_total_bytes=memory,
        device_free_bytes=free,
        host_total_bytes=host,
        host_free_bytes=host,
        disk_free_bytes=round(entry.disk_gib * GIB),
        cpu_count=8,
        torch_version="",
        talkoot_version="",
    )


def fits_of(scenario: Scenario, config: Mapping[str, Any], parameters: int) -> list[Fit]:
    """For each population, in order."""
    rules = scenario.rules.admission
    policy = AdmissionPolicy(rules.memory_margin, rules.proof_loss_tolerance, manual_approval=False)
    return [_fit(node, policy, config, scenario) for node in scenario.classes(parameters)]


def _fit(
    node: NodeClass,
    policy: AdmissionPolicy,
    config: Mapping[str, Any],
    scenario: Scenario,
) -> Fit:
    section = scenario.model
    kind = node.device.kind
    wished = node.population.recipe
    tried = recipes.fastest_first(kind) if wished is None else [recipes.get(wished)]
    has = capability(node)
    found: list[tuple[Recipe, MemoryPlan, Verdict]] = []
    for recipe in tried:
        if recipe.accelerator_only and kind == "cpu":
            continue
        needs = plans.quick(
            dict(config),
            recipe,
            sequence_length=section.sequence_length,
            micro_batch=section.micro_batch,
            accumulated=scenario.rules.inner.max_steps > 0,
        )
        verdict = judge_capability(policy, has, [needs])
        if verdict.accepted:
            # What a scenario says that a node was measured at is with the recipe that it uses.
            given = node.population.tokens_per_second is not None
            speed = node.tokens_per_second * (1.0 if given else recipe.speed(kind))
            return Fit(node, recipe, needs, verdict, speed)
        found.append((recipe, needs, verdict))
    _, needs, verdict = min(found, key=lambda one: one[1].device_bytes)
    return Fit(node, None, needs, verdict, 0.0)
