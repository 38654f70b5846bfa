"""Proof of capacity: real training steps that the coordinator can repeat.

The challenge is a nonce. It decides the initial weights and the tokens, so a node cannot know the
loss without doing the work, and the coordinator gets the same loss from the same nonce (up to
rounding: another device sums in another order). torch is imported when the steps run.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.messages import AdapterSpec, InnerSpec
from talkoot.protocol.recipes import Recipe, get, reference
from talkoot.protocol.schedule import learning_rate

if TYPE_CHECKING:
    import torch

_ALONE: Final = threading.Lock()
"""Checkpointed activations put torch's generator back to where it was, and it is the process's.
Done while another thread draws the weights of its nonce, those would be others."""
NONCE: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
MAX_PROOF_STEPS: Final = 64
MAX_PROOF_TOKENS: Final = 2**26
"""Tokens that one proof may draw: they are drawn at once, 12 bytes each."""


SKETCH: Final = 64
"""Numbers in a fingerprint."""
SKETCH_TENSORS: Final = 16
SKETCH_ELEMENTS: Final = 2**18
"""Of each of these tensors, in one piece."""


def proof_seed(nonce: str) -> int:
    """Seed of the initial weights: the nonce as a number, below 2**63."""
    return int(nonce, 16) % 2**63


def proof_tokens(
    nonce: str, *, steps: int, micro_batch: int, sequence_length: int, vocabulary: int
) -> npt.NDArray[np.int64]:
    """Uniform tokens of a nonce: (steps, micro_batch, sequence_length) int64.

    SHAKE-256 of ``b"talkoot proof\\0" + nonce`` read as little-endian uint32, modulo the
    vocabulary. The bias of the modulo is below ``vocabulary / 2**32``. The same on every platform.

    Raises:
        ProtocolError: not a nonce, or more steps or tokens than a proof may have.
    """
    if NONCE.fullmatch(nonce) is None:
        raise ProtocolError("A proof's nonce is 32 hexadecimal digits.", code="bad-nonce")
    count = steps * micro_batch * sequence_length
    if not 1 <= steps <= MAX_PROOF_STEPS or count > MAX_PROOF_TOKENS:
        raise ProtocolError(
            f"A proof of {steps} steps with {count} tokens is over the caps of {MAX_PROOF_STEPS} "
            f"steps and {MAX_PROOF_TOKENS} tokens.",
            code="proof-too-large",
        )
    stream = hashlib.shake_256(b"talkoot proof\0" + nonce.encode("ascii")).digest(4 * count)
    ids = np.frombuffer(stream, dtype="<u4").astype(np.int64) % vocabulary
    return ids.reshape(steps, micro_batch, sequence_length)


def proof_batches(inner: InnerSpec, recipe: Recipe) -> int:
    """Batches in one step of a proof: two where leases may have such steps, as the gradients of the
    first are then alive beside all of the second, and the peak must be seen."""
    return 2 if inner.max_steps and recipe.accumulates else 1


def proof_steps(
    config: dict[str, Any],
    nonce: str,
    *,
    sequence_length: int,
    micro_batch: int,
    inner: InnerSpec,
    steps: int,
    recipe: Recipe | None = None,
    adapter: AdapterSpec | None = None,
    device: torch.device | str = "cpu",
    mark: list[float] | None = None,
) -> Iterator[float]:
    """Train from the nonce's weights on the nonce's tokens and yield the loss of each step.

    In an adapter run the nonce decides the frozen weights, too. ``recipe`` (None is the reference
    of the kind of run) at full sequence and micro-batch, with the run's inner
    optimizer at the schedule's peak rate (no warm-up), so that the moments are allocated and used.
    A step is of :func:`proof_batches` batches.

    ``mark`` gets the fingerprint of what the steps changed, after the last of them: it cannot be
    had without doing them, while the loss of a model that knows nothing is close to the logarithm
    of its vocabulary.

    Raises:
        ProtocolError: the config is refused, or the proof is over its caps.
        TalkootError: code ``"non-finite-loss"``.
    """
    import torch

    from talkoot.protocol.replica import new_replica

    chosen = reference(adapter is not None) if recipe is None else recipe
    batches = proof_batches(inner, chosen)
    tokens = proof_tokens(
        nonce,
        steps=steps,
        micro_batch=batches * micro_batch,
        sequence_length=sequence_length,
        vocabulary=int(config["vocab_size"]),
    )
    seed = proof_seed(nonce)
    replica = new_replica(config, chosen, inner, seed=seed, device=device, adapter=adapter)
    rate = learning_rate(inner, max(0, inner.warmup_tokens - inner.start_tokens))
    before = _sketch(replica.weights(), seed)
    for ids in tokens:
        yield replica.step(torch.split(torch.from_numpy(ids).to(device), micro_batch), rate)
    if mark is not None:
        after = _sketch(replica.weights(), seed)
        mark.extend(b - a for a, b in zip(before, after, strict=True))


def _sketch(weights: Sequence[tuple[str, torch.Tensor]], seed: int) -> list[float]:
    """A linear sketch (signed sums) of pieces of some tensors, which the seed chooses.

    Of the difference of two replicas it is the difference of their sketches, so no copy is kept.
    """
    import torch

    dice = np.random.default_rng([seed % 2**32, seed >> 32])
    picked = dice.permutation(len(weights))[:SKETCH_TENSORS]
    total = np.zeros(SKETCH)
    for number in picked:
        flat = weights[int(number)][1].detach().reshape(-1)
        length = min(flat.numel(), SKETCH_ELEMENTS)
        start = int(dice.integers(flat.numel() - length + 1))
        piece = flat[start : start + length].to("cpu", torch.float64).numpy()
        signed = np.zeros(-(-length // SKETCH) * SKETCH)
        signed[:length] = piece * (2.0 * dice.integers(0, 2, length) - 1.0)
        total += signed.reshape(-1, SKETCH).sum(0)
    return [float(value) for value in total]


def sketch_distance(claimed: Sequence[float], expected: Sequence[float]) -> float:
    """Distance of two fingerprints, relative to the expected one; 1 for one that is missing."""
    if len(claimed) != len(expected):
        return 1.0
    size = math.dist(expected, [0.0] * len(expected))
    return math.dist(claimed, expected) / max(size, 1e-30)


def sketch_tolerance(recipe: str) -> float:
    """How far the fingerprint of honest steps may be from the coordinator's own.

    On the same kind of device they are the same. AdamW's first steps take the sign of a gradient,
    and other kernels turn the signs of the smallest. Measured on a model of 111 thousand parameters
    after two steps: fp32 against bf16 products 0.06, against pure bf16 0.10 to 0.14; one step left
    out 0.48, half the sequence 1.1 (docs/LOG.md).
    """
    return 0.3 if get(recipe).compute == "bfloat16" else 0.2


def proof_result(
    config: dict[str, Any],
    nonce: str,
    *,
    sequence_length: int,
    micro_batch: int,
    inner: InnerSpec,
    steps: int = 2,
    recipe: Recipe | None = None,
    adapter: AdapterSpec | None = None,
    device: torch.device | str = "cpu",
) -> tuple[float, list[float]]:
    """What ``Proof.loss`` and ``Proof.sketch`` must be near: mean loss of :func:`proof_steps`, in
    nats per token, and the fingerprint of what the steps changed. Thread-safe: one at a time."""
    mark: list[float] = []
    steps_of_nonce = proof_steps(
        config,
        nonce,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        inner=inner,
        steps=steps,
        recipe=recipe,
        adapter=adapter,
        device=device,
        mark=mark,
    )
    with _ALONE:
        losses = list(steps_of_nonce)
    return sum(losses) / len(losses), mark
