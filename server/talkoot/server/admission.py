"""Admission: pure functions of (policy, capability, proof) that return a verdict with its reason.

Twice: at enrolment a node's measured memory is held against what a replica needs, before it
downloads a byte; then it proves it with real training steps, and the proof is held against what
the coordinator can check.
"""

from __future__ import annotations

from dataclasses import dataclass

from talkoot.protocol.memory import MemoryPlan, format_size
from talkoot.protocol.messages import Capability, Proof, Verdict


@dataclass(frozen=True)
class AdmissionPolicy:
    """What the operator asks of a node."""

    memory_margin: float
    """Predicted memory times this must fit (>= 1)."""
    loss_tolerance: float
    """Relative difference allowed between the claimed and the recomputed loss of a proof."""
    manual_approval: bool


def judge_capability(policy: AdmissionPolicy, has: Capability, needs: MemoryPlan) -> Verdict:
    """Whether a node can hold a replica, by its measured memory and disk."""
    # On a CPU node the device's memory *is* the host's: it must hold both shares.
    peak = needs.device_bytes + (needs.host_bytes if has.device == "cpu" else 0)
    wanted = int(peak * policy.memory_margin)
    if has.device_free_bytes < wanted:
        return Verdict(
            accepted=False,
            code="too-little-memory",
            sentence=(
                f"A replica of this model needs {format_size(wanted)} on the device "
                f"({format_size(peak)} and a margin of {policy.memory_margin:.2f}); "
                f"{has.device_name} has {format_size(has.device_free_bytes)} free of "
                f"{format_size(has.device_total_bytes)}: close what uses it, raise --max-memory, "
                "or join with a larger device."
            ),
        )
    if has.device != "cpu" and has.host_free_bytes < needs.host_bytes:
        return Verdict(
            accepted=False,
            code="too-little-host-memory",
            sentence=(
                f"A replica of this model needs {format_size(needs.host_bytes)} of host memory; "
                f"{format_size(has.host_free_bytes)} is free: close other programs or add memory."
            ),
        )
    if has.disk_free_bytes < needs.disk_bytes:
        return Verdict(
            accepted=False,
            code="too-little-disk",
            sentence=(
                f"A replica of this model needs {format_size(needs.disk_bytes)} of disk; "
                f"{format_size(has.disk_free_bytes)} is free: free some, or choose another --home."
            ),
        )
    return Verdict(
        accepted=True,
        code="fits",
        sentence=(
            f"{has.device_name} has {format_size(has.device_free_bytes)} free and a replica needs "
            f"{format_size(wanted)}."
        ),
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
    needs: MemoryPlan,
    *,
    nonce: str | None,
    expected_loss: float | None,
) -> Verdict:
    """Whether a proof admits its node.

    Args:
        nonce: the node's open challenge, or None when there is none.
        expected_loss: the loss that the coordinator computed for the same nonce, or None when the
            model is too large for it to recompute.
    """
    if nonce is None or proof.nonce != nonce:
        return stale_proof()
    room = judge_capability(policy, proof.capability, needs)
    if not room.accepted:
        return room
    if proof.peak_bytes > proof.capability.device_total_bytes:
        return Verdict(
            accepted=False,
            code="over-the-cap",
            sentence=(
                f"The steps took {format_size(proof.peak_bytes)}, more than the "
                f"{format_size(proof.capability.device_total_bytes)} that this node may use."
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
    measured = f"{format_size(proof.peak_bytes)} at peak, {proof.tokens_per_second:,.0f} tokens/s"
    if policy.manual_approval:
        return Verdict(
            accepted=False,
            code="awaits-approval",
            sentence=f"Proved ({measured}); waiting for the operator's approval.",
        )
    return Verdict(accepted=True, code="admitted", sentence=f"Admitted: proved {measured}.")
