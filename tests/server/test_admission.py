"""Admission as a function: what a node has and proved, against what a replica needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol.memory import MemoryPlan
from talkoot.protocol.messages import Capability, Proof
from talkoot.protocol.planner.choose import Holder, Holders, hold, ways_to_fit
from talkoot.server.admission import AdmissionPolicy, judge_capability, judge_proof
from talkoot.server.measured import kind_of, ratios

GIB = 2**30
POLICY = AdmissionPolicy(memory_margin=1.25, loss_tolerance=0.02, manual_approval=False)


def plan(recipe: str = "fp32-adamw", device: int = 8, host: int = 2, disk: int = 20) -> MemoryPlan:
    """Sizes in GiB."""
    return MemoryPlan(
        recipe=recipe,
        device_bytes=device * GIB,
        allocated_bytes=device * GIB,
        smallest_cap_bytes=device * GIB,
        host_bytes=host * GIB,
        pinned_padding_bytes=0,
        disk_bytes=disk * GIB,
        breakdown={"device_weights": device * GIB // 2},
        phases={},
        source="simulation",
    )


NEEDS = [plan()]
NONCE = "0123456789abcdef" * 2


def capability(
    device: str = "cuda",
    *,
    free: int = 24 * GIB,
    total: int = 24 * GIB,
    host_free: int = 16 * GIB,
    disk_free: int = 100 * GIB,
) -> Capability:
    return Capability(
        device=device,
        device_name="Card 9000",
        device_total_bytes=total,
        device_free_bytes=free,
        host_total_bytes=32 * GIB,
        host_free_bytes=host_free,
        disk_free_bytes=disk_free,
        cpu_count=8,
        torch_version="2",
        talkoot_version="0",
    )


def proof(
    loss: float = 5.0, *, nonce: str = NONCE, peak: int = 9 * GIB, free: int = 24 * GIB
) -> Proof:
    return Proof(
        run_id="run",
        node_id="0123456789abcdef",
        nonce=nonce,
        recipe="fp32-adamw",
        steps=2,
        loss=loss,
        peak_bytes=peak,
        predicted_bytes=8 * GIB,
        tokens_per_second=1234.0,
        capability=capability(free=free),
    )


def test_a_device_with_room_for_replica_and_margin_is_enough() -> None:
    assert judge_capability(POLICY, capability(free=11 * GIB), NEEDS).accepted


def test_one_byte_below_the_margin_is_too_little_and_the_sentence_has_the_numbers() -> None:
    verdict = judge_capability(POLICY, capability(free=11 * GIB - 1), NEEDS)
    assert (verdict.accepted, verdict.code) == (False, "too-little-memory")
    for part in ("11 GiB", "1.25", "Card 9000", "24 GiB", "close programs"):
        assert part in verdict.sentence


def test_the_fastest_recipe_that_fits_is_the_one_that_is_named() -> None:
    needs = [plan("bf16-backward-adafactor", 5), plan("bf16-adamw", 12), plan("amp-adamw", 30)]
    verdict = judge_capability(POLICY, capability(), needs)
    assert verdict.accepted
    assert "bf16-adamw needs 16 GiB" in verdict.sentence


def test_a_refused_volunteer_sees_all_recipes_and_the_three_cheapest_ways_to_fit() -> None:
    needs = [plan("bf16-adamw", 12), plan("bf16-backward-adafactor", 6), plan("amp-adamw", 30)]
    has = capability(free=6 * GIB, total=8 * GIB).model_copy(
        update={
            "device_physical_bytes": 24 * GIB,
        }
    )
    sentence = judge_capability(POLICY, has, needs).sentence
    first, second, third = (sentence.index(f"({number})") for number in (1, 2, 3))
    assert "raise --max-vram to 9GiB (bf16-backward-adafactor)" in sentence[first:second]
    assert "48 GiB (amp-adamw)" in sentence[second:third]
    assert "raise --max-vram to 16GiB (bf16-adamw)" in sentence[third:]
    head, *rows = sentence.splitlines()[1:]
    assert head.split() == ["recipe", "device", "host", "disk", "lacks"]
    assert [row.split()[0] for row in rows] == ["amp-adamw", "bf16-adamw", needs[1].recipe]


def test_programs_to_close_are_named_where_a_few_hold_enough() -> None:
    has = capability(free=5 * GIB, total=24 * GIB)
    fits = hold([plan("bf16-backward-adafactor", 6)], has, margin=1.0)
    lacks = fits[0].lacks_device
    assert lacks > GIB
    firefox, game = Holder("firefox", 1, GIB), Holder("game", 2, 2 * GIB)
    untold = Holder("x", 3, None)
    sizes = {
        (): "close programs: ",
        (untold,): "close programs: ",
        (firefox, untold): "close programs: ",
        (game, firefox): "close game: ",
        (untold, firefox, game): "close firefox and game: ",
    }
    for held, said in sizes.items():
        (way,) = ways_to_fit(fits, has, Holders(device=held))
        assert way.startswith(said), held


def test_what_others_of_its_kind_measured_corrects_what_is_predicted() -> None:
    has = capability(free=11 * GIB)
    assert not judge_capability(POLICY, has, NEEDS, ratio=lambda recipe: 1.1).accepted
    assert judge_capability(POLICY, has, NEEDS, ratio=lambda recipe: 0.9).accepted


def test_measurements_of_another_kind_and_absurd_ones_change_little() -> None:
    one, liar = proof(peak=9 * GIB), proof(peak=80 * GIB)
    kind = kind_of(one.capability)
    assert ratios([("a", one)], kind)("fp32-adamw") == 9 / 8
    assert ratios([("a", liar)], kind)("fp32-adamw") == 1.3
    assert ratios([("a", one), ("a", liar)], kind)("fp32-adamw") == 9 / 8  # its newest counts
    assert ratios([("a", one)], kind)("bf16-adamw") == 1.0
    assert ratios([("a", one)], ("cuda", "another", "", "2"))("fp32-adamw") == 1.0


def test_a_peak_below_half_of_the_weights_is_not_believed() -> None:
    verdict = judge_proof(POLICY, proof(peak=GIB), NEEDS, nonce=NONCE, expected_loss=5.0)
    assert verdict.code == "implausible-peak"


def test_a_proof_of_a_recipe_that_this_run_does_not_have_is_refused() -> None:
    other = proof().model_copy(update={"recipe": "lora-bf16"})
    verdict = judge_proof(POLICY, other, NEEDS, nonce=NONCE, expected_loss=5.0)
    assert verdict.code == "unknown-recipe"


def test_a_processor_must_hold_the_device_share_and_the_host_share_together() -> None:
    assert not judge_capability(POLICY, capability("cpu", free=12 * GIB), NEEDS).accepted
    assert judge_capability(POLICY, capability("cpu", free=13 * GIB), NEEDS).accepted


def test_a_device_of_its_own_does_not_replace_host_memory() -> None:
    verdict = judge_capability(POLICY, capability(host_free=2 * GIB), NEEDS)
    assert verdict.code == "too-little-host-memory"
    assert "2 GiB of host memory" in verdict.sentence


def test_a_full_disk_is_named_with_the_way_out() -> None:
    verdict = judge_capability(POLICY, capability(disk_free=19 * GIB), NEEDS)
    assert verdict.code == "too-little-disk"
    assert "--home" in verdict.sentence


rooms = st.integers(0, 40 * GIB)


@given(rooms, rooms, rooms, st.integers(0, 8 * GIB), st.sampled_from(["cpu", "cuda"]))
def test_more_room_never_turns_a_yes_into_a_no(
    device: int, host: int, disk: int, more: int, kind: str
) -> None:
    def judged(extra: int) -> bool:
        has = capability(kind, free=device + extra, host_free=host + extra, disk_free=disk + extra)
        return judge_capability(POLICY, has, NEEDS).accepted

    assert judged(more) or not judged(0)


def test_a_good_proof_admits_and_says_what_was_measured() -> None:
    verdict = judge_proof(POLICY, proof(5.05), NEEDS, nonce=NONCE, expected_loss=5.0)
    assert (verdict.accepted, verdict.code) == (True, "admitted")
    assert "1,234 tokens/s" in verdict.sentence
    assert "9 GiB at peak" in verdict.sentence


@pytest.mark.parametrize("challenge", [None, "f" * 32])
def test_a_proof_without_its_open_challenge_is_stale(challenge: str | None) -> None:
    verdict = judge_proof(POLICY, proof(), NEEDS, nonce=challenge, expected_loss=5.0)
    assert (verdict.accepted, verdict.code) == (False, "stale-proof")


def test_room_that_has_gone_since_enrolment_is_found_at_the_proof() -> None:
    verdict = judge_proof(POLICY, proof(free=GIB), NEEDS, nonce=NONCE, expected_loss=5.0)
    assert verdict.code == "too-little-memory"


def test_steps_that_took_more_than_the_volunteer_allows_do_not_admit() -> None:
    verdict = judge_proof(POLICY, proof(peak=25 * GIB), NEEDS, nonce=NONCE, expected_loss=5.0)
    assert verdict.code == "over-the-cap"


@given(st.floats(0.01, 20), st.floats(-1, 1))
def test_a_loss_admits_exactly_within_the_tolerance(expected: float, off: float) -> None:
    claimed = expected * (1 + off)
    verdict = judge_proof(POLICY, proof(claimed), NEEDS, nonce=NONCE, expected_loss=expected)
    difference = abs(claimed - expected) / expected
    assert verdict.accepted == (difference <= POLICY.loss_tolerance)
    assert verdict.code == ("admitted" if verdict.accepted else "wrong-loss")


def test_a_model_too_large_to_recompute_is_admitted_by_its_measurements() -> None:
    assert judge_proof(POLICY, proof(1e9), NEEDS, nonce=NONCE, expected_loss=None).accepted


def test_with_manual_approval_a_good_proof_waits_and_a_bad_one_is_still_refused() -> None:
    policy = replace(POLICY, manual_approval=True)
    good = judge_proof(policy, proof(), NEEDS, nonce=NONCE, expected_loss=5.0)
    bad = judge_proof(policy, proof(), NEEDS, nonce=NONCE, expected_loss=9.0)
    assert (good.accepted, good.code) == (False, "awaits-approval")
    assert bad.code == "wrong-loss"
