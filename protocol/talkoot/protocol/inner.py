"""The inner step: AdamW on one micro-batch. What a node runs, and what a proof or a replay repeats.

A torch module. On the CPU with a fixed number of threads a step is a pure function of (weights,
moments, tokens, rate), to the last bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from talkoot.protocol.errors import TalkootError
from talkoot.protocol.messages import InnerSpec


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, vectors (norm gains, biases) do not.

    Decay pulls a norm's gain to zero, where it has no meaning as a penalty (the convention since
    GPT-3's codebases). ``params`` are in ``named_parameters`` order within a group.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: torch.nn.Module, spec: InnerSpec) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over all parameters of ``model``, without any state yet.

    Fused where torch has a fused kernel for the device: one pass over memory and no temporaries.
    Never ``foreach``, which needs temporaries as big as the model.
    """
    groups = [
        group for group in parameter_groups(model, spec.weight_decay) if group["params"] != []
    ]

    def build(fused: bool) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            groups,
            lr=spec.learning_rate,
            betas=(spec.beta1, spec.beta2),
            eps=spec.epsilon,
            foreach=False,
            fused=fused,
        )

    try:
        return build(fused=True)
    except RuntimeError:  # no fused kernel for this device
        return build(fused=False)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    ids: Tensor,
    *,
    learning_rate: float,
    clip_norm: float,
) -> float:
    """One step in place; returns the loss before it.

    Args:
        model: a causal LM; its gradients are empty before and after.
        optimizer: of :func:`make_optimizer`.
        ids: (sequences, sequence_length) int64 on the model's device. Each token but the last of a
            sequence predicts the next one.
        learning_rate: of this step.
        clip_norm: largest global gradient norm; 0 is no clipping.

    Raises:
        TalkootError: code ``"non-finite-loss"``: the loss or the gradient is NaN or infinite. The
            weights and the moments are unchanged.
    """
    # Only the loss is kept: the logits can go before the backward pass needs their memory.
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is not annotated
    parameters = list(model.parameters())
    limit = clip_norm if clip_norm > 0 else math.inf
    # An infinite limit still gives the norm, and scales by exactly one.
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False))
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise TalkootError(
            f"The training loss is {value} with a gradient norm of {norm}: this node's lease is "
            "given up; if all nodes report it, lower the run's learning rate.",
            code="non-finite-loss",
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value
