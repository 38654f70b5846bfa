"""A training replica as its recipe says: what a node trains, and what a proof or a replay repeats.

A torch module. On the CPU with a fixed number of threads a step is a pure function of (weights,
state, tokens, rate, seed), to the last bit.

The planner runs this very code on fake tensors, so a step reads numbers from the device in one
place only, :func:`_number`; and whatever belongs into host memory although the device may be the
CPU is allocated inside :func:`on_host`, where the planner can ask :func:`tier`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from talkoot.protocol.adapters import GetBase, build_adapted, drawn_base
from talkoot.protocol.errors import TalkootError
from talkoot.protocol.losses import use_chunked_loss
from talkoot.protocol.messages import AdapterSpec, InnerSpec
from talkoot.protocol.model import build_model, named_trainable
from talkoot.protocol.recipes import Recipe, get
from talkoot.protocol.rules import States, Step, make_rule

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CLIP_EPSILON: Final = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``."""

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
        seed: of stochastic rounding, below 2**63; a node takes its lease's.
        on_phase: is told ``"forward"``, ``"backward"`` and ``"update"`` when each begins.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, inner: InnerSpec) -> None:
        self.recipe: Final = recipe
        self.model: Final = model
        self.inner: Final = inner
        self.steps = 0
        self.seed = 0
        self.on_phase: Callable[[str], None] = lambda phase: None
        self._parameters: list[tuple[str, torch.nn.Parameter]] = named_trainable(model)
        self._trained: list[Tensor] = self._make_trained()
        self._rule = make_rule(recipe, inner, self._trained[0].device)
        self._states: list[States] = [self._make_states(tensor) for tensor in self._trained]

    # What a recipe's gradients decide -------------------------------------------------------------

    def _make_trained(self) -> list[Tensor]:
        """What the optimizer updates, one a parameter."""
        return [parameter.detach() for _, parameter in self._parameters]

    def _make_states(self, tensor: Tensor) -> States:
        return self._rule.states(tensor)

    def _update_all(self, batches: Sequence[Tensor], learning_rate: float) -> float:
        """Passes and update; returns the loss. Raises as :meth:`step` does."""
        raise NotImplementedError

    # The step -------------------------------------------------------------------------------------

    def step(self, ids: Tensor | Sequence[Tensor], learning_rate: float) -> float:
        """One inner step in place; returns the loss before it, in nats per token.

        Args:
            ids: (sequences, sequence_length) int64 on the model's device. Each token but the last
                of a sequence predicts the next one. Or several of them, one after the other, whose
                gradients are summed: the step is that of one batch with all their sequences.
            learning_rate: of this step.

        Raises:
            ValueError: several batches, and a recipe that cannot accumulate.
            TalkootError: code ``"non-finite-loss"``: the loss or the gradient is NaN or infinite.
                Load weights and state again: a recipe that updates in the backward pass may have
                spoiled them.
        """
        batches = [ids] if isinstance(ids, Tensor) else ids
        if len(batches) > 1 and not self.recipe.accumulates:
            raise ValueError(f"{self.recipe.name} cannot accumulate")
        try:
            value = self._update_all(batches, learning_rate)
        finally:
            for _, parameter in self._parameters:
                parameter.grad = None
        self.steps += 1
        return value

    def _loss(self, ids: Tensor) -> Tensor:
        self.on_phase("forward")
        # Only the loss is kept: the logits can go before the backward pass needs their memory.
        with self._autocast():
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.on_phase("backward")
        return loss

    def _backward(self, batches: Sequence[Tensor]) -> Tensor:
        """Add up the gradients of the mean loss over all sequences, which are of one length;
        that loss."""
        count = sum(batch.shape[0] for batch in batches)
        total: Tensor | None = None
        for batch in batches:
            loss = self._loss(batch)
            if len(batches) > 1:  # one batch is not even multiplied with 1: to the bit as ever
                loss = loss * (batch.shape[0] / count)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is not annotated
            value = loss.detach()
            total = value if total is None else total + value
            del loss  # and the graph, before the next forward pass
        assert total is not None
        return total

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.compute == self.recipe.weights:
            return contextlib.nullcontext()
        # Weights change in every step, so a cache of their casts would only cost memory.
        return torch.autocast(self.device.type, DTYPES[self.recipe.compute], cache_enabled=False)

    def _apply(self, index: int, gradient: Tensor, learning_rate: float, scale: Tensor) -> None:
        tensor = self._trained[index]
        step = Step(
            number=self.steps + 1,
            learning_rate=learning_rate,
            # Decay pulls a norm's gain to zero, where it has no meaning as a penalty (the
            # convention since GPT-3's codebases), so vectors have none.
            weight_decay=self.inner.weight_decay if tensor.dim() >= 2 else 0.0,
            scale=scale,
            seed=_mix(self.seed, self.steps, index),
        )
        with torch.no_grad():
            self._rule.update(tensor, gradient, self._states[index], step)

    def _clip_scale(self, norm: Tensor) -> Tensor:
        """What a gradient of this norm is multiplied with, as ``clip_grad_norm_`` has it."""
        if self.inner.clip_norm <= 0:
            return torch.ones_like(norm)
        return (self.inner.clip_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)

    # What lasts -----------------------------------------------------------------------------------

    def weights(self) -> list[tuple[str, Tensor]]:
        """What is trained, in the manifest's order: the live tensors, in the replica's own dtype.

        Difference against :meth:`as_loaded` of what was published. To change them, use
        :meth:`load_weights`.
        """
        return [
            (name, tensor)
            for (name, _), tensor in zip(self._parameters, self._trained, strict=True)
        ]

    @torch.no_grad()
    def load_weights(self, get: Callable[[str], Tensor]) -> None:
        """Fill all weights, tensor by tensor, from the CPU tensors that ``get`` returns."""
        for name, tensor in self.weights():
            tensor.copy_(get(name))

    def as_loaded(self, published: Tensor) -> Tensor:
        """A published tensor as :meth:`load_weights` has it, rounded to the dtype of its weight.

        A difference to this holds what training changed and nothing of the rounding.
        """
        return published.to(DTYPES[self.recipe.trained])

    def state(self) -> list[tuple[str, Tensor]]:
        """The optimizer's live tensors by name, zero before the first step: write them to a
        checkpoint, or copy into them (and assign ``steps``) to resume bit for bit."""
        return [
            (f"{key}:{name}", tensor)
            for (name, _), states in zip(self._parameters, self._states, strict=True)
            for key, tensor in states.items()
        ]

    def release(self) -> None:
        """Give up all memory; the replica is of no use afterwards."""
        self._states.clear()
        self._trained.clear()
        self._parameters.clear()
        self.model.to_empty(device="meta")

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self._parameters[0][1].device


class KeptReplica(Replica):
    """All gradients live until the step."""

    def _update_all(self, batches: Sequence[Tensor], learning_rate: float) -> float:
        """Nothing has changed when it raises."""
        loss = self._backward(batches)
        self.on_phase("update")
        gradients = [parameter.grad for _, parameter in self._parameters]
        return self._update_from(loss, gradients, learning_rate)

    def _update_from(
        self, loss: Tensor, gradients: list[Tensor | None], learning_rate: float
    ) -> float:
        """Clip by the norm of all, and update; a parameter without a gradient stays as it is."""
        norms = [
            torch.linalg.vector_norm(gradient, dtype=torch.float32)
            for gradient in gradients
            if gradient is not None
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        value, size = _number(loss), _number(norm)
        if not (math.isfinite(value) and math.isfinite(size)):
            raise non_finite(value, size)
        scale = self._clip_scale(norm)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self._apply(index, gradient, learning_rate, scale)
        return value


class BackwardReplica(Replica):
    """Each gradient is used, and freed, as soon as the backward pass has made it.

    The norm over all gradients is then not known in time, so each tensor's gradient is clipped by
    itself (ADR 9).
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, inner: InnerSpec) -> None:
        super().__init__(model, recipe, inner)
        self._learning_rate = 0.0
        self._norms: list[Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
            for index, (_, parameter) in enumerate(self._parameters)
        ]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def use(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            self._norms.append(norm)
            self._apply(index, gradient, self._learning_rate, self._clip_scale(norm))

        return use

    def _update_all(self, batches: Sequence[Tensor], learning_rate: float) -> float:
        (ids,) = batches
        loss = self._loss(ids)
        value = _number(loss.detach())
        if not math.isfinite(value):
            raise non_finite(value, math.nan)
        self._learning_rate = learning_rate
        self._norms.clear()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is not annotated
        size = _number(torch.linalg.vector_norm(torch.stack(self._norms)))
        self._norms.clear()
        if not math.isfinite(size):
            raise non_finite(value, size)
        return value

    def release(self) -> None:
        """Give up all memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().release()


class OffloadReplica(KeptReplica):
    """Weights on the device, everything else on the host, where the optimizer runs in fp32.

    Gradients move to the host as they are made, so the device never holds all of them; the norm of
    all is known before anything is updated. With fp32 on the device, too, it equals KeptReplica
    bit for bit.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe, inner: InnerSpec) -> None:
        with on_host():
            super().__init__(model, recipe, inner)
        self._gradients: list[Tensor | None] = [None] * len(self._parameters)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
            for index, (_, parameter) in enumerate(self._parameters)
        ]

    def _make_trained(self) -> list[Tensor]:
        return [_host_copy(parameter.detach(), torch.float32) for _, parameter in self._parameters]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def use(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            with on_host():
                moved, before = _host_copy(gradient, gradient.dtype), self._gradients[index]
                self._gradients[index] = moved if before is None else before.add_(moved)

        return use

    def _update_all(self, batches: Sequence[Tensor], learning_rate: float) -> float:
        try:
            loss = self._backward(batches)
            self.on_phase("update")
            with on_host():
                value = self._update_from(loss, self._gradients, learning_rate)
        finally:
            self._gradients = [None] * len(self._parameters)
        return value

    @torch.no_grad()
    def _apply(self, index: int, gradient: Tensor, learning_rate: float, scale: Tensor) -> None:
        super()._apply(index, gradient.float(), learning_rate, scale)
        self._gradients[index] = None
        self._parameters[index][1].copy_(self._trained[index])

    @torch.no_grad()
    def load_weights(self, get: Callable[[str], Tensor]) -> None:
        """Fill master and device."""
        super().load_weights(get)
        for (_, parameter), master in zip(self._parameters, self._trained, strict=True):
            parameter.copy_(master)

    def release(self) -> None:
        """Give up all memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().release()


def _host_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the host, page-locked where that makes the way there faster (CUDA)."""
    pinned = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=pinned)
    return host.copy_(tensor)


def _mix(seed: int, step: int, index: int) -> int:
    """A seed of its own for every step and parameter, below 2**63 (splitmix64's finaliser)."""
    mask = 2**64 - 1
    value = (seed + step * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1


def rounding_seed(lease_id: str) -> int:
    """``Replica.seed`` of a lease: nodes round differently, so that their roundings cancel, and
    whoever repeats a lease rounds alike."""
    return int(lease_id[:15], 16)


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
    if recipe.checkpointing:
        # The other kind (reentrant) would run a layer's backward pass as one of its own, in which
        # tied weights get their gradient in two parts.
        model.activation_checkpointing_enable(  # type: ignore[operator]  # of PreTrainedModel
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    if recipe.loss == "chunked":
        use_chunked_loss(model)
    kinds = {
        "kept": KeptReplica,
        "in-backward": BackwardReplica,
        "offloaded": OffloadReplica,
    }
    return kinds[recipe.gradients](model, recipe, inner)


def new_replica(
    config: dict[str, Any],
    recipe: Recipe,
    inner: InnerSpec,
    *,
    seed: int | None,
    device: torch.device | str,
    adapter: AdapterSpec | None = None,
    base: GetBase | None = None,
) -> Replica:
    """Build the model of ``config`` in the recipe's dtype and make it a replica.

    Args:
        config: the model's.
        recipe: for the kind of run.
        inner: the run's inner optimizer.
        seed: of what is trained, as in ``build_model``.
        device: where batches go.
        adapter: the run's, if only adapters are trained.
        base: the frozen weights of such a run; None draws those of a proof, from ``seed``.

    Raises:
        ConfigError: a recipe for the other kind of run.
        CapacityError, ProtocolError: as :func:`build_replica` and ``build_model`` do.
    """
    get(recipe.name, adapters=adapter is not None)
    dtype = DTYPES[recipe.weights]
    if adapter is None:
        model = build_model(config, seed=seed, device=device, dtype=dtype)
    else:
        assert recipe.adapter is not None
        model = build_adapted(
            config,
            adapter,
            drawn_base(config, adapter, seed or 0) if base is None else base,
            dtype=dtype,
            quantise=recipe.adapter.base == "nf4",
            seed=seed,
            device=device,
        )
    return build_replica(model, recipe, inner)
