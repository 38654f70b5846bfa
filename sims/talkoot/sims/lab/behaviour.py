"""What a node of the lab is like, and what it may do instead of what it was asked.

A :class:`NodeBehaviour` is the seam for attackers and for nodes with broken hardware. It has three
places to act, in the order in which a contribution comes into being: the training data, the
pseudo-gradient before it is encoded, and the payload on its way to the coordinator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from talkoot.protocol.corpus import Tokens
from talkoot.protocol.errors import ConfigError


@dataclass(frozen=True)
class Situation:
    """What a node knows when it acts."""

    round: int
    node: int
    """Its place among the lab's nodes."""
    seed: int
    """Of the run: behaviour that draws at random draws from (seed, round, node)."""
    honest: tuple[Path, ...] = ()
    """Payloads that honest nodes have made this round. Nodes that misbehave come last, so that a
    colluding attacker sees all of them: the strongest one that is usually assumed."""


class NodeBehaviour:
    """An honest node. A subclass overrides what it does otherwise; arguments are not changed."""

    honest = True
    """Whether the node does what it was asked; only others are taken the long way."""
    late = False
    """Whether it delivers after the round was closed: what it did is refused, and goes back into
    its error feedback."""

    def tokens(self, situation: Situation, block: Tokens) -> Tokens:
        """The block to train on instead of the leased ``block``: (block_tokens,) ids."""
        return block

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        """What to encode (with the feedback) for tensor ``name`` instead of ``delta``."""
        return delta

    def payload(self, situation: Situation, path: Path) -> None:
        """Do something to the finished payload file. May be asked twice when a lab was killed."""


HONEST = NodeBehaviour()


@dataclass(frozen=True)
class NodeProfile:
    """A node of the lab."""

    speed: float = 1.0
    """Tokens a second, in any unit: leases follow its ratio to the median."""
    dropout: float = 0.0
    """Probability of missing a round altogether."""
    shard: int = 0
    """Which corpus its leases come from."""
    recipe: str = "fp32-adamw"
    """How its replica is held (``talkoot.protocol.recipes``)."""
    behaviour: NodeBehaviour = field(default=HONEST)

    def __post_init__(self) -> None:
        if not (self.speed > 0 and 0 <= self.dropout < 1 and self.shard >= 0):
            raise ConfigError(
                "A node of the lab has a speed above 0, a dropout from 0 up to but not 1, and a "
                f"shard from 0: not {self.speed}, {self.dropout} and {self.shard}."
            )


def uniform(nodes: int) -> tuple[NodeProfile, ...]:
    """So many equal, honest nodes."""
    return (NodeProfile(),) * nodes


def with_behaviour(
    profiles: Sequence[NodeProfile], behaviour: NodeBehaviour, count: int
) -> tuple[NodeProfile, ...]:
    """The same nodes, the last ``count`` of them with another behaviour."""
    kept = len(profiles) - count
    if kept < 0:
        raise ConfigError(f"{count} of {len(profiles)} nodes cannot be replaced.")
    changed = (replace(profile, behaviour=behaviour) for profile in profiles[kept:])
    return (*profiles[:kept], *changed)
