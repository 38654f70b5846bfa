"""Batches and steps of a lease: pure, and the same for whoever counts."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from talkoot.protocol.steps import LeaseSteps

LEASES = st.builds(LeaseSteps, st.integers(1, 300), st.integers(1, 8), st.integers(0, 60))


def joined(lease: LeaseSteps, accumulates: bool) -> list[int]:
    """Batches in each step."""
    found, batch = [], 0
    while batch < lease.batches:
        end = lease.end(batch, accumulates)
        found.append(end - batch)
        batch = end
    assert batch == lease.batches
    return found


@given(LEASES)
def test_all_batches_are_in_one_step_each_and_no_two_steps_differ_by_more_than_one(
    lease: LeaseSteps,
) -> None:
    steps = joined(lease, accumulates=True)
    assert len(steps) == lease.fewest == lease.count(accumulates=True)
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1
    if lease.max_steps:
        assert len(steps) == min(lease.batches, lease.max_steps)
    else:
        assert steps == [1] * lease.batches


@given(LEASES)
def test_a_recipe_that_cannot_accumulate_makes_a_step_of_each_batch(lease: LeaseSteps) -> None:
    assert joined(lease, accumulates=False) == [1] * lease.batches
    assert lease.count(accumulates=False) == lease.batches


@given(LEASES, st.integers(0, 300), st.booleans())
def test_what_is_left_is_counted_right_wherever_another_recipe_left_off(
    lease: LeaseSteps, batch: int, accumulates: bool
) -> None:
    assume(batch <= lease.batches)
    steps, at = 0, batch
    while at < lease.batches:
        at, steps = lease.end(at, accumulates), steps + 1
    assert steps == lease.left(batch, accumulates)


@given(LEASES, st.integers(0, 60))
def test_the_number_of_steps_tells_where_a_node_fell_to_a_recipe_that_cannot_accumulate(
    lease: LeaseSteps, fell: int
) -> None:
    assume(fell <= lease.fewest)

    def ends(accumulates_at: list[bool]) -> list[int]:
        found, batch = list[int](), 0
        while batch < lease.batches:
            batch = lease.end(batch, accumulates_at[len(found)])
            found.append(batch)
        return found

    made = ends([True] * fell + [False] * lease.batches)
    assert lease.fewest <= len(made) <= lease.batches
    again, batch = list[int](), 0
    while batch < lease.batches:  # as ``replay_lease`` does
        accumulates = len(again) + lease.left(batch, accumulates=False) > len(made)
        batch = lease.end(batch, accumulates)
        again.append(batch)
    assert again == made


def test_a_node_a_little_faster_than_intended_takes_as_many_steps() -> None:
    assert joined(LeaseSteps(16 * 4, 4, 15), accumulates=True).count(2) == 1
    assert LeaseSteps(16 * 4, 4, 15).fewest == 15
