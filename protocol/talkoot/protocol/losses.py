"""The language-model loss without all logits at once. A torch module.

The logits of one batch are often the largest thing in a training step: 2048 tokens of a vocabulary
of 152,064 are 1.2 GB in fp32, and the ordinary loss holds them three times. Here they exist for
:data:`CHUNK_TOKENS` tokens at a time: once in the forward pass, which keeps only their loss, and
once more in the backward pass, which computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

CHUNK_TOKENS: Final = 512


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of ``hidden @ weight.T + bias`` with ``targets``, in fp32.

    Beside the gradients that it returns it needs the fp32 logits of one chunk, and those in the
    dtype of products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (tokens, width)
        weight: Tensor,  # (vocabulary, width)
        bias: Tensor | None,  # (vocabulary,)
        targets: Tensor,  # (tokens,) int64
        compute: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.compute = compute
        cast = weight.to(compute)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = _logits(hidden[part], cast, bias)
            right = logits.gather(1, targets[part, None]).squeeze(1)
            most, mass = _exponentiate(logits)
            total += (mass.log_().add_(most) - right[:, None]).sum()
            del logits  # before the next chunk's are made
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (upstream,) = gradients
        hidden, weight, bias, targets = ctx.saved_tensors
        cast = weight.to(ctx.compute)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.empty_like(hidden) if wants_hidden else None
        for_weight = torch.zeros_like(weight) if wants_weight else None
        for_bias = torch.zeros_like(bias) if wants_bias else None
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = _logits(hidden[part], cast, bias)
            _, mass = _exponentiate(logits)
            slope = logits.div_(mass)
            one = torch.ones((), dtype=slope.dtype, device=slope.device)
            slope.scatter_add_(1, targets[part, None], (-one).expand(len(slope), 1))
            slope.mul_(upstream)
            if for_bias is not None:
                for_bias += slope.sum(0)
            small = slope.to(ctx.compute)
            del logits, slope
            if for_hidden is not None:
                for_hidden[part] = small @ cast
            if for_weight is not None:
                if for_weight.dtype == ctx.compute:
                    for_weight.addmm_(small.T, hidden[part].to(ctx.compute))
                else:
                    for_weight += small.T @ hidden[part].to(ctx.compute)
            del small
        return for_hidden, for_weight, for_bias, None, None


def _logits(hidden: Tensor, cast: Tensor, bias: Tensor | None) -> Tensor:
    """(tokens, vocabulary) fp32, in memory of their own."""
    narrow = hidden.to(cast.dtype) @ cast.T
    return narrow.float() if bias is None else narrow.float() + bias.float()


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(logits - max)`` in place; returns max and the sum of it, (tokens, 1) both.

    ``torch.logsumexp`` would take the memory of all logits once more.
    """
    most = logits.amax(1, keepdim=True)
    return most, logits.sub_(most).exp_().sum(1, keepdim=True)


def chunked_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, as transformers' own loss has it.

    Args:
        hidden: (sequences, length, width), what the head would have been given.
        weight: (vocabulary, width) of the head.
        bias: (vocabulary,) of the head.
        ids: (sequences, length) int64; each token but a sequence's last predicts the next one.
    """
    width = hidden.shape[-1]
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    targets = ids[:, 1:].reshape(-1)
    apply: Callable[..., Tensor] = _ChunkedCrossEntropy.apply
    total = apply(hidden[:, :-1].reshape(-1, width), weight, bias, targets, compute)
    return total / targets.numel()


def use_chunked_loss(model: torch.nn.Module) -> None:
    """Make ``model(input_ids=ids, labels=ids).loss`` come from :func:`chunked_loss`.

    The head passes its input on, and the loss function applies the head. Whatever the model does
    to its logits in between must be linear, as scaling is; all of ``model.FAMILIES`` do no more
    (``tests/protocol/test_losses.py``). What the model adds to the loss, as the balance of a
    mixture of experts, stays.
    """
    head: torch.nn.Linear = model.get_output_embeddings()  # type: ignore[operator]

    def loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        # Mixtures of experts pass the vocabulary size by position.
        return chunked_loss(logits, head.weight, head.bias, labels)

    head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    model.loss_function = loss  # type: ignore[assignment]
