"""Which class of nodes can hold a replica, and by which recipe: the real admission decides.

``memory.py`` predicts the reference recipe; what other recipes need follows here from what they say
they are made of. It is a first answer, as ``memory.py`` is: a node proves that it fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from talkoot.protocol import recipes
from talkoot.protocol.limits import GIB, MIB
from talkoot.protocol.memory import MemoryPlan, predict
from talkoot.protocol.messages import Capability, Verdict
from talkoot.protocol.recipes import REFERENCE, Recipe
from talkoot.server.admission import AdmissionPolicy, judge_capability
from talkoot.sims.scenario import NodeClass, Scenario

CONTEXT_BYTES: Final = 800 * MIB
"""Of an accelerator that its driver and libraries take before the first tensor."""
_BYTES: Final = {"float32": 4, "bfloat16": 2}
_STATES: Final = {"float32": 8.0, "bfloat16": 4.0, "8-bit": 2.1, "4-bit": 1.1, "factored": 0.02}
"""Of both moments, bytes a parameter, with the scales of quantised ones."""
_CHUNK_TOKENS: Final = 1024
"""Of a chunked loss, at a time."""
_WORKSPACE: Final = 256 * MIB
"""Slabs of the optimizer and of matrix products."""


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


def needs_of(
    recipe: Recipe, config: Mapping[str, Any], sequence_length: int, micro_batch: int
) -> MemoryPlan:
    """What a replica under ``recipe`` needs."""
    plain = predict(config, sequence_length, micro_batch)
    if recipe.name == REFERENCE:
        return plain
    parts = plain.breakdown
    count = parts["weights"] // 4
    width = _BYTES[recipe.compute]
    weights = _BYTES[recipe.weights] * count
    if recipe.compute != recipe.weights:
        weights += width * count  # autocast keeps the low-precision copies until the backward pass
    largest = parts["host_encoding"] // 16  # elements of the largest tensor
    gradient = 4 if recipe.states_on == "host" else _BYTES[recipe.weights]
    gradients = gradient * (count if recipe.gradients == "kept" else 2 * largest)
    states = round(_STATES[recipe.states] * count)
    activations = parts["activations"] * width // 4
    if recipe.checkpointing:
        layers = int(config.get("num_hidden_layers", config.get("n_layer", 1)))
        hidden = int(config.get("hidden_size", config.get("n_embd", 1)))
        kept = width * sequence_length * micro_batch * hidden * layers
        activations = kept + activations // max(layers, 1)
    logits = parts["logits"]
    if recipe.loss == "chunked":
        tokens = sequence_length * micro_batch
        logits = logits * min(_CHUNK_TOKENS, tokens) // tokens
    on_host = 0
    if recipe.states_on == "host":
        on_host = states + (4 + 4) * count  # moments, master weights and gradients
        states = 0
    device = weights + states + max(activations + logits, gradients) + gradients
    device += _WORKSPACE
    trained = _BYTES[recipe.trained] * count
    saved = round(_STATES[recipe.states] * count)
    return MemoryPlan(
        device_bytes=device,
        host_bytes=plain.host_bytes + on_host,
        disk_bytes=8 * count + saved + 2 * (trained + saved),
        breakdown={"weights": weights, "states": states, "gradients": gradients},
    )


def capability(node: NodeClass) -> Capability:
    """What a node of this class would measure of itself."""
    entry, device = node.population, node.device
    given = entry.memory_gib
    memory = device.memory_bytes if given is None else round(given * GIB)
    host = device.host_bytes if entry.host_gib is None else round(entry.host_gib * GIB)
    free = memory if device.kind == "cpu" else max(0, memory - CONTEXT_BYTES)
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
    return [
        _fit(node, policy, config, scenario.model.sequence_length, scenario.model.micro_batch)
        for node in scenario.classes(parameters)
    ]


def _fit(
    node: NodeClass,
    policy: AdmissionPolicy,
    config: Mapping[str, Any],
    sequence_length: int,
    micro_batch: int,
) -> Fit:
    kind = node.device.kind
    wished = node.population.recipe
    tried = recipes.fastest_first(kind) if wished is None else [recipes.get(wished)]
    has = capability(node)
    found: list[tuple[Recipe, MemoryPlan, Verdict]] = []
    for recipe in tried:
        if recipe.accelerator_only and kind == "cpu":
            continue
        needs = needs_of(recipe, config, sequence_length, micro_batch)
        verdict = judge_capability(policy, has, needs)
        if verdict.accepted:
            # What a scenario says that a node was measured at is with the recipe that it uses.
            given = node.population.tokens_per_second is not None
            speed = node.tokens_per_second * (1.0 if given else recipe.speed(kind))
            return Fit(node, recipe, needs, verdict, speed)
        found.append((recipe, needs, verdict))
    _, needs, verdict = min(found, key=lambda one: one[1].device_bytes)
    return Fit(node, None, needs, verdict, 0.0)
