from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol.limits import MIB
from talkoot.protocol.planner.allocator import Allocator, OverTheCap, replay, smallest_cap


@st.composite
def traces(draw: Any) -> list[tuple[int, int, str]]:
    """Allocations and ends in a legal order."""
    alive: list[int] = []
    events = []
    for number in range(draw(st.integers(1, 40))):
        if alive and draw(st.booleans()):
            events.append((alive.pop(draw(st.integers(0, len(alive) - 1))), 0, ""))
        events.append((number, draw(st.integers(1, 64 * MIB)), ""))
        alive.append(number)
    return events


def test_a_small_request_takes_a_segment_of_two_mebibytes_that_others_share() -> None:
    allocator = Allocator()
    allocator.allocate(0, 1)
    assert (allocator.reserved, allocator.allocated) == (2 * MIB, 512)
    allocator.allocate(1, MIB)
    assert allocator.reserved == 2 * MIB


def test_medium_requests_share_twenty_mebibytes_and_large_ones_have_their_own() -> None:
    allocator = Allocator()
    allocator.allocate(0, 2 * MIB)
    allocator.allocate(1, 9 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(2, 10 * MIB + 1)
    assert allocator.reserved == 32 * MIB


def test_free_neighbours_become_one_block_that_serves_a_larger_request() -> None:
    allocator = Allocator()
    for number in range(2):
        allocator.allocate(number, 10 * MIB - 512)
        allocator.allocate(number + 10, 5 * MIB)
    held = allocator.reserved
    for number in (0, 10, 1, 11):
        allocator.free(number)
    allocator.allocate(2, 19 * MIB)
    assert allocator.reserved == held


def test_expandable_segments_hold_no_more_than_pages_over_what_was_alive() -> None:
    growing = [(number, (11 + number) * MIB, "") for number in range(10)]
    ends = [(number, 0, "") for number in range(10)]
    whole = [(99, 150 * MIB, "")]
    events = growing + ends + whole
    assert replay(events, expandable=True).peak_reserved == 160 * MIB
    assert replay(events).peak_reserved > 300 * MIB  # no segment is large enough


@given(traces())
def test_what_is_reserved_holds_what_is_alive_and_ends_empty(
    events: list[tuple[int, int, str]],
) -> None:
    for expandable in (False, True):
        allocator = replay(events, expandable=expandable)
        assert allocator.peak_reserved >= allocator.peak_allocated
        alive = {block for block, size, _ in events if size}
        for block in alive - {block for block, size, _ in events if not size}:
            allocator.free(block)
        assert allocator.allocated == 0


@given(traces())
def test_the_smallest_cap_serves_the_trace_and_one_below_what_is_alive_does_not(
    events: list[tuple[int, int, str]],
) -> None:
    cap = smallest_cap(events, step=MIB)
    free = replay(events)
    assert free.peak_allocated <= cap <= free.peak_reserved
    replay(events, cap)
    with pytest.raises(OverTheCap):
        replay(events, max(size for _, size, _ in events) - 512)
