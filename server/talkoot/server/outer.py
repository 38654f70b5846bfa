"""The outer optimizer: how the averaged pseudo-gradient moves the master weights."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from talkoot.protocol.messages import Message


class OuterSpec(Message):
    """The outer optimizer and its settings.

    ``sgd``: plain SGD, as SparseLoCo uses it (arXiv 2508.15706, algorithm 1); ``momentum`` is not
    read. ``nesterov``: DiLoCo's (arXiv 2311.08105, algorithm 1 and section 3).
    """

    optimizer: Literal["sgd", "nesterov"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @property
    def has_state(self) -> bool:
        """Whether a momentum buffer, one fp32 per parameter, goes from round to round."""
        return self.optimizer == "nesterov"


def outer_step(
    spec: OuterSpec, master: Tensor, gradient: Tensor, momentum: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One outer step of one tensor: the new master weights and the new momentum.

    ``master``, ``gradient`` and ``momentum`` are fp32 of one shape; None for the momentum is the
    first step. The arithmetic is that of ``torch.optim.SGD(nesterov=True)``, operation by
    operation. The arguments are not changed.
    """
    if spec.optimizer == "sgd":
        return torch.add(master, gradient, alpha=-spec.learning_rate), None
    if momentum is None:
        new_momentum = gradient.clone()
    else:
        new_momentum = torch.add(momentum * spec.momentum, gradient)
    step = torch.add(gradient, new_momentum, alpha=spec.momentum)
    return torch.add(master, step, alpha=-spec.learning_rate), new_momentum
