from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol import recipes
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.model import preset
from talkoot.protocol.proof import (
    proof_result,
    proof_tokens,
    sketch_distance,
    sketch_tolerance,
)
from talkoot.protocol.schedule import feedback_share, learning_rate, lease_position, step_rate

SPEC = InnerSpec(
    learning_rate=1e-3, final_learning_rate_ratio=0.1, warmup_tokens=1000, total_tokens=11_000
)
NONCE = "00112233445566778899aabbccddeeff"


def test_the_rate_warms_up_then_follows_a_cosine_to_its_final_ratio() -> None:
    assert learning_rate(SPEC, 0) == 0
    assert learning_rate(SPEC, 500) == pytest.approx(5e-4)
    assert learning_rate(SPEC, 1000) == pytest.approx(1e-3)
    assert learning_rate(SPEC, 6000) == pytest.approx(0.55e-3)
    assert learning_rate(SPEC, 11_000) == pytest.approx(1e-4)
    assert learning_rate(SPEC, 10**9) == pytest.approx(1e-4)


def test_with_wsd_the_rate_stays_at_its_peak_and_falls_in_a_straight_line_at_the_end() -> None:
    spec = SPEC.model_copy(update={"schedule": "wsd", "decay_share": 0.2})
    assert learning_rate(spec, 500) == pytest.approx(5e-4)
    assert learning_rate(spec, 1000) == learning_rate(spec, 8800) == pytest.approx(1e-3)
    assert learning_rate(spec, 9900) == pytest.approx(0.55e-3)
    assert learning_rate(spec, 11_000) == pytest.approx(1e-4)
    assert learning_rate(spec, 10**9) == pytest.approx(1e-4)


def test_a_run_that_was_made_before_there_was_a_choice_follows_its_cosine() -> None:
    written = SPEC.model_dump(exclude={"schedule", "decay_share"})
    assert learning_rate(InnerSpec(**written), 6000) == pytest.approx(0.55e-3)


@given(st.integers(0, 20_000), st.integers(0, 20_000), st.sampled_from(["cosine", "wsd"]))
def test_a_run_whose_first_version_was_trained_before_goes_on_in_the_middle_of_its_schedule(
    start: int, tokens: int, kind: str
) -> None:
    whole = SPEC.model_copy(update={"schedule": kind})
    later = whole.model_copy(update={"start_tokens": start})
    assert learning_rate(later, tokens) == learning_rate(whole, start + tokens)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_a_node_starts_from_more_of_its_feedback_as_rounds_pass(limit: float, number: int) -> None:
    assert feedback_share(limit, 1) == 0
    assert feedback_share(limit, 51) == limit / 2
    assert feedback_share(limit, number) <= feedback_share(limit, number + 1) <= limit


def test_without_a_total_the_rate_stays_at_its_peak() -> None:
    assert learning_rate(InnerSpec(learning_rate=3e-4), 0) == 3e-4
    assert learning_rate(InnerSpec(learning_rate=3e-4), 10**12) == 3e-4


def test_a_total_inside_the_warm_up_is_not_divided_by() -> None:
    odd = InnerSpec(learning_rate=1e-3, warmup_tokens=100, total_tokens=50)
    assert learning_rate(odd, 50) == pytest.approx(5e-4)
    assert learning_rate(odd, 100) == pytest.approx(1e-4)


@given(
    warmup=st.integers(0, 10**6),
    total=st.integers(0, 10**7),
    ratio=st.floats(0, 1),
    tokens=st.floats(0, 1e13),
    schedule=st.sampled_from(["cosine", "wsd"]),
    share=st.floats(0, 1, exclude_min=True),
)
def test_the_rate_is_always_between_zero_and_the_peak(
    warmup: int,
    total: int,
    ratio: float,
    tokens: float,
    schedule: Literal["cosine", "wsd"],
    share: float,
) -> None:
    spec = InnerSpec(
        learning_rate=1e-3,
        final_learning_rate_ratio=ratio,
        warmup_tokens=warmup,
        total_tokens=total,
        schedule=schedule,
        decay_share=share,
    )
    assert 0 <= learning_rate(spec, tokens) <= 1e-3 * (1 + 1e-12)


def test_a_step_of_more_batches_has_a_higher_rate_only_if_the_run_says_so() -> None:
    root = SPEC.model_copy(update={"rate_power": 0.5})
    assert step_rate(SPEC, 6000, 4) == step_rate(root, 6000, 1) == learning_rate(SPEC, 6000)
    assert step_rate(root, 6000, 4) == pytest.approx(2 * learning_rate(SPEC, 6000))


def test_a_lease_moves_through_its_round_by_its_own_fraction() -> None:
    assert lease_position(1000, 400, 50, 100) == 1200
    assert lease_position(1000, 400, 100, 100) == 1400


def test_the_tokens_of_a_nonce_are_frozen() -> None:
    tokens = proof_tokens(NONCE, steps=2, micro_batch=3, sequence_length=5, vocabulary=260)
    stream = hashlib.shake_256(b"talkoot proof\0" + NONCE.encode()).digest(4 * 30)
    expected = [int.from_bytes(stream[4 * i : 4 * i + 4], "little") % 260 for i in range(30)]
    assert tokens.shape == (2, 3, 5)
    assert tokens.reshape(-1).tolist() == expected
    assert expected[:4] == [143, 246, 258, 116]


def test_the_tokens_of_a_nonce_are_uniform() -> None:
    tokens = proof_tokens(NONCE, steps=1, micro_batch=100, sequence_length=1000, vocabulary=100)
    counts = np.bincount(tokens.reshape(-1), minlength=100)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_a_proof_over_its_caps_is_refused_before_anything_is_drawn() -> None:
    for steps, micro_batch in ((0, 1), (65, 1), (64, 2**20)):
        with pytest.raises(ProtocolError, match="over the caps"):
            proof_tokens(
                NONCE, steps=steps, micro_batch=micro_batch, sequence_length=8, vocabulary=260
            )
    with pytest.raises(ProtocolError, match="nonce"):
        proof_tokens("xyz", steps=1, micro_batch=1, sequence_length=8, vocabulary=260)


def test_the_fingerprint_tells_the_steps_that_were_done_from_others_and_not_the_recipe() -> None:
    torch.set_num_threads(1)

    def sketch(
        recipe: str, steps: int = 2, length: int = 64, nonce: str = "ab" * 16
    ) -> list[float]:
        done = proof_result(
            preset("nano"),
            nonce,
            sequence_length=length,
            micro_batch=2,
            inner=InnerSpec(),
            steps=steps,
            recipe=recipes.get(recipe),
        )
        return done[1]

    honest = sketch("fp32-adamw")
    assert sketch("fp32-adamw") == honest
    # What another kernel rounds differently is within the tolerance; what was skipped is not.
    near = sketch_tolerance("fp32-adamw")
    assert sketch_distance(sketch("fp32-backward-adamw8"), honest) < near / 2
    assert sketch_distance(sketch("amp-adamw"), honest) < near / 2
    assert sketch_distance(sketch("fp32-adamw", steps=1), honest) > 0.4 > near
    assert sketch_distance(sketch("fp32-adamw", length=32), honest) > 0.4
    assert sketch_distance(sketch("fp32-adamw", nonce="cd" * 16), honest) > 0.4
    assert sketch_distance([], honest) == 1.0


def test_threads_that_prove_at_once_get_the_fingerprints_of_their_own_nonces() -> None:
    """Recipes that compute activations again put the process's generator back on their way."""
    nonces = [hashlib.md5(bytes([n]), usedforsecurity=False).hexdigest() for n in range(24)]
    names = ("fp32-adamw", "fp32-adamw-ckpt", "bf16-backward-adafactor")
    proofs = [(nonce, recipes.get(names[n % 3])) for n, nonce in enumerate(nonces)]

    def prove(proof: tuple[str, recipes.Recipe]) -> tuple[float, list[float]]:
        nonce, recipe = proof
        return proof_result(
            preset("nano"), nonce, sequence_length=64, micro_batch=4, inner=SPEC, recipe=recipe
        )

    alone = [prove(proof) for proof in proofs]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(prove, proofs)) == alone
