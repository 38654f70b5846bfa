"""A first answer to "does a replica fit here?", in closed form. Pure; no torch.

One recipe so far, ``fp32-adamw``: fp32 weights, gradients and both moments (16 bytes a parameter)
and all activations kept for the backward pass. The count of activations follows what transformers'
Llama-like models save under "sdpa" attention (counted with torch's memory profiler on the CPU; see
``tests/protocol/test_memory.py``, which holds the prediction within 25 % of the measured peak for
models of a few million parameters).

What it does not know: the device context and libraries (hundreds of MB on a GPU), the allocator's
fragmentation, attention kernels that need extra memory (a device without fused attention stores
heads * sequence_length**2 floats a sequence), and families that are not Llama-like (plain MLPs,
mixtures of experts, shared layers), for which it is an estimate only. A node therefore proves that
it fits (``proof.py``); this number decides only whether to try.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.limits import GIB, KIB, MIB
from talkoot.protocol.messages import RunSpec

RECIPE: Final = "fp32-adamw"

FLOAT: Final = 4
"""Bytes of one fp32 number."""
PROCESS_BYTES: Final = 640 * MIB
"""Host memory of a trainer process that holds no model: Python, torch, transformers."""

WEIGHT_BYTES: Final = 4
MOMENT_BYTES: Final = 8
GRADIENT_BYTES: Final = 4

PUBLISHED_DISK_BYTES: Final = 4
FEEDBACK_DISK_BYTES: Final = 4
CHECKPOINT_DISK_BYTES: Final = 12
"""Local weights and both moments, per parameter."""


@dataclass(frozen=True)
class MemoryPlan:
    """What one replica needs at its peak. All in bytes.

    On a node whose device is the CPU, device and host memory are the same, and it needs the sum.
    """

    device_bytes: int
    host_bytes: int
    """The trainer process beside the device's share."""
    disk_bytes: int
    breakdown: Mapping[str, int]
    """Parts of the three, by name. Not all parts of device memory live at the same time, so they
    may add up to more than ``device_bytes``."""


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

    @property
    def parameters(self) -> int:
        attention = self.hidden * (2 * self.query + 2 * self.key)
        mlp = (3 if self.gated else 2) * self.hidden * self.mlp
        head = self.vocabulary * self.hidden * (1 if self.tied else 2)
        norms = 2 * self.layers + 1
        table = self.positions * self.hidden
        return head + table + self.layers * (attention + mlp) + norms * self.hidden


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
    )


def predict(
    config: Mapping[str, Any],
    sequence_length: int,
    micro_batch: int,
    *,
    parameters: int | None = None,
) -> MemoryPlan:
    """Predict the peak of one replica under ``fp32-adamw``.

    Args:
        config: a transformers config as plain numbers (``model.py``).
        sequence_length: tokens in a sequence.
        micro_batch: sequences in one forward pass.
        parameters: the exact count where it is known (``RunSpec.parameters``); otherwise it is
            derived from the config without biases.

    Raises:
        ConfigError: the config lacks a number that is needed.
    """
    shape = _shape(config)
    count = shape.parameters if parameters is None else parameters
    tokens = sequence_length * micro_batch

    # Floats saved a token and layer: both norms keep their input, their normalised input and their
    # output; attention keeps q, k, v, its output, and the output again laid out for o_proj; a
    # gated MLP keeps gate, activated gate, up and their product (a plain one whose GELU is written
    # out in elementary operations keeps as much).
    saved = 6 * shape.hidden + 3 * shape.query + 2 * shape.key + 4 * shape.mlp
    activations = FLOAT * tokens * (shape.layers * saved + 3 * shape.hidden)
    # At the start of the backward pass: log-probabilities, their gradient, the logits' gradient.
    logits = 3 * FLOAT * tokens * shape.vocabulary
    head_gradient = FLOAT * shape.vocabulary * shape.hidden
    layer_work = FLOAT * tokens * (2 * shape.mlp + 2 * shape.hidden)

    weights = WEIGHT_BYTES * count
    moments = MOMENT_BYTES * count
    gradients = GRADIENT_BYTES * count
    # Gradients grow while activations shrink, layer by layer, so the peak is at one of the ends.
    device = (
        weights
        + moments
        + max(
            activations + logits,
            activations + logits // 3 + head_gradient,
            activations + head_gradient + layer_work,
            gradients + layer_work,
        )
    )
    largest = FLOAT * max(shape.vocabulary, shape.mlp) * shape.hidden
    encoding = 4 * largest  # pseudo-gradient, feedback, their sum and the decoded payload
    published = PUBLISHED_DISK_BYTES * count
    feedback = FEEDBACK_DISK_BYTES * count
    checkpoint = CHECKPOINT_DISK_BYTES * count
    return MemoryPlan(
        device_bytes=device,
        host_bytes=PROCESS_BYTES + encoding,
        # The moments from before the lease stay until it is done, and a checkpoint is written
        # beside the one that it replaces.
        disk_bytes=published + feedback + moments + 2 * checkpoint,
        breakdown={
            "weights": weights,
            "gradients": gradients,
            "moments": moments,
            "activations": activations,
            "logits": logits,
            "host_process": PROCESS_BYTES,
            "host_encoding": encoding,
            "disk_published": published,
            "disk_feedback": feedback,
            "disk_moments": moments,
            "disk_checkpoint": checkpoint,
            "disk_checkpoint_swap": checkpoint,
        },
    )


def with_base(plan: MemoryPlan, spec: RunSpec) -> MemoryPlan:
    """What an adapter run needs beside its adapters: the frozen weights, in fp32 as ``lora-fp32``
    has them, and their file. A run of the other kind needs nothing more."""
    if spec.adapter is None:
        return plan
    frozen, file = FLOAT * spec.adapter.base_parameters, spec.adapter.base.size_bytes
    return replace(
        plan,
        device_bytes=plan.device_bytes + frozen,
        disk_bytes=plan.disk_bytes + file,
        breakdown={**plan.breakdown, "frozen": frozen, "disk_base": file},
    )


_UNITS: Final[Mapping[str, int]] = {
    **{"": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB},
    **{"t": 1024 * GIB, "tib": 1024 * GIB},
    **{"kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4},
}
_SIZE: Final = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]{0,3})\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes in ``"20GiB"``, ``"1.5 g"`` (binary) or ``"20GB"`` (decimal).

    Raises:
        ConfigError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(
            f"{text[:40]!r} is not a size: write a number and a unit, such as 20GiB or 500MB.",
            code="bad-size",
        )
    whole, _, fraction = match[1].partition(".")
    unit = _UNITS[match[2].lower()]
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def format_size(size_bytes: int) -> str:
    """``1536`` as ``"1.5 KiB"``: three significant digits, binary units."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    unit = units.pop(0)
    while units and abs(value) >= 999.5:  # not 1024: "1010 MiB" takes four digits
        value, unit = value / 1024, units.pop(0)
    digits = 0 if unit == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"
