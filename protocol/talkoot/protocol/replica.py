"""A training replica as its recipe says: what a node trains, and what a proof or a replay repeats.

A torch module. On the CPU with a fixed number of threads a step is a pure function of (weights,
state, tokens, rate), to the last bit.

The planner runs this very code on fake tensors, so it looks at numbers on the host in one place
only, :func:`_number`; and whatever belongs into host memory although the device may be the CPU is
allocated inside :func:`on_host`, where the planner asks :func:`tier`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from talkoot.protocol.errors import TalkootError
from talkoot.protocol.inner import make_optimizer
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.model import named_trainable
from talkoot.protocol.recipes import Recipe

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOMENTS: Final = ("exp_avg", "exp_avg_sq")

_TIER: contextvars.ContextVar[str] = contextvars.ContextVar("tier", default="device")


def tier() -> str:
    """Where what is allocated now belongs: ``"device"`` or ``"host"``."""
    return _TIER.get()


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """What is allocated inside is host memory, even when the device is the CPU."""
    token = _TIER.set("host")
    try:
        yield
    finally:
        _TIER.reset(token)


def _number(tensor: Tensor) -> float:
    """The one place where a step reads a value from the device. Fake tensors get a constant here
    (``aten._local_scalar_dense``), which must be finite."""
    return float(tensor)


def non_finite(loss: float, norm: float) -> TalkootError:
    """The error of a step whose loss or gradient is NaN or infinite."""
    return TalkootError(
        f"The training loss is {loss} with a gradient norm of {norm}: this node's lease is "
        "given up; if all nodes report it, lower the run's learning rate.",
        code="non-finite-loss",
    )


class Replica:
    """One model in training. Build it with :func:`build_replica`.

    Attributes:
        recipe: what it is made as.
        model: a causal LM in training mode; no gradient lives between steps.
        steps: optimizer steps that the state has seen; assign it when you load a state.
        on_phase: is told ``"forward"``, ``"backward"`` and ``"update"`` when each begins.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, inner: InnerSpec) -> None:
        self.recipe: Final = recipe
        self.model: Final = model
        self.inner: Final = inner
        self.on_phase: Callable[[str], None] = lambda phase: None

    @property
    def steps(self) -> int:
        """Optimizer steps that the state has seen."""
        raise NotImplementedError

    @steps.setter
    def steps(self, steps: int) -> None:
        raise NotImplementedError

    def step(self, ids: Tensor, learning_rate: float) -> float:
        """One inner step in place; returns the loss before it, in nats per token.

        Args:
            ids: (sequences, sequence_length) int64 on the model's device. Each token but the last
                of a sequence predicts the next one.
            learning_rate: of this step.

        Raises:
            TalkootError: code ``"non-finite-loss"``: the loss or the gradient is NaN or infinite.
                Load weights and state again: a recipe that updates in the backward pass may have
                spoiled them.
        """
        raise NotImplementedError

    def weights(self) -> list[tuple[str, Tensor]]:
        """What is trained, in the manifest's order: the live tensors, in the replica's own dtype.

        Difference against :meth:`as_loaded` of what was published.
        """
        return [(name, parameter.detach()) for name, parameter in named_trainable(self.model)]

    @torch.no_grad()
    def load_weights(self, get: Callable[[str], Tensor]) -> None:
        """Fill :meth:`weights`, tensor by tensor, from the CPU tensors that ``get`` returns."""
        for name, tensor in self.weights():
            tensor.copy_(get(name))

    def as_loaded(self, published: Tensor) -> Tensor:
        """A published tensor as :meth:`load_weights` has it, rounded to the dtype of its weight.

        A difference to this holds what training changed and nothing of the rounding.
        """
        return published.to(DTYPES[self.recipe.weights])

    def state(self) -> list[tuple[str, Tensor]]:
        """The optimizer's live tensors by name, zero before the first step: write them to a
        checkpoint, or copy into them (and assign ``steps``) to resume bit for bit."""
        raise NotImplementedError

    def release(self) -> None:
        """Give up all memory; the replica is of no use afterwards."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return next(self.model.parameters()).device


class KeptReplica(Replica):
    """All gradients live until the step, which torch's AdamW makes."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, inner: InnerSpec) -> None:
        super().__init__(model, recipe, inner)
        self._optimizer = make_optimizer(model, inner)
        fused = bool(self._optimizer.defaults["fused"])
        for parameter in model.parameters():
            # torch's fused kernels read the step count on the device, the others on the host.
            where = parameter.device if fused else torch.device("cpu")
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=where),
                **{key: torch.zeros_like(parameter.detach()) for key in MOMENTS},
            }
        self._steps = 0

    @property
    def steps(self) -> int:
        """Optimizer steps that the state has seen."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps
        for parameter in self.model.parameters():
            self._optimizer.state[parameter]["step"].fill_(float(steps))

    def step(self, ids: Tensor, learning_rate: float) -> float:
        """One inner step; nothing has changed when it raises."""
        self.on_phase("forward")
        # Only the loss is kept: the logits can go before the backward pass needs their memory.
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.on_phase("backward")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is not annotated
        self.on_phase("update")
        parameters = list(self.model.parameters())
        limit = self.inner.clip_norm if self.inner.clip_norm > 0 else math.inf
        # An infinite limit still gives the norm, and scales by exactly one.
        norm = _number(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False))
        value = _number(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._optimizer.zero_grad(set_to_none=True)
            raise non_finite(value, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return value

    def state(self) -> list[tuple[str, Tensor]]:
        """Both moments of every parameter."""
        return [
            (f"{key}:{name}", self._optimizer.state[parameter][key])
            for name, parameter in named_trainable(self.model)
            for key in MOMENTS
        ]

    def release(self) -> None:
        """Drop parameters and moments."""
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        self.model.to_empty(device="meta")


def build_replica(model: torch.nn.Module, recipe: Recipe, inner: InnerSpec) -> Replica:
    """Make ``model`` a replica that trains as ``recipe`` says.

    Args:
        model: of ``build_model`` with the dtype ``DTYPES[recipe.weights]``, on its device. It
            belongs to the replica from here on.
        recipe: of :data:`talkoot.protocol.recipes.RECIPES`.
        inner: the run's inner optimizer.

    Raises:
        CapacityError: the recipe cannot run on this device, or a package is missing.
    """
    return KeptReplica(model, recipe, inner)
