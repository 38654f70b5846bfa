"""Recipes: the ways to fit one training replica into a machine's memory. Pure; no torch.

A recipe says what a replica is made of, in which dtype, where it is and when it is freed.
``replica.py`` builds what a recipe says, the planner predicts what it needs, a proof names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from talkoot.protocol.errors import ConfigError

WeightDType = Literal["float32", "bfloat16"]
StateDType = Literal["float32", "bfloat16", "8-bit", "4-bit", "factored"]
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Adapter:
    """Low-rank matrices beside frozen weights (LoRA, arXiv 2106.09685)."""

    base: Literal["float32", "bfloat16", "nf4"]
    """How the frozen weights are held. ``nf4`` is QLoRA's (arXiv 2305.14314)."""


@dataclass(frozen=True)
class Recipe:
    """One way to hold and train a replica."""

    name: str
    sentence: str
    """For people."""
    weights: WeightDType = "float32"
    """Of the weights that the forward pass reads, on the device."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    states: StateDType = "float32"
    """Of the optimizer's moments."""
    states_on: Literal["device", "host"] = "device"
    """Where the moments live; with them, on the host, an fp32 copy of the weights (the master)."""
    gradients: Literal["kept", "in-backward", "offloaded"] = "kept"
    """``kept``: all of them live on the device until the step. ``in-backward``: each is used and
    freed as soon as the backward pass has made it. ``offloaded``: each moves to the host then."""
    checkpointing: bool = False
    """Activations of a layer are computed again in the backward pass instead of kept."""
    loss: Literal["plain", "chunked"] = "plain"
    """``chunked``: logits exist for some of the tokens at a time."""
    stochastic_rounding: bool = False
    """Of bf16 weights when they are updated."""
    published_on: Tier = "disk"
    """The published weights that the pseudo-gradient is a difference to."""
    feedback_on: Tier = "disk"
    """The error feedback."""
    adapter: Adapter | None = None
    """None: every parameter is trained."""
    accelerator_only: bool = False
    package: str | None = None
    """What must be installed beside talkoot's own dependencies."""
    extra: str | None = None
    """The extra of talkoot that brings ``package``."""
    speed: float = 1.0
    """Tokens a second relative to the fastest recipe, an estimate (``docs/recipes.md``)."""

    @property
    def clips_globally(self) -> bool:
        """Whether the gradient's norm over all tensors is known before anything is updated."""
        return self.gradients != "in-backward"

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several micro-batches can be summed before a step."""
        return self.gradients != "in-backward"


_ALL: Final = (
    Recipe(
        name="fp32-adamw",
        sentence="Everything in fp32 on the device: the reference, and the fastest on a CPU.",
    ),
)

RECIPES: Final[Mapping[str, Recipe]] = {recipe.name: recipe for recipe in _ALL}
"""By name, from the fastest to the smallest."""


def get(name: str) -> Recipe:
    """The recipe called ``name``. Raises :class:`ConfigError` on an unknown name."""
    if name not in RECIPES:
        raise ConfigError(
            f"There is no recipe named {name[:64]!r}: choose one of {', '.join(RECIPES)}.",
            code="unknown-recipe",
        )
    return RECIPES[name]
