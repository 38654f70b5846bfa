"""Who the nodes of a scenario are, all from its seed: profiles, keys, and who of them lies. Pure.

Speeds, lines and hours are the planner's (``planning/fleet.py``), so that ``run`` and ``plan`` of
one scenario speak of the same nodes.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.recipes import REFERENCE
from talkoot.sims.planning.fleet import Fleet
from talkoot.sims.scenario import Scenario
from talkoot.sims.virtual.layout import Profile

P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
    "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)
"""Order of the base point (FIPS 186-4, D.1.2.4)."""


def key_of(scenario: Scenario, who: str) -> NodeKey:
    """The key of ``who`` in this scenario; the same seed gives the same key."""
    text = f"talkoot simulation\0{scenario.name}\0{scenario.seed}\0{who}".encode()
    number = int.from_bytes(hashlib.sha512(text).digest(), "big")
    # 512 bits reduced to 384 are as good as uniform.
    return NodeKey(ec.derive_private_key(number % (P384_ORDER - 1) + 1, ec.SECP384R1()))


def profiles(scenario: Scenario, fleet: Fleet) -> list[Profile]:
    """One a node, in the fleet's order.

    Nodes that hold no recipe of the scenario's model have a profile, too: they will be refused.
    """
    lies = _liars(scenario, fleet)
    found = []
    for index in range(fleet.count):
        fit = fleet.fits[int(fleet.kind[index])]
        kind, begins = lies.get(index, (None, 1))
        found.append(
            Profile(
                index=index,
                name=f"{fit.node_class.name}-{index:05d}",
                population=fit.node_class.name,
                recipe=_recipe(fit.node_class.population.recipe),
                tokens_per_second=max(float(fleet.speed[index]), 1e-6),
                speed_noise=float(fleet.noise[index]),
                attack=kind,
                attack_from=begins,
                seed=scenario.seed,
            )
        )
    return found


def _recipe(wished: str | None) -> str:
    """By which a node trains here: this machine's CPU stands for every device."""
    return REFERENCE if wished is None else wished


def _liars(scenario: Scenario, fleet: Fleet) -> dict[int, tuple[str, int]]:
    """By node: kind of lie and its first round. Nobody lies in two ways."""
    rng = np.random.default_rng([scenario.seed, 0x11A5])
    names = [fit.node_class.name for fit in fleet.fits]
    first = np.setdiff1d(np.arange(fleet.count), fleet.waiting)
    found: dict[int, tuple[str, int]] = {}
    for entry in scenario.attackers:
        there = first[fleet.fits_here[first]]
        if entry.population is not None:
            there = there[fleet.kind[there] == names.index(entry.population)]
        free = np.setdiff1d(there, np.array(sorted(found), dtype=np.int64))
        wanted = entry.count if entry.count is not None else round((entry.share or 0) * len(there))
        if wanted > len(free):
            raise ConfigError(
                f"{wanted} attackers of kind {entry.kind!r} are wanted and {len(free)} nodes are "
                "left to lie: lower count or share, or add nodes."
            )
        for index in sorted(rng.choice(free, wanted, replace=False).tolist()):
            found[index] = (entry.kind, entry.from_round)
    return found
