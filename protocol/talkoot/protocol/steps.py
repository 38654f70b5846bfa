"""How many batches and optimizer steps a lease has. Pure; no torch.

A *batch* is one forward and backward pass over at most ``micro_batch`` sequences. A *step* is one
update of the weights, from the gradients of one batch or of several. The trainer, the validator's
replay, acceptance and the simulators all count here, so that they agree.

A lease is sized by its node's speed and by the run's tokens a round, and a batch by the memory of
the smallest device. With ``inner.max_steps`` a long lease takes larger steps instead of more of
them, so that both can be chosen for what is learned from them (ADR 28).
"""

from __future__ import annotations

from dataclasses import dataclass

from talkoot.protocol.messages import RunSpec


@dataclass(frozen=True)
class LeaseSteps:
    """A lease's batches, and the steps that they are joined into.

    Batches are spread over the steps evenly: step ``i`` of ``fewest`` takes those from
    ``i * batches // fewest`` up to ``(i + 1) * batches // fewest``, so no two differ by more than
    one batch, and a node a little faster than intended takes hardly fewer steps than it would have.

    A recipe that frees gradients in the backward pass cannot accumulate
    (``Recipe.accumulates``): it makes a step of each batch. A node that runs out of memory and
    falls to one does so from there on, so any count from ``fewest`` to ``batches`` may be honest.
    """

    sequences: int
    micro_batch: int
    max_steps: int
    """0: no limit."""

    @property
    def batches(self) -> int:
        """Of at most ``micro_batch`` sequences; only the last may be smaller."""
        return -(-self.sequences // self.micro_batch)

    @property
    def fewest(self) -> int:
        """Steps of a recipe that accumulates."""
        return min(self.batches, self.max_steps) if self.max_steps else self.batches

    def count(self, accumulates: bool) -> int:
        """Steps of the whole lease."""
        return self.left(0, accumulates)

    def end(self, batch: int, accumulates: bool) -> int:
        """The batch after the last one of the step that begins with ``batch``.

        Defined for each batch, wherever another recipe has left off.
        """
        if not accumulates:
            return batch + 1
        return self._step_after(batch) * self.batches // self.fewest

    def left(self, batch: int, accumulates: bool) -> int:
        """Steps from ``batch`` to the end."""
        if not accumulates:
            return self.batches - batch
        return self.fewest - self._step_after(batch) + 1

    def _step_after(self, batch: int) -> int:
        """The first step, counted from 0, that begins behind ``batch``."""
        return -(-(batch + 1) * self.fewest // self.batches)


def steps_of(spec: RunSpec, tokens: int) -> LeaseSteps:
    """Of a lease of ``tokens`` tokens, which are whole sequences."""
    return LeaseSteps(tokens // spec.sequence_length, spec.micro_batch, spec.inner.max_steps)
