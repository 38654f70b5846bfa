"""Recipes: the ways to fit one training replica into a machine's memory. Pure; no torch.

A recipe says what a replica is made of, in which dtype, where it is and when it is freed.
``replica.py`` builds what a recipe says, the planner predicts what it needs, a proof names it.
``docs/recipes.md`` says what each costs.
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
    compute: WeightDType = "float32"
    """Of matrix products: ``bfloat16`` with fp32 weights is autocast."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    states: StateDType = "float32"
    """Of the optimizer's moments."""
    states_on: Literal["device", "host"] = "device"
    """Where the moments live; on the host there is an fp32 copy of the weights (the master) too."""
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
    cpu_speed: float = 1.0
    """Tokens a second of a CPU without bf16 units relative to fp32-adamw (of adapter runs: to
    lora-fp32). Measured: a model of 4 M parameters, one core held to AVX2
    (``bench/cases/recipes.py``). With AVX-512's bf16 units amp-adamw was 1.46 times as fast as
    fp32-adamw there, and the others in bf16 0.4 to 1.15 times; few volunteers' CPUs have them, and
    without them it is a tenth. Who has them can ask for one (``talkoot join --recipe``)."""
    accelerator_speed: float = 1.0
    """On an accelerator with bf16 units, relative to amp-adamw. An estimate that nothing measured
    stands behind: none was at hand."""

    @property
    def trained(self) -> WeightDType:
        """Dtype of the weights that the optimizer updates and a checkpoint holds."""
        return "float32" if self.states_on == "host" or self.adapter else self.weights

    @property
    def clips_globally(self) -> bool:
        """Whether the gradient's norm over all tensors is known before anything is updated."""
        return self.gradients != "in-backward"

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several batches can be summed before a step (``steps.py``)."""
        return self.gradients != "in-backward"

    def bytes_per_parameter(self, device: str) -> float:
        """Of the device's memory, for what is there throughout a step; on a CPU host memory is the
        device's, too. A rough count, to tell which of two recipes is the smaller."""
        if self.adapter is not None:
            return _HELD[self.adapter.base]
        held = _HELD[self.weights]
        both = 2 * _HELD[self.states] if self.optimizer == "adamw" else _HELD[self.states]
        if self.states_on == "device" or device == "cpu":
            held += both + (_HELD["float32"] if self.states_on == "host" else 0)
        if self.gradients == "kept" or (self.gradients == "offloaded" and device == "cpu"):
            held += _HELD[self.weights]
        return held

    def speed(self, device: str) -> float:
        """Relative speed on a kind of device: ``cpu`` or anything else."""
        return self.cpu_speed if device == "cpu" else self.accelerator_speed


_HELD: Final = {
    **{"float32": 4.0, "bfloat16": 2.0, "8-bit": 1.02, "4-bit": 0.54, "nf4": 0.52},
    "factored": 0.01,
}
"""Bytes of one number as it is held, with its share of a block's scale."""

_SMALL: Final = {"checkpointing": True, "loss": "chunked"}
_PURE_BF16: Final = {
    "weights": "bfloat16",
    "compute": "bfloat16",
    "stochastic_rounding": True,
    **_SMALL,
}


def _recipe(name: str, sentence: str, **made: object) -> Recipe:
    return Recipe(name, sentence, **made)  # type: ignore[arg-type]  # checked by the tests


_ALL: Final = (
    _recipe(
        "amp-adamw",
        "Weights and moments in fp32, matrix products in bf16, every activation kept: the fastest "
        "where a GPU has room.",
        compute="bfloat16",
        cpu_speed=0.11,
        accelerator_speed=1.0,
    ),
    _recipe(
        "fp32-adamw",
        "Everything in fp32, every activation kept: the reference, and the fastest on most CPUs.",
        cpu_speed=1.0,
        accelerator_speed=0.35,
    ),
    _recipe(
        "amp-adamw-ckpt",
        "As amp-adamw, but activations are computed twice and logits exist a few at a time.",
        compute="bfloat16",
        **_SMALL,
        cpu_speed=0.09,
        accelerator_speed=0.75,
    ),
    _recipe(
        "bf16-adamw",
        "Weights, gradients and moments in bf16, rounded stochastically.",
        **_PURE_BF16,
        states="bfloat16",
        cpu_speed=0.09,
        accelerator_speed=0.7,
    ),
    _recipe(
        "bf16-backward-adamw",
        "As bf16-adamw, but each gradient is used and freed within the backward pass.",
        **_PURE_BF16,
        states="bfloat16",
        gradients="in-backward",
        cpu_speed=0.09,
        accelerator_speed=0.7,
    ),
    _recipe(
        "bf16-backward-adamw8",
        "Weights in bf16, moments in 8 bits, gradients freed within the backward pass.",
        **_PURE_BF16,
        states="8-bit",
        gradients="in-backward",
        cpu_speed=0.08,
        accelerator_speed=0.6,
    ),
    _recipe(
        "bf16-backward-adamw4",
        "Weights in bf16, moments in 4 bits, gradients freed within the backward pass.",
        **_PURE_BF16,
        states="4-bit",
        gradients="in-backward",
        cpu_speed=0.08,
        accelerator_speed=0.6,
    ),
    _recipe(
        "bf16-backward-adafactor",
        "Weights in bf16, a factored second moment, gradients freed within the backward pass: the "
        "least memory in all.",
        **_PURE_BF16,
        optimizer="adafactor",
        states="factored",
        gradients="in-backward",
        cpu_speed=0.09,
        accelerator_speed=0.6,
    ),
    _recipe(
        "fp32-adamw-ckpt",
        "As fp32-adamw, but activations are computed twice and logits exist a few at a time.",
        **_SMALL,
        cpu_speed=0.77,
        accelerator_speed=0.25,
    ),
    _recipe(
        "fp32-backward-adamw",
        "Everything in fp32, but each gradient is used and freed within the backward pass.",
        **_SMALL,
        gradients="in-backward",
        cpu_speed=0.77,
        accelerator_speed=0.25,
    ),
    _recipe(
        "fp32-backward-adamw8",
        "Weights in fp32, moments in 8 bits, gradients freed within the backward pass.",
        **_SMALL,
        states="8-bit",
        gradients="in-backward",
        cpu_speed=0.32,
        accelerator_speed=0.24,
    ),
    _recipe(
        "fp32-backward-adafactor",
        "Weights in fp32, a factored second moment, gradients freed within the backward pass: the "
        "least memory for a CPU.",
        **_SMALL,
        optimizer="adafactor",
        states="factored",
        gradients="in-backward",
        cpu_speed=0.71,
        accelerator_speed=0.24,
    ),
    _recipe(
        "bf16-offload-adamw",
        "Weights in bf16 on the device; fp32 weights, moments and gradients in host memory: AdamW "
        "in full precision on a small GPU with much RAM.",
        weights="bfloat16",
        compute="bfloat16",
        **_SMALL,
        states_on="host",
        gradients="offloaded",
        cpu_speed=0.09,
        accelerator_speed=0.15,
    ),
    _recipe(
        "fp32-offload-adamw",
        "As bf16-offload-adamw with fp32 on the device too: fp32-adamw to the bit.",
        **_SMALL,
        states_on="host",
        gradients="offloaded",
        cpu_speed=0.75,
        accelerator_speed=0.1,
    ),
)

_BF16_BASE: Final = {"weights": "bfloat16", "compute": "bfloat16", **_SMALL}
_NF4: Final = {"adapter": Adapter("nf4"), "package": "bitsandbytes", "extra": "adapters"}
_ADAPTERS: Final = (
    _recipe(
        "lora-bf16",
        "Adapters in fp32 beside frozen weights in bf16.",
        **_BF16_BASE,
        adapter=Adapter("bfloat16"),
        cpu_speed=0.07,
        accelerator_speed=1.0,
    ),
    _recipe(
        "lora-fp32",
        "Adapters beside frozen weights in fp32, every activation kept: for a CPU.",
        adapter=Adapter("float32"),
        cpu_speed=1.0,
        accelerator_speed=0.35,
    ),
    _recipe(
        "lora-fp32-ckpt",
        "As lora-fp32, but activations are computed twice and logits exist a few at a time.",
        **_SMALL,
        adapter=Adapter("float32"),
        cpu_speed=0.68,
        accelerator_speed=0.25,
    ),
    _recipe(
        "qlora-nf4",
        "Adapters in fp32 beside frozen weights in 4 bits, products in bf16: a 7B model on an 8 GB "
        "card.",
        **_BF16_BASE,
        **_NF4,
        cpu_speed=0.07,
        accelerator_speed=0.8,
    ),
    _recipe(
        "qlora-nf4-fp32",
        "As qlora-nf4 with products in fp32: the least memory for a CPU.",
        **_SMALL,
        **_NF4,
        cpu_speed=0.63,
        accelerator_speed=0.2,
    ),
)

RECIPES: Final[Mapping[str, Recipe]] = {recipe.name: recipe for recipe in _ALL}
"""For runs that train every parameter. By name, from the fastest to the smallest on an
accelerator; :func:`fastest_first` sorts for a CPU."""
ADAPTER_RECIPES: Final[Mapping[str, Recipe]] = {recipe.name: recipe for recipe in _ADAPTERS}
"""The same for adapter runs."""
REFERENCE: Final = "fp32-adamw"
"""What every network can train with, and what others are compared to."""
ADAPTER_REFERENCE: Final = "lora-fp32"
"""The same for adapter runs."""


def reference(adapters: bool) -> Recipe:
    """What a run of the kind is compared to, and replayed with."""
    return get(ADAPTER_REFERENCE if adapters else REFERENCE)


def recipes_of(adapters: bool) -> Mapping[str, Recipe]:
    """All recipes for adapter runs, or for runs that train every parameter."""
    return ADAPTER_RECIPES if adapters else RECIPES


def get(name: str, adapters: bool | None = None) -> Recipe:
    """The recipe called ``name``, if it is one for the kind of run (None: of either).

    Raises :class:`ConfigError` on another name.
    """
    known = {**RECIPES, **ADAPTER_RECIPES} if adapters is None else recipes_of(adapters)
    if name not in known:
        kind = {None: "", True: " for an adapter run", False: " for this run"}[adapters]
        raise ConfigError(
            f"There is no recipe named {name[:64]!r}{kind}: choose one of {', '.join(known)}.",
            code="unknown-recipe",
        )
    return known[name]


def needs_less(one: Recipe, other: Recipe, device: str) -> bool:
    """Whether ``one`` takes less of the device's memory than ``other``, for any model.

    Nothing of it is larger and something is smaller: what is there throughout, or what is kept of
    activations and logits.
    """

    def sizes(recipe: Recipe) -> tuple[float, int, int, int]:
        return (
            recipe.bytes_per_parameter(device),
            int(not recipe.checkpointing),
            int(recipe.loss == "plain"),
            int(recipe.compute == "float32"),
        )

    pairs = list(zip(sizes(one), sizes(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def fastest_first(device: str, adapters: bool = False) -> list[Recipe]:
    """All recipes for a kind of run by their speed on a kind of device; equals in the registry's
    order."""
    return sorted(recipes_of(adapters).values(), key=lambda recipe: -recipe.speed(device))
