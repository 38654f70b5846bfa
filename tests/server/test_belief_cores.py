"""The pure cores of who is believed: sketches, acceptance, agreement, standing, robust rules."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol.codec import SparseTensor, encode_tensor
from talkoot.protocol.manifest import Manifest, TensorSpec
from talkoot.protocol.messages import CodecSpec, InnerSpec
from talkoot.protocol.payload import verify_payload, write_payload
from talkoot.server import acceptance, agreement, robust, standing
from talkoot.server.acceptance import Claims, Effort, Finding, Policy, Seen
from talkoot.server.agreement import Member, judge, weighted_median
from talkoot.server.remembered import Alike
from talkoot.server.sketch import F32, NOISE, SIZE, Examination, Sketcher, examine, pack, unpack

unhurried = settings(deadline=None, max_examples=40)

KEY = b"k" * 32
RNG = np.random.default_rng(2**40)  # no seed of a test below


# Sketches ----------------------------------------------------------------------


def sketch_of(vector: np.ndarray, key: bytes = KEY) -> np.ndarray:
    sketcher = Sketcher(key)
    where = np.flatnonzero(vector)
    sketcher.add(where.astype(np.int64), vector[where].astype(np.float32))
    return sketcher.direction()


def test_cosines_survive_sketching_within_their_standard_error() -> None:
    rng = np.random.default_rng(1)
    errors = []
    for wanted in (0.0, 0.1, 0.5, -0.5):
        a = rng.standard_normal(40_000)
        b = wanted * a + math.sqrt(1 - wanted**2) * rng.standard_normal(40_000)
        true = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        errors.append(abs(float(sketch_of(a) @ sketch_of(b)) - true))
    assert max(errors) < 4 * NOISE


def test_with_another_key_a_sketch_is_another() -> None:
    vector = np.random.default_rng(2).standard_normal(10_000)
    assert abs(float(sketch_of(vector) @ sketch_of(vector, b"x" * 32))) < 5 * NOISE


def test_an_examination_is_what_verification_and_exact_arithmetic_say(tmp_path: Path) -> None:
    manifest = Manifest(
        tensors=(
            TensorSpec(name="a", shape=(64, 128), dtype="float32"),
            TensorSpec(name="b", shape=(100,), dtype="float32"),
        )
    )
    codec = CodecSpec()
    torch.manual_seed(0)
    tensors = {t.name: torch.randn(t.shape) for t in manifest.tensors}
    items = ((name, encode_tensor(t, codec)) for name, t in tensors.items())
    write_payload(tmp_path / "p", manifest, codec, items, {})
    found = examine(tmp_path / "p", manifest, codec, KEY)
    facts = verify_payload(tmp_path / "p", manifest, codec)
    assert found.l2_norm == pytest.approx(facts.l2_norm)
    assert found.values == facts.values
    assert found.shares.sum() == pytest.approx(1.0)
    assert float(np.linalg.norm(found.sketch)) == pytest.approx(1.0)
    assert float(unpack(pack(found.sketch)) @ found.sketch) == pytest.approx(1.0, abs=1e-3)
    assert len(pack(found.sketch)) == 2 * SIZE


# Acceptance ----------------------------------------------------------------------

EFFORT = Effort(steps=8, rate_sum=8 * 2e-3)
CLAIMS = Claims(steps=8, training_seconds=10.0, tokens=4096, waited_seconds=12.0, known_speed=400.0)


def direction(rng: np.random.Generator, common: np.ndarray, cosine: float) -> np.ndarray:
    """A unit vector with this cosine to ``common``."""
    own = rng.standard_normal(SIZE)
    own -= (own @ common) * common
    own /= np.linalg.norm(own)
    return (cosine * common + math.sqrt(1 - cosine**2) * own).astype(np.float32)


COMMON = RNG.standard_normal(SIZE)
COMMON /= np.linalg.norm(COMMON)
SHARES = (np.arange(1, 9) / 36).astype(np.float32)


def found(rng: np.random.Generator, **changes: object) -> Examination:
    fine = Examination(
        l2_norm=0.05 * math.exp(0.1 * rng.standard_normal()),
        largest=0.004,
        values=1000,
        shares=SHARES,
        sketch=direction(rng, COMMON, 0.35),
    )
    return replace(fine, **changes)  # type: ignore[arg-type]


def seen(count: int = 16, seed: int = 3) -> list[Seen]:
    rng = np.random.default_rng(seed)
    history = []
    for number in range(count):
        one = found(rng)
        scaled = acceptance.scaled_norm(one.l2_norm, EFFORT)
        history.append(Seen(f"{number % 8}", number // 8, scaled, one.shares, one.sketch))
    return history


def accept(
    one: Examination,
    history: list[Seen] | None = None,
    claims: Claims = CLAIMS,
) -> Finding:
    return acceptance.accept(
        Policy(),
        one,
        inner=InnerSpec(),
        feedback_decay=0.95,
        effort=EFFORT,
        claims=claims,
        seen=seen() if history is None else history,
        round_number=2,
    )


@unhurried
@given(st.integers(0, 2**31))
def test_an_ordinary_contribution_is_accepted_with_and_without_history(seed: int) -> None:
    one = found(np.random.default_rng(seed))
    assert accept(one).accepted
    assert accept(one, history=[]).accepted


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("empty", {"values": 0, "l2_norm": 0.0}),
        ("impossible-value", {"largest": 50.0}),
        ("norm-too-large", {"l2_norm": 5.0}),
        ("norm-too-small", {"l2_norm": 1e-5}),
        ("odd-profile", {"shares": np.eye(8, dtype=np.float32)[0]}),
        ("copied", {"sketch": seen()[-1].sketch}),
    ],
)
def test_what_is_out_of_the_ordinary_is_refused_with_its_reason(
    code: str, changes: dict[str, object]
) -> None:
    verdict = accept(found(np.random.default_rng(9), **changes))
    assert (verdict.accepted, verdict.code) == (False, code)
    assert verdict.sentence.endswith(".")


def test_before_anything_is_known_the_optimizer_s_own_bound_holds() -> None:
    verdict = accept(found(np.random.default_rng(9), largest=50.0), history=[])
    assert verdict.code == "impossible-value"
    assert accept(found(np.random.default_rng(9), l2_norm=5.0), history=[]).accepted


@unhurried
@given(st.floats(0.0, 0.2), st.integers(0, 2**31))
def test_a_copy_with_some_of_it_changed_is_known_again(changed: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original = seen()[-1].sketch
    copy = direction(rng, original.astype(np.float64), math.sqrt(1 - changed))
    assert accept(found(rng, sketch=copy)).code == "copied"


def test_where_everybody_is_alike_being_alike_is_no_copy() -> None:
    assert acceptance.duplicate_threshold([0.8, 0.82, 0.78]) == pytest.approx(0.9)
    assert acceptance.duplicate_threshold([0.1, 0.12, 0.09]) == pytest.approx(0.55)
    assert acceptance.duplicate_threshold([]) == acceptance.COLD_DUPLICATE


def test_odd_claims_are_noted_and_wrong_ones_refused() -> None:
    one = found(np.random.default_rng(4))
    assert accept(one, claims=replace(CLAIMS, steps=9)).code == "wrong-steps"
    late = accept(one, claims=replace(CLAIMS, training_seconds=1000.0))
    assert (late.accepted, late.doubts) == (True, ("claims-too-long",))
    fast = accept(one, claims=replace(CLAIMS, training_seconds=0.1))
    assert (fast.accepted, fast.doubts) == (True, ("claims-too-fast",))


# Agreement ----------------------------------------------------------------------


def members(
    rng: np.random.Generator, honest: int, liars: list[np.ndarray], cosine: float = 0.35
) -> list[Member]:
    """Honest ones have ``cosine`` squared with each other."""
    vectors = [direction(rng, COMMON, cosine) for _ in range(honest)] + liars
    return [
        Member(f"{i:02d}", float(rng.integers(500, 2000)), v.astype(np.float32), established=True)
        for i, v in enumerate(vectors)
    ]


@unhurried
@given(st.integers(0, 2**31), st.integers(4, 20), st.floats(0.25, 0.9))
def test_honest_contributions_all_count(seed: int, honest: int, cosine: float) -> None:
    judged = judge(members(np.random.default_rng(seed), honest, [], cosine), probation_share=0.25)
    assert {one.code for one in judged} == {"counted"}
    assert all(one.influence == 1.0 for one in judged)


@pytest.mark.parametrize("kind", ["reversed", "noise"])
@unhurried
@given(seed=st.integers(0, 2**31), liars=st.integers(1, 3))
def test_a_minority_that_has_nothing_in_common_with_the_rest_is_set_aside(
    kind: str, seed: int, liars: int
) -> None:
    rng = np.random.default_rng(seed)
    if kind == "reversed":
        bad = [-direction(rng, COMMON, 0.35) for _ in range(liars)]
    else:
        bad = [direction(rng, COMMON, 0.0) for _ in range(liars)]
    # So much in common that five sigmas of the sketches' noise are below what is asked for.
    judged = judge(members(rng, 9, bad, cosine=0.6), probation_share=0.25)
    assert [one.code for one in judged[:9]] == ["counted"] * 9
    assert all(one.code == "set-aside" and one.influence == 0 for one in judged[9:])


def test_colluders_that_are_alike_count_as_one() -> None:
    rng = np.random.default_rng(5)
    target = rng.standard_normal(SIZE)
    target /= np.linalg.norm(target)
    bad = []
    for _ in range(2):  # honest work and as much of a direction of their own
        mixed = direction(rng, COMMON, 0.35) + 1.0 * target
        bad.append(mixed / np.linalg.norm(mixed))
    judged = judge(members(rng, 6, bad), probation_share=0.25)
    assert [one.code for one in judged[:6]] == ["counted"] * 6
    assert [(one.code, one.influence) for one in judged[6:]] == [("alike", 0.5)] * 2


def test_whoever_is_near_to_all_makes_nobody_its_twin() -> None:
    judged = judge(members(np.random.default_rng(5), 7, [COMMON]), probation_share=0.25)
    assert {one.code for one in judged} == {"counted"}


@unhurried
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 0.9))
def test_newcomers_together_never_hold_more_than_their_share(
    old: int, new: int, share: float
) -> None:
    rng = np.random.default_rng(old * 100 + new)
    everybody = [
        Member(f"{i}", float(rng.integers(1, 99)), direction(rng, COMMON, 0.5), i < old)
        for i in range(old + new)
    ]
    factor = agreement.probation_factor(everybody, share)
    kept = sum(m.weight for m in everybody[:old])
    added = factor * sum(m.weight for m in everybody[old:])
    assert added <= share * (kept + added) * (1 + 1e-9)
    assert factor <= 1.0


def test_a_wave_of_newcomers_cannot_outvote_those_who_are_established() -> None:
    rng = np.random.default_rng(6)
    wave = [-direction(rng, COMMON, 0.35) for _ in range(24)]
    everybody = members(rng, 8, wave)
    everybody = everybody[:8] + [replace(m, established=False) for m in everybody[8:]]
    judged = judge(everybody, probation_share=0.25)
    assert [one.code for one in judged[:8]] == ["counted"] * 8
    assert {one.code for one in judged[8:]} == {"set-aside"}


@unhurried
@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 9)), min_size=1, max_size=30),
)
def test_a_weighted_median_has_at_most_half_the_weight_on_either_side(
    pairs: list[tuple[float, float]],
) -> None:
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    middle = weighted_median(values, weights)
    half = weights.sum() / 2 * (1 + 1e-9)
    assert weights[values < middle].sum() <= half
    assert weights[values > middle].sum() <= half


# Standing ----------------------------------------------------------------------

KINDS = st.sampled_from(sorted(standing.POINTS))


def run(kinds: list[str], start: standing.Standing | None = None) -> standing.Standing:
    now = start or standing.Standing()
    for number, kind in enumerate(kinds):
        now = standing.advance(
            now, standing.Evidence(kind, f"{kind}."), probation=3, now=float(number)
        )
    return now


@unhurried
@given(st.lists(KINDS, max_size=60))
def test_quarantine_comes_from_evidence_alone_and_only_a_pardon_ends_it(kinds: list[str]) -> None:
    end = run(kinds)
    assert end.suspicion >= 0
    if end.state == "quarantined":
        assert end.suspicion >= standing.QUARANTINE_AT
        assert run(["counted"] * 99, end) == end
        assert standing.pardon(now=1.0).state == "probation"
    if all(standing.POINTS[kind] <= 0 for kind in kinds):
        assert end.suspicion == 0
        assert end.state != "quarantined"


def test_a_node_is_established_by_work_that_counted_and_doubted_again_by_evidence() -> None:
    assert run(["counted"] * 2).state == "probation"
    assert run(["on-probation"] * 3).state == "established"
    assert run(["counted"] * 3 + ["set-aside"] * 2).state == "probation"
    assert run(["counted"] * 99 + ["set-aside"] * 3).state != "quarantined"
    assert run(["counted"] * 99 + ["set-aside"] * 4).state == "quarantined"
    assert run(["replay-differs", "replay-differs"]).state == "quarantined"


def test_the_false_quarantine_rate_is_under_one_percent_in_a_thousand_rounds() -> None:
    assert standing.false_quarantine(0.02, 1000) < 0.01
    assert standing.false_quarantine(0.0, 1000) == 0
    assert standing.false_quarantine(0.9, 20) > 0.99


# Robust rules ----------------------------------------------------------------------


def sparse_of(dense: np.ndarray) -> SparseTensor:
    where = np.flatnonzero(dense)
    return SparseTensor(
        torch.from_numpy(where.astype(np.int64)), torch.from_numpy(dense[where].astype(np.float32))
    )


def random_parts(seed: int, honest: int, liars: int, numel: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(honest + liars):
        row = rng.standard_normal(numel) * (1e4 if i >= honest else 1.0)
        row[rng.random(numel) < 0.5] = 0.0
        rows.append(row.astype(np.float32))
    return rows


@unhurried
@given(st.integers(0, 2**31), st.integers(3, 9), st.integers(0, 4))
def test_a_trimmed_mean_lies_between_honest_values_whatever_the_trimmed_send(
    seed: int, honest: int, liars: int
) -> None:
    liars = min(liars, honest - 1)
    rows = random_parts(seed, honest, liars)
    n = honest + liars
    parts = [(sparse_of(row), 1.0 + i, 1.0) for i, row in enumerate(rows)]
    result = robust.trimmed_mean(64, parts, (liars + 0.5) / n if liars else 0.0).numpy()
    true = np.stack(rows[:honest])
    low, high = np.minimum(true.min(0), 0), np.maximum(true.max(0), 0)
    assert (result >= low - 1e-5).all()
    assert (result <= high + 1e-5).all()


@unhurried
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_nothing_trimmed_is_the_mean_over_those_who_sent(seed: int, honest: int) -> None:
    from talkoot.server.aggregate import average

    rows = random_parts(seed, honest, 0)
    parts = [(sparse_of(row), 1.0 + i, 0.5) for i, row in enumerate(rows)]
    torch.testing.assert_close(robust.trimmed_mean(64, parts, 0.0), average(64, parts))


@unhurried
@given(st.integers(0, 2**31), st.integers(3, 9), st.integers(0, 4))
def test_the_geometric_median_stays_near_the_honest_whatever_a_minority_sends(
    seed: int, honest: int, liars: int
) -> None:
    liars = min(liars, (honest - 1) // 2)
    n = honest + liars
    rows = np.stack(random_parts(seed, honest, liars)).astype(np.float64)
    alphas = robust.geometric_median_weights(rows @ rows.T, np.ones(n))
    assert alphas.sum() == pytest.approx(1.0)
    found = alphas @ rows
    center = rows[:honest].mean(0)
    radius = np.linalg.norm(rows[:honest] - center, axis=1).max()
    # Minsker 2015, lemma 2.1 with alpha = liars / n; the smoothing and 64 steps cost a little.
    alpha = liars / n
    bound = 2 * (1 - alpha) / (1 - 2 * alpha) * radius
    assert np.linalg.norm(found - center) <= 1.1 * bound


@unhurried
@given(st.integers(0, 2**31), st.integers(3, 9), st.integers(0, 4))
def test_a_sign_majority_has_a_sign_that_honest_weight_carries(
    seed: int, honest: int, liars: int
) -> None:
    liars = min(liars, honest - 1)
    rows = random_parts(seed, honest, liars)
    parts = [(sparse_of(row), 1.0, 1.0) for row in rows]
    result = robust.sign_majority(64, parts).numpy()
    votes = np.sign(np.stack(rows)).sum(0)
    assert (np.sign(result) * np.sign(votes) >= 0).all()
    # Where all honest ones that sent agree and outnumber the liars, the liars change no sign.
    signs = np.sign(np.stack(rows[:honest]))
    clear = np.abs(signs.sum(0)) > liars
    assert (np.sign(result[clear]) == np.sign(signs.sum(0)[clear])).all()


def test_the_rules_give_the_same_bits_each_time() -> None:
    rows = random_parts(1, 6, 2)
    parts = [(sparse_of(row), 1.0, 1.0) for row in rows]
    again = list(parts)
    assert torch.equal(robust.trimmed_mean(64, parts, 0.25), robust.trimmed_mean(64, again, 0.25))
    assert torch.equal(robust.sign_majority(64, parts), robust.sign_majority(64, again))


def test_pairs_that_grow_by_a_row_are_those_reckoned_at_once() -> None:
    rng = np.random.default_rng(4)
    alike = Alike()
    sketches: dict[str, F32] = {}
    for count in range(1, 150):  # more than there is room for at first
        sketches[f"{rng.integers(2**60):x}"] = direction(rng, COMMON, 0.35)
        some = sorted(sketches)[:100]  # the others fall out, and may come in again
        seen = [Seen("n", 7, 0.0, np.zeros(3, np.float32), sketches[lease]) for lease in some]
        found = alike.pairs(7, some, [sketches[lease] for lease in some])
        assert len(found) == len(some) * (len(some) - 1) // 2
        if count % 30 == 0:
            assert found == pytest.approx(acceptance.cosines_of_newest(seen), abs=1e-5)
    assert (
        len(alike.pairs(8, ["x"], [direction(rng, COMMON, 0.35)])) == 0
    )  # another round begins anew
