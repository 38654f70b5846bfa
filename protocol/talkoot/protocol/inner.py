"""The inner optimizer, as a run's :class:`InnerSpec` says. A torch module."""

from __future__ import annotations

import torch

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
