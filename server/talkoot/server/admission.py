"""Admission: pure functions of (policy, capability, proof) that return a verdict with its reason.

Twice: at enrolment a node's measured memory is held against what a replica needs, before it
downloads a byte; then it proves it with real training steps, and the proof is held against what
the coordinator can check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from talkoot.protocol.memory import MemoryPlan, format_size
from talkoot.protocol.messages import Capability, Proof, Verdict
from talkoot.protocol.planner.choose import (
    Ratio,
    as_predicted,
    fastest,
    hold,
    refusal,
)
from talkoot.protocol.proof import sketch_distance, sketch_tolerance

CHECKED_BYTES: Final = 2**30
"""Weights from here on must show in a proof's peak: a CPU process may reuse less than that."""


@dataclass(frozen=True)
class AdmissionPolicy:
    """What the operator asks of a node."""

    memory_margin: float
    """Predicted memory times this must fit (>= 1)."""
    loss_tolerance: float
    """Relative difference allowed between the claimed and the recomputed loss of a proof."""
    manual_approval: bool


def judge_capability(
    policy: AdmissionPolicy,
    has: Capability,
    needs: Sequence[MemoryPlan],
    *,
    ratio: Ratio = as_predicted,
) -> Verdict:
    """Whether a node can hold a replica under any recipe, by its measured memory and disk.

    Args:
        needs: the plan of every recipe of the run's kind.
        ratio: measured over predicted, on machines of this kind.
    """
    fits = hold(needs, has, margin=policy.memory_margin, ratio=ratio)
    best = fastest(fits)
    if best is not None:
        return Verdict(
            accepted=True,
            code="fits",
            sentence=(
                f"{has.device_name} has {format_size(has.device_free_bytes)} free and a replica "
                f"under {best.recipe} needs {format_size(best.need.device)}."
            ),
        )
    code, sentence = refusal(fits, has, policy.memory_margin)
    return Verdict(accepted=False, code=code, sentence=sentence)


def _unknown(recipe: str, needs: Sequence[MemoryPlan]) -> Verdict:
    known = ", ".join(plan.recipe for plan in needs)
    return Verdict(
        accepted=False,
        code="unknown-recipe",
        sentence=f"This run has no recipe {recipe!r}: it has {known}.",
    )


def stale_proof() -> Verdict:
    """The verdict on a proof that answers no open challenge (any more)."""
    return Verdict(
        accepted=False,
        code="stale-proof",
        sentence="The proof answers no open challenge: ask for a new one and prove again.",
    )


def judge_proof(
    policy: AdmissionPolicy,
    proof: Proof,
    needs: Sequence[MemoryPlan],
    *,
    ratio: Ratio = as_predicted,
    nonce: str | None,
    expected_loss: float | None,
    expected_sketch: Sequence[float] | None = None,
) -> Verdict:
    """Whether a proof admits its node.

    Args:
        needs: the plan of every recipe of the run's kind; the proof's own is what counts.
        ratio: measured over predicted, on machines of this kind.
        nonce: the node's open challenge, or None when there is none.
        expected_loss: the loss that the coordinator computed for the same nonce, or None when the
            model is too large for it to recompute.
        expected_sketch: the fingerprint of the same steps; None: it is not looked at.
    """
    if nonce is None or proof.nonce != nonce:
        return stale_proof()
    own = [plan for plan in needs if plan.recipe == proof.recipe]
    room = judge_capability(policy, proof.capability, own or needs, ratio=ratio)
    if not own or not room.accepted:
        return room if own else _unknown(proof.recipe, needs)
    if proof.peak_bytes > proof.capability.device_total_bytes:
        return Verdict(
            accepted=False,
            code="over-the-cap",
            sentence=(
                f"The steps took {format_size(proof.peak_bytes)}, more than the "
                f"{format_size(proof.capability.device_total_bytes)} that this node may use."
            ),
        )
    held = own[0].breakdown.get("device_weights", 0)
    if held >= CHECKED_BYTES and proof.peak_bytes < held // 2:
        return Verdict(
            accepted=False,
            code="implausible-peak",
            sentence=(
                f"The proof says {format_size(proof.peak_bytes)} at peak, but the weights alone "
                f"take {format_size(held)}: the steps were not made as {proof.recipe} makes them."
            ),
        )
    if expected_loss is not None:
        difference = abs(proof.loss - expected_loss) / max(abs(expected_loss), 1e-9)
        if difference > policy.loss_tolerance:
            return Verdict(
                accepted=False,
                code="wrong-loss",
                sentence=(
                    f"The proof's loss {proof.loss:.4f} is not the {expected_loss:.4f} that the "
                    "same steps give here: the node's software or hardware computes wrongly."
                ),
            )
    if expected_sketch is not None:
        distance = sketch_distance(proof.sketch, expected_sketch)
        if distance > sketch_tolerance(proof.recipe):
            return Verdict(
                accepted=False,
                code="wrong-fingerprint",
                sentence=(
                    f"The proof's steps changed the weights otherwise than the same steps do here "
                    f"(distance {distance:.2f}): they were not all done, or not under "
                    f"{proof.recipe}; prove again, with nothing skipped."
                ),
            )
    measured = f"{format_size(proof.peak_bytes)} at peak, {proof.tokens_per_second:,.0f} tokens/s"
    if policy.manual_approval:
        return Verdict(
            accepted=False,
            code="awaits-approval",
            sentence=f"Proved ({measured}); waiting for the operator's approval.",
        )
    return Verdict(accepted=True, code="admitted", sentence=f"Admitted: proved {measured}.")
