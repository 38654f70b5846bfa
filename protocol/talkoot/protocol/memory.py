"""What one replica needs: the plan, what a machine must have for it, and a first answer in closed
form. Pure; no torch.

:func:`predict` answers in microseconds. Its terms follow what ``planner/simulate.py`` counts when
it runs the same recipe on fake tensors, to which ``tests/protocol/test_memory.py`` holds it; where
the two differ the simulation is right, so use ``planner.plans``, which has both. A node proves that
it fits in the end (``proof.py``); these numbers decide only what to try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.limits import GIB, MIB
from talkoot.protocol.messages import AdapterSpec
from talkoot.protocol.recipes import Recipe, get, reference
from talkoot.protocol.sizes import format_size, parse_size

__all__ = ["MemoryPlan", "assemble", "format_size", "need", "parse_size", "predict"]

FLOAT: Final = 4
"""Bytes of one fp32 number."""
PROCESS_BYTES: Final = 640 * MIB
"""Host memory of a trainer process that holds no model: Python, torch, transformers."""
RUNTIME_BYTES: Final = GIB
"""Device memory that no tensor is in: context, libraries, attention's and cuBLAS' workspaces.
Half to one and a half GiB on CUDA; not measured here, as no accelerator was at hand."""
FORMULA_UNCERTAINTY: Final = 1.1
"""What a plan in closed form must be multiplied with to be on the safe side of a simulation."""

CHUNK: Final = 512
"""Tokens of which logits exist at a time: ``losses.CHUNK_TOKENS``."""
SLAB: Final = 2**22
"""Elements that an update works on at a time: ``rules.SLAB``."""
ENCODER_BYTES: Final = {"float32": 16, "bfloat16": 14}
"""Beside each element of the largest tensor while it is encoded, by what the replica trains in."""
PAGE: Final = 20 * MIB
"""By which the allocator's pool of large blocks grows."""
NF4_BYTES: Final = 0.516
"""Of one element in 4 bits, with its share of the scales."""
HEAP_BYTES: Final = 32 * MIB
"""NumPy's arrays while a section of a tensor is encoded, by one worker."""

Source = Literal["formula", "simulation", "table"]
_WIDTH: Final = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """What one replica needs at its peak under one recipe. All in bytes."""

    recipe: str
    device_bytes: int
    """What an accelerator's caching allocator reserves (expandable segments)."""
    allocated_bytes: int
    """What lives in tensors on the device. On a CPU, which has no such allocator, this counts."""
    smallest_cap_bytes: int
    """The least that the allocator (without expandable segments) can do with."""
    host_bytes: int
    """The trainer process beside the device's share: libraries, offloaded tensors, the encoder."""
    pinned_padding_bytes: int
    """More host memory that a CUDA device takes for page-locked tensors (powers of two)."""
    disk_bytes: int
    breakdown: Mapping[str, int]
    """Parts at the peaks, by tier and category (``device_weights``, ``host_states``,
    ``disk_feedback`` …)."""
    phases: Mapping[str, int]
    """The peak of each phase of the work, by tier (``device_backward`` …)."""
    source: Source = "formula"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "breakdown": dict(self.breakdown), "phases": dict(self.phases)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPlan:
        """Inverse of :meth:`as_dict`. Raises TypeError or ValueError on anything else."""
        numbers = {
            key: int(data[key]) for key in cls.__dataclass_fields__ if key.endswith("_bytes")
        }
        return cls(
            recipe=str(data["recipe"]),
            breakdown={str(k): int(v) for k, v in dict(data["breakdown"]).items()},
            phases={str(k): int(v) for k, v in dict(data["phases"]).items()},
            source=data["source"],
            **numbers,
        )


@dataclass(frozen=True)
class Need:
    """What a machine must have free for a plan. Bytes."""

    device: int
    """On a CPU node this is all of its memory: the host's share is in it."""
    host: int
    """0 on a CPU node."""
    disk: int


def need(plan: MemoryPlan, device: str, *, margin: float = 1.0, ratio: float = 1.0) -> Need:
    """What a machine with this kind of device must have free.

    Args:
        device: ``cpu``, or any accelerator's kind.
        margin: the operator's, >= 1, on memory.
        ratio: measured over predicted on machines of this kind.
    """
    factor = margin * ratio * (FORMULA_UNCERTAINTY if plan.source == "formula" else 1.0)
    if device == "cpu":
        return Need(int((plan.allocated_bytes + plan.host_bytes) * factor), 0, plan.disk_bytes)
    padding = plan.pinned_padding_bytes if device == "cuda" else 0
    return Need(
        int(plan.device_bytes * factor) + RUNTIME_BYTES,
        int((plan.host_bytes + padding) * margin),
        plan.disk_bytes,
    )


def assemble(
    recipe: Recipe,
    *,
    parameters: Sequence[int],
    states: int,
    device_bytes: int,
    allocated_bytes: int,
    smallest_cap_bytes: int,
    host_tensors: int,
    host_heap: int,
    parts: Mapping[str, int],
    phases: Mapping[str, int],
    source: Source,
) -> MemoryPlan:
    """A plan from the peaks of device and host; adds the process, the pinned padding and the disk.

    Args:
        parameters: elements of each parameter tensor.
        states: bytes of the optimizer's states.
        host_tensors: most bytes in tensors of the host tier.
        host_heap: most bytes beside them (the encoder's NumPy arrays).
    """
    count = sum(parameters)
    heap = -(-host_heap // MIB) * MIB  # it varies by some KB
    trained = _WIDTH[recipe.trained] * count
    published = feedback = FLOAT * count
    checkpoint = trained + states
    # Beside published weights, feedback and the moments from before the lease there are, at their
    # time: two checkpoints (one is being written), or one and the next feedback, or (while the
    # replica is brought up to date) what was fetched and two more copies of the weights.
    swap = max(2 * checkpoint, checkpoint + feedback, 3 * published)
    return MemoryPlan(
        recipe=recipe.name,
        device_bytes=device_bytes,
        allocated_bytes=allocated_bytes,
        smallest_cap_bytes=smallest_cap_bytes,
        host_bytes=PROCESS_BYTES + host_tensors + heap,
        pinned_padding_bytes=_pinned_padding(recipe, parameters),
        disk_bytes=published + feedback + states + swap,
        breakdown={
            **parts,
            "host_process": PROCESS_BYTES,
            "host_heap": heap,
            "disk_published": published,
            "disk_feedback": feedback,
            "disk_moments": states,
            "disk_swap": swap,
        },
        phases=dict(phases),
        source=source,
    )


def _pinned_padding(recipe: Recipe, parameters: Sequence[int]) -> int:
    """CUDA's allocator of page-locked memory rounds to powers of two: masters and gradients."""
    if recipe.gradients != "offloaded":
        return 0
    sizes = [count * width for count in parameters for width in (FLOAT, _WIDTH[recipe.weights])]
    return sum(2 ** math.ceil(math.log2(max(size, 512))) - size for size in sizes)


@dataclass(frozen=True)
class _Shape:
    """The numbers of a decoder that memory depends on."""

    hidden: int
    mlp: int
    layers: int
    query: int  # heads * head_dim
    key: int  # key-value heads * head_dim
    vocabulary: int
    tied: bool
    positions: int  # rows of a learned position table; 0 for rotary
    gated: bool
    experts: int  # 1: dense
    routed: int  # experts that a token goes through

    def tensors(self) -> list[tuple[int, ...]]:
        """The shape of every parameter, without biases; norms are one tensor each."""
        attention = [(self.query, self.hidden), (self.key, self.hidden), (self.key, self.hidden)]
        attention.append((self.hidden, self.query))
        if self.experts > 1:  # as transformers stacks them: gate and up in one, all in one
            mlp: list[tuple[int, ...]] = [
                (self.experts, self.hidden),
                (self.experts, 2 * self.mlp, self.hidden),
                (self.experts, self.hidden, self.mlp),
            ]
        else:
            mlp = [(self.mlp, self.hidden)] * (3 if self.gated else 2)
        layer = [*attention, *mlp, (self.hidden,), (self.hidden,)]
        ends: list[tuple[int, ...]] = [(self.vocabulary, self.hidden), (self.hidden,)]
        ends += [] if self.tied else [(self.vocabulary, self.hidden)]
        ends += [(self.positions, self.hidden)] if self.positions else []
        return ends + self.layers * layer

    @property
    def linear(self) -> int:
        """Elements of the layers' matrices: what an adapter run may hold in 4 bits."""
        mlp = (3 if self.gated else 2) * self.mlp * self.experts
        return self.layers * self.hidden * (2 * self.query + 2 * self.key + mlp)

    @property
    def saved(self) -> int:
        """Numbers that one layer keeps a token for its backward pass.

        Both norms keep their input, their normalised input and their output; attention keeps q, k,
        v, its output, and the output again laid out for o_proj; a gated MLP keeps gate, activated
        gate, up and their product (a plain one whose GELU is written out in elementary operations
        keeps as much); experts also keep their tokens sorted, and their outputs twice.
        """
        sorted_tokens = 3 * self.routed * self.hidden if self.experts > 1 else 0
        return (
            6 * self.hidden
            + 3 * self.query
            + 2 * self.key
            + 4 * self.mlp * self.routed
            + sorted_tokens
        )


_PLAIN_MLP: Final = frozenset({"gpt2", "gpt_neox", "starcoder2"})


def _number(config: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is None:
        raise ConfigError(
            f"The model config has no {names[0]}, so its memory cannot be predicted: add the key.",
            code="config-incomplete",
        )
    return default


def _shape(config: Mapping[str, Any]) -> _Shape:
    family = config.get("model_type")
    hidden = _number(config, ("hidden_size", "n_embd"))
    heads = _number(config, ("num_attention_heads", "n_head"))
    head = _number(config, ("head_dim",), hidden // heads)
    key_heads = _number(config, ("num_key_value_heads",), heads)
    learned = family == "gpt2"
    experts = _number(config, ("num_experts", "num_local_experts"), 1)
    return _Shape(
        hidden=hidden,
        mlp=_number(config, ("intermediate_size", "n_inner"), 4 * hidden),
        layers=_number(config, ("num_hidden_layers", "n_layer")),
        query=heads * head,
        key=key_heads * head,
        vocabulary=_number(config, ("vocab_size",)),
        tied=bool(config.get("tie_word_embeddings", learned)),
        positions=_number(config, ("n_positions",), 1024) if learned else 0,
        gated=family not in _PLAIN_MLP,
        experts=experts,
        routed=_number(config, ("num_experts_per_tok",), 2) if experts > 1 else 1,
    )


@dataclass(frozen=True)
class _Terms:
    """What peaks are made of, under one recipe. Bytes."""

    weights: int  # on the device
    states: int
    gradients: int  # all of them
    kept: int  # activations of all layers at the end of the forward pass
    layer: int  # what the backward pass of one layer has alive, its activations among it
    logits: int
    head: int  # the head's gradient
    largest: int  # elements of the largest tensor
    widest: int  # elements of a layer's largest tensor
    update: int  # temporaries of one tensor's update
    encode: int


def _states(recipe: Recipe, tensors: Sequence[tuple[int, ...]]) -> int:
    """Bytes of the optimizer's states, as ``rules.py`` makes them."""
    total = 0
    for shape in tensors:
        count = math.prod(shape)
        if recipe.states == "factored":
            rows, columns = count // shape[-1], count // shape[-2] if len(shape) > 1 else 0
            total += FLOAT * (count if len(shape) < 2 else rows + columns)
        elif recipe.states in ("8-bit", "4-bit") and count >= 4096:
            bits = 8 if recipe.states == "8-bit" else 4
            blocks = -(-count // (256 if bits == 8 else 128))
            total += 2 * (blocks * (256 if bits == 8 else 128) * bits // 8 + FLOAT * blocks)
        else:
            total += 2 * count * (2 if recipe.states == "bfloat16" else FLOAT)
    return total


def _frozen(recipe: Recipe, shape: _Shape, count: int) -> int:
    """Bytes of the weights that an adapter run leaves alone."""
    width = _WIDTH[recipe.weights]
    if recipe.adapter is not None and recipe.adapter.base == "nf4":
        # Half a byte, and a scale of 8 bits for every 64.
        return int(shape.linear * NF4_BYTES) + width * (count - shape.linear)
    return width * count


def _adapters(shape: _Shape, adapter: AdapterSpec, count: int) -> list[tuple[int, ...]]:
    """Stand-ins for the shapes of the trained matrices, with ``count`` elements in all."""
    largest = adapter.rank * max(shape.mlp, shape.hidden)
    number = max(count // largest, 1)
    return [(count // number,)] * number


def _terms(
    recipe: Recipe,
    shape: _Shape,
    tensors: Sequence[tuple[int, ...]],
    count: int,
    tokens: int,
    frozen: int,
) -> _Terms:
    """``count`` elements in ``tensors`` are trained, beside ``frozen`` bytes that are not."""
    width, compute = _WIDTH[recipe.weights], _WIDTH[recipe.compute]
    mixed = width != compute  # autocast: the residual stream and norms in fp32, products in bf16
    largest = max(math.prod(shape) for shape in tensors)
    layer_tensors = [math.prod(t) for t in tensors if t[0] != shape.vocabulary]
    layer_weights = shape.linear // shape.layers
    own = FLOAT if recipe.adapter else width  # of what is trained
    wide = 10 * shape.hidden  # norms are computed in fp32 whatever the weights are
    saved = compute * shape.saved + (4 - compute) * (wide if mixed else 4 * shape.hidden)
    # Autocast without a cache keeps the cast of every weight that a product was made with.
    one = tokens * saved + (compute * layer_weights if mixed else 0)
    work = tokens * compute * 2 * (shape.mlp * shape.routed + shape.hidden)
    entries = tokens * shape.vocabulary
    head_weights = shape.vocabulary * shape.hidden
    if recipe.loss == "chunked":
        logits = min(tokens, CHUNK) * shape.vocabulary * (FLOAT + (compute if compute < 4 else 0))
        logits += compute * head_weights if mixed else 0
    else:
        logits = (3 * FLOAT if not mixed else 2 * FLOAT + 2 * compute) * entries
        logits += compute * head_weights if mixed else 0
    residual = width * tokens * shape.hidden
    slabbed = (recipe.trained, recipe.states) != ("float32", "float32")
    if recipe.optimizer == "adafactor":  # rows of one matrix at a time, of a stack of them
        update = 3 * FLOAT * min(max(math.prod(tensor[-2:]) for tensor in tensors), SLAB)
    else:
        update = 5 * FLOAT * min(largest, SLAB)
    return _Terms(
        weights=own * count + frozen,
        states=_states(recipe, tensors),
        gradients=own * count,
        kept=shape.layers * residual if recipe.checkpointing else shape.layers * one + 3 * residual,
        layer=(one if recipe.checkpointing else 0) + work,
        logits=logits,
        head=0 if recipe.adapter else width * head_weights,
        largest=largest,
        widest=max(layer_tensors),
        update=update if slabbed else 0,
        encode=ENCODER_BYTES[recipe.trained] * largest,
    )


def predict(
    config: Mapping[str, Any],
    sequence_length: int,
    micro_batch: int,
    *,
    recipe: Recipe | None = None,
    parameters: int | None = None,
    adapter: AdapterSpec | None = None,
    accumulated: bool = False,
) -> MemoryPlan:
    """Predict the peak of one replica in closed form.

    Args:
        config: a transformers config as plain numbers (``model.py``).
        sequence_length: tokens in a sequence.
        micro_batch: sequences in one forward pass.
        recipe: None is the reference of the kind of run.
        parameters: the exact count where it is known (``RunSpec.parameters``); otherwise it is
            derived from the config without biases. Of an adapter run this counts the adapters.
        adapter: of an adapter run.
        accumulated: steps may be of several batches (``InnerSpec.max_steps``): a recipe that keeps
            gradients on the device then has all of them there in the next forward pass.

    Raises:
        ConfigError: the config lacks a number that is needed, or the recipe is for the other kind
            of run.
    """
    how = recipe or reference(adapter is not None)
    get(how.name, adapters=adapter is not None)
    shape = _shape(config)
    tensors = shape.tensors()
    sizes = [math.prod(tensor) for tensor in tensors]
    count = sum(sizes) if parameters is None else parameters
    frozen = 0
    if adapter is not None:
        frozen = _frozen(how, shape, adapter.base_parameters)
        tensors = _adapters(shape, adapter, count)
        sizes = [math.prod(tensor) for tensor in tensors]
    terms = _terms(how, shape, tensors, count, sequence_length * micro_batch, frozen)
    held = terms.weights + (terms.states if how.states_on == "device" else 0)
    width = _WIDTH[how.weights]
    # A tied embedding's gradient comes in two parts, the second as the last of all, and their sum.
    tied = 2 * terms.head if shape.tied else 0
    # Gradients grow while activations shrink, layer by layer, so the peak is at one of the ends.
    first = terms.kept + terms.logits
    if how.gradients == "kept":
        # Those of the batches before stay, and what a pass makes is added to them tensor by tensor.
        summed = terms.gradients if accumulated else 0
        beside = width * terms.widest if accumulated else 0
        peaks = {
            "forward": summed + first,
            "backward": max(
                summed + terms.kept + terms.logits // 3 + terms.head,
                summed + terms.kept + terms.head + terms.layer,
                terms.gradients + terms.layer + beside,
                terms.gradients + tied + (terms.head if accumulated else 0),
            ),
            "update": terms.gradients + terms.update,
        }
    else:
        peaks = {
            "forward": first,
            "backward": max(
                terms.kept + terms.logits + terms.head,
                terms.kept + tied // 2 + terms.layer + width * terms.widest + terms.update,
                terms.head + max(tied, terms.update),
            ),
        }
    host_tensors, encode = FLOAT * terms.largest, terms.encode
    if how.states_on == "host":
        master = FLOAT * count + terms.states
        host_tensors = master + max(terms.gradients + FLOAT * terms.largest, encode)
        encode = 0
    peaks["encode"] = encode
    allocated = held + max(peaks.values())
    plan = assemble(
        how,
        parameters=sizes,
        states=terms.states,
        # One page of the allocator's, and what falls between blocks.
        device_bytes=int(allocated * 1.02) + PAGE,
        allocated_bytes=allocated,
        smallest_cap_bytes=int(allocated * 1.03) + PAGE,
        host_tensors=host_tensors,
        host_heap=HEAP_BYTES,
        parts={
            "device_weights": terms.weights,
            "device_states" if how.states_on == "device" else "host_states": terms.states,
            "device_gradients": terms.gradients if how.gradients == "kept" else 0,
            "device_forward": terms.kept + terms.logits,
        },
        phases={f"device_{phase}": held + peak for phase, peak in peaks.items()},
        source="formula",
    )
    if adapter is None:
        return plan
    return replace(
        plan,
        disk_bytes=plan.disk_bytes + adapter.base.size_bytes,
        breakdown={
            **plan.breakdown,
            "device_frozen": frozen,
            "device_weights": terms.weights - frozen,
            "disk_base": adapter.base.size_bytes,
        },
    )
