"""The outer optimizer: how the averaged pseudo-gradient moves the master weights.

torch is not imported here: the configuration reads :class:`OuterSpec`, and ``--help`` must be
quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from talkoot.protocol.messages import Message

if TYPE_CHECKING:
    from torch import Tensor


class OuterSpec(Message):
    """The outer optimizer and its settings, which are the operator's ``[outer]`` as well.

    ``sgd``: plain SGD, as SparseLoCo uses it (arXiv 2508.15706, algorithm 1). ``nesterov``:
    DiLoCo's (arXiv 2311.08105, algorithm 1 and section 3).
    """

    optimizer: Literal["sgd", "nesterov"] = "sgd"
    """``nesterov`` keeps one more fp32 a parameter on the coordinator's disk."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Of the averaged pseudo-gradient."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of ``nesterov``; ``sgd`` does not read it."""
    feedback_decay: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Of what an update left out, from round to round (the coordinator's error feedback). Nodes do
    not see what is held back and find part of it again, so that at 1 it is applied twice."""

    @property
    def has_state(self) -> bool:
        """Whether a momentum buffer, one fp32 per parameter, goes from round to round."""
        return self.optimizer == "nesterov"


def outer_step(
    spec: OuterSpec, master: Tensor, gradient: Tensor, momentum: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One outer step of one tensor: the new master weights and the new momentum.

    ``master``, ``gradient`` and ``momentum`` are fp32 of one shape; None for the momentum is the
    first step. The arguments are not changed.
    """
    master, gradient = master.clone(), gradient.clone()
    if momentum is not None:
        momentum = momentum.clone()
    return master, outer_step_(spec, master, gradient, momentum)


def outer_step_(
    spec: OuterSpec, master: Tensor, gradient: Tensor, momentum: Tensor | None
) -> Tensor | None:
    """:func:`outer_step` in place: ``master`` is moved, ``gradient`` is used up, and the new
    momentum is returned (in ``momentum`` if there was one).

    The arithmetic is that of ``torch.optim.SGD(nesterov=True)``, operation by operation. The step
    does not read ``master``, so what it moves may be the weights, or their distance to something.
    """
    if spec.optimizer == "sgd":
        master.add_(gradient, alpha=-spec.learning_rate)
        return None
    if momentum is None:
        momentum = gradient.clone()
    else:
        momentum.mul_(spec.momentum).add_(gradient)
    master.add_(gradient.add_(momentum, alpha=spec.momentum), alpha=-spec.learning_rate)
    return momentum
