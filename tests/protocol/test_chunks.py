"""Chunks that are put on the wire by hand, and chunks that are read ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol.ahead import read_ahead
from talkoot.protocol.chunks import fetch_chunk, push_chunk
from talkoot.protocol.limits import MAX_ARTIFACT
from talkoot.protocol.wire.transfer_pb2 import FetchChunk, PushChunk

SIZES = st.integers(0, MAX_ARTIFACT)


@given(data=st.binary(max_size=300), number=SIZES)
def test_a_chunk_that_was_put_together_by_hand_is_what_the_schema_says(
    data: bytes, number: int
) -> None:
    fetched = FetchChunk.FromString(fetch_chunk(data, number))
    assert (fetched.data, fetched.total_size) == (data, number)
    pushed = PushChunk.FromString(push_chunk(number, data))
    assert pushed == PushChunk(offset=number, data=data)


@given(items=st.lists(st.integers()), depth=st.integers(1, 4))
def test_what_is_read_ahead_comes_whole_and_in_order(items: list[int], depth: int) -> None:
    assert list(read_ahead(iter(items), depth)) == items


def test_an_error_comes_after_what_came_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ConnectionError("cut")

    seen: list[int] = []
    with pytest.raises(ConnectionError, match="cut"):
        seen.extend(read_ahead(broken()))
    got = read_ahead(broken())
    assert [next(got), next(got)] == [1, 2]


def test_who_stops_early_stops_the_reader_no_more_than_a_few_items_ahead() -> None:
    taken = threading.Semaphore(0)
    given_out: list[int] = []

    def endless() -> Iterator[int]:
        number = 0
        while True:
            given_out.append(number)
            yield number
            taken.release()
            number += 1

    items = read_ahead(endless(), depth=2)
    assert next(items) == 0
    for _ in range(2):
        assert taken.acquire(timeout=10)
    items.close()
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(10)
            assert not thread.is_alive()
    assert len(given_out) <= 5
