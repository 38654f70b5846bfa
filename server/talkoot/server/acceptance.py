"""Acceptance: a pure function of (policy, what was seen so far, one contribution) to a verdict.

Structure, signature, lease, replay and finiteness were checked before (``desk.py``, ``book.py``,
the codec). Here is what needs to be known about the contribution or about others: is it anything at
all, can the inner optimizer have made it, is it as loud and shaped like the others, is it somebody
else's, do its claims fit. Each threshold says where it comes from; the measured distributions are
in ``docs/trust.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from talkoot.protocol.messages import InnerSpec, RoundTask, RunSpec
from talkoot.protocol.schedule import lease_position, step_rate
from talkoot.protocol.steps import steps_of
from talkoot.server.sketch import F32, Examination

REACH: Final = 4.0
"""Honest values may exceed the bound of :func:`most_per_element` by this: weight decay on large
weights, recipes with rounded or factored moments, and the codec's coarse levels."""
NORM_SIGMAS: Final = 8.0
MIN_NORM_SPREAD: Final = 0.25
"""Nats. Norms of honest nodes agree better than that in a homogeneous network; one with small
batches or an empty feedback need not."""
SMALLEST_RATIO: Final = 1 / 50
"""Of the usual norm: what is smaller has no effect, and was no work."""
MIN_PROFILE_DISTANCE: Final = 0.35
"""Total variation between shares of tensors; the largest honest one that was seen is 0.16."""
PROFILE_SIGMAS: Final = 8.0
COLD_DUPLICATE: Final = 0.97
"""A cosine that is a copy as long as nobody knows what is usual here."""
STEPS_EXPONENT: Final = 0.75
"""Norms grow with steps between a walk (0.5) and a march (1)."""
TIME_SLACK_SECONDS: Final = 60.0
SPEED_FACTOR: Final = 10.0


@dataclass(frozen=True)
class Effort:
    """What the inner optimizer did in a lease."""

    steps: int
    rate_sum: float
    """Sum of the inner learning rates of all steps."""


def effort_of(spec: RunSpec, task: RoundTask, claimed_steps: int) -> Effort:
    """Steps and learning rates of a lease.

    Of the claim is only as much believed as can be: without ``inner.max_steps`` nothing, as each
    batch is a step; with it the nearest count that the lease can have been trained in. Who claims
    more steps than were made has more room for values, as much as without that setting.
    """
    possible = steps_of(spec, task.lease.tokens)
    steps = min(max(claimed_steps, possible.fewest), possible.batches)
    # A schedule is smooth: its mean over the lease is taken from at most 64 points.
    points = min(steps, 64)
    total = 0.0
    for point in range(points):
        tokens = round(task.lease.tokens * (point + 1) / points)
        position = lease_position(task.tokens_before, task.tokens_round, tokens, task.lease.tokens)
        total += step_rate(spec.inner, position, possible.batches / steps)
    return Effort(steps=steps, rate_sum=total * steps / points)


def most_per_element(inner: InnerSpec, effort: Effort, feedback_decay: float) -> float:
    """A magnitude that no honest value reaches.

    AdamW moves no weight by more than ``rate * (1 - beta1) / sqrt(1 - beta2)`` in a step, or by
    ``rate`` if that is larger (Kingma and Ba, arXiv 1412.6980, section 2.1). The error feedback
    adds up earlier leases, each ``feedback_decay`` of the one after it. The share of weight decay,
    recipes and the codec is in :data:`REACH`.
    """
    step = max(1.0, (1 - inner.beta1) / math.sqrt(max(1 - inner.beta2, 1e-12)))
    kept = 1.0 / max(1.0 - feedback_decay, 1e-2)
    return REACH * step * effort.rate_sum * kept


def scaled_norm(l2_norm: float, effort: Effort) -> float:
    """Logarithm of a norm, relative to what its lease asks for, so that leases can be compared."""
    rate = max(effort.rate_sum / max(effort.steps, 1), 1e-12)
    return math.log(max(l2_norm, 1e-30) / rate) - STEPS_EXPONENT * math.log(max(effort.steps, 1))


@dataclass(frozen=True)
class Seen:
    """An accepted contribution, as acceptance remembers it."""

    node_id: str
    round: int
    scaled_norm: float
    shares: F32
    sketch: F32


@dataclass(frozen=True)
class Policy:
    """What the operator asks (``[trust]``)."""

    history: int = 8
    """Accepted contributions below which nothing is called unusual."""
    largest_ratio: float = 20.0
    """Of the usual norm; louder is refused. What is merely loud is clipped in aggregation."""


@dataclass(frozen=True)
class Claims:
    """What the node says, and what the coordinator knows about the time."""

    steps: int
    training_seconds: float
    tokens: int
    waited_seconds: float
    """From the lease's issue to its contribution, by the coordinator's clock."""
    known_speed: float
    """Tokens a second: the larger of what it proved and what it has shown since."""


@dataclass(frozen=True)
class Finding:
    """The answer, with its reason."""

    accepted: bool
    code: str
    sentence: str
    doubts: tuple[str, ...] = ()
    """Codes of what is odd and no reason to refuse."""


def _no(code: str, sentence: str) -> Finding:
    return Finding(accepted=False, code=code, sentence=sentence)


def accept(
    policy: Policy,
    found: Examination,
    *,
    inner: InnerSpec,
    feedback_decay: float,
    effort: Effort,
    claims: Claims,
    seen: Sequence[Seen],
    round_number: int,
    alike: F32 | None = None,
) -> Finding:
    """Whether a well-formed payload may count.

    Args:
        seen: accepted contributions of this and the last rounds, of anybody.
        alike: (pairs,) cosines of each two of the newest round among them; None reckons them.
    """
    if claims.steps != effort.steps:
        return _no(
            "wrong-steps",
            f"The contribution claims {claims.steps} steps where its lease has {effort.steps}.",
        )
    if found.values == 0 or found.l2_norm == 0.0:
        return _no("empty", "The contribution changes nothing: it holds no value.")
    most = most_per_element(inner, effort, feedback_decay)
    if found.largest > most:
        return _no(
            "impossible-value",
            f"The contribution moves a weight by {found.largest:.3g}; {effort.steps} steps of this "
            f"run's inner optimizer can't move one by more than {most:.3g}.",
        )
    for verdict in (
        _norm(policy, found, effort, seen),
        _profile(policy, found, seen),
        _copy(found, seen, alike),
    ):
        if verdict is not None:
            return verdict
    return Finding(
        accepted=True, code="accepted", sentence="Accepted.", doubts=_doubts(claims, effort)
    )


def _norm(
    policy: Policy, found: Examination, effort: Effort, seen: Sequence[Seen]
) -> Finding | None:
    if len(seen) < policy.history:
        return None
    logs = np.array([one.scaled_norm for one in seen])
    middle = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - middle))), MIN_NORM_SPREAD)
    away = scaled_norm(found.l2_norm, effort) - middle
    ratio = math.exp(min(away, 700.0))
    if away > max(NORM_SIGMAS * spread, math.log(policy.largest_ratio)):
        return _no(
            "norm-too-large",
            f"The contribution is {ratio:.3g} times as large as usual for its lease.",
        )
    if away < min(-NORM_SIGMAS * spread, math.log(SMALLEST_RATIO)):
        return _no(
            "norm-too-small",
            f"The contribution is {ratio:.3g} of what is usual for its lease: it was no work.",
        )
    return None


def profile_distance(a: F32, b: F32) -> float:
    """Total variation between two shares of the squared norm, 0 to 1."""
    return 0.5 * float(np.abs(a.astype(np.float64) - b).sum())


def _profile(policy: Policy, found: Examination, seen: Sequence[Seen]) -> Finding | None:
    if len(seen) < policy.history:
        return None
    shares = np.stack([one.shares for one in seen])  # (contributions, tensors)
    usual = np.median(shares, axis=0)
    usual = (usual / max(float(usual.sum()), 1e-12)).astype(np.float32)
    honest = np.array([profile_distance(row, usual) for row in shares])
    middle = float(np.median(honest))
    spread = 1.4826 * float(np.median(np.abs(honest - middle)))
    distance = profile_distance(found.shares, usual)
    if distance > max(MIN_PROFILE_DISTANCE, middle + PROFILE_SIGMAS * spread):
        return _no(
            "odd-profile",
            f"{distance:.0%} of the contribution's weight lies in other tensors than usual.",
        )
    return None


def duplicate_threshold(cosines: F32 | Sequence[float]) -> float:
    """Half-way between what two nodes' work usually has in common and being the same.

    Above :data:`COLD_DUPLICATE` nobody needs to know what is usual.
    """
    if len(cosines) < 3:
        return COLD_DUPLICATE
    usual = max(0.0, float(np.median(np.asarray(cosines, dtype=np.float64))))
    return min(COLD_DUPLICATE, max(0.5, (1 + usual) / 2))


def cosines_of_newest(seen: Sequence[Seen]) -> F32:
    """(pairs,) the cosine of each two contributions of the newest round among them."""
    latest = max(one.round for one in seen)
    newest = np.stack([one.sketch for one in seen if one.round == latest])  # (n, SIZE)
    return np.asarray((newest @ newest.T)[np.triu_indices(len(newest), k=1)])


def _copy(found: Examination, seen: Sequence[Seen], alike: F32 | None) -> Finding | None:
    if not seen:
        return None
    cosines = np.array([one.sketch @ found.sketch for one in seen])
    threshold = duplicate_threshold(cosines_of_newest(seen) if alike is None else alike)
    nearest = int(np.argmax(cosines))
    if cosines[nearest] >= threshold:
        one = seen[nearest]
        return _no(
            "copied",
            f"The contribution is {float(cosines[nearest]):.0%} the same as one of round "
            f"{one.round}; {threshold:.0%} is where work of one's own ends.",
        )
    return None


def _doubts(claims: Claims, effort: Effort) -> tuple[str, ...]:
    doubts = []
    if claims.training_seconds > claims.waited_seconds + TIME_SLACK_SECONDS:
        doubts.append("claims-too-long")
    speed = claims.tokens / max(claims.training_seconds, 1e-3)
    if claims.known_speed > 0 and speed > SPEED_FACTOR * claims.known_speed:
        doubts.append("claims-too-fast")
    return tuple(doubts)
