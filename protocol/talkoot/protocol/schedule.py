"""The inner learning rate as a function of tokens. Pure.

The clock of the schedule is the whole network's tokens, not a node's steps: a node that joins late,
or is slow, trains at the rate that everybody else has reached.
"""

from __future__ import annotations

import math
from typing import Final

from talkoot.protocol.messages import InnerSpec


def learning_rate(spec: InnerSpec, tokens: float) -> float:
    """The rate at ``tokens`` tokens of the whole network, after the ``start_tokens`` of version 0.

    Linear from zero over ``warmup_tokens``, then down to ``learning_rate *
    final_learning_rate_ratio`` at ``total_tokens``, and that value from there on: by half a cosine
    (SGDR, arXiv 1608.03983, eq. 5, one period), or with ``wsd`` at the peak first and then by a
    straight line over the last ``decay_share`` of ``total_tokens`` (MiniCPM, arXiv 2404.06395,
    section 4; linear as in arXiv 2405.18392, section 3). ``total_tokens`` of 0 keeps the peak for
    ever.
    """
    peak = spec.learning_rate
    tokens += spec.start_tokens
    if tokens < spec.warmup_tokens:
        return peak * max(tokens, 0.0) / spec.warmup_tokens
    if spec.total_tokens == 0:
        return peak
    span = spec.total_tokens - spec.warmup_tokens
    if span <= 0:
        return peak * spec.final_learning_rate_ratio
    progress = min((tokens - spec.warmup_tokens) / span, 1.0)
    ratio = spec.final_learning_rate_ratio
    if spec.schedule == "wsd":
        left = (spec.total_tokens - min(tokens, spec.total_tokens)) / spec.total_tokens
        return peak * (ratio + (1.0 - ratio) * min(left / spec.decay_share, 1.0))
    return peak * (ratio + (1.0 - ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def step_rate(spec: InnerSpec, tokens: float, batches: float) -> float:
    """The rate of a step of ``batches`` batches that ends at ``tokens``.

    A mean over more sequences has less noise in it, which Adam would take for a reason to go no
    further: with ``rate_power`` of 0.5 larger steps go as far as the smaller ones that they stand
    for, if these are mostly noise (arXiv 2205.10287, section 4).
    """
    rate = learning_rate(spec, tokens)
    return rate if batches == 1 else rate * batches**spec.rate_power


FEEDBACK_ROUNDS: Final = 50
"""Rounds before a new one, after which a lease starts from half of what it will start from."""


def feedback_share(feedback_start: float, round_number: int) -> float:
    """The share of its error feedback that a node starts a lease of ``round_number`` from (ADR 26).

    Nothing in round 1, when feedback is large and soon wrong; half of ``feedback_start`` after
    ``FEEDBACK_ROUNDS`` rounds, nearly all of it after many.
    """
    before = max(0, round_number - 1)
    return feedback_start * (before / (before + FEEDBACK_ROUNDS))


def lease_position(
    tokens_before: int, tokens_round: int, lease_tokens_done: int, lease_tokens: int
) -> float:
    """Where the network is when a node has done ``lease_tokens_done`` of its ``lease_tokens``.

    All leases of a round are sized to end together, so a fraction of one lease stands for the same
    fraction of the round. A step is given the position it *ends* at: the first step of a warm-up
    then has a rate above zero.
    """
    return tokens_before + tokens_round * (lease_tokens_done / lease_tokens)
